"""`leukoflow automations`: what Prefect does and whom it notifies when a night goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from leukoflow.apps.cli.common import Debug, reported, use_configured_prefect

automations_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Prefect's automations: what happens, and who is notified, when a run fails, is late, is stuck or drifts.",
)


@automations_app.command("apply")
def apply(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The YAML file.")] = Path("deployments/automations.yaml"),
    debug: Debug = False,
) -> None:
    """Make the Prefect server of `PREFECT_API_URL` have the automations of a file.

    What is there already is updated or left alone, so that it can be given after every change. Secrets come from the
    environment: `LEUKOFLOW_WEBHOOK_URL` and `LEUKOFLOW_EMAIL_URL` (`mailtos://USER:PASSWORD@HOST:587?from=A&to=B`) say
    where messages go; later calls without them keep what the server has.

    **Example**: `LEUKOFLOW_WEBHOOK_URL=https://chat.example.org/hook leukoflow automations apply`
    """
    from leukoflow.apps.cli.view.console import open_console
    from leukoflow.apps.prefect_connection import require_server

    with reported(debug):
        require_server(use_configured_prefect(debug))
        from leukoflow.apps.automations import apply_automations

        applied = apply_automations(file)
        console = open_console()
        for words, names in (
            ("created", applied.created),
            ("updated", applied.updated),
            ("unchanged", applied.unchanged),
            ("deleted", applied.deleted),
        ):
            for name in names:
                console.print(f"{words:<10} {name}", soft_wrap=True, highlight=False)
        for variable in applied.silent:
            console.print(
                f"[yellow]{variable} is not set[/]: nobody is notified that way", soft_wrap=True, highlight=False
            )
