"""A run is bound to the key that made its pseudonyms: with another one its patients would be nobody's elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from harness import smears, write_zip
from prefect.blocks.system import Secret

from leukoflow.core.codec import dumps, loads
from leukoflow.core.config import load_config
from leukoflow.core.errors import ConfigError, RunConflictError
from leukoflow.models.bundle import Bundle
from leukoflow.runs.progress import RunBinding
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.intake.open_run import open_run
from leukoflow.tasks.intake.patient_key import check_value, patient_key, pseudonym
from leukoflow.tasks.intake.plan_file import read_summary
from leukoflow.tasks.upkeep.patients import runs_of_other_keys

RIGHT, WRONG = "the key that the hospital has kept", "the key that somebody has mistyped"
NAME = "LEUKOFLOW_PATIENT_KEY"


@pytest.fixture
def begin(small: Bundle, tmp_path: Path) -> Any:
    """Plans a run of three images of patient 7, and binds its id."""
    source = write_zip(tmp_path / "night.zip", smears(tmp_path / "sample", 3, seed=5))
    names = list(smears(tmp_path / "sample", 3, seed=5))
    (tmp_path / "slides.csv").write_text("image_key,patient_id\n" + "".join(f"{n},7\n" for n in names))

    def opened(run_id: str = "night", manifest: str | None = "slides.csv") -> Run:
        extra = {"manifest": str(tmp_path / manifest)} if manifest else {}
        return open_run(
            load_config(source=str(source), out=str(tmp_path / "out"), run_id=run_id, bundle=str(small.path), **extra)
        )

    return opened


def patients(run: Run) -> set[str]:
    return set(pq.read_table(Path(run.root) / "plan.parquet")["patient_id"].to_pylist())


def test_a_run_is_not_taken_up_with_another_key(begin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, WRONG)
    run = begin()
    assert run.binding.patient_key_check == check_value(WRONG.encode())
    assert WRONG not in (Path(run.root) / "run.json").read_text()
    assert patients(run) == {pseudonym("7", WRONG.encode())}
    monkeypatch.setenv(NAME, RIGHT)
    with pytest.raises(RunConflictError, match="were made with a different patient key") as refused:
        begin()
    assert "choose a new --run-id and delete night" in str(refused.value)
    assert RIGHT not in str(refused.value)
    assert patients(begin("night-2")) == {pseudonym("7", RIGHT.encode())}
    monkeypatch.setenv(NAME, WRONG)
    assert begin().summary == run.summary
    monkeypatch.delenv(NAME)  # what is planned needs none
    assert begin().summary == run.summary


def test_a_plan_that_was_cut_off_before_it_was_bound_keeps_its_key(begin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, WRONG)
    run = begin()
    path = Path(run.root) / "run.json"
    unplanned = replace(run.binding, members=0, shards=0, plan_sha256="", patient_key_check="")
    assert not unplanned.is_planned
    path.write_bytes(dumps(unplanned))
    monkeypatch.setenv(NAME, RIGHT)
    with pytest.raises(RunConflictError, match="a different patient key"):
        begin()
    assert not loads(RunBinding, path.read_bytes(), "run.json").is_planned


def test_a_plan_that_nothing_binds_is_made_again_with_the_right_key(
    begin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, WRONG)
    run = begin()
    (Path(run.root) / "run.json").unlink()
    monkeypatch.setenv(NAME, RIGHT)
    assert patients(begin()) == {pseudonym("7", RIGHT.encode())}


def test_a_plan_that_was_lost_is_not_made_with_another_key(begin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, RIGHT)
    run = begin()
    (Path(run.root) / "plan.parquet").unlink()
    monkeypatch.setenv(NAME, WRONG)
    with pytest.raises(RunConflictError, match="a different patient key"):
        begin()
    assert not (Path(run.root) / "plan.parquet").exists()
    monkeypatch.setenv(NAME, RIGHT)
    assert patients(begin()) == {pseudonym("7", RIGHT.encode())}


def test_runs_without_patients_and_of_older_versions_ask_for_no_key(
    begin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, RIGHT)
    assert begin("plain", manifest=None).binding.patient_key_check == ""
    run = begin("old")
    path = Path(run.root) / "run.json"
    text = path.read_text()
    path.write_text(text.replace(f' "patient_key_check": "{run.binding.patient_key_check}",\n', ""))
    assert loads(RunBinding, path.read_bytes(), "run.json").patient_key_check == ""
    plan = pq.read_table(path.with_name("plan.parquet"))
    summary = pq.read_schema(path.with_name("plan.parquet")).metadata[b"leukoflow.plan"].decode()
    old = summary.replace(f', "patient_key_check": "{run.binding.patient_key_check}"', "").replace(
        ', "remarks": []', ""
    )
    assert "remarks" not in old
    assert "check" not in old
    pq.write_table(plan.replace_schema_metadata({"leukoflow.plan": old}), path.with_name("plan.parquet"))
    assert read_summary(path.with_name("plan.parquet")).remarks == ()
    bound = loads(RunBinding, path.read_bytes(), "run.json")
    path.write_bytes(dumps(replace(bound, plan_sha256="")))
    monkeypatch.setenv(NAME, WRONG)
    assert begin("plain", manifest=None).summary.members == 3
    assert begin("old").summary.members == 3


def test_a_new_run_beside_those_of_another_key_says_so(begin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, RIGHT)
    assert begin("first").summary.remarks == ()
    assert begin("second").summary.remarks == ()
    monkeypatch.setenv(NAME, WRONG)
    (remark,) = begin("third").summary.remarks
    assert "the patients of this run are not found in 2 of the runs beside it" in remark
    assert begin("plain", manifest=None).summary.remarks == ()


def test_a_key_that_can_be_guessed_begins_no_run(begin: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(NAME, "x")
    with pytest.raises(ConfigError, match="can be guessed: it has 1 characters"):
        begin()
    path = tmp_path / "out" / "night" / "run.json"
    assert not loads(RunBinding, path.read_bytes(), "run.json").is_planned
    monkeypatch.setenv(NAME, RIGHT)
    assert patients(begin()) == {pseudonym("7", RIGHT.encode())}


def test_a_search_for_a_patient_says_where_the_key_does_not_fit(
    begin: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    monkeypatch.setenv(NAME, RIGHT)
    begin("first")
    begin("plain", manifest=None)
    assert runs_of_other_keys(out, "7", RIGHT.encode()) == ()
    with pytest.raises(
        ConfigError, match="holds another key than the one that made the pseudonyms of first, so nobody"
    ):
        runs_of_other_keys(out, "7", WRONG.encode())
    assert runs_of_other_keys(out, pseudonym("7", RIGHT.encode()), WRONG.encode()) == ()
    monkeypatch.setenv(NAME, WRONG)
    begin("second")
    assert runs_of_other_keys(out, "7", RIGHT.encode()) == ("second",)
    assert runs_of_other_keys(out, "7", RIGHT.encode(), ["first"]) == ()
    with pytest.raises(ConfigError, match="pseudonyms of second"):
        runs_of_other_keys(out, "7", RIGHT.encode(), ["second"])


@pytest.mark.parametrize(("code", "words"), [(401, "refuses user and password: set PREFECT_API_AUTH"), (502, "answer")])
def test_a_server_that_refuses_to_say_the_key_is_not_said_to_be_away(
    monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    def load(*_: Any, **__: Any) -> None:
        request = httpx.Request("GET", "http://night/api")
        raise httpx.HTTPStatusError("no", request=request, response=httpx.Response(code, request=request))

    monkeypatch.delenv(NAME, raising=False)
    monkeypatch.setenv("PREFECT_API_URL", "http://night/api")
    monkeypatch.setattr(Secret, "load", load)
    with pytest.raises(ConfigError, match=words):
        patient_key()
