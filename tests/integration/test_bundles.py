"""A night with the approved bundle, a candidate in its shadow, and the night computed again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import tables, with_other_thresholds, zarr_bytes
from typer.testing import CliRunner

from leukoflow.apps.cli.main import app
from leukoflow.models.bundle import Bundle
from leukoflow.models.registry import Registry
from leukoflow.runs.progress import read_manifest, read_progress
from leukoflow.runs.records import RunManifest
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.upkeep.diff import diff_runs
from leukoflow.tasks.upkeep.reproduce import reproduce_run
from leukoflow.tasks.upkeep.retention import plan_retention
from leukoflow.tasks.upkeep.shadow import newest_run
from leukoflow.tasks.upkeep.verify import verify_run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def manifest(root: Path | str) -> RunManifest:
    found = read_manifest(open_storage(str(root)))
    assert found is not None
    return found


def test_a_candidate_in_the_shadow_of_a_night_and_the_night_computed_again(
    screen: Any, bundle: Bundle, archives: dict[str, str], dask_address: str, tmp_path: Path, monkeypatch: Any
) -> None:
    from leukoflow.flows.shadow import shadow

    out, registry = str(tmp_path / "out"), Registry(str(tmp_path / "registry"))
    registry.register(bundle.path, "ana", "first", without_metrics="a test")
    candidate = with_other_thresholds(bundle, tmp_path / "candidate", 3.0)
    registry.register(candidate.path, "ana", "second", without_metrics="a test")
    registry.approve("first", "ana", "to begin with")
    monkeypatch.setenv("LEUKOFLOW_BUNDLES", registry.storage.root)
    assert screen(archives["tgz"], out, "night", bundle="approved").is_completed()
    night = manifest(f"{out}/night")
    assert (night.bundle_digest, night.bundle_reference, len(night.hosts)) == (bundle.digest, "approved", 1)

    state = shadow(out, None, "registry:second", cluster=dask_address, return_state=True)
    assert state.is_completed(), state.message
    name = f"night-shadow-{candidate.digest[:8]}"
    root = Path(out) / name
    found = manifest(root)
    assert (found.shadow_of, found.bundle_digest) == ("night", candidate.digest)
    assert zarr_bytes(root) == zarr_bytes(Path(out) / "night")  # taken over: the backbones are the same
    assert {t.stage for t in found.timings} == {"classify"}
    assert verify_run(str(root)).findings == ()
    summary = json.loads((root / "shadow.json").read_text())
    compared = diff_runs(f"{out}/night", str(root))
    assert (summary["shadow_of"], summary["images"], summary["changed"]) == ("night", 48, compared.changed)
    assert compared.changed > 30
    keys = [row["image_key"] for row in tables(root)["predictions"]]
    text = (root / "shadow.json").read_text()
    assert not any(key in text for key in keys)  # names of images stay in tables and reports

    assert read_progress(str(root)).shadow_of == "night"
    settings = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    assert f"{name}  shadow" in CliRunner().invoke(app, ["status", out], env=settings).output
    assert "not the night's result" in CliRunner().invoke(app, ["status", out, name], env=settings).output
    assert "not the night&#x27;s result" in (root / "report.html").read_text().replace("'", "&#x27;")
    assert "A shadow run of" not in (Path(out) / "night" / "report.html").read_text()
    assert newest_run(out) == "night"
    assert {d.run_id: d.delete for d in plan_retention(out, 0, 1)} == {"night": False, name: False}

    again = shadow(out, "night", "registry:second", cluster=dask_address, return_state=True)
    assert "finished already" in str(again.message)
    refused = shadow(out, name, "registry:second", cluster=dask_address, return_state=True)
    assert "is a shadow run itself; name night" in str(refused.message)

    repeated = reproduce_run(f"{out}/night", shards=2, workers=1)
    assert repeated.differences == ()
    assert (repeated.environment, len(repeated.shards), repeated.of_shards) == ((), 2, 3)
    assert dict(repeated.values)["features.zarr/hybrid"] > 1000
