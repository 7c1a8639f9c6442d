"""Commands about a local Prefect server that stays."""

from __future__ import annotations

import typer

from leukoflow.apps.cli.common import Commands, Debug, reported

prefect_app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="A local Prefect server that keeps running, for its dashboard.\n\n"
    "`leukoflow run` starts a server for itself when none is configured, and stops it at the end. One that was started "
    "here is used instead and keeps running, so that its dashboard shows all runs.",
)


@prefect_app.command("start")
def prefect_start(debug: Debug = False) -> None:
    """Start a Prefect server on this machine that stays until it is stopped.

    It listens on the loopback address only, keeps its database below the user's state directory
    (`LEUKOFLOW_PREFECT_HOME` names another place), and sends nothing anywhere.
    """
    with reported(debug):
        from leukoflow.apps import prefect_server
        from leukoflow.apps.cli.view.console import open_console

        console = open_console()
        with console.status("starting a Prefect server", spinner="dots"):
            server = prefect_server.start_server(keep=True)
        console.print(f"dashboard  {server.ui_url}\nlog        {server.log}", soft_wrap=True)
        console.print(f"runs use it automatically; other programs with PREFECT_API_URL={server.url}", soft_wrap=True)


@prefect_app.command("status")
def prefect_status(debug: Debug = False) -> None:
    """Say which Prefect server a run would use. Exits with 1 when one is configured and does not answer."""
    with reported(debug):
        from leukoflow.apps import prefect_connection, prefect_server
        from leukoflow.apps.cli.view.console import open_console

        console = open_console()
        if url := prefect_connection.configured_api_url():
            answers = prefect_connection.is_healthy(url)
            console.print(f"configured: {url} ({'answers' if answers else 'does not answer'})", soft_wrap=True)
            raise typer.Exit(0 if answers else 1)
        server = prefect_server.running_server()
        if server is None:
            console.print(
                "none is running; `leukoflow run` starts one for itself, `leukoflow prefect start` one that stays"
            )
        else:
            console.print(f"running at {server.ui_url} (process {server.pid}, log {server.log})", soft_wrap=True)


@prefect_app.command("stop")
def prefect_stop(debug: Debug = False) -> None:
    """Stop the server that `leukoflow prefect start` or `run --keep-prefect` left running."""
    with reported(debug):
        from leukoflow.apps import prefect_server
        from leukoflow.apps.cli.view.console import open_console

        open_console().print("stopped" if prefect_server.stop() else "none was running")
