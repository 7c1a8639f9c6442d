"""A site's night: finish what was cut off, take what has arrived, screen it, and say what is missing.

The claim is what makes a night safe to kill: what was taken is written down, with run ids, before anything is done with
it (`leukoflow/runs/ledger.py`). The next night finds claims without an outcome and does them first. What became of
nights, looked back at over all runs of an output folder, is `tasks/monitor/nights.py`.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from datetime import date as Date
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed

from leukoflow.core.config import RunConfig
from leukoflow.core.counts import count_of
from leukoflow.core.errors import (
    ConfigError,
    DeadlineError,
    LeukoflowError,
    RunCancelledError,
    SourceError,
    StorageError,
    words_of,
)
from leukoflow.core.site import Site, load_site
from leukoflow.flows.announce import headline
from leukoflow.flows.life import asked_to_stop
from leukoflow.flows.run import STATE_NAMES, screen
from leukoflow.runs.ledger import ClaimHead, ClaimOutcome, Ledger, RunOutcome, read_selection
from leukoflow.runs.progress import HEARTBEAT_SECONDS, ProgressReader, now, read_manifest
from leukoflow.runs.records import RunManifest
from leukoflow.sources.survey import survey
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.binding import bound_config
from leukoflow.tasks.intake.inbox import InboxView, look, take, write_missing

SEVERITY = (1, 130, 2, 4, 3, 0)
"""Exit codes of runs, the worst first: that of a night is the worst of its runs'."""


@dataclass(frozen=True, slots=True)
class NightReport:
    """What a night has done. `exit_code` as `leukoflow run` has it."""

    night: str
    runs: tuple[RunOutcome, ...]
    view: InboxView
    exit_code: int


def _night_name() -> str:
    """Name the night as the dashboard lists it, with the date on which the run was due."""
    given = flow_run.parameters.get("date")
    return f"night of {given or (flow_run.scheduled_start_time or datetime.now(UTC)).astimezone().date()}"


@flow(name="leukoflow night", flow_run_name=_night_name)
def night(site: str | None = None, date: str | None = None) -> State[Any]:
    """Screen what is complete in a site's inbox, once, and finish earlier nights first.

    Args:
        site: path of the site file; default: what LEUKOFLOW_SITE names.
        date: of the night, as 2026-03-01; default: the date in the site's time zone on which this run was due.
    """
    log = get_run_logger()
    try:
        place = load_site(site)
        report = work_through(place, _date_of(place, date))
    except RunCancelledError as cancelled:
        log.warning("%s", cancelled)
        return Cancelled(message=str(cancelled), data=cancelled)
    except LeukoflowError as error:
        log.error("%s", error)
        return Failed(message=str(error), data=error)
    words = "; ".join(in_words(report))
    log.info("%s", words)
    try:
        create_markdown_artifact(
            summary(place, report), key="night-summary", description=f"The night of {report.night} at {place.name}"
        )
    except Exception as error:  # a server that is away must not turn a finished night into a failed one
        log.warning(
            "the night's summary could not be written to Prefect (%s: %s)", type(error).__name__, words_of(error)
        )
    if report.exit_code in STATE_NAMES:
        return Completed(name=STATE_NAMES[report.exit_code], message=words, data=report)
    late = report.exit_code == 130
    return Failed(name="DeadlineMissed" if late else None, message=words, data=report)


def _date_of(site: Site, date: str | None) -> Date:
    if date is None:
        return site.night_of(flow_run.scheduled_start_time or datetime.now(UTC))
    try:
        return Date.fromisoformat(date)
    except ValueError:
        raise ConfigError(f"--date {date!r} is not a date: write it as 2026-03-01") from None


