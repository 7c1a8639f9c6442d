"""The page and the figures of the nights, from records alone: no pixels are needed to tell what became of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import UTC, date
from html.parser import HTMLParser
from pathlib import Path

import pytest
from faults import moto_server, s3_account
from made_up_nights import binding, facts, manifest, put
from typer.testing import CliRunner

from leukoflow.apps.cli.main import app
from leukoflow.core.codec import dumps
from leukoflow.core.errors import ConfigError, StorageError
from leukoflow.runs.layout import OutKey
from leukoflow.runs.progress import now
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.monitor.drift import QUANTITIES, DriftFacts, Group, facts_bytes
from leukoflow.tasks.monitor.nights import Nights, gather, night_of, nights_json
from leukoflow.tasks.report.nights_report import nights_page


@pytest.fixture
def out(tmp_path: Path) -> str:
    """Five nights with a drift at Site-B in the last, and a run that died on the sixth."""
    place = str(tmp_path / "out")
    for day in range(1, 6):
        put(place, f"night-{day}", day, shift=4.0 if day == 5 else 0.0, missing=3 if day == 5 else 0)
    put(place, "second-5", 5, quarantined=10)
    put(place, "died", 6, finished=False)
    reference = facts("night-1", 1)
    open_storage(place).write(
        OutKey.BASELINE, facts_bytes(replace(reference, groups=(*reference.groups, *facts("n", 2).groups)))
    )
    return place


def seen(out: str, nights: int = 30) -> Nights:
    return gather(out, nights, zone=UTC)


def test_a_night_lasts_from_noon_to_noon() -> None:
    assert night_of("2026-03-01T22:00:00+00:00", UTC) == date(2026, 3, 1)
    assert night_of("2026-03-02T11:59:59+00:00", UTC) == date(2026, 3, 1)
    assert night_of("2026-03-02T12:00:00+00:00", UTC) == date(2026, 3, 2)


def test_runs_of_a_night_are_added_up(out: str) -> None:
    found = seen(out)
    assert [str(n.night) for n in found.nights] == [f"2026-03-0{d}" for d in range(1, 7)]
    fifth = found.nights[4]
    assert {r.run_id for r in fifth.runs} == {"night-5", "second-5"}
    assert [fifth.total(s) for s in ("members", "done", "predicted", "abstained", "rejected", "quarantined")] == [
        192, 192, 146, 24, 8, 14
    ]  # fmt: skip
    assert fifth.total("missing") == 3
    assert fifth.balanced
    assert fifth.images_per_second == 2.0
    assert fifth.share("quarantined") == 14 / 192
    assert fifth.labels == (68, 52, 16, 10)
    assert sum(fifth.labels) == fifth.total("predicted")


def test_an_unfinished_run_counts_with_what_it_has_committed(out: str) -> None:
    last = seen(out).nights[-1]
    (run,) = last.runs
    assert (run.state, run.members, run.done, run.counts.quarantined, run.failed_shards) == ("killed", 96, 32, 2, 1)
    assert run.counts.labels == (8, 6, 4, 2)
    assert not last.balanced
    assert last.images_per_second is None


def test_drift_is_reported_where_it_is_and_nowhere_else(out: str) -> None:
    found = seen(out)
    assert found.reference is not None
    assert found.reference.endswith("_baseline/drift.json")
    levels = {
        (str(n.night)[-1], g.kind, g.name, g.against): d.level
        for n in found.nights
        for g in n.drift
        for d in g.drifts
        if d.quantity == "stain_red"
    }
    assert levels["5", "site", "Site-B", "reference"] == levels["5", "site", "Site-B", "week"] == "act"
    assert {v for k, v in levels.items() if k[0] in "1234" or k[2] == "Site-A"} <= {"none", "few"}
    assert levels["4", "all", "all fields", "reference"] == "none"
    assert [n.level for n in found.nights[:5]] == ["none", "none", "none", "none", "act"]


def test_only_the_last_nights_are_shown_but_the_week_before_them_counts(out: str) -> None:
    found = seen(out, 2)
    assert [str(n.night) for n in found.nights] == ["2026-03-05", "2026-03-06"]
    week = {
        d.level for g in found.nights[0].drift for d in g.drifts if g.against == "week" and d.quantity == "stain_red"
    }
    assert "act" in week


def test_another_bundle_is_compared_only_in_what_it_does_not_decide(out: str) -> None:
    other = replace(facts("night-3", 3), bundle_digest="e" * 64)
    open_storage(out).write(
        "night-3/manifest.json",
        dumps(replace(manifest("night-3", "2026-03-03T22:00:00+00:00"), bundle_digest="e" * 64)),
    )
    open_storage(out).write("night-3/drift.json", facts_bytes(other))
    (third,) = [n for n in seen(out).nights if n.night.day == 3]
    assert {d.quantity for d in third.drifts("reference")} == {q.name for q in QUANTITIES if q.of_image}
    assert "<b>no-such-bundle eeeeeeeeeeee, new</b>" in nights_page(seen(out))


def test_what_cannot_be_read_becomes_a_note(out: str) -> None:
    open_storage(out).write("night-2/manifest.json", b"{")
    open_storage(out).write("broken/run.json", b"{")
    open_storage(out).delete("night-3/drift.json")  # its tables are not there either
    found = seen(out)
    assert [str(n.night)[-1] for n in found.nights if n.runs] == ["1", "3", "4", "5", "6"]
    assert any("run night-2 cannot be read" in note for note in found.notes)
    assert any("run broken cannot be read" in note for note in found.notes)
    open_storage(out).delete(OutKey.BASELINE)
    assert any("no drift reference" in note for note in seen(out).notes)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        if tag not in ("meta", "rect", "line", "circle", "polyline", "br", "path", "image", "i", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line", "circle", "polyline", "i"):
            assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(out: str) -> None:
    html = nights_page(seen(out))
    page = Page()
    page.feed(html)
    assert page.open == []
    assert "script" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert "url(" not in html
    assert "not finished" in html
    assert "64 images are unfinished" in html
    assert "NaN" not in html
    assert not re.search(r"\bnan\b|\binf\b", html)


def test_the_page_says_what_calls_for_a_look(out: str) -> None:
    open_storage(out).delete("died")
    html = nights_page(seen(out))
    assert "<b>The night of 2026-03-05 is reconciled.</b>" in html
    assert "3 images that a manifest lists have not arrived" in html
    assert "<b>Drift, act:</b>" in html
    assert "stain: red over green (site Site-B, against the reference" in html
    assert 'class="cell-act"' in html


def test_a_source_that_was_cut_off_is_said_beside_what_is_reconciled(tmp_path: Path) -> None:
    said = "The source of at least one run was incomplete: images may be absent from these figures."
    place = str(tmp_path / "cut")
    put(place, "night-1", 1)
    assert said not in nights_page(seen(place))
    whole = manifest("night-1", "2026-03-01T22:00:00+00:00")
    open_storage(place).write("night-1/manifest.json", dumps(replace(whole, source_truncated="the archive ends early")))
    html = nights_page(seen(place))
    assert "is reconciled" in html
    assert f'<p class="verdict warn">{said}</p>' in html


def test_shares_of_classes_are_of_the_predicted(out: str) -> None:
    open_storage(out).delete("died")
    html = nights_page(seen(out))
    assert 'Benign among predicted <span class="n">46.6 %</span>' in html  # 68 of 146
    assert "of the predicted images alone" in html


def test_a_night_with_nothing_to_compare_is_not_called_well(tmp_path: Path) -> None:
    place = str(tmp_path / "alone")
    put(place, "night-1", 1)
    (only,) = seen(place).nights
    assert only.comparisons == (0, 0)
    html = nights_page(seen(place))
    assert "Nothing could be compared: there is no reference, or no earlier night within a week." in html
    assert "Drift was not judged." in html
    assert "drift not compared" in html
    assert "calls for a look" not in html


def test_a_night_of_too_few_fields_is_not_called_well(tmp_path: Path) -> None:
    place = str(tmp_path / "few")
    for day in (1, 2):
        put(place, f"night-{day}", day)
        small = replace(
            facts(f"night-{day}", day), groups=(Group("Site-A", None, facts("x", day).groups[0].counts[:2]),)
        )
        open_storage(place).write(f"night-{day}/drift.json", facts_bytes(small))
    judged, there = seen(place).nights[-1].comparisons
    assert judged == 0
    assert there > 0
    html = nights_page(seen(place))
    assert (
        "Nothing could be compared: on one side there are fewer than 40 fields or 5 slides of every quantity." in html
    )
    assert "too few to judge" in html
    assert "calls for a look" not in html


def test_a_steady_night_says_how_much_was_compared(out: str) -> None:
    for run in ("died", "night-5", "second-5"):
        open_storage(out).delete(run)
    last = seen(out).nights[-1]
    judged, there = last.comparisons
    assert 0 < judged < there  # the facts hold one quantity alone
    html = nights_page(seen(out))
    assert f"Of {there} comparisons of the last night, {judged} could be judged, and none of these calls" in html
    body = json.loads(nights_json(seen(out)))["nights"][-1]
    assert (body["judged"], body["comparisons"]) == (judged, there)


def test_a_night_whose_run_failed_is_not_reconciled(tmp_path: Path) -> None:
    """All rows are there, but the run has not said that they are whole."""
    place = str(tmp_path / "failed")
    put(place, "night-1", 1, finished=False)
    open_storage(place).write("night-1/run.json", dumps(binding("night-1", "2026-03-01T22:00:00+00:00", members=32)))
    (only,) = seen(place).nights
    assert only.total("done") == only.total("members") == 32
    assert not only.balanced
    html = nights_page(seen(place))
    assert "is reconciled" not in html
    assert "night-1 killed" in html


def test_foreign_text_stays_text(out: str) -> None:
    hostile = "<script>alert(1)</script>"
    put(out, "night-5", 5)
    group = Group(hostile, hostile, facts("night-5", 5, 9.0).groups[1].counts)
    open_storage(out).write("night-5/drift.json", facts_bytes(DriftFacts(("night-5",), "d" * 64, now(), (group,))))
    open_storage(out).write(
        "night-5/manifest.json",
        dumps(replace(manifest("night-5", "2026-03-05T22:00:00+00:00"), reasons=((hostile, 3),), bundle=hostile)),
    )
    html = nights_page(seen(out))
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_the_same_as_json(out: str) -> None:
    body = json.loads(nights_json(seen(out)))
    assert body["thresholds"] == {"watch": 0.1, "act": 0.25, "chance": 0.01, "fields": 40, "slides": 5}
    fifth = body["nights"][4]
    assert (fifth["night"], fifth["level"], fifth["balanced"]) == ("2026-03-05", "act", True)
    assert fifth["runs"][0]["reasons"][0] == ["ambiguous", 12]


def test_nothing_to_show_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="holds no run"):
        nights_page(gather(str(tmp_path)))
    with pytest.raises(ConfigError, match="does not exist"):
        gather(str(tmp_path), baseline=str(tmp_path / "nothing.json"))


def test_commands(out: str, tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["report", out, "--to", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    assert "6 nights, the last one not finished" in done.output.replace("\n", " ")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert json.loads((tmp_path / "page.json").read_text())["nights"]
    assert runner.invoke(app, ["report", out]).exit_code == 0
    assert (Path(out) / "nights.html").is_file()
    made = runner.invoke(app, ["drift", "reference", out, "night-1", "night-2", "--to", str(tmp_path / "drift.json")])
    assert made.exit_code == 0, made.output
    assert "240 fields" in made.output
    assert runner.invoke(app, ["drift", "reference", out, "died"]).exit_code == 1
    assert "120 fields" not in runner.invoke(app, ["drift", "show", out]).output
    assert runner.invoke(app, ["report", out, "night-1", "--to", "x.html"]).exit_code == 1


@pytest.mark.slow
def test_nights_on_an_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    with moto_server() as url:
        for name, value in s3_account(url).items():
            monkeypatch.setenv(name, value)
        open_storage("s3://nights/x").fs.mkdir("nights")
        for day in (1, 2):
            put("s3://nights/out", f"night-{day}", day)
        done = CliRunner().invoke(app, ["drift", "reference", "s3://nights/out", "night-1"])
        assert done.exit_code == 0, done.output
        done = CliRunner().invoke(app, ["report", "s3://nights/out"])
        assert done.exit_code == 0, done.output
        page = open_storage("s3://nights/out").read("nights.html").decode()
        assert "2026-03-01 to 2026-03-02" in page
        assert "s3://nights/out/_baseline/drift.json" in page
