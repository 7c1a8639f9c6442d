"""What the command line says of places that do not fit, before it makes, asks or starts anything."""

from __future__ import annotations

import io
import json
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, smears, write_zip
from rich.console import Console
from typer.testing import CliRunner

from leukoflow.apps.cli.common import warn_of_another
from leukoflow.apps.cli.main import app
from leukoflow.apps.cli.sample import next_command
from leukoflow.apps.cli.view.console import facts_table, open_console
from leukoflow.core.codec import dumps
from leukoflow.core.config import load_config
from leukoflow.core.counts import count_of
from leukoflow.core.errors import ConfigError, RunConflictError
from leukoflow.models.bundle import Bundle
from leukoflow.runs.progress import Heartbeat, now, read_progress
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.open_run import open_run


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    return write_zip(folder / "night.zip", smears(folder / "sample", 2))


def call(*arguments: str, text: str = "") -> Any:
    return CliRunner().invoke(app, list(arguments), input=text, env={"NO_COLOR": "1", "TERM": "dumb"})


def test_version_is_an_option_as_well() -> None:
    assert call("--version").output == f"leukoflow {version('leukoflow')}\n"


# --- where results go ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("README.md", "README.md is a file; name a folder"),
        ("README.md/below", "README.md is a file; name a folder"),
        ("/proc/x", "the folder /proc/x/night cannot be made"),
    ],
)
def test_an_output_that_is_no_folder_is_named_with_the_remedy(
    archive: Path, small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("words")
    config = load_config(source=str(archive), out=out, run_id="night", bundle=str(small.path))
    with pytest.raises(ConfigError) as refused:
        open_run(config)
    assert words in str(refused.value)
    assert "same command" not in str(refused.value)
    assert (tmp_path / "README.md").read_text() == "words"


def test_a_run_id_is_looked_at_before_anything_else(tmp_path: Path) -> None:
    for run_id in ("a/b", ".night", "n" * 101, "inbox", "nights.html", "audit.jsonl", "web-audit.jsonl"):
        with pytest.raises(ConfigError, match=r"run id .* is not usable"):
            open_run(load_config(source="nowhere.zip", out=str(tmp_path / "out"), run_id=run_id))
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_the_output_or_lies_in_a_run_is_refused(small: Bundle, tmp_path: Path) -> None:
    smears(tmp_path / "fields", 2)
    with pytest.raises(ConfigError, match="is the source itself"):
        open_run(load_config(source=str(tmp_path / "fields"), out=str(tmp_path / "fields"), bundle=str(small.path)))
    run = tmp_path / "out" / "night-1"
    smears(run / "fields", 2)
    (run / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="lies inside the results of run night-1"):
        open_run(load_config(source=str(run / "fields"), out=str(tmp_path / "out"), bundle=str(small.path)))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--manifest", "is a folder; name the CSV or Parquet file"),
        ("--config", "is a folder; name the TOML file"),
        ("--bundle", "name a folder that holds a bundle.json, or one that comes with leukoflow (pocket)"),
    ],
)
def test_a_folder_where_a_file_is_wanted_and_a_file_where_a_folder(
    archive: Path, tmp_path: Path, option: str, words: str
) -> None:
    wrong = archive if option == "--bundle" else tmp_path
    done = call("run", str(archive), "--out", str(tmp_path / "out"), option, str(wrong))
    assert done.exit_code == 1
    assert words in done.output
    assert "bug in the program" not in done.output


