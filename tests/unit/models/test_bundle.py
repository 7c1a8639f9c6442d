"""Bundles: written, read back, refused when incomplete or altered; digests of the whole and of its components."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from harness import ROOT

from leukoflow.core.errors import BundleError
from leukoflow.models.bundle import Bundle, Calibration, load_bundle, random_bundle, save_bundle, write_spec
from leukoflow.models.presets import preset
from leukoflow.tasks.report.model_card import render

COMPONENTS = ("segmenter", "features", "classifier")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(tmp_path_factory.mktemp("bundles") / "b", 3, tiny=True)


@pytest.fixture
def bundle(made: Bundle, tmp_path: Path) -> Bundle:
    """A copy of its own for each test."""
    return load_bundle(Path(shutil.copytree(made.path, tmp_path / "b")))


def test_same_seed_same_digest_and_loading_changes_nothing(bundle: Bundle, tmp_path: Path) -> None:
    assert load_bundle(bundle.path).digest == bundle.digest
    assert random_bundle(tmp_path / "again", 3, tiny=True).digest == bundle.digest
    assert random_bundle(tmp_path / "other", 4, tiny=True).digest != bundle.digest


def test_modules_are_ready_for_inference(bundle: Bundle) -> None:
    segmenter = bundle.segmenter()
    assert segmenter is not None
    for module in (segmenter, bundle.hybrid(), bundle.classifier()):
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())
        assert all(p.dtype == torch.float32 for p in module.parameters())
    assert bundle.hybrid().num_features == len(bundle.statistics.mean)
    assert len(bundle.spec.selected) == bundle.spec.classifier.inputs


def test_digest_ignores_metrics_only(bundle: Bundle) -> None:
    write_spec(bundle.path, bundle.spec.model_copy(update={"metrics": {"accuracy": 0.5}}))
    assert load_bundle(bundle.path).digest == bundle.digest
    write_spec(bundle.path, bundle.spec.model_copy(update={"calibration": Calibration(temperature=2.0)}))
    assert load_bundle(bundle.path).digest != bundle.digest


def test_a_new_classifier_leaves_the_other_components_alone(bundle: Bundle, tmp_path: Path) -> None:
    segmenter, classifier = bundle.segmenter(), bundle.classifier()
    assert segmenter is not None
    with torch.no_grad():
        classifier.evidence.bias.add_(1)
    modules = {"segmenter": segmenter, "classifier": classifier, **dict(bundle.hybrid().backbones.items())}
    new = save_bundle(tmp_path / "new", bundle.spec, modules, bundle.statistics)
    before, after = ([b.component_digest(c) for c in COMPONENTS] for b in (bundle, new))
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False]


def test_settings_belong_to_their_component(bundle: Bundle) -> None:
    method = bundle.spec.method
    changes = {
        "segmenter": {"normalize": method.normalize.model_copy(update={"clahe": False})},
        "features": {"features": method.features.model_copy(update={"cell_batch": 8})},
        "classifier": {"classify": method.classify.model_copy(update={"max_cells": 3})},
    }
    for component, update in changes.items():
        spec = bundle.spec.model_copy(update={"method": method.model_copy(update=update)})
        other = Bundle(bundle.path, spec, bundle.statistics)
        changed = [c for c in COMPONENTS if other.component_digest(c) != bundle.component_digest(c)]
        assert changed == [component]


def test_altered_and_missing_files_are_named(bundle: Bundle) -> None:
    file = bundle.path / "nasnet.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"altered: nasnet\.safetensors"):
        load_bundle(bundle.path)
    file.unlink()
    with pytest.raises(BundleError, match=r"nasnet\.safetensors is missing"):
        load_bundle(bundle.path)


def test_other_schema_version_and_broken_json(bundle: Bundle) -> None:
    document = bundle.path / "bundle.json"
    raw = json.loads(document.read_text("utf-8"))
    document.write_text(json.dumps(raw | {"schema_version": 99}), "utf-8")
    with pytest.raises(BundleError, match="schema version 99"):
        load_bundle(bundle.path)
    document.write_text(json.dumps(raw | {"colour": "red"}), "utf-8")
    with pytest.raises(BundleError, match="colour"):
        load_bundle(bundle.path)
    document.write_text("{", "utf-8")
    with pytest.raises(BundleError, match="cannot be read"):
        load_bundle(bundle.path)


def test_a_file_outside_the_bundle_is_never_read(bundle: Bundle) -> None:
    files = bundle.spec.files | {"../secret.safetensors": "0"}
    write_spec(bundle.path, bundle.spec.model_copy(update={"files": files}))
    with pytest.raises(BundleError, match="incomplete"):
        load_bundle(bundle.path)


def test_absent_bundle_and_preset() -> None:
    with pytest.raises(BundleError, match="no bundle 'nowhere'"):
        load_bundle("nowhere")
    with pytest.raises(BundleError, match="no preset named 'huge'"):
        preset("huge")


def test_card_of_a_bundle_that_nobody_measured(bundle: Bundle) -> None:
    card = render(bundle)
    assert "It has not been evaluated." in card
    assert bundle.digest[:16] in card


def test_the_card_in_the_documentation_is_that_of_the_embedded_bundle() -> None:
    stored = ROOT / "docs" / "model-card.md"
    assert stored.read_text("utf-8") == render(load_bundle("pocket")), (
        "write it with python -m leukoflow.tasks.report.model_card pocket"
    )


def test_embedded_bundle_is_small_and_measured() -> None:
    bundle = load_bundle("pocket")
    size = sum(file.stat().st_size for file in bundle.path.iterdir())
    assert size <= 25_000_000
    assert not [f for f in bundle.path.iterdir() if f.suffix not in {".json", ".safetensors"}]
    metrics = bundle.spec.metrics
    assert metrics["bundle_digest"] == bundle.digest
    assert {"cluster", "slide", "random"} <= set(metrics["protocols"])
    assert {"leukoflow", "colour histogram"} <= set(metrics["protocols"]["cluster"]["models"])
