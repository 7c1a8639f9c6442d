"""Commands over the nights: the drift reference, and figures for Prometheus."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leukoflow.apps.cli.common import Commands, Debug, Out, reported
from leukoflow.core.errors import ConfigError
from leukoflow.runs.layout import OutKey

if TYPE_CHECKING:
    from rich.console import Console

    from leukoflow.storage.base import Storage
    from leukoflow.tasks.monitor.drift import DriftFacts

drift_app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="What nights are compared with.\n\n"
    "A reference is the summary of one or more finished runs that somebody has looked at and found good. A bundle's "
    "own (`drift.json` beside its `bundle.json`) is preferred to that of OUT.",
)


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.add_typer(drift_app, name="drift")
    app.command()(metrics)


@drift_app.command("reference")
def drift_reference(
    out: Out,
    run_ids: Annotated[list[str], typer.Argument(metavar="RUN_ID...", help="Finished runs of one bundle.")],
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="FILE", help="Another place, such as BUNDLE/drift.json; a path or s3:// address."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Make the reference that nights are compared with, from runs that were found good.

    Choose runs of ordinary nights: some hundred fields of a few dozen slides, of every site and scanner. Without --to
    the reference becomes that of OUT. It holds counts, and neither images nor names of slides or patients.

    **Examples**: `leukoflow drift reference out night-2026-03-01 night-2026-03-02`;
    `leukoflow drift reference out night-2026-03-01 --to bundles/mine/drift.json`
    """
    with reported(debug):
        from leukoflow.apps.cli.view.console import open_console
        from leukoflow.storage.opening import open_storage
        from leukoflow.tasks.monitor.drift import facts_bytes, merge_reference

        console = open_console()
        with console.status("reading the runs", spinner="dots"):
            facts = merge_reference(out, run_ids)
        place, key = _split(to) if to is not None else (open_storage(out), OutKey.BASELINE)
        place.write(key, facts_bytes(facts))
        _show_reference(console, place.uri(key), facts)


@drift_app.command("show")
def drift_show(
    out: Out,
    bundle: Annotated[
        str, typer.Option("--bundle", help="Name or folder of the bundle whose reference wins.")
    ] = "pocket",
    debug: Debug = False,
) -> None:
    """Say which reference the nights of OUT are compared with, and what it was made of.

    **Example**: `leukoflow drift show out`
    """
    with reported(debug):
        from leukoflow.apps.cli.view.console import open_console
        from leukoflow.tasks.monitor.drift import find_reference
        from leukoflow.tasks.monitor.nights import bundle_dir

        found = find_reference(out, bundle_dir(bundle))
        if found is None:
            raise ConfigError(f"{out} has no drift reference; `leukoflow drift reference {out} RUN_ID` makes one")
        _show_reference(open_console(), found[1], found[0])


def _split(file: str) -> tuple[Storage, str]:
    """Return storage and key of a file that is named by path or address."""
    from leukoflow.storage.opening import open_storage

    folder, _, name = (file if "://" in file else str(Path(file).expanduser().absolute())).rpartition("/")
    return open_storage(folder or "/"), name


def _show_reference(console: Console, place: str, facts: DriftFacts) -> None:
    from leukoflow.tasks.monitor.drift import QUANTITIES

    counts = facts.counts()
    fields = int(counts[:, : QUANTITIES[0].places].sum())
    console.print(f"drift reference  {place}", soft_wrap=True, highlight=False)
    console.print(
        f"{fields:,} fields of {len(counts):,} slides, bundle {facts.bundle_digest[:12]}, "
        f"made {facts.made_at} of {', '.join(facts.runs)}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    for group in facts.groups:
        own = int(group.counts[:, : QUANTITIES[0].places].sum())
        name = f"{group.site or 'no site'}, {group.scanner or 'no scanner'}"
        console.print(f"  {name}: {own:,} fields", soft_wrap=True, highlight=False, markup=False)


def report_nights(out: str, nights: int, to: str | None) -> None:
    """Write `nights.html` and `nights.json` of the last nights, in OUT or at `to`."""
    from leukoflow.apps.cli.view.console import open_console
    from leukoflow.storage.opening import open_storage
    from leukoflow.tasks.monitor.nights import gather, nights_json
    from leukoflow.tasks.report.nights_report import nights_page

    console = open_console()
    with console.status("reading the runs", spinner="dots") as status:
        found = gather(out, nights, report=lambda run_id: status.update(f"reading {run_id}"))
        html, facts = nights_page(found).encode(), nights_json(found)
    place, key = _split(to) if to is not None else (open_storage(out), OutKey.NIGHTS_PAGE)
    place.write(key, html)
    place.write(f"{key.removesuffix('.html')}.json", facts)
    last = found.nights[-1]
    state = "balanced" if last.balanced else "not finished"
    count = "1 night," if len(found.nights) == 1 else f"{len(found.nights)} nights, the last one"
    judged, there = last.comparisons
    drift: str = last.level if judged else "nothing could be compared"
    if judged < there and judged:
        drift += f", {judged} of {there} comparisons could be judged"
    console.print(
        f"{place.uri(key)}  ({count} {state}, drift: {drift})",
        soft_wrap=True,
    )
    for note in found.notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True, highlight=False, markup=False)


def metrics(
    out: Out,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Where Prometheus scrapes; 0: a free one.")
    ] = 9109,
    address: Annotated[str, typer.Option("--address", help="Interface to listen on.")] = "127.0.0.1",
    textfile: Annotated[
        Path | None,
        typer.Option("--textfile", metavar="FILE", help="Write the figures once, for node_exporter, and exit."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Serve the figures of all runs in OUT to Prometheus, from what they have committed.

    Survives between nights, needs neither Prefect nor Dask, and only reads. Figures carry no names of runs, sources,
    images or patients. Scrape it once a minute.

    **Examples**: `leukoflow metrics s3://results --port 9109`;
    `leukoflow metrics out --textfile /var/lib/node_exporter/leukoflow.prom`
    """
    with reported(debug):
        import threading

        from leukoflow.apps.cli.view.console import open_console
        from leukoflow.tasks.monitor.metrics import RunsCollector, exposition, metrics_endpoint

        if textfile is not None:
            place, key = _split(str(textfile))
            place.write(key, exposition(RunsCollector(out)))
            return
        with metrics_endpoint(RunsCollector(out), port, address) as bound:
            open_console().print(f"metrics  http://{address}:{bound}/metrics  (Ctrl-C stops it)", soft_wrap=True)
            with suppress(KeyboardInterrupt):
                threading.Event().wait()
