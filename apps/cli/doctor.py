"""The command that checks what a run needs."""

from __future__ import annotations

from typing import Annotated

import typer

from leukoflow.apps.cli.common import Debug, reported, use_configured_prefect


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.command()(doctor)


def doctor(
    out: Annotated[str | None, typer.Option("--out", "-o", help="Where runs are to be written.")] = None,
    bundle: Annotated[
        str, typer.Option("--bundle", help="Name, directory or s3:// prefix of the model bundle.")
    ] = "pocket",
    cluster: Annotated[
        str | None, typer.Option("--cluster", metavar="ADDRESS", help="The Dask scheduler to use.")
    ] = None,
    start_prefect: Annotated[
        bool, typer.Option("--start/--no-start", help="Start a Prefect server for a moment if none is configured.")
    ] = True,
    debug: Debug = False,
) -> None:
    """Check what a run needs, and say what to do about what is not right.

    Versions, Prefect server, Dask scheduler, storage, bundle, decoding process, disk, memory, cores and GPU. Exits
    with 1 when a check failed; warnings do not count.

    **Examples**: `leukoflow doctor`; `leukoflow doctor --out s3://results --cluster tcp://gpu1:8786`
    """
    with reported(debug):
        from leukoflow.apps.cli.view.checks import show_checks
        from leukoflow.apps.cli.view.console import open_console
        from leukoflow.apps.doctor import diagnose

        console = open_console()
        use_configured_prefect(debug)  # the patient key may come from a block of that server
        with console.status("checking", spinner="dots"):
            checks = diagnose(out, bundle, cluster, start_prefect)
        show_checks(console, checks)
        raise typer.Exit(1 if any(c.verdict == "fail" for c in checks) else 0)
