"""The command that takes a run up again: it holds from any folder, and forgets no setting."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from harness import smears, write_zip

from leukoflow.core.config import RunConfig, load_config
from leukoflow.core.errors import RunConflictError
from leukoflow.models.bundle import Bundle
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.commands import resume_command
from leukoflow.tasks.intake.open_run import open_run
from leukoflow.tasks.upkeep.diff import _command, _options


def settings(**more: Any) -> RunConfig:
    return load_config(**({"source": "/in/night.zip", "out": "/out", "run_id": "n"} | more))


def test_places_that_are_relative_hold_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "a night"
    (here / "mine").mkdir(parents=True)
    (here / "mine" / "bundle.json").touch()
    monkeypatch.chdir(here)
    cd = f"cd '{here}' && "
    plain = "leukoflow run /in/night.zip --out /out --run-id n"
    assert resume_command(settings(), "n", "pocket") == plain
    assert resume_command(settings(source="s3://lab/night", out="s3://out"), "n", "s3://bundles/x") == (
        "leukoflow run s3://lab/night --out s3://out --run-id n --bundle s3://bundles/x"
    )
    assert resume_command(settings(source="night.zip"), "n", "pocket") == (
        f"{cd}leukoflow run night.zip --out /out --run-id n"
    )
    assert resume_command(settings(out="out"), "n", "pocket").startswith(cd)
    assert resume_command(settings(manifest="m.csv"), "n", "pocket") == f"{cd}{plain} --manifest m.csv"
    assert resume_command(settings(), "n", "mine") == f"{cd}{plain} --bundle mine"
    assert resume_command(settings(shadow_of="m"), "n", "mine") == f"{cd}leukoflow shadow /out m --bundle mine"


@pytest.mark.parametrize(
    "more",
    [
        {"meta_columns": ["ward"]},
        {"limits": {"min_side_px": 16}},
        {"cluster": {"address": "slurm", "slurm": {"partition": "night"}}},
    ],
)
def test_settings_without_an_option_are_kept_with_the_run(more: dict[str, Any]) -> None:
    config = settings(**more)
    assert resume_command(config, "n", "pocket", planned=True) == "leukoflow rerun /out n"
    # its manifest may be about to be mended
    assert resume_command(config, "n", "pocket").startswith("leukoflow run /in/night.zip --out /out --run-id n")


def test_options_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(cluster={"workers": 3}, um_per_px=0.5, deadline="2026-03-02T07:00:00+00:00")
    assert resume_command(config, "n", "pocket", planned=True) == (
        "leukoflow run /in/night.zip --out /out --run-id n --um-per-px 0.5 --workers 3"
    )


def test_a_run_names_it_once_it_is_planned(small: Bundle, tmp_path: Path) -> None:
    source = write_zip(tmp_path / "night.zip", smears(tmp_path / "sample", 2, seed=5))
    more = {"source": str(source), "out": str(tmp_path / "out"), "run_id": "n", "bundle": str(small.path)}
    config = load_config(**more, um_per_px=0.25, limits={"block_mb": 32})
    run = open_run(config)
    assert run.binding.command == shlex.join(["leukoflow", "rerun", str(tmp_path / "out"), "n"])
    assert _options(_command(open_storage(run.root))) == {"--um-per-px": "0.25"}  # `diff` still tells them
    with pytest.raises(RunConflictError, match=r"another source \(or the same one written differently\), another man"):
        open_run(load_config(**more))
