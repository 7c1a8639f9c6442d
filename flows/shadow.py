"""A shadow run: the nightly flow once more with a candidate bundle, after the night, and what it would have changed."""

from __future__ import annotations

import os
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Failed
from prefect.task_runners import ThreadPoolTaskRunner

from leukoflow.core.errors import LeukoflowError
from leukoflow.flows.run import nightly
from leukoflow.tasks.upkeep.shadow import as_markdown, compare, shadow_config

NICENESS = 10
"""Of this process and the workers that it starts, so that a night that begins meanwhile comes first."""


def _run_name() -> str:
    return f"shadow of {flow_run.parameters['run_id'] or 'the newest run'}"


@flow(name="leukoflow shadow", flow_run_name=_run_name, task_runner=ThreadPoolTaskRunner(max_workers=256))  # type: ignore[arg-type]
def shadow(
    out: str, run_id: str | None, bundle: str, workers: int | None = None, cluster: str | None = None
) -> State[Any]:
    """Screen what a finished run (by default the newest) has seen with a candidate bundle, at low priority.

    The run is `<run_id>-shadow-<digest>`; run again, it does only what is missing. `shadow.json` says what differs.
    """
    log = get_run_logger()
    try:
        config = shadow_config(out, run_id, bundle, workers, cluster)
        if config.cluster.address == "local":
            _be_nice()
        state: State[Any] = nightly.fn(config)
        if not state.is_completed():
            return state
        found = compare(out, str(config.run_id))
        create_markdown_artifact(
            as_markdown(found), key="shadow-summary", description=f"What run {config.run_id} would have changed"
        )
        log.info("run %s: %s of %s images moved", config.run_id, found.moved, found.images)
    except LeukoflowError as error:
        log.error("%s", error)
        return Failed(message=str(error), data=error)
    return state


def _be_nice() -> None:
    """Let other processes of this machine go first; not to be taken back, so the flow has a process of its own."""
    niceness = os.nice(0)
    if niceness < NICENESS:
        os.nice(NICENESS - niceness)
