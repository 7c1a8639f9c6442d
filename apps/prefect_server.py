"""A real local Prefect server, for a run that was given none: loopback only, SQLite, no analytics, own home.

One server per home at a time: the server inherits a lock that the kernel releases when it is gone, so neither a stale
file nor a reused process id can be mistaken for a live server. It inherits its listening socket too, which is opened
before it starts: runs that start together cannot race for a port. Each home has a port of its own that it prefers, so
that a run whose server has died does not find the server of another home there. A server that is not kept dies with
the process that started it, even when that is killed. All of Prefect's own settings in the environment are kept away
from it.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from leukoflow.apps.prefect_connection import PrefectServerError, ask

STARTUP_SECONDS = 300.0
"""How long a server may take until it answers: seconds, but minutes where many start at once on few cores. One that
has died is noticed at once."""

FASTAPI_BELOW = "0.151"
"""Prefect 3.8 allows newer ones, but its server does not start with 0.155, which dropped `Body(min_items=...)`."""

_PREFERRED_PORT = 4200
_LOCK, _STATE, _LOG = "server.lock", "server.json", "server.log"
_LOCK_TRIES, _LOCK_PAUSE = 5, 0.02
_PARALLEL = 64  # runs at the same time that may each have a server of their own


@dataclass(frozen=True, slots=True)
class LocalServer:
    """A Prefect server on this machine. `process` is None when another command started it."""

    url: str  # of the API
    pid: int
    home: Path
    keep: bool
    process: subprocess.Popen[bytes] | None = None

    @property
    def ui_url(self) -> str:
        """Address of the dashboard."""
        return self.url.removesuffix("/api")

    @property
    def log(self) -> Path:
        """The server's own log."""
        return self.home / _LOG

    def stop(self) -> None:
        """End the server if this process started it and it is not to be kept; otherwise do nothing."""
        if self.process is not None and not self.keep:
            _terminate(self.process.pid, self.process)
            _forget(self.home, self.pid)


def default_home() -> Path:
    """Return where the server keeps its database: `LEUKOFLOW_PREFECT_HOME`, else below the user's state directory."""
    if chosen := os.environ.get("LEUKOFLOW_PREFECT_HOME"):
        return Path(chosen).expanduser().absolute()
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser().absolute() / "leukoflow" / "prefect"


def client_environment(server: LocalServer | None) -> dict[str, str]:
    """Return the variables that a process must have before it imports Prefect, so that it uses `server` quietly.

    With None the user's own server is used, and only analytics and the noise on the console are switched off (the log
    still goes to the server and to the run's own file).
    """
    quiet = {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
        # each event and log line that waits for a server which is away would be an error on the terminal
        "PREFECT_LOGGING_INTERNAL_LEVEL": os.environ.get("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL"),
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": os.environ.get("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL"),
    }
    if server is None:
        return quiet
    # a hospital's web proxy must not be asked for a loopback address
    bypass = [h for h in (os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or "").split(",") if h]
    bypass += [h for h in ("127.0.0.1", "localhost") if h not in bypass]
    return {
        **quiet,
        "PREFECT_API_URL": server.url,
        "PREFECT_HOME": str(server.home),
        "NO_PROXY": ",".join(bypass),
        "no_proxy": ",".join(bypass),
    }


def _is_of(home: Path, api_url: str) -> bool:
    """Return whether the server at `api_url` is that of this home, and not another that took the port before."""
    try:
        return bool(json.loads(ask(f"{api_url}/admin/settings") or b"{}").get("home") == str(home))
    except (ValueError, AttributeError):
        return False


def running_server(home: Path | None = None) -> LocalServer | None:
    """Return the kept server of this home, if it lives and answers."""
    home = home or default_home()
    server = _recorded(home)
    return server if server is not None and server.keep and _is_of(home, server.url) else None


