"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# A Prefect without a server would start one of its own, unasked, and write to a closed stream when the tests end.
os.environ["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] = "false"

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Beside other test processes, each computes with one thread: pools that wait for each other are far slower."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; tests that need it skip where it is missing."""
    folder = Path(os.environ.get("LEUKOFLOW_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "all_fields.zip").is_file():
        pytest.skip(f"the real data is not here ({folder}); set LEUKOFLOW_DATA to its folder")
    return folder
