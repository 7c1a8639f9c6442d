"""The keys of a run and of its output folder, held against the lists in docs/data-format.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from leukoflow.runs.layout import LedgerKey, OutKey, RunKey, Stage
from leukoflow.runs.records import Shard
from leukoflow.storage import base, local
from leukoflow.tasks.store.commit import STAGES

FORMAT = (Path(__file__).parents[3] / "docs" / "data-format.md").read_text()
SHARD = "<shard>"


def fenced(after: str) -> list[tuple[str, str]]:
    """Names and descriptions in the fenced block behind a heading; two blanks stand between them."""
    block = FORMAT.split(f"{after}\n", 1)[1].split("```\n", 2)[1]
    return [(names, words) for names, words in (re.split(r" {2,}", line, maxsplit=1) for line in block.splitlines())]


RUN = fenced("# What a run leaves behind")
LISTED = [name for names, _ in RUN for name in names.split()]


def test_documented_names_are_those_of_the_layout() -> None:
    stores = {RunKey.group(store, SHARD) for store in RunKey.STORES}
    folders = {f"{folder}/" for folder in RunKey.FOLDERS if folder not in RunKey.STORES} | {f"{s}/" for s in stores}
    assert sorted(LISTED) == sorted(folders | set(RunKey.FILES))
    assert len(LISTED) == len(set(LISTED))


def test_documented_parts_are_those_of_the_layout() -> None:
    for table in (RunKey.PREDICTIONS, RunKey.CELLS, RunKey.FIELDS):
        words = next(words for names, words in RUN if names == f"{table}/")
        assert words.startswith(f"{RunKey.part(table, SHARD).partition('/')[2]}: ")
        assert RunKey.part(table, SHARD) == f"{table}/part-<shard>.parquet"
    partial = next(words for names, words in RUN if names == f"{RunKey.PARTIAL}/")
    for key in (RunKey.PARTIAL_SLIDES, RunKey.PARTIAL_REPORT):
        assert key.removeprefix(f"{RunKey.PARTIAL}/") in partial


def test_places_that_the_text_names() -> None:
    assert f"`{RunKey.marker(Stage.ACTIVATIONS, SHARD)}`" in FORMAT
    assert f"`{RunKey.verdict(1)}`" in FORMAT
    assert f"`{RunKey.verdict_seal(1).partition('/')[2]}` seals the file" in FORMAT
    for key in (*(k for k in OutKey.RESERVED if k != OutKey.INBOX), OutKey.BASELINE, f"{OutKey.ledger('<site>')}/"):
        assert f"`OUT/{key}`" in FORMAT


def test_documented_ledger_is_that_of_the_layout() -> None:
    root = f"OUT/{OutKey.ledger('<site>')}"
    assert [names for names, _ in fenced("## The inbox's ledger")] == [
        f"{root}/{LedgerKey.claim(1).replace('00001', '<number>')}",
        f"{root}/{LedgerKey.outcome(1).replace('00001', '<number>')}",
        f"{root}/{LedgerKey.MISSING}",
    ]
    assert LedgerKey.claim(1) == "claims/00001.parquet"
    assert LedgerKey.outcome(123456) == "outcomes/123456.json"


def test_stages_are_those_of_a_shard() -> None:
    assert STAGES == (Stage.MASKS, Stage.FEATURES, Stage.ACTIVATIONS, Stage.PREDICTIONS)


def test_every_key_lies_in_a_folder_that_is_listed() -> None:
    name = Shard(7, 0, 0).name
    keys = {
        RunKey.part(RunKey.CELLS, name): "cells/part-00007.parquet",
        RunKey.group(RunKey.MASKS, name): "masks.zarr/00007",
        RunKey.marker(Stage.PREDICTIONS, name): "markers/predictions/00007.json",
        RunKey.attempt("00007/a1"): "_attempts/00007/a1",
        RunKey.log("run-1.log"): "logs/run-1.log",
        RunKey.host("0123.json"): "hosts/0123.json",
        RunKey.failure(name): "failures/00007.json",
        RunKey.verdict(12): "verdicts/00012.parquet",
        RunKey.verdict_seal(12): "verdicts/00012.json",
    }
    for key, expected in keys.items():
        assert key == expected
        assert RunKey.top(key) in RunKey.FOLDERS
    assert RunKey.marker(Stage.PREDICTIONS, name).startswith(f"{RunKey.markers(Stage.PREDICTIONS)}/")
    assert OutKey.of_run("night-1", RunKey.MANIFEST) == "night-1/manifest.json"


def test_attempts_have_names_of_their_own() -> None:
    first, second = RunKey.new_attempt("compact"), RunKey.new_attempt("compact")
    assert first != second
    assert re.fullmatch(r"_attempts/compact-[0-9a-f]{8}", first)


def test_storage_spells_the_folder_of_attempts_as_the_layout_does() -> None:
    """Storage lies below runs and cannot import the layout."""
    for module in (base, local):
        spelled = re.findall(r"[\"'](_[a-z]+)\b", Path(module.__file__).read_text())
        assert set(spelled) == {RunKey.ATTEMPTS}, module.__name__


@pytest.mark.parametrize(
    ("name", "shard"),
    [
        ("part-00003.parquet", "00003"),
        ("part-00000-00063.parquet", "00000-00063"),
        ("part-123456.parquet", "123456"),
        ("part-.parquet", None),
        ("part-00003.parquet.tmp", None),
        ("xpart-00003.parquet", None),
        ("00003.parquet", None),
    ],
)
def test_shard_of_a_part(name: str, shard: str | None) -> None:
    assert RunKey.shard_of_part(name) == shard
    if shard is not None:
        assert RunKey.part("t", shard) == f"t/{name}"


def test_keys_are_read_back() -> None:
    marker = RunKey.marker(Stage.MASKS, "00042")
    assert RunKey.shard_of_json(marker.rpartition("/")[2]) == "00042"
    assert RunKey.top("plan.parquet") == "plan.parquet"
    assert RunKey.top(RunKey.group(RunKey.FEATURES, "00001")) == RunKey.FEATURES
    assert [top for top in (*RunKey.FILES, *RunKey.FOLDERS) if RunKey.is_store(top)] == list(RunKey.STORES)
    assert RunKey.in_table("predictions/part-00003.parquet", RunKey.CELLS) == "cells/part-00003.parquet"