def start_server(keep: bool, home: Path | None = None) -> LocalServer:
    """Return a server that answers: the kept one of this home if there is one, otherwise a new one.

    Call it from the main thread: the kernel ties a server that is not kept to the thread that started it. Raises
    PrefectServerError with the last lines of the server's log.
    """
    home = home or default_home()
    if not keep and threading.current_thread() is not threading.main_thread():
        raise PrefectServerError("a server that ends with its run must be started from the main thread")
    deadline = time.monotonic() + STARTUP_SECONDS
    while True:
        if (server := running_server(home)) is not None:
            return server
        try:
            place, number, lock = _free_place(home, only_first=keep)
            break
        except PrefectServerError:
            # by another command, to stay
            starting = keep and _is_locked(home) and ((found := _recorded(home)) is None or found.keep)
            if not starting or time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    try:
        return _start_in(place, lock, keep, _PREFERRED_PORT + number)
    finally:
        os.close(lock)  # the server holds its own copy


def stop(home: Path | None = None) -> bool:
    """Stop the kept server of this home; false if none is running."""
    home = home or default_home()
    server = _recorded(home)
    if server is None:
        return False
    if not server.keep:
        raise PrefectServerError(
            f"the Prefect server at {server.ui_url} belongs to a run that is still going on and ends with it"
        )
    _terminate(server.pid, None)
    deadline = time.monotonic() + 5
    while _is_locked(home) and time.monotonic() < deadline:
        time.sleep(0.05)
    _forget(home, server.pid)
    return True


def _free_place(home: Path, only_first: bool) -> tuple[Path, int, int]:
    """Return the first of `home`, `home/parallel-1`, ... without a server, its number, and its lock's file descriptor.

    Two servers never share a SQLite database; a run beside another one gets a place of its own.
    """
    for n in range(1 if only_first else _PARALLEL):
        place = home if n == 0 else home / f"parallel-{n}"
        try:
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(place / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise PrefectServerError(
                f"the Prefect server's directory {place} cannot be written ({error.strerror}): "
                "set LEUKOFLOW_PREFECT_HOME to one that can, or PREFECT_API_URL to a server that runs already"
            ) from None
        if _take_lock(lock):
            return place, n, lock
        os.close(lock)
    if only_first:
        raise PrefectServerError(
            f"a run that is going on uses the Prefect server of {home}, which ends with it: wait for the end of that "
            "run, leave out --keep-prefect, or set LEUKOFLOW_PREFECT_HOME to another directory"
        )
    raise PrefectServerError(
        f"{_PARALLEL} Prefect servers run below {home} already: set PREFECT_API_URL to one of them"
    )


def _take_lock(lock: int) -> bool:
    """Take a home's lock. Tried a few times, since a look whether it is taken holds it for a moment."""
    for attempt in range(_LOCK_TRIES):
        if attempt:
            time.sleep(_LOCK_PAUSE)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        return True
    return False


def _start_in(home: Path, lock: int, keep: bool, port: int) -> LocalServer:
    (home / _STATE).unlink(missing_ok=True)
    deadline = time.monotonic() + STARTUP_SECONDS
    with _listen(port) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
        process = _spawn(home, lock, listening, keep)
    server = LocalServer(url, process.pid, home, keep, process)
    try:
        _record(server)  # before it answers: a server that outlives this process must be known to others
        while process.poll() is None and time.monotonic() < deadline:
            if _is_of(home, url):
                return server
            time.sleep(0.1)
    except BaseException:  # Ctrl-C while waiting
        _terminate(process.pid, process)
        _forget(home, server.pid)
        raise
    alive = process.poll() is None
    if alive:
        _terminate(process.pid, process)
    _forget(home, server.pid)
    if alive:
        raise PrefectServerError(_failure(home, f"did not answer within {STARTUP_SECONDS:.0f} s"))
    raise PrefectServerError(_failure(home, f"ended at once with status {process.returncode}"))


def _listen(preferred: int) -> socket.socket:
    """Open a socket that listens on the loopback address, at `preferred` if nobody else does, else at any free port."""
    for port in (preferred, 0):
        try:
            return socket.create_server(("127.0.0.1", port), backlog=2048)
        except OSError:
            continue
    raise PrefectServerError("no free TCP port on 127.0.0.1: is the loopback interface up?")


def _spawn(home: Path, lock: int, listening: socket.socket, keep: bool) -> subprocess.Popen[bytes]:
    port = listening.getsockname()[1]
    settings = {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / 'prefect.db'}",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home / "ui"),  # the installation may be read-only
        "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "DO_NOT_TRACK": "1",
        "NO_COLOR": "1",
    }
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    folder = Path(__file__).parent
    command = [sys.executable, "-P", str(folder / "_prefect_process.py"), str(listening.fileno())]
    if not keep:
        command = [sys.executable, "-P", str(folder / "_bound_process.py"), str(os.getpid()), *command]
    with (home / _LOG).open("wb") as log:
        return subprocess.Popen(
            command,
            cwd=home,  # away from settings files of the directory where the command was given
            env=inherited | settings,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock, listening.fileno()),
            start_new_session=True,  # Ctrl-C must reach the run, which drains, and not the server that it still needs
        )


