"""A laboratory's hosts on one machine: network namespaces on a bridge of their own, with our wheel and no checkout.

Each host has an address, a working directory and processes; a host can be cut off, brought back, or lost. Nothing of it
touches the machine's own network: the bridge lives in a namespace, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from harness import ROOT, Command, until

CLONE_NEWNET = 0x40000000
NETWORK = "10.213.7"
SITE = '''"""Only the installed wheel is importable: checkouts that the environment knows are taken off the path."""
import os
import sys
wheel = os.environ["LAB_WHEEL"]
sys.path[:] = [p for p in sys.path if p == wheel or not os.path.isdir(os.path.join(p, "leukoflow"))]
with open(os.environ["LAB_HOOKS"]) as file:
    exec(compile(file.read(), file.name, "exec"))
'''


def build_wheel(folder: Path, source: Path = ROOT) -> Path:
    """A folder with the installed wheel of a checkout; a pure-Python wheel is installed by unpacking it."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder / "dist")],
        cwd=source, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
    return folder / "wheel"


@dataclass
class Host:
    name: str
    ip: str
    namespace: str
    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)


class Lab:
    """Hosts by name. `environment` is what all their processes have in common."""

    def __init__(self, folder: Path, wheel: Path, names: list[str]) -> None:
        self.folder = folder
        self.wheel = wheel
        self.mark = uuid.uuid4().hex[:5]
        self.switch = f"lf{self.mark}"
        self.hosts = {
            name: Host(name, f"{NETWORK}.{i}", f"lf{self.mark}-{name}", folder / name)
            for i, name in enumerate(names, start=2)
        }
        site = folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(SITE)
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{site}{os.pathsep}{wheel}",
            "LAB_WHEEL": str(wheel),
            "LAB_HOOKS": str(ROOT / "tests" / "hooks" / "sitecustomize.py"),
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
            "COLUMNS": "160",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0",
        }

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def build(self) -> None:
        """Raises CalledProcessError where network namespaces cannot be made."""
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "br0", "up")
        for i, host in enumerate(self.hosts.values()):
            host.folder.mkdir(exist_ok=True)
            port = self.port(host.name)
            _ip("netns", "add", host.namespace)
            _ip("-n", self.switch, "link", "add", port, "type", "veth", "peer", "name", f"e{i}{self.mark}")
            _ip("-n", self.switch, "link", "set", f"e{i}{self.mark}", "netns", host.namespace)
            _ip("-n", self.switch, "link", "set", port, "master", "br0")
            _ip("-n", self.switch, "link", "set", port, "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.ip}/24", "dev", f"e{i}{self.mark}")
            _ip("-n", host.namespace, "link", "set", f"e{i}{self.mark}", "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")

    def port(self, name: str) -> str:
        """The switch's end of a host's cable."""
        return f"p{list(self.hosts).index(name)}{self.mark}"

    def unplug(self, name: str) -> None:
        _ip("-n", self.switch, "link", "set", self.port(name), "down")

    def plug(self, name: str) -> None:
        _ip("-n", self.switch, "link", "set", self.port(name), "up")

    def run(self, name: str, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        """Starts a process on a host, in a process group of its own; its words go to `HOST/log`."""
        host = self.hosts[name]
        with (host.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", host.namespace, *words],
                env=self.environment | {"HOME": str(host.folder)} | environment,
                cwd=host.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        host.processes.append(process)
        return process

    def python(self, name: str, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        return self.run(name, sys.executable, "-P", *words, **environment)

    def service(self, name: str, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        """A Python process that is started again whenever it ends, as systemd and Kubernetes do."""
        loop = 'while :; do "$@"; sleep 1; done'
        return self.run(name, "bash", "-c", loop, "service", sys.executable, "-P", *words, **environment)

    def text(self, name: str) -> str:
        return (self.hosts[name].folder / "log").read_text(errors="replace")

    def stop(self, name: str, kind: int = signal.SIGKILL) -> None:
        """Ends all processes of a host."""
        for process in self.hosts[name].processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, kind)
        for process in self.hosts[name].processes:
            process.wait(60)
        self.hosts[name].processes.clear()

    def inside(self, name: str, function: Callable[[], Any]) -> Any:
        """Calls a function in a thread whose sockets are that host's."""
        found: list[Any] = []

        def enter() -> None:
            libc = ctypes.CDLL(None, use_errno=True)
            with open(f"/run/netns/{self.hosts[name].namespace}") as space:
                if libc.setns(space.fileno(), CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            found.append(function())

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        (value,) = found
        return value

    def down(self) -> None:
        for name in self.hosts:
            self.stop(name)
        for space in [*(h.namespace for h in self.hosts.values()), self.switch]:
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def laboratory(folder: Path, wheel: Path, names: list[str]) -> Iterator[Lab]:
    """Hosts that are up, and gone afterwards. Raises Unavailable with the reason where this machine cannot have any."""
    if shutil.which("ip") is None:
        raise Unavailable("the command `ip` (iproute2) is not here")
    lab = Lab(folder, wheel, names)
    try:
        try:
            lab.build()
        except subprocess.CalledProcessError as error:
            raise Unavailable(f"network namespaces cannot be made: {error.stderr.decode().strip()}") from None
        yield lab
    finally:
        lab.down()


class Unavailable(Exception):
    """Why there can be no laboratory here."""


# --- what runs there -------------------------------------------------------------------------------------------------


def start_store(lab: Lab, name: str, port: int = 5000) -> None:
    """An S3 interface with the bucket `lab`."""
    lab.python(name, "-m", "moto.server", "-H", lab[name].ip, "-p", str(port))
    lab.environment["AWS_ENDPOINT_URL"] = f"http://{lab[name].ip}:{port}"

    def created() -> bool:
        with contextlib.suppress(Exception):
            bucket(lab).create_bucket(Bucket="lab")
            return True
        time.sleep(0.3)
        return False

    until(lambda: lab.inside(name, created), 120, "the object store answers")


def bucket(lab: Lab) -> Any:
    """To be called inside a host."""
    return boto3.client(
        "s3", endpoint_url=lab.environment["AWS_ENDPOINT_URL"], aws_access_key_id="test",
        aws_secret_access_key="test", region_name="us-east-1",
    )  # fmt: skip


def start_prefect(lab: Lab, name: str) -> None:
    home = {"PREFECT_HOME": str(lab[name].folder), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    lab.environment |= {"DO_NOT_TRACK": "1", "PREFECT_API_URL": f"http://{lab[name].ip}:4200/api"}
    lab.python(name, "-m", "prefect", "server", "start", "--host", lab[name].ip, "--port", "4200", "--no-ui", **home)

    def healthy() -> bool:
        import urllib.request

        with contextlib.suppress(OSError):
            return bool(urllib.request.urlopen(lab.environment["PREFECT_API_URL"] + "/health", timeout=2).status == 200)
        time.sleep(0.3)
        return False

    until(lambda: lab.inside(name, healthy), 180, "the Prefect server answers")


def start_scheduler(lab: Lab, name: str) -> None:
    words = ["-m", "distributed.cli.dask_scheduler", "--host", lab[name].ip, "--port", "8786", "--no-dashboard"]
    lab.python(name, *words)


def start_worker(lab: Lab, name: str, scheduler: str, **environment: str) -> None:
    words = ["-m", "distributed.cli.dask_worker", f"tcp://{lab[scheduler].ip}:8786", "--nthreads", "1"]
    words += ["--host", lab[name].ip, "--no-dashboard", "--memory-limit", "0"]
    lab.service(name, *words, "--local-directory", str(lab[name].folder), **environment)


def start_run(lab: Lab, name: str, *words: str, **environment: str) -> Command:
    """The command as a user types it on that host; its words are those of this run alone."""
    host = lab[name]
    log = host.folder / f"run-{uuid.uuid4().hex[:6]}.log"
    with log.open("ab") as sink:
        process = subprocess.Popen(
            ["ip", "netns", "exec", host.namespace, sys.executable, "-P", "-m", "leukoflow",
             "run", *words],
            env=lab.environment | dict.fromkeys(("HOME", "PREFECT_HOME", "TMPDIR"), str(host.folder)) | environment,
            cwd=host.folder, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True,
        )  # fmt: skip
    return Command(process, log)
