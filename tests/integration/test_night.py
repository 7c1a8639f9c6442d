"""Nights of a site, with a real Prefect server and real workers: what is taken, resumed, reported and handed over."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from harness import assert_same, committed_shards, smears, table, tables, write_folder, write_zip

from leukoflow.core.site import load_site
from leukoflow.models.bundle import Bundle
from leukoflow.runs.ledger import Ledger
from leukoflow.runs.progress import read_manifest, read_progress
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.inbox import take
from leukoflow.tasks.intake.open_run import open_run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
Night = Callable[..., Any]


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return list(smears(tmp_path_factory.mktemp("fields"), 32, seed=9).values())


class Place:
    """A site below a folder, all of whose items have arrived as soon as they are there."""

    def __init__(self, folder: Path, bundle: Bundle, dask_address: str) -> None:
        self.folder, self.inbox, self.out = folder, folder / "inbox", folder / "out"
        self.inbox.mkdir()
        self.file = folder / "site.toml"
        self.head = ['name = "ward"', 'inbox = "inbox"', 'out = "out"']
        self.arrival = ["settle_seconds = 0"]
        self.run = [f'bundle = "{bundle.path}"', "shard_size = 16", f"cluster = {{ address = '{dask_address}' }}"]
        self.write()

    def write(self, *head: str, run: tuple[str, ...] = ()) -> None:
        lines = [*self.head, *head, "[arrival]", *self.arrival, "[run]", *self.run, *run]
        self.file.write_text("\n".join(lines))

    @property
    def ledger(self) -> Ledger:
        return Ledger(str(self.out), "ward")

    def night(self, date: str = "2026-03-01") -> Any:
        from leukoflow.flows.site_night import night

        return night(str(self.file), date, return_state=True)

    def keys(self, run_id: str) -> list[str]:
        return list(table(self.out / run_id, "predictions")["image_key"].to_pylist())


@pytest.fixture
def place(server: str, dask_address: str, bundle: Bundle, tmp_path: Path) -> Place:
    return Place(tmp_path, bundle, dask_address)


def test_everything_in_the_inbox_is_accounted_for_once_over_several_nights(place: Place, fields: list[bytes]) -> None:
    write_folder(place.inbox, {"slide-a/1.jpg": fields[0], "slide-a/2.jpg": fields[1], "single.jpg": fields[2]})
    write_zip(place.inbox / "scan.zip", {"x.jpg": fields[3], "y.jpg": b"no image"})
    expected = ["slide-a/1.jpg,A", "slide-a/3.jpg,A", "slide-z/1.jpg,Z", "scan.zip/x.jpg,S", "scan.zip/z.jpg,S"]
    (place.folder / "slides.csv").write_text("image_key,slide_id\n" + "\n".join(expected))
    place.write('manifest = "slides.csv"')
    state = place.night()
    assert state.is_completed(), state.message
    assert state.name == "CompletedWithMissing"
    assert "2 of 2 images accounted for" in state.message
    assert "1 images of 1 items without a trace, and 1 that were not in theirs" in state.message
    assert place.keys("ward-2026-03-01") == ["single.jpg", "slide-a/1.jpg", "slide-a/2.jpg"]
    assert place.keys("ward-2026-03-01.scan") == ["x.jpg", "y.jpg"]
    rows = table(place.out / "ward-2026-03-01.scan", "predictions").to_pylist()
    assert [(r["slide_id"], r["status"] == "quarantined") for r in rows] == [("S", False), (None, True)]
    missing = {run: pq.read_table(place.out / run / "missing.parquet")["image_key"].to_pylist() for run in (
        "ward-2026-03-01", "ward-2026-03-01.scan")}  # fmt: skip
    assert missing == {"ward-2026-03-01": ["slide-a/3.jpg"], "ward-2026-03-01.scan": ["z.jpg"]}

    # The same night once more takes nothing; the file that comes late is the next night's, and then not missing.
    again = place.night()
    assert "nothing in the inbox was complete" in again.message
    write_folder(place.inbox, {"slide-a/3.jpg": fields[4], "slide-z/1.jpg": fields[5]})
    later = place.night("2026-03-02")
    assert later.name == "Completed", later.message
    assert place.keys("ward-2026-03-02") == ["slide-a/3.jpg", "slide-z/1.jpg"]
    assert not (place.out / "ward-2026-03-02" / "missing.parquet").exists()
    assert [h.night for h in place.ledger.read().heads] == ["2026-03-01", "2026-03-02"]
    assert all(place.ledger.outcome(n) for n in (1, 2))


def test_a_night_that_died_is_finished_with_what_it_started_with(place: Place, fields: list[bytes]) -> None:
    """Claimed, bound and planned, then dead; until the next night the manifest and the site's settings change."""
    write_folder(place.inbox, {"slide-a/1.jpg": fields[0], "slide-a/2.jpg": fields[1]})
    (place.folder / "slides.csv").write_text("image_key,slide_id\nslide-a/1.jpg,A\nslide-a/2.jpg,A\n")
    place.write('manifest = "slides.csv"')
    site = load_site(place.file)
    ledger = place.ledger
    head = take(site, ledger, site.night_of(datetime(2026, 3, 1, tzinfo=UTC)), datetime.now(UTC).timestamp())
    assert head is not None
    from leukoflow.flows.site_night import run_config

    open_run(run_config(site, ledger, head, head.name, None))
    (place.folder / "slides.csv").write_text("image_key,slide_id\nslide-a/1.jpg,B\nslide-b/1.jpg,B\n")
    place.write('manifest = "slides.csv"', run=("um_per_px = 0.5",))
    write_folder(place.inbox, {"slide-b/1.jpg": fields[2]})
    state = place.night("2026-03-02")
    assert state.is_completed(), state.message
    assert state.name == "Completed"
    assert table(place.out / head.name, "predictions")["slide_id"].to_pylist() == ["A", "A"]
    assert place.keys("ward-2026-03-02") == ["slide-b/1.jpg"]
    assert table(place.out / "ward-2026-03-02", "predictions")["um_per_px"].to_pylist() == [0.5]


