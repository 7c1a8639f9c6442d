"""Verdicts: appended and never replaced, safe with several servers, found when altered, gone with their patient."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import digests

from leukoflow.core.codec import dumps
from leukoflow.core.errors import RequestError, RunBusyError, RunNotFoundError
from leukoflow.runs.lock import held
from leukoflow.runs.progress import read_manifest
from leukoflow.runs.schema import VERDICTS
from leukoflow.storage.base import Storage
from leukoflow.storage.local import LocalStorage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.intake.patient_key import pseudonym
from leukoflow.tasks.review.verdict_record import NOTHING, Action, Verdict
from leukoflow.tasks.review.verdicts import VerdictReader, add, add_all, check_run, read
from leukoflow.tasks.store.compact import compact_run
from leukoflow.tasks.upkeep.correct import correct_patient
from leukoflow.tasks.upkeep.erase import erase_patient
from leukoflow.tasks.upkeep.retention import retain
from leukoflow.tasks.upkeep.verify import verify_run

KEY = b"a key that only these tests have"
MARY, JANE = pseudonym("mary", KEY), pseudonym("jane", KEY)
HERS, OTHERS = "ward-0/00.jpg", "ward-1/01.jpg"  # mary's field on slide S0, jane's on S1


def verdict(image: str | None = OTHERS, action: Action = Action.FLAG, **more: Any) -> Verdict:
    given = {"run_id": "night", "who": "dr. grey", "at": "2026-11-25T08:00:00+00:00", "seen_label": "Pre"} | more
    return Verdict(action=action, image_key=image, **given)


def said(out: Path) -> list[tuple[str | None, str, str | None]]:
    return [(v.image_key or v.slide_id, str(v.action), v.comment) for v in read(str(out), "night").given]


def test_a_verdict_comes_back_as_it_was_given(copy: Path) -> None:
    out = str(copy.parent)
    assert read(out, "night").given == ()
    first = verdict(action=Action.CORRECT, label="Pro", comment="=1+1 <b>\nsmudged", seen_confidence=0.75,
                    seen_status="abstained", seen_bundle_digest="b" * 64,
                    at="2026-11-25T09:00:00.250+01:00")  # fmt: skip
    second = verdict(None, slide_id="S1", grouping="manifest", action=Action.ACCEPT)
    assert (add(out, first), add(out, second)) == (1, 2)
    found = read(out, "night").given
    assert found[0] == replace(first, at="2026-11-25T08:00:00.250+00:00")
    assert found[1].target == ("slide", "manifest:S1")
    assert (found[0].said, found[1].said) == ("Pro", "Pre")
    table = pq.read_table(copy / "verdicts" / "00001.parquet")
    assert table.schema.remove_metadata().equals(VERDICTS)
    assert sorted(p.name for p in (copy / "verdicts").iterdir()) == [
        "00001.json", "00001.parquet", "00002.json", "00002.parquet",
    ]  # fmt: skip


def test_the_last_word_holds(copy: Path) -> None:
    out = str(copy.parent)
    acts = [(Action.ACCEPT, None, None), (Action.FLAG, None, "look"), (Action.CORRECT, "Early", None),
            (Action.UNFLAG, None, None), (Action.COMMENT, None, "smudge")]  # fmt: skip
    for action, label, comment in acts:
        add(out, verdict(action=action, label=label, comment=comment))
    found = read(out, "night")
    standing = found.standings()[("image", OTHERS)]
    assert standing.decision is not None
    assert (standing.decision.said, standing.flagged, standing.comment, standing.verdicts) == (
        "Early",
        False,
        "smudge",
        5,
    )
    assert len(found.of(("image", OTHERS))) == 5


def test_a_decision_is_withdrawn_by_another_entry(copy: Path) -> None:
    out = str(copy.parent)

    def standing() -> Any:
        return read(out, "night").standings()[("image", OTHERS)]

    add(out, verdict(action=Action.CORRECT, label="Early", comment="rim"))
    add(out, verdict(action=Action.FLAG))
    add(out, verdict(action=Action.WITHDRAW, label="Early", who="dr. webber"))
    assert (standing().decision, standing().flagged, standing().comment, standing().verdicts) == (None, True, "rim", 3)
    last = read(out, "night").given[-1]
    assert (last.who, last.label, last.seen_label, last.said) == ("dr. webber", "Early", "Pre", None)
    checked = check_run(open_storage(str(copy)), "night")
    assert (checked.verdicts, checked.problems) == (3, ())
    add(out, verdict(action=Action.ACCEPT))
    assert standing().decision.said == "Pre"
    add(out, verdict(action=Action.WITHDRAW, label="Early"))  # it came too late: a new decision stands
    assert standing().decision.said == "Pre"
    add(out, verdict(action=Action.WITHDRAW, label="Pre"))
    assert standing().decision is None


BAD: list[tuple[Verdict, str]] = [
    (verdict(action=Action.WITHDRAW), "no decision to withdraw"),
    (verdict(action=Action.WITHDRAW, label="Blast"), "no decision to withdraw"),
    (verdict(None), "name either"),
    (verdict(slide_id="S1", grouping="manifest"), "name either"),
    (verdict(action=Action.CORRECT), "needs a label"),
    (verdict(action=Action.CORRECT, label="Pro", seen_status="quarantined"), "nothing to label: flag it or comment"),
    (verdict(action=Action.CORRECT, label="Blast"), "needs a label"),
    (verdict(action=Action.ACCEPT, label="Pro"), "only a correction"),
    (verdict(action=Action.ACCEPT, seen_label=None), "no prediction to accept"),
    (verdict(action=Action.COMMENT, comment=" \n"), "empty"),
    (verdict(comment="x" * 2001), "shorten"),
    (verdict(comment="a\x00b"), "cannot be shown"),
    (verdict(comment="\ud800"), "cannot be shown"),
    (verdict(who=" "), "must be known"),
    (verdict(at="yesterday"), "no time"),
    (verdict(at="2026-11-25T08:00:00"), "no time"),
]


@pytest.mark.parametrize(("bad", "words"), BAD, ids=[words for _, words in BAD])
def test_what_is_no_verdict_is_refused(copy: Path, bad: Verdict, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        add(str(copy.parent), bad)
    assert not (copy / "verdicts").exists()


@pytest.mark.parametrize("run_id", ["other", "", "..", "night/..", "../out/night", "night/predictions", "\\"])
def test_a_run_that_there_is_not(copy: Path, run_id: str) -> None:
    before = digests(copy.parent)
    with pytest.raises(RunNotFoundError):
        add(str(copy.parent), verdict(run_id=run_id))
    with pytest.raises(RunNotFoundError):
        read(str(copy.parent), run_id)
    assert digests(copy.parent) == before


def test_two_runs_at_once_are_refused(copy: Path) -> None:
    with pytest.raises(RequestError, match="one run at a time"):
        add_all(str(copy.parent), (verdict(), verdict(run_id="other")))
    with pytest.raises(RequestError, match="one at least"):
        add_all(str(copy.parent), ())


def test_many_servers_at_once_lose_and_replace_nothing(copy: Path) -> None:
    out = str(copy.parent)
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda i: add(out, verdict(comment=str(i))), range(40)))
    assert sorted(numbers) == list(range(1, 41))
    assert sorted(int(v.comment or "") for v in read(out, "night").given) == list(range(40))
    found = verify_run(str(copy))
    assert (found.findings, found.verdicts) == ((), 40)


def test_verify_knows_of_verdicts_and_predictions_stay_as_they_were(night: Run, copy: Path) -> None:
    add_all(str(copy.parent), (verdict(), verdict(HERS, Action.COMMENT, comment="hm")))
    found = verify_run(str(copy))
    assert (found.findings, found.verdicts) == ((), 2)
    assert found.verdict_head == check_run(open_storage(str(copy)), "night").head != NOTHING
    mine = {k: v for k, v in digests(copy).items() if not k.startswith("verdicts/")}
    assert mine == digests(Path(night.root))
    assert verify_run(night.root).verdict_head == ""


def _forge(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path, compression="zstd", use_dictionary=False)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _comment(table: pa.Table) -> pa.Table:
    i = table.schema.get_field_index("comment")
    return table.set_column(i, table.schema.field(i), pa.array(["never said"] * len(table)))


def _unsealed(folder: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    _forge(folder / f"{name}.parquet", change)
    (folder / f"{name}.json").unlink()


def _swap(folder: Path) -> None:
    for kind in ("parquet", "json"):
        (folder / f"00001.{kind}").rename(folder / f"x.{kind}")
        (folder / f"00002.{kind}").rename(folder / f"00001.{kind}")
        (folder / f"x.{kind}").rename(folder / f"00002.{kind}")


HARMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "first altered": (lambda d: _flip(d / "00001.parquet"), "not those that were sealed"),
    "last altered": (lambda d: _forge(d / "00003.parquet", _comment), "not those that were sealed"),
    "last altered, its seal gone": (lambda d: _unsealed(d, "00003", _comment), "its rows are not those"),
    "row dropped": (lambda d: _unsealed(d, "00003", lambda t: t.slice(1)), "its rows are not those"),
    "first lost": (lambda d: (d / "00001.parquet").unlink(), "missing"),
    "last lost": (lambda d: (d / "00003.parquet").unlink(), "missing"),
    "first lost wholly": (lambda d: [(d / f"00001.{k}").unlink() for k in ("parquet", "json")], "missing"),
    "seal lost": (lambda d: (d / "00002.json").unlink(), "missing"),
    "seal edited": (lambda d: (d / "00002.json").write_text("{}"), "no seal"),
    "put in": (lambda d: shutil.copy(d / "00001.parquet", d / "00004.parquet"), "put in or moved"),
    "swapped": (lambda d: _swap(d), "put in or moved"),
    "something else": (lambda d: (d / "notes.txt").write_text("hi"), "no file of verdicts"),
    "no Parquet": (lambda d: [(d / "00003.parquet").write_bytes(b"?"), (d / "00003.json").unlink()], "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMS)
def test_what_was_done_to_verdicts_is_found(copy: Path, name: str) -> None:
    for comment in "abc":
        add_all(str(copy.parent), (verdict(comment=comment), verdict(HERS, comment=comment)))
    assert check_run(open_storage(str(copy)), "night").problems == ()
    harm, words = HARMS[name]
    harm(copy / "verdicts")
    found = verify_run(str(copy))
    assert any(words in f.what for f in found.findings), found.findings
    assert all(f.where.startswith("verdicts/") and "predictions are not affected" in f.remedy for f in found.findings)
    assert found.skipped is None


def test_verdicts_of_another_run_are_found(copy: Path) -> None:
    out = copy.parent
    shutil.copytree(copy, out / "second")
    add(str(out), verdict())
    shutil.copytree(copy / "verdicts", out / "second" / "verdicts")
    assert [what for _, what in check_run(open_storage(str(out / "night")), "second").problems] == [
        "it belongs to another run"
    ]


def test_a_writer_cut_off_before_sealing_is_no_fault(copy: Path) -> None:
    add(str(copy.parent), verdict())
    (copy / "verdicts" / "00001.json").unlink()
    assert verify_run(str(copy)).ok
    assert add(str(copy.parent), verdict()) == 2
    assert (copy / "verdicts" / "00001.json").exists()
    assert verify_run(str(copy)).ok


@pytest.mark.parametrize("harm", ["lost", "damaged"])
def test_after_a_loss_verdicts_go_on_behind_it(copy: Path, harm: str) -> None:
    for _ in range(2):
        add(str(copy.parent), verdict())
    path = copy / "verdicts" / "00002.parquet"
    path.unlink() if harm == "lost" else path.write_bytes(b"?")
    assert add(str(copy.parent), verdict(comment="later")) == 3
    problems = check_run(open_storage(str(copy)), "night").problems
    assert [where for where, _ in problems] == ["verdicts/00002.parquet"]
    found = read(str(copy.parent), "night")
    assert ([v.comment for v in found.given], found.damaged) == ([None, "later"], harm == "damaged")


def test_a_reader_reads_each_file_once_and_sees_what_is_new(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(copy.parent)
    add(out, verdict(comment="one"))
    reader = VerdictReader(open_storage(str(copy)))
    asked: list[str] = []
    original = LocalStorage.read
    monkeypatch.setattr(LocalStorage, "read", lambda self, key: asked.append(key) or original(self, key))
    assert len(reader.read().given) == 1
    first = reader.read()
    assert first is reader.read()
    add(out, verdict(comment="two"))
    assert [v.comment for v in reader.read().given] == ["one", "two"]
    assert reader.read().head != first.head
    assert asked.count("verdicts/00001.parquet") == 2  # once by the reader, once to chain the second
    erase_patient(out, JANE)
    assert reader.read().given == ()


def test_erasing_takes_a_patients_verdicts_and_leaves_the_chain(night: Run, copy: Path) -> None:
    out = copy.parent
    add_all(str(out), (verdict(HERS, comment="mary's blasts"), verdict(OTHERS, comment="jane's")))
    add(str(out), verdict(None, slide_id="S0", grouping="manifest", comment="mary's slide"))
    add(str(out), verdict(None, slide_id="S1", grouping="manifest", comment="jane's slide"))
    add(str(out), verdict(HERS, Action.CORRECT, label="Pro", comment="mary again"))
    before = check_run(open_storage(str(copy)), "night").head
    done = erase_patient(str(out), MARY)
    assert done[0].images == 13
    assert said(out) == [(OTHERS, "flag", "jane's"), ("S1", "flag", "jane's slide")]
    for path in copy.rglob("*"):
        if path.is_file() and path.suffix != ".zip":
            assert b"mary's" not in path.read_bytes(), path
    found = verify_run(str(copy))
    assert (found.findings, found.verdicts, found.verdict_head) == ((), 2, before)
    add(str(out), verdict(HERS, comment="later"))
    assert verify_run(str(copy)).ok
    listed = {key for key, _, _ in read_manifest(open_storage(str(copy))).tables}  # type: ignore[union-attr]
    assert listed == {"plan.parquet", "scales.parquet", "slides.parquet", "duplicates.parquet", "missing.parquet"}
    assert erase_patient(str(out), MARY) == ()


def test_an_erased_file_is_still_watched(copy: Path) -> None:
    add_all(str(copy.parent), (verdict(HERS, comment="mary's"), verdict(OTHERS, comment="jane's")))
    erase_patient(str(copy.parent), MARY)
    _unsealed(copy / "verdicts", "00001", _comment)
    assert [w for _, w in check_run(open_storage(str(copy)), "night").problems] == [
        "altered: its rows are not those that were written"
    ]


def test_correcting_a_patient_keeps_verdicts(copy: Path) -> None:
    add_all(str(copy.parent), (verdict(HERS, comment="hers"), verdict(None, slide_id="S0", grouping="manifest")))
    before = digests(copy / "verdicts")
    assert correct_patient(str(copy.parent), JANE, MARY)[0].images == 13
    assert digests(copy / "verdicts") == before
    found = verify_run(str(copy))
    assert (found.findings, found.verdicts) == ((), 2)


def test_compacting_keeps_verdicts_and_retention_takes_them_with_the_run(copy: Path) -> None:
    add(str(copy.parent), verdict())
    compact_run(str(copy))
    assert (verify_run(str(copy)).ok, len(said(copy.parent))) == (True, 1)
    retain(str(copy.parent), 0, 0)
    assert not copy.exists()


def test_nobody_gives_verdicts_while_a_patient_is_erased(copy: Path) -> None:
    run = open_storage(str(copy))
    with held(run, "compact.lock", "erase"), pytest.raises(RunBusyError, match="in a minute"):
        add(str(copy.parent), verdict())
    with held(run, "compact.lock", "compacting"):
        add(str(copy.parent), verdict())
    run.write("amend.json", b"{}")
    with pytest.raises(RunBusyError):
        add(str(copy.parent), verdict())


def test_a_run_that_is_deleted_meanwhile_leaves_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LocalStorage.create

    def create(self: Storage, key: str, data: bytes) -> bool:
        if key == "verdicts/00001.parquet":
            shutil.rmtree(copy)
        return original(self, key, data)

    monkeypatch.setattr(LocalStorage, "create", create)
    with pytest.raises(RunNotFoundError, match="deleted meanwhile"):
        add(str(copy.parent), verdict())
    assert not copy.exists() or not any(p.is_file() for p in copy.rglob("*"))


def test_seals_are_records(copy: Path) -> None:
    add(str(copy.parent), verdict())
    seal = json.loads((copy / "verdicts" / "00001.json").read_bytes())
    assert set(seal) == {"number", "entry", "sha256", "size"}
    assert seal["sha256"] == digests(copy / "verdicts")["00001.parquet"]
    assert dumps(read(str(copy.parent), "night").given[0])
