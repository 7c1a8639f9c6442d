"""What an inbox holds, what a night takes of it, and that nothing is taken twice or lost."""

from __future__ import annotations

import os
import shutil
import time
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from harness import write_zip

from leukoflow.core.errors import SourceError, StorageError
from leukoflow.core.site import Site, load_site
from leukoflow.runs.ledger import ClaimOutcome, Ledger, RunOutcome, read_selection
from leukoflow.tasks.intake.inbox import look, take, write_missing
from leukoflow.tasks.intake.plan import plan

NIGHT = date(2026, 3, 1)
SETTLE = 300.0


class Inbox:
    """An inbox whose clock can be turned forward."""

    def __init__(self, folder: Path, manifest: str | None = None, rules: str = "") -> None:
        self.folder, self.root = folder, folder / "inbox"
        self.root.mkdir(parents=True)
        lines = ['name = "ward"', 'inbox = "inbox"', 'out = "out"']
        if manifest is not None:
            (folder / "slides.csv").write_text(manifest)
            lines.append('manifest = "slides.csv"')
        (folder / "site.toml").write_text(
            "\n".join([*lines, "[arrival]", f"settle_seconds = {SETTLE}", rules, "[run]"])
        )
        self.site: Site = load_site(folder / "site.toml")
        self.ahead = 2 * SETTLE

    def put(self, key: str, data: bytes = b"image") -> None:
        (self.root / key).parent.mkdir(parents=True, exist_ok=True)
        (self.root / key).write_bytes(data)

    @property
    def ledger(self) -> Ledger:
        """Read it again, as another process would."""
        return Ledger(self.site.out, self.site.name)

    def states(self) -> dict[str, str]:
        return {i.name: i.state for i in look(self.site, self.ledger, time.time() + self.ahead).items}

    def take(self, night: date = NIGHT) -> dict[str, list[str]]:
        """Keys that were taken, by run."""
        ledger = self.ledger
        head = take(self.site, ledger, night, time.time() + self.ahead)
        if head is None:
            return {}
        found = {run: read_selection(ledger.uri(head.number), run) for run in head.runs}
        return {run: [e.key for e in selection.entries()] for run, selection in found.items()}


@pytest.fixture
def inbox(tmp_path: Path) -> Inbox:
    return Inbox(tmp_path)


def test_what_is_still_arriving_stays(inbox: Inbox) -> None:
    inbox.put("slide-a/1.jpg")
    inbox.ahead = SETTLE / 2
    assert inbox.states() == {"slide-a": "arriving"}
    assert inbox.take() == {}
    assert inbox.ledger.read().heads == ()
    inbox.ahead = SETTLE + 5
    assert inbox.states() == {"slide-a": "complete"}
    assert inbox.take() == {"ward-2026-03-01": ["slide-a/1.jpg"]}
    assert inbox.states() == {"slide-a": "taken"}


def test_what_systems_leave_behind_is_not_taken_and_unfinished_files_never(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path, rules="partial = []")
    for key in ("slide-a/1.jpg", "slide-a/@eaDir/1.jpg/thumb.jpg", "#recycle/0.jpg", "slide-a/2.jpg.crdownload"):
        inbox.put(key)
    assert inbox.states() == {"slide-a": "complete"}
    assert inbox.take() == {"ward-2026-03-01": ["slide-a/1.jpg"]}


def test_a_copy_that_keeps_old_times_has_not_arrived(inbox: Inbox) -> None:
    inbox.put("slide-a/1.jpg")
    os.utime(inbox.root / "slide-a/1.jpg", (0, 0))
    inbox.ahead = 0
    assert inbox.states() == {"slide-a": "arriving"}


def test_a_sentinel_says_that_it_is_complete(inbox: Inbox) -> None:
    inbox.put("slide-a/1.jpg")
    inbox.put("slide-a/_COMPLETE", b"")
    inbox.put("batch.zip")
    inbox.put("batch.zip.done", b"")
    inbox.put("slide-b/_COMPLETE", b"")
    inbox.put("late.zip")
    inbox.ahead = 0
    assert inbox.states() == {
        "batch.zip": "complete",
        "late.zip": "arriving",
        "slide-a": "complete",
        "slide-b": "arriving",
    }
    assert inbox.take() == {"ward-2026-03-01.batch": ["batch.zip"], "ward-2026-03-01": ["slide-a/1.jpg"]}