def test_what_changes_between_claim_and_run_is_noticed(place: Place, fields: list[bytes]) -> None:
    write_folder(place.inbox, {"slide-a/1.jpg": fields[0], "slide-a/2.jpg": fields[1]})
    write_zip(place.inbox / "scan.zip", {"x.jpg": fields[2]})
    (place.inbox / "torn.zip").write_bytes(b"not an archive at all")
    site = load_site(place.file)
    head = take(site, place.ledger, datetime(2026, 3, 1).date(), datetime.now(UTC).timestamp())
    assert head is not None
    (place.inbox / "slide-a/2.jpg").write_bytes(fields[3] + b" ")
    write_zip(place.inbox / "scan.zip", {"x.jpg": fields[4], "y.jpg": fields[5]})
    state = place.night("2026-03-02")
    assert state.is_failed()
    assert "scan.zip has changed since it was taken" in state.message
    assert "torn.zip is neither a zip or tar archive" in state.message
    first = table(place.out / "ward-2026-03-01", "predictions").to_pylist()
    assert [r["status"] == "quarantined" for r in first] == [False, True]
    assert "changed since it was planned" in first[1]["reason"]
    # The new versions are taken as they are now; what cannot be mended is not tried for ever.
    assert place.keys("ward-2026-03-02") == ["slide-a/2.jpg"]
    assert place.keys("ward-2026-03-02.scan") == ["x.jpg", "y.jpg"]
    outcome = place.ledger.outcome(1)
    assert outcome is not None
    assert sorted(r.exit_code for r in outcome.runs) == [2, 2, 3]
    assert place.night("2026-03-03").is_completed()


def test_an_inbox_that_is_not_mounted_fails_and_loses_nothing(place: Place, fields: list[bytes]) -> None:
    write_folder(place.inbox, {"slide-a/1.jpg": fields[0]})
    site = load_site(place.file)
    assert take(site, place.ledger, datetime(2026, 3, 1).date(), datetime.now(UTC).timestamp()) is not None
    place.inbox.rename(place.folder / "elsewhere")
    state = place.night()
    assert state.is_failed()
    assert "is it mounted" in state.message
    place.inbox.mkdir()
    assert place.night().is_failed()
    assert place.ledger.outcome(1) is None
    place.inbox.rmdir()
    (place.folder / "elsewhere").rename(place.inbox)
    assert place.night().name == "Completed"
    assert place.keys("ward-2026-03-01") == ["slide-a/1.jpg"]


