"""Every check of `leukoflow doctor`: what it finds, its verdict, and that a failed one names a remedy."""

from __future__ import annotations

import re
import socket
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from harness import ROOT

from leukoflow.apps import doctor, prefect_connection, prefect_server
from leukoflow.apps.doctor import (
    Check,
    check_cluster,
    check_packages,
    check_patient_key,
    check_prefect,
    check_storage,
    diagnose,
)
from leukoflow.core.errors import BundleError, StorageError
from leukoflow.storage.base import Storage
from leukoflow.storage.local import LocalStorage


def _only(checks: Iterator[Check]) -> Check:
    found = list(checks)
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("found", "low", "high", "fits"),
    [
        ("3.8.8", "3.8", "3.9", True),
        ("3.9.0", "3.8", "3.9", False),
        ("3.7.12", "3.8", "", False),
        ("0.150.0", "0.139", "0.151", True),
        ("0.151.0", "0.139", "0.151", False),
        ("2.10.0+cpu", "2.6", "", True),
        ("2026.8.0", "2026.1", "", True),
    ],
)
def test_versions_are_compared_as_numbers(found: str, low: str, high: str, fits: bool) -> None:
    assert doctor._within(found, low, high) is fits


def test_a_package_outside_the_tested_range_fails_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {name: low for name, (low, _) in doctor._TESTED.items()}
    monkeypatch.setattr(doctor, "version", lambda name: installed[name])
    assert _only(check_packages()).verdict == "ok"
    installed["fastapi"] = "0.159.1"
    check = _only(check_packages())
    assert (check.name, check.verdict) == ("fastapi", "fail")
    assert "fastapi>=0.139,<0.151" in check.remedy

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", absent)
    assert {c.found for c in check_packages()} == {"not installed"}


def test_the_tested_range_agrees_with_the_project_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["run"]]
    wanted = {re.split("[<>=]", line)[0]: re.split("^[^<>=]+", line)[1] for line in lines}
    for name, (low, high) in doctor._TESTED.items():
        assert {f">={low}"} | ({f"<{high}"} if high else set()) >= set(wanted[name].split(",")), name


def test_a_scheduler_is_looked_for_where_it_should_be() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        assert _only(check_cluster(address)).verdict == "ok"
    gone = _only(check_cluster(address))
    assert gone.verdict == "fail"
    assert "dask scheduler" in gone.remedy
    for wrong in ("127.0.0.1:8786", "http://host:8786", "tcp://host", "tcp://host:port"):
        check = _only(check_cluster(wrong))
        assert check.verdict == "fail"
        assert "tcp://HOST:8786" in check.remedy


def test_workers_that_a_run_would_start_are_asked_for_where_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "can submit jobs" in _only(check_cluster("slurm")).remedy
    (tmp_path / "sbatch").touch(mode=0o755)
    assert {kind: _only(check_cluster(kind)).verdict for kind in ("local", "slurm")} == {"local": "ok", "slurm": "ok"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "leukoflow[kubernetes]" in _only(check_cluster("kubernetes")).remedy


def test_storage_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").touch()
    checks = list(check_storage(str(tmp_path)))
    assert [c.name for c in checks] == ["storage", "disk"]
    assert checks[0].verdict == "ok"
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]
    assert next(iter(check_storage(str(tmp_path / "new")))).verdict == "ok"
    assert not (tmp_path / "new").exists()


def test_storage_that_cannot_be_used_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    check = _only(check_storage(str(tmp_path / "file" / "out")))
    assert check.verdict == "fail"
    assert "--out" in check.remedy

    def overwrite(self: Storage, key: str, data: bytes) -> bool:
        self.write(key, data)
        return True

    monkeypatch.setattr(LocalStorage, "create", overwrite)
    check = _only(check_storage(str(tmp_path)))
    assert check.verdict == "fail"
    assert "conditional writes" in check.remedy

    def refuse(self: Storage, key: str, data: bytes) -> bool:
        raise StorageError("quota exceeded")

    monkeypatch.setattr(LocalStorage, "create", refuse)
    assert "quota exceeded" in _only(check_storage(str(tmp_path))).found


def test_little_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_FREE_GB", 1e9)
    assert [c.verdict for c in check_storage(str(tmp_path))] == ["ok", "warn"]


@pytest.mark.slow
def test_a_configured_server_must_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    check = _only(check_prefect(start=True))
    assert check.verdict == "fail"
    assert "PREFECT_API_URL" in check.remedy
    monkeypatch.setattr(prefect_connection, "require_server", lambda url: None)
    assert _only(check_prefect(start=True)).verdict == "ok"


def test_a_server_of_its_own_is_started_and_stopped_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stopped: list[Path] = []

    class Server:
        home = tmp_path

        def stop(self) -> None:
            stopped.append(self.home)

    monkeypatch.setattr(prefect_connection, "configured_api_url", lambda: None)
    monkeypatch.setattr(prefect_server, "running_server", lambda: None)
    monkeypatch.setattr(prefect_server, "start_server", lambda keep: Server())
    assert "not tried" in _only(check_prefect(start=False)).found
    assert stopped == []
    assert _only(check_prefect(start=True)).verdict == "ok"
    assert stopped == [tmp_path]


def test_a_check_that_breaks_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Check]:
        raise ZeroDivisionError("by accident")
        yield

    def no_bundle(name: str) -> Iterator[Check]:
        raise BundleError(f"bundle {name} is absent; name another with --bundle")
        yield

    for name in ("check_python", "check_packages", "check_machine", "check_gpu"):
        monkeypatch.setattr(doctor, name, broken)
    monkeypatch.setattr(doctor, "check_decoding", lambda: iter([Check("decoding", "ok", "works")]))
    monkeypatch.setattr(doctor, "check_prefect", lambda start: iter([Check("prefect", "ok", "works")]))
    monkeypatch.setattr(doctor, "check_patient_key", lambda: iter([Check("patient key", "ok", "none")]))
    monkeypatch.setattr(doctor, "check_bundle", no_bundle)
    checks = diagnose(None, "none", None, start_prefect=False)
    assert [c.verdict for c in checks] == ["fail"] * 5 + ["ok"] * 3
    assert "by accident" in checks[0].found
    assert checks[4].found == "bundle none is absent; name another with --bundle"


def test_the_decoding_process_works() -> None:
    assert _only(doctor.check_decoding()).verdict == "ok"


def test_a_patient_key_must_resist_guessing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("LEUKOFLOW_PATIENT_KEY", raising=False)
    assert (_only(check_patient_key()).verdict, _only(check_patient_key()).found[:5]) == ("ok", "none;")
    monkeypatch.setenv("LEUKOFLOW_PATIENT_KEY", "ward-7")
    weak = _only(check_patient_key())
    assert (weak.verdict, weak.found) == ("fail", "it can be guessed: it has 6 characters")
    assert "at least 32 characters" in weak.remedy
    assert "secrets.token_hex(32)" in weak.remedy
    assert "ward-7" not in weak.remedy
    monkeypatch.setenv("LEUKOFLOW_PATIENT_KEY", "a key that only these tests have")
    good = _only(check_patient_key())
    assert (good.verdict, good.found) == ("ok", "check value d94186fc5069d787, the same wherever the key is the same")
