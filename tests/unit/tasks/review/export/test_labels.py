"""Verdicts as training labels: what training reads, without a patient's name, and whole or counted."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
from exports import JANE, MARY, NIGHT

from leukoflow.core.errors import ConfigError, SourceError
from leukoflow.runs.records import Status
from leukoflow.tasks.review.export.labels import LABELS, labels_csv, training_labels, write_training_set
from leukoflow.tasks.review.keys import run_key_of
from leukoflow.tasks.review.query import Query, Sort
from leukoflow.tasks.review.runs import open_run_table
from leukoflow.tasks.review.verdict_record import Action
from leukoflow.tasks.review.verdicts import add
from leukoflow.tasks.training.data import read_labels, read_members
from leukoflow.tasks.upkeep.erase import erase_patient


def test_labels_are_what_training_reads(copy: Path, tmp_path: Path) -> None:
    out = str(copy.parent)
    with pytest.raises(ConfigError, match="nothing to train on"):
        write_training_set(out, tmp_path / "data")
    opened = open_run_table(out, NIGHT)
    ordinals = [
        f.ordinal for f in opened.fields(Query(status=Status.PREDICTED, sort=Sort.ORDER, descending=False)).items
    ]
    for i, ordinal in enumerate(ordinals[:12]):
        action, label = (Action.ACCEPT, None) if i % 2 else (Action.CORRECT, "Pro")
        add(out, opened.verdict_on_field(ordinal, action, "dr. grey", label))
    add(out, opened.verdict_on_field(ordinals[3], Action.FLAG, "dr. grey"))
    add(out, opened.verdict_on_field(35, Action.CORRECT, "dr. grey", "Benign"))  # rejected, but a person knows better
    add(out, opened.verdict_on_field(ordinals[20], Action.COMMENT, "dr. grey", comment="no label"))
    labels = training_labels(out)
    assert len(labels) == 12
    text = labels_csv(labels).decode()
    assert text.splitlines()[0] == ",".join(LABELS)
    for word in (MARY, JANE, "mary", "jane", "ward-", "S0,", "S1,", "dr."):
        assert word not in text.replace("S0000", "").replace("S0001", "")
    made = write_training_set(out, tmp_path / "data")
    assert (made.images, made.lost) == (12, 0)
    read = read_labels(tmp_path / "data")
    assert len(read) == 12
    assert len(list(read_members(tmp_path / "data" / "all_fields.zip", read.keys))) == 12
    assert len(set(read.cluster)) == 2  # mary's and jane's fields stay together
    with zipfile.ZipFile(tmp_path / "data" / "all_fields.zip") as archive:
        assert sorted(archive.namelist()) == sorted(read.keys)
    with pytest.raises(ConfigError, match="name another folder"):
        write_training_set(out, tmp_path / "data")
    assert training_labels(out, [run_key_of("other")]) == []
    erase_patient(out, MARY)
    left = training_labels(out)
    assert 0 < len(left) < 12
    assert {x.group for x in left} == {"G0000"}


def test_labels_of_images_that_are_gone_are_counted(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    out = str(copy.parent)
    opened = open_run_table(out, NIGHT)
    add(out, opened.verdict_on_field(0, Action.ACCEPT, "dr. grey"))

    def gone(*_: Any) -> Any:
        raise SourceError("gone")

    monkeypatch.setattr("leukoflow.tasks.review.export.labels.open_reader", gone)
    made = write_training_set(out, tmp_path / "data")
    assert (made.images, made.lost) == (0, 1)
