"""Site files: the examples load, and what is wrong in one is named."""

from __future__ import annotations

from datetime import UTC, datetime, time
from pathlib import Path

import pytest
from harness import ROOT

from leukoflow.core.errors import ConfigError
from leukoflow.core.site import load_site

EXAMPLES = sorted((ROOT / "deployments" / "sites").glob("*.toml"))
MINIMAL = 'name = "ward"\ninbox = "in"\nout = "s3://lab/out/"\n'


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda p: p.stem)
def test_the_examples_load(file: Path) -> None:
    site = load_site(file)
    assert site.deadline == time(6, 0)
    assert site.run.source == site.inbox
    assert site.run.shard_size % 16 == 0


def test_there_is_an_example_for_each_kind_of_site() -> None:
    assert {p.stem for p in EXAMPLES} == {"workstation", "two-gpu-server", "slurm", "kubernetes-s3"}


def test_paths_are_relative_to_the_file_and_the_environment_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site.toml").write_text(MINIMAL + "[run]\nshard_size = 32\n")
    monkeypatch.setenv("LEUKOFLOW_SITE", str(tmp_path / "site.toml"))
    monkeypatch.setenv("LEUKOFLOW_LIMITS__STAGE_SECONDS", "7")
    site = load_site()
    assert (site.inbox, site.out) == (str(tmp_path / "in"), "s3://lab/out")
    assert (site.run.shard_size, site.run.limits.stage_seconds) == (32, 7)
    monkeypatch.delenv("LEUKOFLOW_SITE")
    with pytest.raises(ConfigError, match="LEUKOFLOW_SITE"):
        load_site()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('inbox = "in"\nout = "out"', "name: is missing"),
        (MINIMAL + 'time_zone = "Mars/Olympus"', "no time zone 'Mars/Olympus'"),
        (MINIMAL + 'deadline = "26:00"', "deadline"),
        (MINIMAL + 'deadline = "06:00Z"', "local time"),
        (MINIMAL + "inbocks = 3", "inbocks: there is no setting of this name"),
        (MINIMAL + "[arrival]\nsettle = 3", "arrival.settle: there is no setting of this name"),
        (MINIMAL + '[arrival]\nsentinel = "a/b"', "arrival.sentinel"),
        (MINIMAL + "[run]\nshard_size = 17", "table run: .*shard_size: .*multiple of 16"),
        (MINIMAL + '[run]\nmanifest = "x.csv"', r"manifest: the site says it outside of \[run\]"),
        (MINIMAL + "run = 3", "it is a table"),
        (MINIMAL + '[urgent]\ncolumn = "slide_id"', "column and values go together"),
        (MINIMAL.replace('"ward"', '"a ward"'), "name"),
        ("name = ", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_site(tmp_path / "site.toml")
    with pytest.raises(ConfigError, match="does not exist"):
        load_site(tmp_path / "absent.toml")


def test_the_deadline_is_the_next_one_also_when_clocks_change(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(MINIMAL + 'time_zone = "Europe/Berlin"\ndeadline = "06:00"\n')
    site = load_site(tmp_path / "site.toml")

    def following(*moment: int) -> datetime:
        found = site.next_deadline(datetime(*moment, tzinfo=UTC))
        assert found is not None
        return found.astimezone(UTC)

    assert following(2026, 1, 15, 19, 0) == datetime(2026, 1, 16, 5, 0, tzinfo=UTC)
    assert following(2026, 1, 16, 4, 59) == datetime(2026, 1, 16, 5, 0, tzinfo=UTC)
    assert following(2026, 1, 16, 5, 0) == datetime(2026, 1, 17, 5, 0, tzinfo=UTC)
    assert following(2026, 3, 28, 20, 0) == datetime(2026, 3, 29, 4, 0, tzinfo=UTC)  # summer time begins that night
