"""Background processes that outlive the command which started them, and that another command finds and ends again.

Each is recorded with its process id and start time, and carries a mark in its environment. So a reused process id is
never mistaken for ours, and children that left their parent's session are found all the same.
"""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from leukoflow.core.errors import LeukoflowError

MARK = "LEUKOFLOW_STACK_MARK"
"""Environment variable that every process of a stack has; its value is the stack's folder."""


class StackError(LeukoflowError):
    """The stack or one of its services did not start, stop or answer."""


STEP = "LEUKOFLOW_STACK_STEP"
"""A mark besides, of commands that end by themselves: what is left of one belongs to a start that was killed."""


class Processes:
    """The processes of one stack, by name. Logs are written to `logs/NAME.log` in the stack's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = folder / "processes.json"
        self._mine: dict[str, subprocess.Popen[bytes]] = {}  # those that this object started

    def log(self, name: str) -> Path:
        """Return where a process writes to."""
        return self.folder / "logs" / f"{name.replace(', ', '-').replace(' ', '-')}.log"

    def tail(self, name: str, lines: int = 12) -> str:
        """Return the last lines that a process has written."""
        try:
            text = self.log(name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], user: pwd.struct_passwd | None = None
    ) -> int:
        """Start a process in a session of its own and return its id; `user` needs root."""
        log = self.log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        identity = {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        with log.open("ab") as sink:
            process = subprocess.Popen(
                list(command),
                cwd="/" if user is not None else self.folder,
                env={**environment, MARK: str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **identity,  # type: ignore[call-overload]
            )
        self._mine[name] = process
        self._write(self._read() | {name: (process.pid, psutil.Process(process.pid).create_time())})
        return int(process.pid)

    def find(self, name: str) -> psutil.Process | None:
        """Return the living process of that name."""
        pid, created = self._read().get(name, (0, 0.0))
        return _living(pid, created)

    def names(self) -> list[str]:
        """Return the names of all processes that were started, in that order."""
        return list(self._read())

    def stop(self, name: str, number: signal.Signals = signal.SIGTERM, seconds: float = 15.0) -> None:
        """Ask a process to end, and end it and its children if that is not heeded."""
        process = self.find(name)
        if process is not None:
            family = [process, *_children(process)]
            process.send_signal(number)
            end(family, seconds)
        if name in self._mine:
            self._mine.pop(name).wait()
        record = self._read()
        record.pop(name, None)
        self._write(record)

    def strays(self, mark: str = MARK) -> list[psutil.Process]:
        """Return the living processes that carry this stack's mark, no matter which command started them."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(mark) == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def _read(self) -> dict[str, tuple[int, float]]:
        try:
            entries = json.loads(self.record.read_text(encoding="utf-8"))
            return {str(name): (int(pid), float(created)) for name, (pid, created) in entries.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _write(self, entries: Mapping[str, tuple[int, float]]) -> None:
        draft = self.record.with_suffix(".tmp")
        draft.write_text(json.dumps(entries), encoding="utf-8")
        draft.replace(self.record)


def end(processes: Sequence[psutil.Process], seconds: float) -> None:
    """Wait for processes that were asked to end, then kill what is left."""
    _, left = psutil.wait_procs(list(processes), timeout=seconds)
    for process in left:
        try:
            process.kill()
        except psutil.Error:
            continue
    psutil.wait_procs(left, timeout=10)


def wait_until(ready: Callable[[], bool], seconds: float, alive: Callable[[], bool]) -> bool:
    """Return whether `ready` became true in time; end early when `alive` is false."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if ready():
            return True
        if not alive():
            return ready()
        time.sleep(0.2)
    return False


def _living(pid: int, created: float) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        if pid and abs(process.create_time() - created) < 1.0 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    except psutil.Error:
        pass
    return None


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def unprivileged_user() -> pwd.struct_passwd | None:
    """Return whom Postgres runs as when we are root, which it refuses to be; None when we are not root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise StackError("Postgres does not run as root and there is no user postgres or nobody; start as another user")
