"""One run again, by its id alone: only what is missing or failed is done."""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Failed

from leukoflow.core.config import RunConfig
from leukoflow.core.errors import LeukoflowError
from leukoflow.flows.run import screen
from leukoflow.runs.progress import ProgressReader
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.binding import bound_config


@flow(name="leukoflow rerun", flow_run_name="rerun of {run_id}")
def rerun(out: str, run_id: str) -> State[Any]:
    """Take a run up again with the settings that it was started with; a finished and whole one returns at once.

    Args:
        out: the folder or s3:// prefix that holds the run.
        run_id: which one.
    """
    try:
        config = rerun_config(out, run_id)
    except LeukoflowError as error:
        get_run_logger().error("%s", error)
        return Failed(message=str(error), data=error)
    return screen(config)


def rerun_config(out: str, run_id: str) -> RunConfig:
    """Return the settings that a run was started with, where it lies now, without the deadline of that night.

    Raises StorageError when there is no such run, ConfigError when it did not keep its settings.
    """
    storage = open_storage(out)
    config = bound_config(ProgressReader(storage.uri(run_id)).binding())
    return config.model_copy(update={"out": storage.root, "deadline": None})
