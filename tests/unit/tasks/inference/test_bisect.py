from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

import pytest

from leukoflow.core.config import LimitSettings
from leukoflow.runs.records import DIED, Shard, Source, SourceKind
from leukoflow.tasks.inference import bisect
from leukoflow.tasks.store.job import ShardJob

JOB = ShardJob(
    root="/nowhere", run_id="r", source=Source("in.zip", SourceKind.ZIP, "i", 1), shard=Shard(0, 0, 16), attempt="a",
    bundle="b", bundle_digest="d", device="cpu", code="c", limits=LimitSettings(stage_seconds=7), meta_columns=(),
)  # fmt: skip


@pytest.mark.parametrize("guilty", [set(), {0}, {15}, {3, 4}, {0, 7, 8, 15}, set(range(16))])
def test_the_search_finds_all_the_guilty_and_nobody_else(guilty: set[int]) -> None:
    looks: list[Sequence[int]] = []

    def kills(ordinals: Sequence[int]) -> str | None:
        looks.append(ordinals)
        return "dead" if guilty & set(ordinals) else None

    found: list[tuple[int, str]] = []
    bisect.search(range(16), kills, found)
    assert found == [(ordinal, "dead") for ordinal in sorted(guilty)]
    assert len(looks) <= 1 + 2 * 4 * max(1, len(guilty))
    assert guilty != {15} or len(looks) == 6


def test_images_that_kill_only_together_are_not_blamed() -> None:
    found: list[tuple[int, str]] = []
    bisect.search(range(16), lambda o: "dead" if {2, 12} <= set(o) else None, found)
    assert found == []


def test_nobody_to_suspect() -> None:
    bisect.search([], lambda o: pytest.fail("there is nothing to look at"), [])


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (0, None),
        (-9, f"{DIED}: signal 9"),
        (75, f"{DIED}: a stage ran longer than 7 s"),
        (3, f"{DIED}: exit code 3"),
    ],
)
def test_how_the_child_ended_is_the_reason(monkeypatch: pytest.MonkeyPatch, code: int, reason: str | None) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, code))
    assert bisect._kills(JOB, [1]) == reason


def test_a_child_that_hangs_is_a_death(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*args: Any, timeout: float, **kwargs: Any) -> None:
        raise subprocess.TimeoutExpired("x", timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert bisect._kills(JOB, [1]) == f"{DIED}: longer than 21 s"
