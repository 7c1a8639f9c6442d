"""A run's sign of life from its first moment: phases, last words, and the log of what fails before there is one."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest

from leukoflow.core.errors import ConfigError, LeukoflowError, RunCancelledError, SourceError
from leukoflow.runs.heart import beating
from leukoflow.runs.progress import Heartbeat, ProgressReader
from leukoflow.runs.runlog import run_log
from leukoflow.storage.base import Storage
from leukoflow.storage.local import LocalStorage


def beat(root: Path) -> Heartbeat:
    found = ProgressReader(str(root)).heartbeat()
    assert found is not None
    return found


def test_it_beats_from_the_first_moment_and_says_what_it_waits_for(tmp_path: Path) -> None:
    with beating(str(tmp_path), "planning the source") as heart:
        assert (beat(tmp_path).state, beat(tmp_path).phase, beat(tmp_path).pid) == (
            "running", "planning the source", os.getpid()
        )  # fmt: skip
        heart.phase("starting 2 workers")
        assert beat(tmp_path).phase == "starting 2 workers"
        heart.say("finished", "all is done", 0)
        heart.say("failed", "too late", 1)
    assert (beat(tmp_path).state, beat(tmp_path).message, beat(tmp_path).exit_code) == ("finished", "all is done", 0)


@pytest.mark.parametrize(
    ("error", "state", "words", "code"),
    [
        (SourceError("night.zip holds no images"), "failed", "night.zip holds no images", 2),
        (ConfigError("the manifest has no image_key"), "failed", "the manifest has no image_key", 1),
        (RunCancelledError("it was asked to stop"), "cancelled", "it was asked to stop", 130),
        (KeyboardInterrupt(), "cancelled", "it was stopped at once while planning the source", 130),
        (MemoryError(), "failed", "MemoryError while planning the source", 1),
    ],
)
def test_what_ends_it_is_its_last_word(tmp_path: Path, error: BaseException, state: str, words: str, code: int) -> None:
    with pytest.raises(type(error)), beating(str(tmp_path), "planning the source"):
        raise error
    last = beat(tmp_path)
    assert (last.state, last.message, last.exit_code) == (state, words, code)
    assert len(list(tmp_path.glob("logs/*.log"))) == (state == "failed")


def test_a_failure_is_logged_once_whether_the_log_was_open_or_not(tmp_path: Path) -> None:
    with pytest.raises(LeukoflowError), beating(str(tmp_path), "planning the source"):
        raise LeukoflowError("no Prefect server; start it")
    (log,) = tmp_path.glob("logs/*.jsonl")
    (line,) = [json.loads(text) for text in log.read_text().splitlines()]
    assert (line["level"], line["message"]) == ("ERROR", "no Prefect server; start it")
    log.unlink()
    with (
        pytest.raises(LeukoflowError),
        run_log(str(tmp_path), "night"),
        beating(str(tmp_path), "planning the source"),
    ):
        raise LeukoflowError("the flow says it itself")
    (log,) = tmp_path.glob("logs/*.jsonl")
    assert log.read_text() == ""


def test_a_block_within_another_uses_its_heart_which_goes_on_beating(tmp_path: Path) -> None:
    with beating(str(tmp_path), "planning the source") as outer:
        with beating(str(tmp_path), "starting Prefect's server") as inner:
            assert inner is outer
        outer.phase("screening images")
        assert (beat(tmp_path).state, beat(tmp_path).phase) == ("running", "screening images")
    with beating(str(tmp_path), "planning the source") as again:
        assert again is not outer


@pytest.mark.parametrize("how", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_last_word_that_could_not_be_written_is_said_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: BaseException
) -> None:
    monkeypatch.setattr("leukoflow.runs.heart.RETRY_SECONDS", 0.0)
    original, failures = LocalStorage.write, [how, OSError(28, "No space left on device")]

    def write(self: Storage, key: str, data: bytes) -> None:
        if b"finished" in data and failures:
            raise failures.pop(0)
        original(self, key, data)

    with suppress(KeyboardInterrupt), beating(str(tmp_path), "writing tables and manifest") as heart:
        monkeypatch.setattr(LocalStorage, "write", write)
        heart.say("finished", "all is done", 0)
    assert (beat(tmp_path).state, beat(tmp_path).message) == ("finished", "all is done")
    assert failures == []
