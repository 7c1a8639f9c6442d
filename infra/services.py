"""The services of a stack on one machine: how each is started, and how to tell that it does its work."""

from __future__ import annotations

import base64
import json
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from infra.configuration import LEUKOFLOW, POOL, PREFIX, ROOT, WEB, Configuration
from infra.processes import Processes

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


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


class Services:
    """The services of a stack whose configuration is loaded."""

    def __init__(self, config: Configuration, processes: Processes) -> None:
        self.config = config
        self.processes = processes

    def __iter__(self) -> Iterator[Service]:
        """Yield all services, in the order in which they are started."""
        yield from self._stores()
        yield from self._dask()
        yield self._prefect_server()
        yield from self._web()
        yield self._prefect_worker()

    def works(self, service: Service) -> bool:
        """Return whether a service does its work. Asked up to three times: an answer may be slow on a busy machine."""
        return any(self.processes.find(service.name) is not None and service.healthy() for _ in range(3))

    def ask_prefect(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return an answer of Prefect's API, through the proxy, as JSON; None when there is none."""
        credentials = base64.b64encode(self.config.secrets["PREFECT_AUTH"].encode()).decode()
        headers = {"Authorization": f"Basic {credentials}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        answer = _get(f"{self.config.public_url}/api{path}", headers, data)
        return None if answer is None else json.loads(answer)

    # --- one after the other ---------------------------------------------------------------------------------------

    def _stores(self) -> Iterator[Service]:
        config, base = self.config, self.config.base_environment()
        postgres = config.postgres
        yield Service(
            "postgres", postgres.command(), base, postgres.answers, f"127.0.0.1:{postgres.port}",
            f"version {postgres.binaries.version}", as_postgres=True, stop_with=signal.SIGINT,
        )  # fmt: skip
        yield Service(
            "object store",
            (sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(config.ports["objects"])),
            base, self._answering("objects", "/moto-api/data.json"), config.url("objects"),
            "for development: keeps everything in memory",
        )  # fmt: skip

    def _dask(self) -> Iterator[Service]:
        config, python = self.config, sys.executable
        environment = config.base_environment() | {"DASK_CONFIG": str(ROOT / "infra" / "dask.yaml")}
        yield Service(
            "dask scheduler",
            (python, "-m", "dask", "scheduler", "--host", "127.0.0.1", "--port", str(config.ports["scheduler"]),
             "--dashboard-address", f"127.0.0.1:{config.ports['dashboard']}", "--no-show"),
            environment, self._answering("dashboard", "/health"), config.scheduler_url,
            f"its dashboard: {config.url('dashboard', '/status')}",
        )  # fmt: skip
        environment = environment | config.client_environment() | _ONE_THREAD
        worker = (python, "-m", "dask", "worker", config.scheduler_url, "--host", "127.0.0.1", "--nthreads", "1",
                  "--no-dashboard", "--local-directory", str(config.folder / "dask"))  # fmt: skip
        yield Service(
            "dask workers", (*worker, "--nworkers", str(config.workers)),
            environment | _NO_GPU, lambda: self._count_dask_workers() >= config.workers,
            config.scheduler_url, f"{config.workers} for CPU",
        )  # fmt: skip
        for gpu in range(config.gpus):
            yield Service(
                f"dask worker, GPU {gpu}", (*worker, "--resources", "GPU=1"),
                environment | {"CUDA_VISIBLE_DEVICES": str(gpu)},
                lambda: self._count_dask_workers() >= config.workers + config.gpus, config.scheduler_url,
                "offers GPU=1",
            )  # fmt: skip

    def _prefect_server(self) -> Service:
        config = self.config
        return Service(
            "prefect server",
            (sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port",
             str(config.ports["prefect"])),
            config.base_environment() | config.server_environment(),
            self._answering("prefect", f"{PREFIX}/api/ready"), config.url("prefect", PREFIX),
            "on Postgres, asks for user and password", seconds=120,
        )  # fmt: skip

    def _web(self) -> Iterator[Service]:
        config, base = self.config, self.config.base_environment()
        if config.nginx:
            yield Service(
                "reverse proxy", (*config.nginx, "-p", str(config.folder / "nginx"), "-c", "nginx.conf"), base,
                lambda: _get(f"{config.public_url}/api/health") is not None, config.public_url, "nginx", seconds=120,
            )  # fmt: skip
        yield Service(
            "web application",
            (LEUKOFLOW, "serve", str(config.results), "--port", str(config.ports["web"]), "--root-path", WEB,
             "--proxy-from", "127.0.0.1", "--users", str(config.users)),
            base | _ONE_THREAD | {"LEUKOFLOW_PATIENT_KEY": config.secrets["PATIENT_KEY"]} | _NO_GPU,
            self._answering("web", f"{WEB}/api/v1/health"), config.web_url, "worklist and single images", seconds=120,
        )  # fmt: skip
        yield Service(
            "metrics",
            (LEUKOFLOW, "metrics", str(config.results), "--port", str(config.ports["metrics"])),
            base, self._answering("metrics", "/metrics"), config.url("metrics", "/metrics"), "figures of all runs",
        )  # fmt: skip
        if config.prometheus:
            listen = f"127.0.0.1:{config.ports['prometheus']}"
            yield Service(
                "prometheus",
                (config.prometheus, f"--config.file={config.folder / 'prometheus.yml'}",
                 f"--storage.tsdb.path={config.folder / 'prometheus'}", f"--web.listen-address={listen}"),
                base, self._answering("prometheus", "/-/ready"), config.url("prometheus"),
                "with the alerts of infra/prometheus",
            )  # fmt: skip

    def _prefect_worker(self) -> Service:
        config = self.config
        return Service(
            "prefect worker",
            (sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--name", "stack"),
            config.base_environment() | config.client_environment() | _ONE_THREAD, self._worker_is_online,
            f"pool {POOL}", "runs the deployments", seconds=90,
        )  # fmt: skip

    # --- whether they work -----------------------------------------------------------------------------------------

    def _answering(self, port: str, path: str) -> Callable[[], bool]:
        """Return the question whether something answers at a path of one of the ports."""
        return lambda: _get(self.config.url(port, path)) is not None

    def _count_dask_workers(self) -> int:
        counts = _get(self.config.url("dashboard", "/json/counts.json"))
        return int(json.loads(counts)["workers"]) if counts else 0

    def _worker_is_online(self) -> bool:
        if self.processes.find("prefect worker") is None:
            return False
        found = self.ask_prefect(f"/work_pools/{POOL}/workers/filter", {}) or []
        return any(w["name"] == "stack" and w["status"] == "ONLINE" for w in found)


def _get(url: str, headers: Mapping[str, str] | None = None, data: bytes | None = None) -> bytes | None:
    """Return the body of a successful answer of this machine, else None."""
    request = urllib.request.Request(url, data=data, headers=dict(headers or {}))
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
            return bytes(answer.read())
    except (urllib.error.URLError, OSError, ValueError):
        return None
