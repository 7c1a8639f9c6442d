"""The whole stack as plain processes on one machine: what `infra/compose.yaml` runs in containers, with one command.

`make stack` starts what is not running, `make stack-down` ends everything. Everything lies in one folder (`stack-out`,
or `LEUKOFLOW_STACK`): data of Postgres, results, logs, generated passwords. All of it listens on the loopback address.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from infra.backup import create, put_back
from infra.configuration import BUCKET, LEUKOFLOW, POOL, ROOT, Configuration, default_folder
from infra.processes import MARK, STEP, Processes, StackError, end, unprivileged_user, wait_until
from infra.services import Service, Services
from leukoflow.runs.progress import list_runs


@dataclass(slots=True)
class Report:
    """What `up` or `status` has found: a row for each service, and the hints for people."""

    rows: list[tuple[str, bool, str, str]] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Return whether every service does its work."""
        return all(ok for _, ok, _, _ in self.rows)


class Stack:
    """The stack of one folder. Nothing is started or written before `up`."""

    def __init__(self, folder: Path, workers: int | None = None) -> None:
        self.folder = folder
        self.processes = Processes(folder)
        self.config = Configuration(folder, workers)
        self.services = Services(self.config, self.processes)

    # --- what people call ------------------------------------------------------------------------------------------

    def up(self, say: Callable[[str], None] = print) -> Report:
        """Start what does not run yet, wait until everything answers, deploy, and leave a sample in the inbox.

        Raises StackError naming the service, the end of its log and the remedy; what was started by then is stopped.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o711)
        with self._exclusively():
            try:
                return self._up(say)
            except BaseException:
                say("stopping what was started")
                self._down()
                raise

    def down(self) -> int:
        """Stop everything, newest first; return how many processes it took to end. Data stays."""
        if not self.folder.is_dir():
            return 0
        with self._exclusively():
            return self._down()

    def status(self) -> Report:
        """Report what runs and does its work."""
        if not (self.folder / "stack.json").is_file():
            raise StackError(f"there is no stack in {self.folder}; `make stack` starts one")
        self._load()
        report = Report()
        for service in self.services:
            report.rows.append((service.name, self.services.works(service), service.address, service.note))
        report.hints = self.config.hints()
        return report

    def backup(self, dest: Path) -> Path:
        """Make a backup of the running stack; return its folder."""
        self.status()
        return create(dest, self.config.postgres.url("prefect"), self.config.results)[0]

    def restore(self, source: Path) -> None:
        """Fill a new stack from a backup; `up` then brings the database to the installed version and starts it.

        Passwords are not part of a backup: put the old `secrets.env` into the folder before, or new ones are made up
        (the patient key is among them).
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o711)
        with self._exclusively():
            if (self.folder / "postgres").exists():
                raise StackError(f"{self.folder} holds a stack already: restore into a new folder (LEUKOFLOW_STACK)")
            self._load()
            self.config.write_files()
            service = next(iter(self.services))
            self.config.postgres.create()
            try:
                self._start(service, lambda _: None)
                self._await(service)
                self.config.postgres.create_database("prefect")
                put_back(source, self.config.postgres.url("prefect"), self.config.results)
            finally:
                self.processes.stop("postgres", signal.SIGINT)

    # --- up --------------------------------------------------------------------------------------------------------

    def _up(self, say: Callable[[str], None]) -> Report:
        self._load()
        self._end_leftovers()
        services = {s.name: s for s in self.services}
        server, worker = services.pop("prefect server"), services.pop("prefect worker")
        missing = [s for s in [*services.values(), server, worker] if not self.services.works(s)]
        if not missing:
            say(f"the stack in {self.folder} runs already")
        if server in missing or services["postgres"] in missing:
            self.config.postgres.create()
        self.config.write_files()
        for service in services.values():
            if service in missing:
                self._start(service, say)
        if server in missing:
            self._await(services["postgres"])
            self.config.postgres.create_database("prefect")
            say("database migrations")
            self.migrate()
            self._start(server, say)
        self._leave_sample(say)
        self._await(server)
        for service in services.values():
            self._await(service)
        self._create_bucket()
        if missing:
            say("work pool, deployments, automations")
            self.deploy()
        if worker in missing:
            self._start(worker, say)
        for service in self.services:  # once more: what answered a while ago may have died since
            self._await(service)
        return self.status()

    def migrate(self) -> None:
        """Bring Prefect's database to the version that is installed."""
        self.run(
            [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"],
            self.config.server_environment(),
        )

    def deploy(self) -> None:
        """Create work pool, deployments and automations as the checkout has them; what exists is updated."""
        passed = ("LEUKOFLOW_STACK_CRON", "LEUKOFLOW_WEBHOOK_URL", "LEUKOFLOW_EMAIL_URL")
        given = {name: os.environ[name] for name in passed if name in os.environ}
        given |= {"LEUKOFLOW_SILENCE_SECONDS": "120", "LEUKOFLOW_PENDING_SECONDS": "120"}  # all is near, nothing waits
        self.run([sys.executable, "-m", "infra.register", POOL], self.config.client_environment() | given)

    def run(self, command: list[str], environment: Mapping[str, str], seconds: float = 180) -> str:
        """Run a command that ends by itself; return what it printed. Raises StackError with its last lines."""
        marked = dict.fromkeys((MARK, STEP), str(self.folder))
        done = subprocess.run(
            command, env=self.config.base_environment() | dict(environment) | marked, cwd=ROOT, timeout=seconds,
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

    def _leave_sample(self, say: Callable[[str], None]) -> None:
        """Leave a night's archive in the inbox, on the first start of a stack that was not restored from a backup."""
        sample = self.folder / "sample"
        # The web application's log is neither a run nor an inbox.
        known = list_runs(str(self.config.results)) or (self.config.results / "inbox").exists()
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
            "s3", endpoint_url=self.config.url("objects"), aws_access_key_id=self.config.secrets["S3_ACCESS_KEY"],
            aws_secret_access_key=self.config.secrets["S3_SECRET_KEY"], region_name="us-east-1",
        )  # fmt: skip
        client.create_bucket(Bucket=BUCKET)

    # --- down ------------------------------------------------------------------------------------------------------

    def _end_leftovers(self) -> None:
        """End what a start that was killed has left: its steps, and our marks without a living record."""
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

    def _load(self) -> None:
        self.config.load(running=bool(self.processes.names()))

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
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


def main(arguments: list[str]) -> int:
    """Run `python -m infra.stack up | down | status | backup DEST | restore DEST/TIME`."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 100_000)
    stack = Stack(default_folder())
    started = time.monotonic()
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
        console.print(f"\nready after {time.monotonic() - started:.0f} s")
    return 0 if report.healthy else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
