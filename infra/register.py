"""Tells a Prefect server what there is to run: the work pool, the deployments and the automations of this checkout.

`python -m infra.register POOL`, with PREFECT_API_URL and PREFECT_API_AUTH_STRING set. What exists is updated. With
LEUKOFLOW_STACK_CRON ("* * * * *", say) the nightly deployment runs by that instead of its own schedule.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEPLOYMENTS = ("nightly", "rerun", "train", "evaluate", "retention")


def main(pool: str) -> None:
    """Create or update everything. Raises CalledProcessError when `prefect deploy` fails."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    from leukoflow.apps.automations import apply_automations

    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(pool)
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    deploy = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--prefect-file", "deployments/prefect.yaml"]
    subprocess.run([*deploy, *(word for name in DEPLOYMENTS for word in ("-n", name))], check=True, cwd=ROOT)
    if cron := os.environ.get("LEUKOFLOW_STACK_CRON"):  # `prefect deploy --cron` would add one to those of the file
        create = [sys.executable, "-m", "prefect", "deployment", "schedule", "create", "leukoflow night/nightly"]
        subprocess.run([*create, "--cron", cron, "--timezone", "UTC", "--replace", "-y"], check=True, cwd=ROOT)
    applied = apply_automations(ROOT / "deployments" / "automations.yaml")
    print(f"automations: {len(applied.created)} created, {len(applied.updated)} updated")


if __name__ == "__main__":
    main(sys.argv[1])
