"""What a run tells Prefect besides its state: events that automations listen for. Counts and shares, never names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from prefect.events import emit_event

EventName = Literal[
    "leukoflow.run.finished",
    "leukoflow.run.quarantined-too-many",
    "leukoflow.run.abstained-too-many",
    "leukoflow.run.drift",
    "leukoflow.run.deadline-at-risk",
]


def emit(event: EventName, run_id: str, payload: Mapping[str, Any]) -> None:
    """Sends an event about a run; an event that cannot be sent must not turn a finished night into a failed one.

    The resource is `leukoflow.run.<run_id>`; inside a flow Prefect adds the flow run and its deployment as related
    resources. The payload holds figures and nothing that comes from a source.
    """
    try:
        emit_event(
            event=event,
            resource={"prefect.resource.id": f"leukoflow.run.{run_id}", "prefect.resource.name": run_id},
            payload=dict(payload),
        )
    except Exception as error:
        logging.getLogger("leukoflow").warning("the event %s was not sent (%s)", event, type(error).__name__)
