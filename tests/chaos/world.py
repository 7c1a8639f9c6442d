"""A night's machinery as separate processes that can be broken one by one, and the supervisor that mends what breaks.

What systemd or an operator would start again is started again: the Dask scheduler, the workers, the Prefect server, the
database, and the run itself with the same command.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from harness import ROOT, Command, start, until

HOOKS = ROOT / "tests" / "hooks"
MARK = "LEUKOFLOW_CHAOS_MARK"
NOBODY = 65534


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 0.5):
            return True
    except OSError:
        return False


def healthy(api: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@dataclass
class Service:
    """A process that is started again when it is gone."""

    name: str
    words: list[str]
    environment: dict[str, str]
    log: Path
    ready: Callable[[], bool]
    user: int | None = None
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    began: float = 0.0

    def start(self) -> None:
        self.began = time.monotonic()
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                self.words,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=self.user,
                group=self.user,
                extra_groups=[] if self.user is not None else None,
            )
        self.starts += 1

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def family(self) -> list[psutil.Process]:
        """The process and its descendants, as far as they live."""
        if not self.alive or self.process is None:
            return []
        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def stop(self) -> None:
        for p in self.family():
            try:
                p.resume()
                p.kill()
            except psutil.Error:
                continue
        if self.process is not None:
            self.process.wait()


def can_run_postgres() -> str | None:
    """Why the server's database cannot be a real Postgres here, None when it can."""
    if not shutil.which("initdb") or not shutil.which("postgres"):
        return "initdb or postgres is not on the PATH"
    return None if os.geteuid() == 0 else "only root may start it as another user"


