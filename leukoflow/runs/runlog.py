"""A run's own log, beside its data: plain text for people in the morning, and JSON lines for programs."""

from __future__ import annotations

import json
import logging
import re
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from leukoflow.cluster.telemetry import WORKER_LOGGER
from leukoflow.core.errors import StorageError, words_of
from leukoflow.runs.layout import RunKey
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage

LOGGERS = ("leukoflow", "prefect.flow_runs", "prefect.task_runs")
_open: list[str] = []
_SHARD = re.compile(r"shard (\d{5,})")


class JsonLines(logging.Formatter):
    """One object a line: time (UTC), level, run, shard, stage, message, and worker or exception where there is one."""

    def __init__(self, run_id: str) -> None:
        super().__init__()
        self.run_id = run_id

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        message = record.getMessage()
        shard = getattr(record, "shard", None)
        if shard is None:  # Prefect's own words about a task run, such as that it will be tried again
            found = _SHARD.match(getattr(record, "task_run_name", None) or message)
            shard = found[1] if found else None
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "run": self.run_id,
            "shard": shard,
            "stage": getattr(record, "stage", None),
            "message": message,
        }
        if worker := getattr(record, "worker", None):
            line["worker"] = worker
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = _kind_and_words(record.exc_info[1])
        return json.dumps(line, ensure_ascii=False)


class PlainLines(logging.Formatter):
    """Lines for people; of an exception where it was raised, and not what a library says of the values."""

    def formatException(self, ei: Any) -> str:
        """Return the frames, and what may be passed on."""
        return "".join([*traceback.format_tb(ei[2]), _kind_and_words(ei[1])])


def _kind_and_words(error: BaseException | None) -> str:
    kind, words = type(error).__name__, words_of(error) if error is not None else ""
    return kind if words in ("", kind) else f"{kind}: {words}"


class _LogFile(logging.FileHandler):
    """A log on a full disk loses lines; that must not put a traceback for each of them on the terminal."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Do nothing: those who need the disk say that it is full."""

    def close(self) -> None:
        """Close the file; what could not be written is lost."""
        with suppress(OSError):
            super().close()


@contextmanager
def run_log(root: str, run_id: str) -> Iterator[None]:
    """Keep what the flow, its tasks and the workers log in `logs/`, two files for each time the run was taken up.

    `.log` has what the flow and its tasks say and the workers' warnings; `.jsonl` has that and every stage of the
    workers.
    """
    storage = open_storage(root)
    name = RunKey.log(f"run-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
    ours, workers = logging.getLogger("leukoflow"), logging.getLogger(WORKER_LOGGER)
    plain = PlainLines("%(asctime)s %(levelname)-7s %(message)s")
    with ExitStack() as stack:
        _open.append(storage.root)
        stack.callback(_open.remove, storage.root)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="leukoflow-log-")))
        for ending, formatter, level in ((".log", plain, logging.WARNING), (".jsonl", JsonLines(run_id), logging.INFO)):
            path = Path(storage.uri(name + ending)) if storage.is_local else scratch / f"run{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            handler = _LogFile(path, encoding="utf-8", delay=False)
            handler.setFormatter(formatter)
            if not storage.is_local:
                stack.callback(_upload, storage, name + ending, path)
            stack.callback(handler.close)
            for logger in LOGGERS:
                logging.getLogger(logger).addHandler(handler)
                stack.callback(logging.getLogger(logger).removeHandler, handler)
            relay = _Relay(handler, level)
            workers.addHandler(relay)
            stack.callback(workers.removeHandler, relay)
        before = ours.level, workers.level, workers.propagate
        ours.setLevel(logging.INFO)  # who comes and goes among the workers
        stack.callback(ours.setLevel, before[0])
        workers.setLevel(logging.INFO)
        workers.propagate = False  # they are many: they belong into the files, not on a terminal
        stack.callback(workers.setLevel, before[1])
        stack.callback(setattr, workers, "propagate", before[2])
        yield


def log_once(root: str, message: str) -> None:
    """Write one error into a log of its own, unless the run's log is open in this process and has it already.

    What goes wrong before a run's log is open would else be in no log. A log that cannot be written is passed over: the
    error itself counts.
    """
    storage = open_storage(root)
    if storage.root in _open:
        return
    with suppress(StorageError, OSError), run_log(root, storage.root.rpartition("/")[2]):
        logging.getLogger("leukoflow").error("%s", message)


class _Relay(logging.Handler):
    """Hands on records from a level upwards to a handler that takes others from lower levels."""

    def __init__(self, handler: logging.Handler, level: int) -> None:
        super().__init__(level)
        self.handler = handler

    def emit(self, record: logging.LogRecord) -> None:
        """Hand one record on."""
        self.handler.handle(record)


def _upload(storage: Storage, key: str, path: Path) -> None:
    try:
        storage.write(key, path.read_bytes())
    except StorageError as error:  # what the run itself has come to counts
        logging.getLogger("leukoflow").warning("the log of this run is lost: %s", error)
