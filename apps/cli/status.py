"""Commands that look at runs, whatever their state: how far they are, and their reports."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from leukoflow.apps.cli.common import Debug, Out, existing, reached, reported, root_of
from leukoflow.core.errors import ConfigError, LeukoflowError
from leukoflow.runs.layout import RunKey


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    for command in (status, report):
        app.command()(command)


def status(
    out: Out,
    run_id: Annotated[
        str | None, typer.Argument(metavar="[RUN_ID]", help="One run; without it, all runs in OUT.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Say how far runs are: running, killed, stopped, failed and finished ones.

    Without RUN_ID a line for every run in OUT; with it, its progress stage by stage, its last sign of life, what
    failed, and the command that resumes it. Reads only what the run has committed, so it works from any machine
    that sees OUT.

    **Examples**: `leukoflow status out`; `leukoflow status out smears-1f0c63b2`
    """
    with reported(debug):
        from leukoflow.apps.cli.view.console import open_console
        from leukoflow.apps.cli.view.outcome import show_runs, show_status
        from leukoflow.runs.progress import list_runs, read_progress

        console = open_console()
        existing(out)
        if run_id is None:
            runs = list_runs(reached(out))
            if not runs:
                raise ConfigError(f"{out} holds no run; `leukoflow run SOURCE --out {shlex.quote(out)}` makes one")
            found, damaged = [], []
            for name in runs:
                try:
                    found.append(read_progress(root_of(out, name)))
                except LeukoflowError as error:  # one damaged run must not hide the others
                    damaged.append((name, str(error)))
            show_runs(console, out, found, damaged)
        else:
            show_status(console, root_of(out, run_id), read_progress(root_of(out, run_id)))


def report(
    out: Out,
    run_id: Annotated[
        str | None, typer.Argument(metavar="[RUN_ID]", help="One run; without it, the last nights of all runs.")
    ] = None,
    nights: Annotated[int, typer.Option("--nights", min=1, help="How many nights to show, without RUN_ID.")] = 30,
    to: Annotated[
        str | None, typer.Option("--to", metavar="FILE", help="Where to write the page of the nights.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write the report of a run again, or without RUN_ID that of the last nights.

    With RUN_ID: OUT/RUN_ID/report.html, also while the run is running or after it was killed. One file without anything
    external: totals, distributions, timings, the ranking of the slides, and the most suspicious and the least certain
    fields with their cells outlined. The outlines need the source; where it is gone, the masks are shown alone.

    Without: OUT/nights.html, and the same as nights.json. Reconciliation of each night, rates, throughput, and drift
    against the reference (`leukoflow drift reference`) and the week before, by site and scanner.

    **Examples**: `leukoflow report out smears-1f0c63b2`; `leukoflow report s3://results --nights 30 --to nights.html`
    """
    with reported(debug):
        if run_id is None:
            from leukoflow.apps.cli.monitor import report_nights

            return report_nights(out, nights, to)
        if to is not None:
            raise ConfigError("--to is for the page of the nights; the report of one run lies beside its data")
        from leukoflow.apps.cli.view.console import open_console
        from leukoflow.runs.progress import ProgressReader
        from leukoflow.tasks.report.run_report import build_report

        root = root_of(out, run_id)
        reader = ProgressReader(root)
        progress = reader.read()
        reader.storage.write(RunKey.REPORT, build_report(root, reader.manifest()).encode())
        open_console().print(f"{reader.storage.uri(RunKey.REPORT)}  ({progress.state})", soft_wrap=True)