def test_at_its_deadline_a_run_hands_over_stops_and_is_finished_by_a_rerun(
    screen: Any, fields: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline comes with the first shard that is committed, whenever that is."""
    import leukoflow.flows.deadline
    from leukoflow.flows.rerun import rerun

    images = {f"slide-{i % 2}/{i:02d}.jpg": data for i, data in enumerate(fields * 4)}
    source = write_zip(tmp_path / "long.zip", images)
    assert screen(source, tmp_path, "whole").is_completed()
    real = leukoflow.flows.deadline._Watch.follow

    def follow(self: Any) -> None:
        while not committed_shards(tmp_path / "late") and not self.over.wait(0.02):
            pass
        self.deadline = datetime.now(UTC) + timedelta(milliseconds=1)
        real(self)

    monkeypatch.setattr(leukoflow.flows.deadline._Watch, "follow", follow)
    soon = datetime.now(UTC) + timedelta(hours=1)
    urgent = {"image_keys": ["slide-1/*"]}
    late = screen(source, tmp_path, "late", deadline=soon, at_deadline="stop", urgent=urgent)
    assert late.is_failed()
    assert late.name == "DeadlineMissed"
    assert "leukoflow rerun" in late.message
    root = tmp_path / "late"
    assert 0 < len(committed_shards(root)) < 8
    partial = pq.read_table(root / "partial" / "slides.parquet")
    label = partial.schema.metadata[b"leukoflow.partial"].decode()
    assert "of 128 images" in label
    assert "not a final result" in label
    assert partial["n_planned"].to_pylist() == [64] * len(partial)
    assert all(done <= 64 for done in partial["n_images"].to_pylist())
    page = (root / "partial" / "report.html").read_text()
    assert "Not a final result" in page
    assert read_progress(str(root)).state == "cancelled"
    monkeypatch.undo()
    state = rerun(str(tmp_path), "late", return_state=True)
    assert state.is_completed(), state.message
    assert not (root / "partial").exists()
    assert_same(tmp_path / "whole", root)
    assert tables(root)["slides"] == tables(tmp_path / "whole")["slides"]


def test_what_was_taken_and_deleted_has_rows_that_say_so(place: Place, fields: list[bytes]) -> None:
    write_folder(place.inbox, {"slide-a/1.jpg": fields[0]})
    site = load_site(place.file)
    assert take(site, place.ledger, datetime(2026, 3, 1).date(), datetime.now(UTC).timestamp()) is not None
    (place.inbox / "slide-a" / "1.jpg").unlink()
    write_folder(place.inbox, {"slide-b/1.jpg": fields[1]})
    assert place.night().name == "CompletedWithQuarantined"
    (row,) = table(place.out / "ward-2026-03-01", "predictions").to_pylist()
    assert (row["image_key"], row["reason"]) == ("slide-a/1.jpg", "gone: it was deleted since it was planned")
    assert place.keys("ward-2026-03-01-2") == ["slide-b/1.jpg"]


def test_after_its_deadline_a_site_that_stops_begins_nothing(
    place: Place, fields: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from leukoflow.core.site import Site

    write_folder(place.inbox, {"slide-a/1.jpg": fields[0]})
    place.write('at_deadline = "stop"', 'deadline = "06:00"')
    monkeypatch.setattr(Site, "next_deadline", lambda self, moment: moment)
    state = place.night()
    assert (state.is_failed(), state.name) == (True, "DeadlineMissed")
    assert "not started, because the deadline has passed" in state.message
    assert not (place.out / "ward-2026-03-01").exists()
    monkeypatch.undo()
    assert place.night("2026-03-02").name == "Completed"
    assert place.keys("ward-2026-03-01") == ["slide-a/1.jpg"]


def test_retention_of_a_site(place: Place, fields: list[bytes]) -> None:
    from leukoflow.flows.retention import retention

    assert "holds no run yet" in retention(str(place.file), return_state=True).message
    write_folder(place.inbox, {"slide-a/1.jpg": fields[0]})
    assert place.night().is_completed()
    manifest = read_manifest(open_storage(str(place.out / "ward-2026-03-01")))
    assert manifest is not None
    with place.file.open("a") as file:
        file.write("\n[retention]\nkeep_days = 0\nkeep_last = 0\n")
    kept = retention(str(place.file), dry_run=True, return_state=True)
    assert kept.message == "1 of 1 runs would go, 0 stay"
    assert retention(str(place.file), return_state=True).message == "1 of 1 runs were deleted, 0 stay"
    assert not (place.out / "ward-2026-03-01").exists()
    assert "nothing in the inbox was complete" in place.night("2026-03-02").message
    failed = retention(str(place.folder / "absent.toml"), return_state=True)
    assert failed.is_failed()
    assert "does not exist" in failed.message
    assert os.environ.get("LEUKOFLOW_SITE") is None