@pytest.mark.parametrize("name", ["nowhere", "file.txt"])
def test_a_folder_of_results_that_is_not_there_is_not_served(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.txt").touch()
    place = tmp_path / name
    done = call("serve", str(place), "--port", "0", "--users", str(tmp_path / "users.json"))
    assert done.exit_code == 1
    assert "name the folder that was given to `leukoflow run --out`" in done.output
    assert not (tmp_path / "nowhere").exists()


# --- a run that fails while it starts --------------------------------------------------------------------------------


def test_a_run_that_fails_before_it_has_a_plan_says_why_and_can_be_repeated(
    archive: Path, small: Bundle, tmp_path: Path
) -> None:
    manifest, out = tmp_path / "slides.csv", tmp_path / "out"
    manifest.write_text("slide_id\nS1\n")
    words = ["run", str(archive), "--out", str(out), "--run-id", "night", "--manifest", str(manifest)]
    done = call(*words, "--bundle", str(small.path))
    assert done.exit_code == 1
    progress = read_progress(str(out / "night"))
    assert (progress.state, progress.exit_code, progress.members) == ("failed", 1, 0)
    assert "image_key" in progress.message
    assert progress.command.startswith("leukoflow run")
    shown = call("status", str(out), "night").output
    assert "failed (exit code 1)" in shown
    assert "image_key" in shown
    assert "the source is not planned yet" in shown
    assert "unknown" not in call("status", str(out)).output
    reported = call("report", str(out), "night")
    assert reported.exit_code == 1
    assert "before its source was planned" in reported.output
    (log,) = (out / "night" / "logs").glob("*.jsonl")
    assert "image_key" in json.loads(log.read_text())["message"]

    manifest.write_text("image_key,slide_id\nslide-a/field-00000.jpg,S1\n")
    config = load_config(
        source=str(archive), out=str(out), run_id="night", manifest=str(manifest), bundle=str(small.path)
    )
    mended = open_run(config)  # nothing was done yet, so nothing binds it to the manifest that was wrong
    assert (mended.binding.members, mended.binding.is_planned) == (2, True)


def test_a_plan_that_the_same_command_has_made_meanwhile_is_kept(archive: Path, small: Bundle, tmp_path: Path) -> None:
    config = load_config(source=str(archive), out=str(tmp_path / "out"), run_id="night", bundle=str(small.path))
    stamps: list[str] = []

    def meanwhile(root: str) -> None:
        open_run(config)
        stamps.append(open_storage(root).stamp("plan.parquet"))

    run = open_run(config, meanwhile)
    assert [open_storage(run.root).stamp("plan.parquet")] == stamps


def test_an_archive_without_images_is_written_down_with_its_exit_code(small: Bundle, tmp_path: Path) -> None:
    source = write_zip(tmp_path / "night.zip", {"Thumbs.db": b"litter"})
    out = str(tmp_path / "out")
    assert call("run", str(source), "--out", out, "--run-id", "night", "--bundle", str(small.path)).exit_code == 2
    progress = read_progress(f"{out}/night")
    assert (progress.state, progress.exit_code) == ("failed", 2)
    assert "holds no images" in progress.message


# --- what is printed -------------------------------------------------------------------------------------------------


def test_addresses_are_whole_where_no_terminal_has_a_width(capsys: pytest.CaptureFixture[str]) -> None:
    address = "http://127.0.0.1:4200/" + "a-very-long-way/" * 20
    target = open_console()
    table = facts_table()
    table.add_row("dashboard", address)
    target.print(table)
    target.print(address)
    assert capsys.readouterr().out.count(address) == 2


def test_the_readme_has_the_command_that_the_sample_prints() -> None:
    printed = next_command(Path("demo/smears.zip"), Path("demo/manifest.csv"))
    assert f"\n{printed} " in (ROOT / "README.md").read_text()


# --- what is asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("add", "anna", "--role", "rewiever"), "there is no role 'rewiever'; there are viewer, reviewer, admin"),
        (("add", "../x"), "a name has up to 64 letters"),
        (("password", "nobody"), "there is no user nobody"),
    ],
)
def test_what_is_wrong_is_said_before_a_password_is_asked_for(
    tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    done = call("users", *words, "--users", str(tmp_path / "users.json"))
    assert done.exit_code == 1
    assert said in done.output
    assert "password:" not in done.output


# --- what a script or a tired hand leaves out ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "", "--out", "out"), "SOURCE is empty"),
        (("run", "night.zip", "--out", " "), "--out is empty"),
        (("run", "night.zip", "--out", "s3:/lab/out"), "an object store is written s3://BUCKET/PREFIX"),
        (("run", "night.zip", "--out", "s3://"), "an object store is written s3://BUCKET/PREFIX"),
        (("status", ""), "OUT is empty"),
        (("status", "nowhere"), "nowhere does not exist"),
        (("verify", "nowhere"), "nowhere does not exist"),
        (("erase", "nowhere", "--patient", "7"), "nowhere does not exist"),
        (("correct", "nowhere", "--to", "7"), "name the right patient"),
    ],
)
def test_what_is_left_out_or_mistyped_is_named(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(*arguments)
    assert done.exit_code == 1
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("--foo",), ("foo",), ("run", "--foo")])
def test_a_command_that_cannot_be_understood_is_not_an_unusable_source(arguments: tuple[str, ...]) -> None:
    assert call(*arguments).exit_code == 1


def test_a_refused_command_leaves_the_record_of_what_the_run_did(
    archive: Path, small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slides.csv").write_text("image_key,patient_id\nfield-00000.png,7\n")
    settings = {"source": str(archive), "out": str(tmp_path), "run_id": "night", "bundle": str(small.path)}
    config = load_config(**settings, manifest=str(tmp_path / "slides.csv"))
    monkeypatch.setenv("LEUKOFLOW_PATIENT_KEY", "a key that only these tests have")
    open_run(config)
    roots: list[str] = []
    monkeypatch.setenv("LEUKOFLOW_PATIENT_KEY", "another key that only these tests have")
    with pytest.raises(RunConflictError):
        open_run(config, roots.append)
    assert roots == []


def test_numbers_of_things() -> None:
    assert count_of(1, "shard") == "1 shard"
    assert count_of(0, "shard") == "0 shards"
    assert count_of(1200, "image") == "1,200 images"


def test_a_run_that_another_process_works_on_is_announced(tmp_path: Path) -> None:
    root = tmp_path / "night"
    root.mkdir()
    said = Console(file=io.StringIO(), width=200)
    with subprocess.Popen(["sleep", "60"]) as other:
        beat = Heartbeat(other.pid, socket.gethostname(), now(), "running", phase="screening images")
        (root / "heartbeat.json").write_bytes(dumps(beat))
        warn_of_another(said, str(root))
        assert f"already being worked on, by process {other.pid} on {socket.gethostname()}" in said.file.getvalue()
        other.kill()
    said = Console(file=io.StringIO(), width=200)
    warn_of_another(said, str(root))
    assert said.file.getvalue() == ""