def work_through(site: Site, evening: Date) -> NightReport:
    """Do every claim that has no outcome, then take what is complete and do that.

    A run that fails does not keep the others from being done. Raises RunCancelledError when it is asked to stop,
    SourceError and StorageError where inbox or ledger cannot be read.
    """
    log = get_run_logger()
    asked_to_stop.clear()
    deadline = site.next_deadline(datetime.now(UTC))
    ledger = Ledger(site.out, site.name)
    attempted: dict[int, list[RunOutcome]] = {}

    def finish_open_claims() -> None:
        for head in ledger.read().heads:
            if head.number not in attempted and ledger.outcome(head.number) is None:
                attempted[head.number] = _do_claim(site, ledger, head, deadline)

    finish_open_claims()
    if asked_to_stop.is_set():
        raise RunCancelledError("the night was stopped before it took what has arrived; the next one takes it")
    taken = take(site, ledger, evening, time.time())
    if taken is not None:
        log.info("night %s: took %s", taken.name, ", ".join(taken.runs))
    finish_open_claims()  # also of a night that claimed beside this one
    view = look(site, ledger, time.time())
    write_missing(ledger, view.missing)
    runs = tuple(outcome for outcomes in attempted.values() for outcome in outcomes)
    codes = [outcome.exit_code for outcome in runs]
    if view.expected is not None and view.expected.absent_images + view.expected.missing_images:
        codes.append(4)
    return NightReport(evening.isoformat(), runs, view, min(codes, key=SEVERITY.index, default=0))


# --- claims ----------------------------------------------------------------------------------------------------------


def _do_claim(site: Site, ledger: Ledger, head: ClaimHead, deadline: datetime | None) -> list[RunOutcome]:
    """Do the runs of a claim; note the outcome when all are settled."""
    log = get_run_logger()
    outcomes = []
    for run_id in head.runs:
        try:
            if deadline is not None and site.at_deadline == "stop" and datetime.now(UTC) >= deadline:
                raise DeadlineError("not started, because the deadline has passed; the next night does it first")
            if asked_to_stop.is_set():  # while the run before was all but finished
                raise RunCancelledError(f"the night was stopped before run {run_id}; the next one goes on with it")
            outcome = _do_run(site, ledger, head, run_id, deadline)
        except DeadlineError as late:
            outcome = RunOutcome(run_id, late.exit_code, str(late), settled=False)
        except RunCancelledError:
            raise
        except LeukoflowError as error:
            outcome = RunOutcome(run_id, error.exit_code, str(error), settled=False)
        if outcome.exit_code not in STATE_NAMES:
            log.error("run %s: %s", run_id, outcome.message)
        outcomes.append(outcome)
    if all(outcome.settled for outcome in outcomes):
        ledger.settle(ClaimOutcome(head.number, head.night, now(), tuple(outcomes)))
    return outcomes


def _do_run(site: Site, ledger: Ledger, head: ClaimHead, run_id: str, deadline: datetime | None) -> RunOutcome:
    storage = open_storage(site.out).child(run_id)
    config = run_config(site, ledger, head, run_id, deadline)
    _wait_for_others(storage.root)
    state = screen(config, f"site:{site.name}")
    if state.is_cancelled() or state.is_cancelling():
        raise RunCancelledError(
            f"the night was stopped in run {run_id}; the next one, or {_again(site)}, goes on with it"
        )
    if state.is_completed():
        manifest = read_manifest(storage)
        if manifest is not None:
            return _outcome(manifest)
    error = state.result(raise_on_failure=False)
    code = error.exit_code if isinstance(error, LeukoflowError) else 1
    return RunOutcome(run_id, code, str(state.message or error), settled=_is_final(site, error))


def _outcome(manifest: RunManifest) -> RunOutcome:
    return RunOutcome(manifest.run_id, manifest.exit_code, headline(manifest), manifest.members)


def _is_final(site: Site, error: object) -> bool:
    """Return whether no later night can do better: what was taken is unusable, or gone from an inbox that is there.

    What comes in its place has another identity, and is taken then.
    """
    if not isinstance(error, SourceError) or isinstance(error.__cause__, StorageError):
        return False
    return any(True for _ in survey(site.inbox))


