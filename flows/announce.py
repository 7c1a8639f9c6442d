"""What others learn of a run: report, metrics, events, artifacts in Prefect, and the one line that sums it up."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from leukoflow.core.errors import ConfigError, words_of
from leukoflow.flows.events import drift_rows, emit, run_events
from leukoflow.runs.layout import RunKey
from leukoflow.runs.records import CLASSES, RunManifest
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.intake.commands import command_about
from leukoflow.tasks.monitor.drift import facts_bytes, find_reference, run_facts
from leukoflow.tasks.monitor.metrics import RunsCollector, metrics_endpoint
from leukoflow.tasks.monitor.nights import GroupDrift, compare_groups
from leukoflow.tasks.report.numbers import share
from leukoflow.tasks.report.run_report import build_report
from leukoflow.tasks.review.keys import run_key_of


@contextmanager
def serve_metrics(run: Run) -> Iterator[None]:
    """Serve the run's figures to Prometheus for the block where a port is set; a taken port must not cost the night."""
    config = run.config
    if config.metrics_port is None:
        yield
        return
    with ExitStack() as stack:
        try:
            collector = RunsCollector(config.out, only=run.run_id, deadline=config.deadline)
            port = stack.enter_context(metrics_endpoint(collector, config.metrics_port, config.metrics_address))
            get_run_logger().info("metrics: http://%s:%s/metrics", config.metrics_address, port)
        except ConfigError as error:
            get_run_logger().warning("%s; the run goes on without it", error)
        yield


def write_report(run: Run, manifest: RunManifest) -> None:
    """Write report.html. A report that fails must not turn a finished run into a failed one."""
    try:
        open_storage(run.root).write(RunKey.REPORT, build_report(run.root, manifest).encode())
    except Exception as error:
        get_run_logger().warning(
            "the report could not be built (%s: %s); build it again with: %s",
            type(error).__name__, words_of(error), command_about(run, "report"),
        )  # fmt: skip


def announce(run: Run, manifest: RunManifest, answers: bool) -> None:
    """Write drift.json, then artifacts and events for Prefect, unless its server does not answer.

    None of it may turn a finished run into a failed one.
    """
    drifts: tuple[GroupDrift, ...] = ()
    try:
        facts = run_facts(run.root, run.run_id, manifest, manifest.bundle_digest)
        open_storage(run.root).write(RunKey.DRIFT, facts_bytes(facts))
        reference = find_reference(run.config.out, str(run.bundle.path), run.config.drift_reference)
        if reference is not None:
            drifts = compare_groups([facts], [reference[0]], "reference")
    except Exception as error:
        get_run_logger().warning("drift could not be computed (%s: %s)", type(error).__name__, words_of(error))
    if not answers:
        get_run_logger().warning(
            "Prefect is not available, so it has neither the drift table nor the link to the report"
        )
        return
    try:
        if drifts:
            create_table_artifact(drift_rows(drifts), key="nightly-drift", description="Drift against the reference")
        create_markdown_artifact(where_the_report_is(run), key="nightly-report", description=f"Report of {run.run_id}")
    except Exception as error:
        get_run_logger().warning("artifacts could not be written (%s: %s)", type(error).__name__, words_of(error))
    for event, payload in run_events(manifest, drifts, run.config.alerts):
        emit(event, run.run_id, payload)


def where_the_report_is(run: Run) -> str:
    """Say in Markdown how people come to the report: a browser follows no link from the dashboard to a file."""
    file = f"File: `{open_storage(run.root).uri(RunKey.REPORT)}`"
    if run.config.web_url is None:
        command = shlex.join(["leukoflow", "serve", open_storage(run.config.out).root])
        return f"{file}\n\nIn the browser: `{command}`, then open run {run.run_id} there."
    page = f"{run.config.web_url.rstrip('/')}/runs/{run_key_of(run.run_id)}"
    return f"[{run.run_id} in the web application]({page})\n\n{file}"


# --- in words ---------------------------------------------------------------------------------------------------------


def headline(manifest: RunManifest) -> str:
    """Say in one line how many images came in and what became of them."""
    m = manifest
    extra = f", {m.missing} missing" if m.missing else ""
    cut = "; the source is truncated" if m.source_truncated else ""
    return (
        f"{m.members} of {m.members} images accounted for: {m.predicted} predicted, {m.abstained} abstained, "
        f"{m.rejected} rejected, {m.quarantined} quarantined{extra}{cut}"
    )


def summary(run: Run, manifest: RunManifest) -> str:
    """Return the summary artifact, Markdown."""
    m = manifest
    rate = m.processed / m.processing_seconds if m.processing_seconds else 0.0
    lines = [
        f"## Run {m.run_id}",
        "",
        headline(m) + ".",
        "",
        f"Source `{m.source.uri}`, bundle `{m.bundle}` ({m.bundle_digest[:12]}), {m.device}. "
        f"{rate:.1f} images/s after a start-up of {m.startup_seconds:.0f} s.",
        "",
        "| handed over | predicted | abstained | rejected | quarantined | missing | ignored |",
        "|---:|---:|---:|---:|---:|---:|---:|",
        f"| {m.members} | {m.predicted} | {m.abstained} | {m.rejected} | {m.quarantined} | {m.missing} | {m.ignored} |",
        "",
        "| label of the predicted | images | share |",
        "|---|---:|---:|",
    ]
    lines += [f"| {name} | {n} | {share(n, sum(m.labels))} |" for name, n in zip(CLASSES, m.labels, strict=True)]
    lines += ["", "| stage | images/s per worker | seconds, all shards |", "|---|---:|---:|"]
    lines += [
        f"| {t.stage} | {t.images / t.seconds if t.seconds else 0:.1f} | {t.seconds:.0f} |" for t in m.timings
    ]  # fmt: skip
    lines += [
        "",
        "Slowest shards: " + ", ".join(f"{shard} ({seconds:.0f} s)" for shard, seconds in m.slowest[:5]) + ".",
        "",
    ]
    if m.reasons:
        lines += ["| why there is no prediction | images |", "|---|---:|"]
        lines += [f"| {reason} | {count} |" for reason, count in m.reasons]
        # Names of images stay out of the dashboard: they may name patients.
        lines += ["", "Which ones:", "```sql", "SELECT image_key, status, reason"]
        lines += [f"FROM '{run.root}/predictions/*.parquet' WHERE status <> 'predicted'", "```", ""]
    if m.conflicts:
        lines += [f"**{m.conflicts} images were found under more than one patient: see `duplicates.parquet`.**", ""]
    lines += [f"**Note:** {note}.\n" for note in m.notes]
    lines += [
        f"Report: `{run.root}/report.html` · predictions: `{run.root}/predictions/` · slides: "
        f"`{run.root}/slides.parquet`",
        "",
        "Research use only.",
    ]
    return "\n".join(lines)