def test_only_the_sentinel_counts_where_the_site_says_so(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path, rules='complete = "sentinel"')
    inbox.put("slide-a/1.jpg")
    assert inbox.states() == {"slide-a": "arriving"}
    inbox.put("slide-a/_COMPLETE", b"")
    assert inbox.states() == {"slide-a": "complete"}


def test_unfinished_files_keep_a_slide_waiting_and_are_never_taken(inbox: Inbox) -> None:
    inbox.put("slide-a/1.jpg")
    inbox.put("slide-a/.2.jpg.Xy12Zz")
    inbox.ahead = 0
    assert inbox.states() == {"slide-a": "arriving"}
    inbox.ahead = 2 * SETTLE
    assert look(inbox.site, inbox.ledger, time.time() + inbox.ahead).leftovers == 1
    assert inbox.take() == {"ward-2026-03-01": ["slide-a/1.jpg"]}


def test_nothing_is_taken_twice(inbox: Inbox) -> None:
    inbox.put("slide-a/1.jpg")
    inbox.put("single.png")
    inbox.put("Thumbs.db")
    assert inbox.take() == {"ward-2026-03-01": ["single.png", "slide-a/1.jpg"]}
    assert inbox.take() == {}
    inbox.put("slide-b/1.jpg")
    assert inbox.take() == {"ward-2026-03-01-2": ["slide-b/1.jpg"]}
    assert inbox.take(date(2026, 3, 2)) == {}


