"""A run's own log file, beside its data: what happened, for whoever comes in the morning."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from leukoflow.errors import StorageError
from leukoflow.storage import Storage

LOGGERS = ("leukoflow", "prefect.flow_runs", "prefect.task_runs")


@contextmanager
def run_log(root: str) -> Iterator[None]:
    """Appends what the flow and its tasks log to `logs/`, one file for each time the run was taken up."""
    storage = Storage(root)
    name = f"logs/run-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.log"
    with tempfile.TemporaryDirectory(prefix="leukoflow-log-") as scratch:
        path = Path(storage.uri(name)) if storage.is_local else Path(scratch) / "run.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8", delay=False)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
        for logger in LOGGERS:
            logging.getLogger(logger).addHandler(handler)
        try:
            yield
        finally:
            for logger in LOGGERS:
                logging.getLogger(logger).removeHandler(handler)
            handler.close()
            if not storage.is_local:
                try:
                    storage.write(name, path.read_bytes())
                except StorageError as error:  # what the run itself has come to counts
                    logging.getLogger("leukoflow").warning("the log of this run is lost: %s", error)
