"""Deletes the runs that a site's policy lets go."""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from leukoflow.core.errors import LeukoflowError
from leukoflow.core.site import load_site
from leukoflow.runs.progress import list_runs
from leukoflow.tasks.upkeep.retention import plan_retention, retain


@flow(name="leukoflow retention")
def retention(site: str | None = None, dry_run: bool = False) -> State[Any]:
    """Delete old runs of a site's output, as its table `retention` says; what was taken from the inbox stays known.

    Args:
        site: path of the site file; default: what LEUKOFLOW_SITE names.
        dry_run: say what would go, and delete nothing.
    """
    log = get_run_logger()
    try:
        place = load_site(site)
        if not list_runs(place.out):
            return Completed(message=f"{place.out} holds no run yet")
        policy = place.retention
        decide = plan_retention if dry_run else retain
        found = decide(place.out, policy.keep_days, policy.keep_last)
    except LeukoflowError as error:
        log.error("%s", error)
        return Failed(message=str(error), data=error)
    for decision in found:
        log.info("run %s %s: %s", decision.run_id, "goes" if decision.delete else "stays", decision.why)
    gone = sum(decision.delete for decision in found)
    words = f"{gone} of {len(found)} runs {'would go' if dry_run else 'were deleted'}, {len(found) - gone} stay"
    return Completed(message=words)
