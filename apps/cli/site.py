"""Commands of a site: look into its inbox, do its night without a deployment, take up a run by its id."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leukoflow.apps.cli.common import Debug, prefect_api, reported
from leukoflow.core.errors import LeukoflowError

if TYPE_CHECKING:
    from rich.console import Console

    from leukoflow.core.site import Site
    from leukoflow.flows.site_night import NightReport
    from leukoflow.tasks.intake.inbox import InboxView

SitePath = Annotated[
    Path | None,
    typer.Argument(metavar="[SITE]", help="The site file. Default: what LEUKOFLOW_SITE names.", show_default=False),
]
_SHOWN = 20


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    for command in (inbox, night):
        app.command()(command)


def inbox(site: SitePath = None, debug: Debug = False) -> None:
    """Say what the inbox of a site holds: complete, still arriving, taken, and expected but absent.

    Looks only, and takes nothing. Nothing of it is decided by a name alone: an item is complete when its sentinel is
    there or nothing in it has changed for long enough, as the site file says.

    **Example**: `leukoflow inbox deployments/sites/workstation.toml`
    """
    with reported(debug):
        import time

        from leukoflow.apps.cli.view.console import open_console
        from leukoflow.core.site import load_site
        from leukoflow.runs.ledger import Ledger
        from leukoflow.tasks.intake.inbox import look

        place = load_site(site)
        ledger = Ledger(place.out, place.name)
        found = look(place, ledger, time.time())
        pending = [head.name for head in ledger.read().heads if ledger.outcome(head.number) is None]
        _show_inbox(open_console(), place, found, pending)


def night(
    site: SitePath = None,
    date: Annotated[
        str | None, typer.Option("--date", metavar="DATE", help="Date of the night, 2026-03-01. Default: today's.")
    ] = None,
    keep_prefect: Annotated[
        bool, typer.Option("--keep-prefect", help="Leave the Prefect server that this starts running.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Do a site's night: finish what was cut off, take what is complete in the inbox, screen it, say what is missing.

    The same flow that the deployment `nightly` runs on schedule. What was taken is written down before anything is
    done with it, so the command can be killed at any time and given again: nothing is taken twice or lost.

    **Example**: `leukoflow night deployments/sites/workstation.toml`

    **Exit codes**: as `leukoflow run`; of several runs the worst. 4 also when the manifest expects what is not there.
    """
    with reported(debug):
        from leukoflow.apps.cli.view.console import open_console
        from leukoflow.core.site import load_site

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # until a run takes over, stopping is just stopping
        place = load_site(site)
        with prefect_api(keep_prefect, debug):
            from leukoflow.flows.site_night import NightReport
            from leukoflow.flows.site_night import night as flow

            state = flow(str(site.absolute()) if site else None, date, return_state=True)
        outcome = state.result(raise_on_failure=False)
        if isinstance(outcome, NightReport):
            _show_night(open_console(), place, outcome)
            raise typer.Exit(outcome.exit_code)
        if isinstance(outcome, BaseException):
            raise outcome
        raise LeukoflowError(f"the night ended without a result: {state.message or state.name}")


# --- what they show --------------------------------------------------------------------------------------------------


def _show_inbox(target: Console, site: Site, found: InboxView, pending: list[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    from leukoflow.apps.cli.view.console import duration

    table = Table(box=None, padding=(0, 2), header_style="dim")
    for name in ("item", "state", "files", "quiet for", "why"):
        table.add_column(name, justify="right" if name in ("files", "quiet for") else "left", overflow="fold")
    for item in [*found.of("complete"), *found.of("arriving")]:
        notes = [item.reason]
        if item.supplement:
            notes.append("a supplement: some of it was taken before")
        if item.changed:
            notes.append(f"{item.changed} of its files were replaced after they were taken")
        table.add_row(
            Text(item.name),
            Text(item.state, style="green" if item.state == "complete" else "yellow"),
            f"{len(item.files):,}",
            duration(item.quiet_seconds),
            Text("; ".join(n for n in notes if n)),
        )
    target.print(f"inbox  {site.inbox}", soft_wrap=True, markup=False)
    if table.row_count:
        target.print(table)
    taken = len(found.of("taken"))
    target.print(f"{len(found.of('complete'))} complete, {len(found.of('arriving'))} arriving, {taken} taken")
    if found.leftovers:
        target.print(f"{found.leftovers} unfinished files that nobody writes to any more; they are never taken")
    if found.expected is not None:
        e = found.expected
        target.print(
            f"expected and not there: {e.absent_images} images of {len(e.absent)} items without a trace, "
            f"{e.missing_images} of items that were taken; {e.arriving_images} wait in the inbox",
            soft_wrap=True,
        )
        for name in e.absent[:_SHOWN]:
            target.print(f"  absent  {name}", soft_wrap=True, markup=False)
        if len(e.absent) > _SHOWN:
            target.print(f"  and {len(e.absent) - _SHOWN} more")
    for name in pending:
        target.print(f"taken and not finished: {name}; the next night goes on with it", soft_wrap=True, markup=False)


def _show_night(target: Console, site: Site, report: NightReport) -> None:
    from leukoflow.flows.site_night import in_words

    for line in in_words(report):
        target.print(line, soft_wrap=True, markup=False)
    for run in report.runs:
        target.print(f"report  {site.out}/{run.run_id}/report.html", soft_wrap=True, markup=False)