def free_port(preferred: int) -> int:
    """Return `preferred` if nobody listens there on the loopback address, else any free port."""
    for port in (preferred, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise PrefectServerError("no free TCP port on 127.0.0.1: is the loopback interface up?")


def _record(server: LocalServer) -> None:
    path = server.home / _STATE
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps({"pid": server.pid, "url": server.url, "keep": server.keep}), encoding="utf-8")
    draft.replace(path)


def _recorded(home: Path) -> LocalServer | None:
    """Return the server that holds this home's lock, from its start on; it may not answer yet."""
    server = _noted(home)
    return server if server is not None and _is_locked(home) else None


def _noted(home: Path) -> LocalServer | None:
    """Return the server of which this home has a note, whether it lives or not."""
    try:
        state = json.loads((home / _STATE).read_text(encoding="utf-8"))
        return LocalServer(str(state["url"]), int(state["pid"]), home, bool(state["keep"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _forget(home: Path, pid: int) -> None:
    """Remove the note of a server that has ended, and not that of another which has started meanwhile."""
    server = _noted(home)
    if server is not None and server.pid == pid:
        (home / _STATE).unlink(missing_ok=True)


def _is_locked(home: Path) -> bool:
    try:
        lock = os.open(home / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def _terminate(pid: int, process: subprocess.Popen[bytes] | None, patience: float = 8.0) -> None:
    """Send SIGTERM, and SIGKILL when that is not heeded."""
    for sig in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, sig)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if process is not None and process.poll() is not None:
                return
            if process is None and not _alive(pid):
                return
            time.sleep(0.05)
    if process is not None:
        process.wait(timeout=patience)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # a zombie that its parent has not collected is gone for our purpose
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True


def _tail(home: Path, lines: int = 12) -> str:
    try:
        text = (home / _LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def _failure(home: Path, what: str) -> str:
    tail = _tail(home)
    remedy = "run `leukoflow doctor`, or set PREFECT_API_URL to a server that runs already"
    if "no space left" in tail.lower() or "disk is full" in tail.lower():  # a traceback may name fastapi as well
        remedy = f"make room on the disk of {home}"
    elif "min_items" in tail or "fastapi" in tail.lower():
        remedy = f"install fastapi<{FASTAPI_BELOW}, which Prefect 3.8 needs; `leukoflow doctor` checks the versions"
    elif "malformed" in tail.lower() or "alembic" in tail.lower():
        remedy = f"move {home / 'prefect.db'} away: it is damaged or of another version, and holds only past dashboards"
    return f"the local Prefect server {what}; {remedy}. The end of {home / _LOG}:\n{tail}"
