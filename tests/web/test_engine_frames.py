"""The engine's parts without its processes: the queue, the frames, and what is said of a bundle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from same_diagnosis import same

from leukoflow.apps.web.engine.child import _measured
from leukoflow.apps.web.engine.fair_queue import FairQueue
from leukoflow.apps.web.engine.frames import (
    HEADER,
    KINDS,
    Answer,
    FrameError,
    TileShape,
    diagnosis_frame,
    diagnosis_of,
    header_of,
    record_of,
)
from leukoflow.runs.records import Quality, Status
from leukoflow.runs.schema import CELLS
from leukoflow.tasks.inference.single import Examination, TileView

# --- the queue -------------------------------------------------------------------------------------------------------


def test_persons_take_turns() -> None:
    queue: FairQueue[str] = FairQueue(100, 50)
    for i in range(4):
        queue.put("anna", f"a{i}")
    queue.put("bert", "b0")
    assert queue.take() == "a0"
    queue.put("cleo", "c0")
    queue.put("bert", "b1")
    taken = []
    while (item := queue.take()) is not None:
        taken.append(item)
    assert taken == ["b0", "a1", "c0", "b1", "a2", "a3"]


def test_the_queue_is_bounded_in_all_and_per_person() -> None:
    queue: FairQueue[int] = FairQueue(3, 2)
    for i, who in enumerate(["anna", "anna", "bert"]):
        assert queue.full_for(who) is None
        queue.put(who, i)
    assert queue.full_for("anna") == "2 of your images are waiting already"
    assert queue.full_for("cleo") == "3 images are waiting already"
    assert queue.discard("anna", 1)
    assert not queue.discard("anna", 1)
    assert queue.full_for("cleo") is None
    queue.put("bert", 9, again=True)
    assert [queue.take() for _ in range(4)] == [0, 9, 2, None]


# --- frames ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diagnosis() -> Examination:
    """One with everything in it: two tiles, cells, and offsets that are not aligned."""
    rng = np.random.default_rng(0)

    def tile(height: int, width: int, cells: int) -> TileView:
        return TileView(
            rng.integers(0, 256, (height, width, 3), np.uint8), rng.integers(0, 256, (height, width, 3), np.uint8),
            rng.integers(0, 3, (height, width), np.uint8), rng.integers(0, 9, (height, width), np.uint16),
            rng.random((2, 3), np.float32), np.arange(cells, dtype=np.int32), rng.random(cells, np.float32),
            rng.random(cells, np.float32), rng.random((cells, 4, 8, 8)).astype(np.float16), 44,
        )  # fmt: skip

    def column(field: pa.Field) -> pa.Array:
        if field.name in ("run_id", "image_key"):
            return pa.array([""] * 5)
        return pa.array([0, 1, None if field.nullable else 1, 0, 1]).cast(field.type)  # no scale, no area

    columns = [column(f) for f in CELLS]
    return Examination(
        sha256="ab" * 32, bundle="one", bundle_digest="cd" * 32, status=Status.ABSTAINED, reason="ambiguous: é",
        label="Early", probabilities=(0.1, 0.4, 0.3, 0.2), prediction_set=("Early", "Pre"), ood=1.25, width_px=300,
        height_px=200, quality=Quality(1.5, 0.5, 0.0, 0.2, 0.1, 1.0, 0.5, 0.4, ("first of 2 pages",)),
        remarks=("first of 2 pages",), cells=pa.Table.from_arrays(columns, schema=CELLS),
        tiles=(tile(13, 17, 3), tile(11, 7, 0), tile(5, 5, 2)), seconds=(("decode", 0.5), ("segment", 0.25)),
    )  # fmt: skip


def parsed(pieces: list[Any]) -> tuple[Answer, bytes]:
    whole = b"".join(pieces)
    kind, words, length = header_of(whole[: HEADER.size])
    record = record_of(kind, whole[HEADER.size : HEADER.size + words])
    assert isinstance(record, Answer)
    body = whole[HEADER.size + words :]
    assert len(body) == length
    return record, body


def test_a_diagnosis_passes_unaltered(diagnosis: Examination) -> None:
    answer, body = parsed(diagnosis_frame(7, diagnosis))
    assert answer.number == 7
    same(diagnosis_of(answer, body), diagnosis)


def test_bytes_that_the_shapes_do_not_account_for_are_refused(diagnosis: Examination) -> None:
    answer, body = parsed(diagnosis_frame(7, diagnosis))
    tile = answer.tiles[0]
    for wrong in (
        replace(answer, cells=1 << 30),
        replace(answer, tiles=(replace(tile, height=1 << 31, width=1 << 31),)),
        replace(answer, tiles=(replace(tile, cells=tile.cells + 1),)),
        replace(answer, tiles=(*answer.tiles, TileShape(0, 0, 0, 0, 0))),
        replace(answer, tiles=()),
    ):
        with pytest.raises(FrameError):
            diagnosis_of(wrong, body)
    with pytest.raises(FrameError):
        diagnosis_of(answer, body[:-1])
    with pytest.raises(FrameError):
        diagnosis_of(answer, body + b"x")


def test_what_is_no_frame_is_refused() -> None:
    for head in (HEADER.pack(200, 0, 0), HEADER.pack(1, 1 << 31, 0), HEADER.pack(1, 0, 1 << 60)):
        with pytest.raises(FrameError):
            header_of(head)
    for words in (b"", b"{", b"[" * 100_000, b'{"number": "x"}', b"\x80\x04cos\nsystem\n."):
        with pytest.raises(FrameError):
            record_of(KINDS.index(Answer), words)


def test_what_was_measured_says_what_became_of_abstentions() -> None:
    ours = {"fields": 400, "accuracy": 0.963, "intervals_95": {"accuracy": [0.936, 0.984]}, "abstention_rate": 0.047}
    words = (
        "Whole clusters held out: 100 fields, 4 repeats; taking the likeliest class even where the model abstained, "
        "right in 96.3 % (95 % interval 93.6 to 98.4 %); 4.7 % abstained"
    )
    for answered, said in ((None, words), (0.9715, words + "; right in 97.2 % of the others")):
        models = {"leukoflow": ours | {"accuracy_answered": answered}}
        assert _measured({"protocols": {"cluster": {"repeats": 4, "models": models}}}) == (said,)
