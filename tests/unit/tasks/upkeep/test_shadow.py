"""Shadow runs: a candidate sees what a run saw, and is never taken for the night's result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import finish_here, tables, with_other_thresholds, zarr_bytes
from typer.testing import CliRunner

from leukoflow.apps.cli.main import app
from leukoflow.core.codec import dumps, loads
from leukoflow.core.config import RunConfig
from leukoflow.core.errors import ConfigError
from leukoflow.models.bundle import Bundle
from leukoflow.models.registry import Registry
from leukoflow.runs.progress import RunBinding, read_manifest, read_progress, read_state
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.intake.open_run import open_run
from leukoflow.tasks.intake.patient_key import pseudonym
from leukoflow.tasks.report.run_report import build_report
from leukoflow.tasks.upkeep.correct import correct_patient
from leukoflow.tasks.upkeep.diff import diff_runs
from leukoflow.tasks.upkeep.shadow import ShadowSummary, as_markdown, compare, newest_run, shadow_config
from leukoflow.tasks.upkeep.verify import verify_run


@pytest.fixture(scope="session")
def candidate(small: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return with_other_thresholds(small, tmp_path_factory.mktemp("candidate") / "b", 3.0)


@pytest.fixture
def accompanied(copy: Path, candidate: Bundle, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Run]:
    """The run, and its shadow."""
    monkeypatch.delenv("LEUKOFLOW_PATIENT_KEY")  # the plan is taken over, so nobody needs the key
    return copy, finish_here(shadow_config(str(copy.parent), "night", str(candidate.path)))


def test_it_sees_the_same_with_the_candidate(accompanied: tuple[Path, Run], candidate: Bundle) -> None:
    night, run = accompanied
    root = Path(run.root)
    assert root.name == f"night-shadow-{candidate.digest[:8]}"
    assert zarr_bytes(root) == zarr_bytes(night)
    manifest = read_manifest(open_storage(run.root))
    assert manifest is not None
    assert (manifest.shadow_of, manifest.bundle_digest) == ("night", candidate.digest)
    assert {t.stage for t in manifest.timings} == {"classify"}  # masks and features were taken over
    keys = ("image_key", "patient_id", "slide_id", "meta_ward", "status")
    mine, theirs = ([{k: r[k] for k in keys} for r in tables(p)["predictions"]] for p in (root, night))
    assert mine == theirs
    assert (root / "plan.parquet").read_bytes() == (night / "plan.parquet").read_bytes()
    assert (root / "missing.parquet").read_bytes() == (night / "missing.parquet").read_bytes()
    assert verify_run(run.root).findings == ()
    assert verify_run(str(night)).findings == ()
    assert run.binding.command.startswith(f"leukoflow shadow {night.parent} night --bundle ")


def test_what_it_would_have_changed_is_reported_without_names(accompanied: tuple[Path, Run]) -> None:
    night, run = accompanied
    found = compare(str(night.parent), run.run_id)
    direct = diff_runs(str(night), run.root)
    assert (found.images, found.changed, found.slides_changed) == (38, direct.changed, len(direct.slides))
    assert found.moved == sum(slide.moved for slide in direct.slides)
    assert found.changed > 20
    text = (Path(run.root) / "shadow.json").read_text()
    assert loads(ShadowSummary, text.encode(), "") == found
    words = {row[name] for row in tables(night)["predictions"] for name in ("image_key", "slide_id", "patient_id")}
    page = as_markdown(found)
    assert not [word for word in words if word and (word in text or word in page)]
    assert "Not the night's result" in page
    assert verify_run(run.root).findings == ()


def test_nobody_takes_it_for_the_nights_result(accompanied: tuple[Path, Run]) -> None:
    night, run = accompanied
    out = str(night.parent)
    assert read_progress(run.root).shadow_of == read_state(run.root).shadow_of == "night"
    assert read_state(str(night)).shadow_of is None
    assert newest_run(out) == "night"
    assert "A shadow run of night, not the night" in build_report(run.root, read_manifest(open_storage(run.root)))
    assert "A shadow run" not in build_report(str(night), read_manifest(open_storage(str(night))))
    settings = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    assert f"{run.run_id}  shadow" in CliRunner().invoke(app, ["status", out], env=settings).output
    status = CliRunner().invoke(app, ["status", out, run.run_id], env=settings).output
    assert "not the night's result" in status


def test_the_same_command_finds_it_also_after_a_correction(accompanied: tuple[Path, Run], candidate: Bundle) -> None:
    night, run = accompanied
    config = shadow_config(str(night.parent), None, str(candidate.path))
    assert open_run(config).finished == read_manifest(open_storage(run.root))
    mary, ruth = (pseudonym(name, b"a key that only these tests have") for name in ("mary", "ruth"))
    assert {e.run_id for e in correct_patient(str(night.parent), ruth, mary)} == {"night", run.run_id}
    assert open_run(config).finished == read_manifest(open_storage(run.root))
    assert verify_run(run.root).findings == ()


def test_a_candidate_of_the_registry(copy: Path, candidate: Bundle, tmp_path: Path, monkeypatch: Any) -> None:
    registry = Registry(str(tmp_path / "registry"))
    registry.register(candidate.path, "ana", "second", without_metrics="a test")
    monkeypatch.setenv("LEUKOFLOW_BUNDLES", registry.storage.root)
    run = open_run(shadow_config(str(copy.parent), "night", "registry:second"))
    assert (run.run_id, run.bundle_uri) == (f"night-shadow-{candidate.digest[:8]}", registry.location(candidate.digest))
    assert run.binding.bundle_reference == "registry:second"


def test_what_cannot_be_accompanied_is_said(accompanied: tuple[Path, Run], candidate: Bundle, tmp_path: Path) -> None:
    night, run = accompanied
    out, bundle = str(night.parent), str(candidate.path)
    with pytest.raises(ConfigError, match="there is no run nothing in"):
        shadow_config(out, "nothing", bundle)
    with pytest.raises(ConfigError, match="is a shadow run itself; name night"):
        open_run(shadow_config(out, run.run_id, bundle))
    with pytest.raises(ConfigError, match="holds no finished run"):
        shadow_config(str(tmp_path / "empty"), None, bundle)
    manifest = read_manifest(open_storage(str(night)))
    assert manifest is not None
    changed = replace(manifest, source=replace(manifest.source, identity="another"))
    (night / "manifest.json").write_bytes(dumps(changed))
    with pytest.raises(ConfigError, match="was changed since run night"):
        open_run(shadow_config(out, "night", bundle))
    (night / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="night is not finished"):
        open_run(shadow_config(out, "night", bundle))
    older = json.loads((night / "run.json").read_text())
    del older["config"]
    (night / "run.json").write_text(json.dumps(older))
    assert loads(RunBinding, (night / "run.json").read_bytes(), "").config == ""
    with pytest.raises(ConfigError, match="did not record all settings"):
        shadow_config(out, "night", bundle)
    refused = CliRunner().invoke(app, ["shadow", out, "night"], env={"COLUMNS": "200"})
    assert (refused.exit_code, "--bundle names the candidate" in refused.stderr) == (1, True)


def test_the_flow_screens_compares_and_tells(copy: Path, candidate: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the flow itself does; the nightly flow that it calls is stood in for, and so is Prefect's server."""
    import logging

    from prefect.states import Completed

    import leukoflow.flows.shadow

    said: list[str] = []

    def screened(config: RunConfig) -> Any:
        finish_here(config)
        return Completed(message="done")

    monkeypatch.setattr(leukoflow.flows.shadow.nightly, "fn", screened)
    monkeypatch.setattr(leukoflow.flows.shadow, "_be_nice", lambda: said.append("nice"))
    monkeypatch.setattr(leukoflow.flows.shadow, "get_run_logger", lambda: logging.getLogger("leukoflow"))
    monkeypatch.setattr(
        leukoflow.flows.shadow, "create_markdown_artifact", lambda text, key, description: said.append(text)
    )
    state = leukoflow.flows.shadow.shadow.fn(str(copy.parent), None, str(candidate.path))
    assert state.is_completed()
    assert said[0] == "nice"
    assert "Not the night's result" in said[1]
    assert (copy.parent / f"night-shadow-{candidate.digest[:8]}" / "shadow.json").exists()
    refused = leukoflow.flows.shadow.shadow.fn(str(copy.parent), "nothing", str(candidate.path))
    assert (refused.is_failed(), "there is no run nothing" in str(refused.message)) == (True, True)
