"""Dask's schedulers and workers as processes of their own, as an operator starts them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from harness import ROOT, until


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class DaskProcesses:
    """One scheduler on a fixed port and any number of workers; `tls` are the options that both get."""

    def __init__(self, folder: Path, tls: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.tls = tls
        self.port = free_port()
        self.address = f"{'tls' if tls else 'tcp'}://127.0.0.1:{self.port}"
        self.scheduler: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[bytes]] = []

    def start_scheduler(self) -> None:
        words = [
            "dask_scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--dashboard-address",
            "127.0.0.1:0",
        ]
        self.scheduler = self._start(words, ROOT)
        until(self._listens, 60, "the scheduler listens")

    def start_worker(self, *options: str, code: Path = ROOT) -> subprocess.Popen[bytes]:
        words = ["dask_worker", self.address, "--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1"]
        words += ["--local-directory", str(self.folder), "--memory-limit", "0"]
        self.workers.append(self._start([*words, *options], code))
        return self.workers[-1]

    def kill_scheduler(self) -> None:
        assert self.scheduler is not None
        self.scheduler.kill()
        self.scheduler.wait()

    def text(self) -> str:
        return (self.folder / "dask.log").read_text(errors="replace")

    def end(self) -> None:
        for process in [*self.workers, *filter(None, [self.scheduler])]:
            if process.poll() is None:
                process.terminate()  # the nanny takes its worker along
        for process in [*self.workers, *filter(None, [self.scheduler])]:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, words: list[str], code: Path) -> subprocess.Popen[bytes]:
        paths = os.pathsep.join([str(code), str(ROOT / "tests")])
        environment = os.environ | {
            "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0",
        }  # fmt: skip
        with (self.folder / "dask.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", f"distributed.cli.{words[0]}", *words[1:], *self.tls],
                env=environment, cwd=self.folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def _listens(self) -> bool:
        assert self.scheduler is not None
        assert self.scheduler.poll() is None, self.text()[-3000:]
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        time.sleep(0.1)
        return False


@contextlib.contextmanager
def dask_processes(folder: Path, tls: tuple[str, ...] = ()) -> Iterator[DaskProcesses]:
    found = DaskProcesses(folder, tls)
    try:
        yield found
    finally:
        found.end()