def test_two_nights_at_the_same_time_share_out_the_inbox(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another night claims between this one's look and its claim: this one looks again."""
    inbox.put("slide-a/1.jpg")
    import leukoflow.tasks.intake.inbox

    real, others = leukoflow.tasks.intake.inbox.survey, []

    def slow(uri: str) -> Any:
        found = list(real(uri))
        if not others:
            others.append(None)
            others.append(inbox.take())
            inbox.put("slide-b/1.jpg")
        return iter(found)

    monkeypatch.setattr(leukoflow.tasks.intake.inbox, "survey", slow)
    mine = inbox.take()
    assert others[1] == {"ward-2026-03-01": ["slide-a/1.jpg"]}
    assert mine == {"ward-2026-03-01-2": ["slide-b/1.jpg"]}
    assert [h.number for h in inbox.ledger.read().heads] == [1, 2]


def test_a_late_file_makes_a_supplement(inbox: Inbox) -> None:
    inbox.put("slide-a/1.jpg")
    inbox.put("slide-a/_COMPLETE", b"")
    inbox.ahead = 0
    assert inbox.take() == {"ward-2026-03-01": ["slide-a/1.jpg"]}
    inbox.put("slide-a/2.jpg")
    assert inbox.states() == {"slide-a": "arriving"}  # the sentinel is older than the file
    inbox.ahead = 2 * SETTLE
    (item,) = look(inbox.site, inbox.ledger, time.time() + inbox.ahead).items
    assert (item.supplement, item.changed, [e.key for e in item.files]) == (True, 0, ["slide-a/2.jpg"])
    assert inbox.take(date(2026, 3, 2)) == {"ward-2026-03-02": ["slide-a/2.jpg"]}
    table = pq.read_table(inbox.ledger.uri(2))
    assert table["supplement"].to_pylist() == [True]


def test_a_file_that_was_replaced_is_reported_and_taken_as_it_is_now(inbox: Inbox) -> None:
    inbox.put("slide-a/1.jpg", b"first")
    inbox.take()
    inbox.put("slide-a/1.jpg", b"second version")
    (item,) = look(inbox.site, inbox.ledger, time.time() + inbox.ahead).items
    assert (item.state, item.changed) == ("complete", 1)
    assert inbox.take(date(2026, 3, 2)) == {"ward-2026-03-02": ["slide-a/1.jpg"]}
    assert inbox.take(date(2026, 3, 3)) == {}


def test_a_claim_survives_whatever_happens_before_its_run(inbox: Inbox) -> None:
    inbox.put("slide-a/1.jpg")
    inbox.put("scan.zip")
    first = inbox.take()
    shutil.rmtree(inbox.root / "slide-a")
    ledger = inbox.ledger
    (head,) = ledger.read().heads
    assert list(head.runs) == list(first)
    assert ledger.outcome(head.number) is None
    selection = read_selection(ledger.uri(1), "ward-2026-03-01")
    assert [e.key for e in selection.entries()] == ["slide-a/1.jpg"]
    assert selection.digest == read_selection(inbox.ledger.uri(1), "ward-2026-03-01").digest
    assert selection.source(inbox.site.inbox).identity == selection.digest  # its rows will say that they are gone
    (inbox.root / "scan.zip").unlink()
    with pytest.raises(SourceError, match="is empty, and 1 files were taken from it; is it mounted"):
        selection.source(inbox.site.inbox)
    ledger.settle(ClaimOutcome(1, "2026-03-01", "now", (RunOutcome("ward-2026-03-01", 0, "done"),)))
    assert inbox.ledger.outcome(1) is not None


def test_an_archive_that_changed_after_it_was_taken_is_not_read_under_the_old_claim(inbox: Inbox) -> None:
    write_zip(inbox.root / "scan.zip", {"a.jpg": b"first"})
    assert inbox.take() == {"ward-2026-03-01.scan": ["scan.zip"]}
    selection = read_selection(inbox.ledger.uri(1), "ward-2026-03-01.scan")
    assert selection.source(f"{inbox.root}/scan.zip").kind == "zip"
    write_zip(inbox.root / "scan.zip", {"a.jpg": b"the second"})
    with pytest.raises(SourceError, match="has changed since it was taken"):
        selection.source(f"{inbox.root}/scan.zip")
    assert inbox.take(date(2026, 3, 2)) == {"ward-2026-03-02.scan": ["scan.zip"]}


def test_a_ledger_with_a_gap_is_refused(inbox: Inbox) -> None:
    for name in "ab":
        inbox.put(f"slide-{name}/1.jpg")
        inbox.take()
    claims = Path(inbox.ledger.storage.root) / "claims"
    (claims / "00001.parquet").unlink()
    with pytest.raises(StorageError, match="taken twice"):
        inbox.ledger.read()
    (claims / "00001.parquet").write_bytes(b"nonsense")
    with pytest.raises(StorageError, match="damaged"):
        inbox.take()


def test_a_claim_whose_bytes_are_damaged_is_to_be_restored(inbox: Inbox) -> None:
    inbox.put("slide-a/1.jpg")
    inbox.take()
    claim = Path(inbox.ledger.storage.root) / "claims" / "00001.parquet"
    whole = bytearray(claim.read_bytes())
    at = whole.find(b"\x28\xb5\x2f\xfd")  # where compressed values begin
    whole[at] ^= 0xFF
    claim.write_bytes(whole)
    with pytest.raises(StorageError, match=r"00001\.parquet is damaged .*; restore it from a backup"):
        inbox.ledger.read()


def test_an_archive_whose_name_is_no_utf8_is_a_row_that_says_so(inbox: Inbox) -> None:
    write_zip(inbox.root / "plain %F6.zip", {"a.jpg": b"first"})
    write_zip(inbox.root / os.fsdecode(b"Gr\xf6.zip"), {"a.jpg": b"first"})
    write_zip(inbox.root / os.fsdecode(b"Gr\xf6"), {"a.jpg": b"first"})
    inbox.put(os.fsdecode(b"Gr\xf6.jpg"))
    runs = inbox.take()
    assert runs == {
        "ward-2026-03-01": ["Gr%F6", "Gr%F6.jpg", "Gr%F6.zip"],
        "ward-2026-03-01.plain-F6": ["plain %F6.zip"],
    }
    selection = read_selection(inbox.ledger.uri(1), "ward-2026-03-01")
    words = "archive with a name that is no UTF-8: rename it, and the next night takes it"
    assert selection.archive is None
    assert [e.refusal for e in selection.entries()] == [words, None, words]
    assert read_selection(inbox.ledger.uri(1), "ward-2026-03-01.plain-F6").source(f"{inbox.root}/plain %F6.zip")


def test_what_was_expected_and_did_not_come(tmp_path: Path) -> None:
    keys = ["slide-a/1.jpg", "slide-a/2.jpg", "slide-b/1.jpg", "slide-c/1.jpg", "scan.zip/x.jpg"]
    inbox = Inbox(tmp_path, manifest="image_key\n" + "\n".join(keys))
    inbox.put("slide-a/1.jpg")
    inbox.put("scan.zip")
    inbox.take()
    inbox.put("slide-b/1.jpg")
    inbox.ahead = 0
    ledger = inbox.ledger
    view = look(inbox.site, ledger, time.time())
    assert view.expected is not None
    assert view.expected.absent == ("slide-c",)
    assert (view.expected.absent_images, view.expected.arriving_images, view.expected.missing_images) == (1, 1, 1)
    write_missing(ledger, view.missing)
    rows = pq.read_table(ledger.storage.uri("missing.parquet")).to_pylist()
    assert {r["image_key"]: r["state"] for r in rows} == {
        "slide-a/2.jpg": "missing", "slide-b/1.jpg": "arriving", "slide-c/1.jpg": "absent",
    }  # fmt: skip
    inbox.put("slide-a/2.jpg")
    inbox.put("slide-c/1.jpg")
    inbox.ahead = 2 * SETTLE
    inbox.take()
    view = look(inbox.site, inbox.ledger, time.time())
    assert view.expected is not None
    assert view.expected.images == 0


def test_an_inbox_that_is_not_there_is_an_error(inbox: Inbox) -> None:
    inbox.root.rmdir()
    with pytest.raises(SourceError, match="is it mounted"):
        inbox.states()


def test_names_of_any_kind_make_usable_run_ids(inbox: Inbox) -> None:
    for name in ("Ünïcode scan.zip", "Ünïcode-scan.zip", "x" * 90 + ".tar.gz"):
        inbox.put(name)
    runs = list(inbox.take())
    assert len(set(runs)) == 3
    assert all(len(run) <= 100 and run.isascii() and " " not in run for run in runs)


def test_the_night_is_a_date_of_the_site(inbox: Inbox) -> None:
    site = inbox.site.model_copy(update={"time_zone": "Europe/Berlin"})
    assert site.night_of(datetime(2026, 3, 1, 23, 30, tzinfo=UTC)) == date(2026, 3, 2)


def test_keys_of_the_manifest_that_are_spelled_otherwise_are_not_missing(tmp_path: Path) -> None:
    keys = ["slide-a\\1.jpg", "Slide-A/2.JPG ", "./scan.zip/x.jpg", "SLIDE-B/1.jpg", "slide-a/gone.jpg", "other/1.jpg"]
    inbox = Inbox(tmp_path, manifest="image_key\n" + "\n".join(keys))
    for name in ("slide-a/1.jpg", "slide-a/2.jpg", "scan.zip"):
        inbox.put(name)
    inbox.take()
    inbox.put("slide-b/1.jpg")
    inbox.ahead = 0
    view = look(inbox.site, inbox.ledger, time.time())
    assert {r["image_key"]: (r["item"], r["state"]) for r in view.missing.to_pylist()} == {
        "SLIDE-B/1.jpg": ("slide-b", "arriving"),
        "slide-a/gone.jpg": ("slide-a", "missing"),
        "other/1.jpg": ("other", "absent"),
    }


def test_runs_of_a_night_find_lines_that_are_spelled_otherwise(tmp_path: Path) -> None:
    keys = ["slide-a\\1.jpg", "Slide-A/2.JPG", "slide-a/gone.jpg", "Scan.zip\\x.jpg", "scan.zip/top/y.jpg"]
    inbox = Inbox(tmp_path, manifest="image_key,site\n" + "".join(f"{key},site {i}\n" for i, key in enumerate(keys)))
    for name in ("slide-a/1.jpg", "slide-a/2.jpg"):
        inbox.put(name)
    write_zip(inbox.root / "scan.zip", {"x.jpg": b"image", "top/y.jpg": b"image"})
    inbox.take()
    found = {}
    for run_id in inbox.ledger.read().heads[0].runs:
        selection = read_selection(inbox.ledger.uri(1), run_id)
        uri = f"{inbox.site.inbox}/{selection.archive}" if selection.archive else inbox.site.inbox
        summary = plan(
            selection.source(uri), tmp_path / "p.parquet", shard_size=4, manifest=tmp_path / "slides.csv",
            selection=selection,
        )  # fmt: skip
        table = pq.read_table(tmp_path / "p.parquet", columns=["image_key", "site"])
        found[run_id] = dict(zip(*table.to_pydict().values(), strict=True)), summary.missing, len(summary.remarks)
    assert found == {
        "ward-2026-03-01": ({"slide-a/1.jpg": "site 0", "slide-a/2.jpg": "site 1"}, 1, 2),
        "ward-2026-03-01.scan": ({"x.jpg": "site 3", "top/y.jpg": "site 4"}, 0, 0),
    }
