"""The commands of a site: what they say, and how they end when there is no site, no inbox or no run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from leukoflow.apps.cli import bundles as cli_bundles
from leukoflow.apps.cli.main import app
from leukoflow.core.codec import dumps
from leukoflow.core.config import RunConfig, load_config
from leukoflow.runs.progress import RunBinding, now
from leukoflow.tasks.intake.commands import resume_command


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"})


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LEUKOFLOW_SITE", raising=False)
    (tmp_path / "inbox" / "slide-[a]").mkdir(parents=True)
    (tmp_path / "inbox" / "slide-[a]" / "1.jpg").write_bytes(b"image")
    (tmp_path / "inbox" / "scan.zip").write_bytes(b"archive")
    (tmp_path / "inbox" / "scan.zip.done").touch()
    (tmp_path / "slides.csv").write_text("image_key\nslide-[a]/1.jpg\nslide-q/1.jpg\n")
    (tmp_path / "site.toml").write_text(
        'name = "ward"\ninbox = "inbox"\nout = "out"\nmanifest = "slides.csv"\n[arrival]\nsettle_seconds = 99\n[run]\n'
    )
    return tmp_path / "site.toml"


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_inbox_is_shown_and_left_alone(site: Path) -> None:
    done = invoke("inbox", str(site))
    assert done.exit_code == 0, done.output
    shown = lines(done.stdout)
    assert any(line.startswith("scan.zip complete 1") and line.endswith("sentinel") for line in shown)
    assert any(line.startswith("slide-[a] arriving 1") for line in shown)
    assert "1 complete, 1 arriving, 0 taken" in shown
    assert "absent slide-q" in shown
    assert any("1 images of 1 items without a trace" in line for line in shown)
    assert not (site.parent / "out").exists()


def test_a_claim_that_is_not_finished_is_named(site: Path) -> None:
    from datetime import date

    from leukoflow.core.site import load_site
    from leukoflow.runs.ledger import Ledger
    from leukoflow.tasks.intake.inbox import take

    place = load_site(site)
    take(place, Ledger(place.out, place.name), date(2026, 3, 1), 0.0)
    done = invoke("inbox", str(site))
    assert "0 complete, 1 arriving, 1 taken" in done.stdout
    assert "taken and not finished: ward-2026-03-01" in done.stdout


@pytest.mark.parametrize("command", ["inbox", "night"])
def test_no_site_and_a_broken_one_are_one_line(command: str, site: Path) -> None:
    assert "set LEUKOFLOW_SITE to it" in invoke(command).stderr
    absent = invoke(command, "absent.toml")
    assert (absent.exit_code, absent.stderr.count("\n")) == (1, 1)
    site.write_text("name = 3")
    broken = invoke(command, str(site))
    assert broken.exit_code == 1
    assert "inbox: is missing" in broken.stderr


def test_an_inbox_that_is_not_there(site: Path) -> None:
    (site.parent / "inbox").rename(site.parent / "elsewhere")
    done = invoke("inbox", str(site))
    assert done.exit_code == 2
    assert "is it mounted" in done.stderr


def test_rerun_needs_a_run_that_kept_its_settings(tmp_path: Path) -> None:
    assert "holds no run" in invoke("rerun", str(tmp_path), "absent").stderr
    old = RunBinding("old", "f", "a.zip", 1, 1, 16, "pocket", "d", "cpu", now(), "leukoflow run a.zip --out out")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_bytes(dumps(old))
    done = invoke("rerun", str(tmp_path), "old")
    assert done.exit_code == 1
    assert "to take it up: leukoflow run a.zip --out out" in done.stderr


def test_a_run_of_a_claim_is_resumed_by_its_id() -> None:
    config = load_config(source="/inbox", out="/out dir", selection="/out/inbox/ward/claims/00001.parquet", run_id="n")
    assert resume_command(config, "n", "pocket") == "leukoflow rerun '/out dir' n"


@pytest.mark.parametrize(("options", "workers"), [((), 3), (("--workers", "1"), 1)])
def test_rerun_takes_the_workers_that_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], workers: int
) -> None:
    config = load_config(source="a.zip", out=str(tmp_path), run_id="n", cluster={"workers": 3})
    bound = RunBinding("n", "f", "a.zip", 1, 1, 16, "pocket", "d", "cpu", now(), "", config=config.canonical())
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "run.json").write_bytes(dumps(bound))
    taken: list[RunConfig] = []

    def execute(settings: RunConfig, *_: bool) -> int:
        taken.append(settings)
        return 0

    monkeypatch.setattr(cli_bundles, "execute", execute)
    assert invoke("rerun", str(tmp_path), "n", *options).exit_code == 0
    assert [found.cluster.workers for found in taken] == [workers]
