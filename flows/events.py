"""What a run tells Prefect besides its state: events that automations listen for. Counts and shares, never names."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from prefect.events import emit_event
from prefect.settings import PREFECT_API_URL

from leukoflow.core.config import AlertSettings
from leukoflow.runs.records import CLASSES, RunManifest
from leukoflow.tasks.monitor.drift import title_of, worst
from leukoflow.tasks.monitor.nights import GroupDrift

EventName = Literal[
    "leukoflow.run.finished",
    "leukoflow.run.quarantined-too-many",
    "leukoflow.run.abstained-too-many",
    "leukoflow.run.drift",
    "leukoflow.run.deadline-at-risk",
]


def emit(event: EventName, run_id: str, payload: Mapping[str, Any]) -> None:
    """Send an event about a run; an event that cannot be sent must not turn a finished night into a failed one.

    The resource is `leukoflow.run.<run_id>`; inside a flow Prefect adds the flow run and its deployment as related
    resources. The payload holds figures and nothing that comes from a source.
    """
    if not PREFECT_API_URL.value():
        return  # there is nobody to hear it, and Prefect would start a temporary server for it
    try:
        emit_event(
            event=event,
            resource={"prefect.resource.id": f"leukoflow.run.{run_id}", "prefect.resource.name": run_id},
            payload=dict(payload),
        )
    except Exception as error:
        logging.getLogger("leukoflow").warning("the event %s was not sent (%s)", event, type(error).__name__)


def run_events(
    manifest: RunManifest, drifts: Sequence[GroupDrift], alerts: AlertSettings
) -> Iterator[tuple[EventName, dict[str, Any]]]:
    """Yield the events of a finished run with their payloads: that it has finished, and what calls somebody."""
    m = manifest
    counts = {
        "members": m.members,
        "predicted": m.predicted,
        "abstained": m.abstained,
        "rejected": m.rejected,
        "quarantined": m.quarantined,
        "missing": m.missing,
    }
    shares = {f"{name}_share": round(counts[name] / max(1, m.members), 4) for name in ("abstained", "quarantined")}
    furthest = worst(d for g in drifts for d in g.drifts)
    drift = {
        "drift_level": furthest.level if furthest else "unknown",
        "drift_quantity": furthest.quantity if furthest else None,
        "drift_excess": round(furthest.excess, 4) if furthest and furthest.excess is not None else None,
    }
    labels = dict(zip((f"label_{c.lower()}" for c in CLASSES), m.labels, strict=True))
    yield "leukoflow.run.finished", {**counts, **shares, **labels, **drift, "exit_code": m.exit_code}
    for share, limit, event in (
        ("quarantined_share", alerts.quarantined_share, "leukoflow.run.quarantined-too-many"),
        ("abstained_share", alerts.abstained_share, "leukoflow.run.abstained-too-many"),
    ):
        if shares[share] > limit:
            yield event, {**counts, share: shares[share], "threshold": limit}  # type: ignore[misc]
    flagged = [
        (g, d) for g in drifts for d in g.drifts if d.level in ("watch", "act") and (d.excess or 0.0) >= alerts.drift
    ]
    if flagged:
        rows = drift_rows([GroupDrift(g.kind, g.name, g.against, (d,)) for g, d in flagged])
        yield "leukoflow.run.drift", {**drift, "threshold": alerts.drift, "drifted": rows}


def drift_rows(drifts: Sequence[GroupDrift]) -> list[dict[str, Any]]:
    """Return a row for each quantity of all fields, and of those of sites and scanners what calls for a look."""
    return [
        {
            "fields of": "all" if g.kind == "all" else f"{g.kind} {g.name}",
            "quantity": title_of(d.quantity),
            "level": d.level,
            "index": None if d.psi is None else round(d.psi, 3),
            "above chance": None if d.excess is None else round(d.excess, 3),
            "fields": d.fields,
            "slides": d.slides,
        }
        for g in drifts
        for d in g.drifts
        if g.kind == "all" or d.level in ("watch", "act")
    ]
