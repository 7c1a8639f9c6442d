"""The chain of verdicts after any acts: each file names the one before it, and no altered byte goes unnoticed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from leukoflow.core.codec import loads
from leukoflow.core.errors import StorageError
from leukoflow.runs.layout import RunKey
from leukoflow.runs.records import CLASSES
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.review.verdict_file import Seal, decode, key_of
from leukoflow.tasks.review.verdict_record import NOTHING, Action, Standing, Target, Verdict
from leukoflow.tasks.review.verdicts import add_all, check_run, read

AT = "2026-11-25T08:00:00.000+00:00"


@st.composite
def acts(draw: st.DrawFn) -> Verdict:
    action = draw(st.sampled_from(Action))
    labelled = action in (Action.CORRECT, Action.WITHDRAW)
    said = st.text("abc ä<\n", min_size=1, max_size=6).filter(str.strip)
    number = draw(st.integers(0, 2))
    place = {"slide_id": "S1", "grouping": "manifest"} if number == 2 else {"image_key": f"ward-{number}/00.jpg"}
    return Verdict(
        run_id="night", action=action, who=draw(st.sampled_from(("dr. grey", "dr. webber"))), at=AT,
        label=draw(st.sampled_from(CLASSES[:2])) if labelled else None,
        comment=draw(said if action is Action.COMMENT else st.none() | said), seen_label=draw(st.sampled_from(CLASSES)),
        seen_status="predicted", seen_confidence=draw(st.sampled_from((None, 0.75))), **place,
    )  # fmt: skip


CHAINS = st.lists(st.lists(acts(), min_size=1, max_size=3), min_size=1, max_size=4)
"""Files of verdicts, each with what is said in it."""


@contextmanager
def night_with(chain: list[list[Verdict]]) -> Iterator[Path]:
    """A run with nothing but its binding and these verdicts."""
    with tempfile.TemporaryDirectory() as out:
        root = Path(out) / "night"
        root.mkdir()
        (root / RunKey.BINDING).write_text("{}")
        assert [add_all(out, verdicts) for verdicts in chain] == list(range(1, len(chain) + 1))
        yield root


def fold(verdicts: list[Verdict]) -> dict[Target, Standing]:
    """What stands after these acts, field by field and in plain words."""
    standing: dict[Target, Standing] = {}
    for target in {v.target for v in verdicts}:
        decision, flagged, comment, count = None, False, None, 0
        for v in verdicts:
            if v.target != target:
                continue
            count += 1
            comment = v.comment or comment
            if v.action is Action.ACCEPT or v.action is Action.CORRECT:
                decision = v
            elif v.action is Action.WITHDRAW and decision is not None:
                stands = decision.seen_label if decision.action is Action.ACCEPT else decision.label
                decision = None if stands == v.label else decision
            elif v.action is Action.FLAG:
                flagged = True
            elif v.action is Action.UNFLAG:
                flagged = False
        standing[target] = Standing(decision, flagged, comment, count)
    return standing


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(CHAINS)
def test_each_file_names_the_one_before_it(chain: list[list[Verdict]]) -> None:
    with night_with(chain) as root:
        previous = NOTHING
        for number, verdicts in enumerate(chain, 1):
            entry, rows = decode((root / key_of(number)).read_bytes(), "")
            assert (entry.number, entry.previous, len(rows)) == (number, previous, len(verdicts))
            previous = entry.digest
        found = read(str(root.parent), "night")
        assert list(found.given) == [v for verdicts in chain for v in verdicts]
        assert (found.head, found.damaged) == (previous, 0)
        checked = check_run(open_storage(str(root)), "night")
        assert (checked.verdicts, checked.head, checked.problems) == (len(found.given), previous, ())


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.lists(acts(), min_size=1, max_size=12), max_size=1))
def test_what_stands_is_a_plain_fold(chain: list[list[Verdict]]) -> None:
    from leukoflow.tasks.review.verdict_record import Verdicts

    given_ = [v for verdicts in chain for v in verdicts]
    assert Verdicts(tuple(given_)).standings() == fold(given_)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(CHAINS, st.data())
def test_an_altered_byte_is_noticed(chain: list[list[Verdict]], data: st.DataObject) -> None:
    with night_with(chain) as root:
        files = sorted((root / RunKey.VERDICTS).iterdir())
        assert len(files) == 2 * len(chain)
        for file in files:
            whole = file.read_bytes()
            altered = bytearray(whole)
            altered[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
            file.write_bytes(altered)
            problems = dict(check_run(open_storage(str(root)), "night").problems)
            if file.suffix == ".parquet":
                assert f"{RunKey.VERDICTS}/{file.name}" in problems
            else:
                assert problems or _same_seal(bytes(altered), whole)  # a blank of JSON says nothing
            file.write_bytes(whole)
        assert check_run(open_storage(str(root)), "night").problems == ()


def _same_seal(altered: bytes, whole: bytes) -> bool:
    try:
        return loads(Seal, altered, "") == loads(Seal, whole, "")
    except StorageError:
        return False