def run_config(site: Site, ledger: Ledger, head: ClaimHead, run_id: str, deadline: datetime | None) -> RunConfig:
    """Return the settings of a run of a claim: the site's, or those that the run was started with, where it was."""
    uri = ledger.uri(head.number)
    archive = read_selection(uri, run_id).archive
    config = site.run.model_copy(
        update={
            "source": f"{head.inbox}/{archive}" if archive else head.inbox,
            "out": site.out,
            "run_id": run_id,
            "selection": uri,
            "manifest": site.manifest,
            "manifest_sha256": None,
            "reuse": None,
            "deadline": deadline,
            "at_deadline": site.at_deadline,
            "urgent": site.urgent,
        }
    )
    try:
        binding = ProgressReader(open_storage(site.out).child(run_id).root).binding()
    except StorageError:
        return config
    return config.bound_as(bound_config(binding))


def _wait_for_others(root: str) -> None:
    """Return when nobody works on the run; raise RunBusyError when somebody does.

    The last sign of life of a process on another machine may be too fresh to tell: then the next one is waited for.
    """
    reader = ProgressReader(root)
    beat = reader.heartbeat()
    if beat is None or (beat.host == socket.gethostname() and beat.pid == os.getpid()):
        return
    end = time.monotonic() + 6 * HEARTBEAT_SECONDS
    while reader.state(found := reader.heartbeat()) == "running":
        if found != beat:
            raise StorageError(
                f"{root} is being worked on by process {beat.pid} on {beat.host}: wait for it, or stop it there"
            )
        if time.monotonic() > end:
            return
        time.sleep(1.0)


# --- what people read ------------------------------------------------------------------------------------------------


def _again(site: Site) -> str:
    return f"`leukoflow night` with the file of site {site.name}"


def in_words(report: NightReport) -> list[str]:
    """Say what a night has done, with the remedies, line by line. Names no image and no slide."""
    lines = []
    if not report.runs:
        lines.append("nothing in the inbox was complete")
    for run in report.runs:
        lines.append(f"{run.run_id}: {run.message}")
    if complete := len(report.view.of("complete")):
        lines.append(f"{count_of(complete, 'item')} arrived in the meantime and will be taken the next night")
    if arriving := len(report.view.of("arriving")):
        lines.append(f"{count_of(arriving, 'item')} still arriving, for the next night")
    if changed := sum(item.changed for item in report.view.items):
        were = "file was" if changed == 1 else "files were"
        lines.append(f"{changed:,} {were} replaced after having been taken; the next night takes what is there now")
    if report.view.leftovers:
        lines.append(f"{report.view.leftovers} unfinished files are in the inbox and are not taken")
    expected = report.view.expected
    if expected is not None and (expected.absent_images or expected.missing_images):
        lines.append(
            f"the manifest expects {expected.absent_images} images of {len(expected.absent)} items without a "
            f"trace, and {expected.missing_images} that were not in theirs"
        )
    return lines


def summary(site: Site, report: NightReport) -> str:
    """Return the summary artifact, Markdown, without names of images and slides, which may name patients."""
    lines = [f"## Night of {report.night}, {site.name}", ""]
    if report.runs:
        lines += ["| run | exit code | images |", "|---|---:|---:|"]
        lines += [f"| {r.run_id} | {r.exit_code} | {r.members} |" for r in report.runs]
        # beside a table, since the dashboard cuts off what is wide
        lines += ["", *(f"- **{r.run_id}**: {_line(r.message)}" for r in report.runs)]
    else:
        lines += ["Nothing in the inbox was complete."]
    taken, complete, arriving = (len(report.view.of(state)) for state in ("taken", "complete", "arriving"))
    lines += ["", f"Inbox: {taken} taken, {complete} complete, {arriving} still arriving."]
    if report.view.expected is not None:
        e = report.view.expected
        lines += [
            "",
            f"Expected by the manifest and not there: {e.absent_images} images of {len(e.absent)} items without a "
            f"trace, {e.missing_images} of items that were taken; {e.arriving_images} are arriving. Which ones: "
            f"`{site.out}/inbox/{site.name}/missing.parquet`, or `leukoflow inbox SITE`.",
        ]
    return "\n".join([*lines, "", "Research use only."])


def _line(text: str) -> str:
    return text.replace("\n", " ")