@dataclass
class World:
    """Prefect's server, perhaps with Postgres, a Dask scheduler and two workers."""

    folder: Path
    postgres: bool = False
    workers: int = 2
    ttl_seconds: int = 45
    environment: dict[str, str] = field(default_factory=dict)
    services: dict[str, Service] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.pg_home: Path | None = None
        self.delay, self.clock = self.folder / "delay", self.folder / "clock"
        self.delay.write_text("0")
        self.clock.write_text("0")
        self.api = f"http://127.0.0.1:{free_port()}/api"
        self.scheduler_port = free_port()

    @property
    def scheduler(self) -> str:
        return f"tcp://127.0.0.1:{self.scheduler_port}"

    def _environment(self, **more: str) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "LEUKOFLOW_"))}
        path = os.pathsep.join(filter(None, [str(HOOKS), str(ROOT), os.environ.get("PYTHONPATH")]))
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        hooks = {"TEST_DELAY_FILE": str(self.delay), "TEST_CLOCK_FILE": str(self.clock), MARK: self.mark}
        return inherited | threads | hooks | {"PYTHONPATH": path} | self.environment | more

    def __enter__(self) -> World:
        try:
            if self.postgres:
                self._add_postgres()
            self._add_prefect()
            self._add_dask()
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *trouble: object) -> None:
        for service in reversed(self.services.values()):
            service.stop()
        if self.pg_home is not None:
            shutil.rmtree(self.pg_home)

    def _add(self, service: Service) -> None:
        self.services[service.name] = service
        service.start()

    def _wait(self) -> None:
        for service in self.services.values():
            until(service.ready, 240, f"{service.name} answers; its log is {service.log}")

    def _add_postgres(self) -> None:
        # not below pytest's folder, which only its owner may enter
        home, port = Path("/tmp") / f"leukoflow-pg-{self.mark[:8]}", free_port()
        home.mkdir()
        self.pg_home = home
        os.chown(home, NOBODY, NOBODY)
        plain = {k: v for k, v in self._environment().items() if k != "PYTHONPATH"}
        own = {"user": NOBODY, "group": NOBODY, "extra_groups": [], "env": plain, "cwd": home}
        made = subprocess.run(
            ["initdb", "-D", str(home / "db"), "-U", "prefect", "-A", "trust", "--no-sync"], capture_output=True, **own
        )  # type: ignore[call-overload]
        assert made.returncode == 0, made.stderr.decode()
        words = ["postgres", "-D", str(home / "db"), "-p", str(port), "-k", str(home), "-h", "127.0.0.1"]
        log = self.folder / "postgres.log"
        self._add(Service("postgres", words, plain, log, lambda: answers(port), NOBODY))
        self._wait()
        subprocess.run(["createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "prefect", "prefect"], check=True, **own)  # type: ignore[call-overload]
        self.database = f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"

    def _add_prefect(self) -> None:
        home = self.folder / "prefect"
        home.mkdir()
        port = self.api.split(":")[2].split("/")[0]
        database = getattr(self, "database", f"sqlite+aiosqlite:///{home / 'prefect.db'}")
        environment = self._environment(
            PREFECT_HOME=str(home),
            PREFECT_SERVER_DATABASE_CONNECTION_URL=database,
            PREFECT_SERVER_ANALYTICS_ENABLED="false",
            PREFECT_SERVER_UI_ENABLED="false",
            PREFECT_CLI_PROMPT="false",
            DO_NOT_TRACK="1",
        )
        words = [sys.executable, "-P", "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
        log = self.folder / "prefect.log"
        self._add(Service("prefect server", words, environment, log, lambda: healthy(self.api)))

    def _add_dask(self) -> None:
        environment = self._environment(
            DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="0",
            DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL=f"{self.ttl_seconds}s",
            DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED="false",
        )
        module = [sys.executable, "-m"]
        words = [*module, "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(self.scheduler_port)]
        log = self.folder / "scheduler.log"
        ready = Service("scheduler", [*words, "--no-dashboard"], environment, log, lambda: answers(self.scheduler_port))
        self._add(ready)
        for i in range(self.workers):
            words = [*module, "distributed.cli.dask_worker", self.scheduler, "--nthreads", "1", "--no-dashboard"]
            words += ["--memory-limit", "0", "--local-directory", str(self.folder / f"worker-{i}")]
            self._add(Service(f"nanny {i}", words, environment, self.folder / f"nanny-{i}.log", lambda: True))

    # --- what can be hit

    def nannies(self) -> list[psutil.Process]:
        return [f[0] for s in self._nanny_services() if (f := s.family())]

    def worker_processes(self) -> list[psutil.Process]:
        found = []
        for service in self._nanny_services():
            family = service.family()
            for p in family[1:]:
                try:
                    if p.ppid() == family[0].pid and "multiprocessing.spawn" in " ".join(p.cmdline()):
                        found.append(p)
                except psutil.Error:
                    continue
        return found

    def _nanny_services(self) -> list[Service]:
        return [s for s in self.services.values() if s.name.startswith("nanny")]

    def supervise(self) -> list[str]:
        """Starts again what is gone, as systemd does with RestartSec=2; its names."""
        gone = [s for s in self.services.values() if not s.alive and time.monotonic() - s.began > 2.0]
        for service in gone:
            if service.name == "postgres" and self.pg_home is not None:
                (self.pg_home / "db" / "postmaster.pid").unlink(missing_ok=True)
            service.start()
        return [s.name for s in gone]

    # --- runs

    def run(self, words: list[str], log: Path, **environment: str) -> Command:
        """The `leukoflow` command, in this world."""
        settings = {
            "EXTRA_PATH": str(HOOKS),
            "PREFECT_API_URL": self.api,
            "TEST_CLOCK_FILE": str(self.clock),
            "TEST_DELAY_FILE": str(self.delay),
            MARK: self.mark,
            "LEUKOFLOW_LIMITS__STAGE_SECONDS": "60",
            "LEUKOFLOW_LIMITS__RETRY_DELAY_SECONDS": "0.2",
            "LEUKOFLOW_CLUSTER__WAIT_SECONDS": "60",
        }
        return start([*words, "--cluster", self.scheduler], log, **(settings | self.environment | environment))

    def _living(self) -> list[psutil.Process]:
        """Processes that were started in this world, also those whose parents are gone."""
        found = []
        for p in psutil.process_iter():
            try:
                if p.pid != os.getpid() and p.environ().get(MARK) == self.mark and p.status() != psutil.STATUS_ZOMBIE:
                    found.append(p)
            except psutil.Error:
                continue
        return found

    def strays(self) -> list[str]:
        """Command lines of living processes that were started in this world."""
        found = []
        for p in self._living():
            with contextlib.suppress(psutil.Error):
                found.append(" ".join(p.cmdline()))
        return found

    def switch_off_frozen(self) -> None:
        """Ends what was frozen for good, as a machine that hangs is switched off; its nanny may be dead long since."""
        for p in self._living():
            with contextlib.suppress(psutil.Error):
                if p.status() == psutil.STATUS_STOPPED:
                    p.kill()


def freeze(processes: list[psutil.Process], seconds: float) -> int:
    """SIGSTOP, and SIGCONT after a while; how many were hit."""
    hit = []
    for p in processes:
        try:
            p.send_signal(signal.SIGSTOP)
            hit.append(p)
        except psutil.Error:
            continue
    time.sleep(seconds)
    for p in hit:
        try:
            p.send_signal(signal.SIGCONT)
        except psutil.Error:
            continue
    return len(hit)


def kill(processes: list[psutil.Process]) -> int:
    """SIGKILL; how many were hit."""
    hit = 0
    for p in processes:
        try:
            p.kill()
            hit += 1
        except psutil.Error:
            continue
    return hit
