"""The bundle registry: what is approved follows from a history that only grows, and a run keeps what it began with."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from harness import screen_here, smears, with_other_thresholds, write_zip

from leukoflow.core.config import load_config
from leukoflow.core.errors import BundleError, ConfigError, RunConflictError, StorageError
from leukoflow.models.bundle import Bundle, load_bundle, write_spec
from leukoflow.models.registry import Registry, headline_metrics, is_reference, reference
from leukoflow.runs.progress import read_manifest
from leukoflow.storage.base import Storage
from leukoflow.storage.local import LocalStorage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.open_run import open_run
from leukoflow.tasks.upkeep.verify import verify_run


def measured(bundle: Bundle, accuracy: float) -> Bundle:
    """The bundle with metrics as evaluating writes them."""
    models = {"leukoflow": {"accuracy": accuracy, "macro_f1": accuracy - 0.01, "ece": 0.02, "fields": 9}}
    metrics = {"bundle_digest": bundle.digest, "protocols": {"cluster": {"models": models}}}
    write_spec(bundle.path, bundle.spec.model_copy(update={"metrics": metrics}))
    return load_bundle(bundle.path)


@pytest.fixture(scope="session")
def several(small: Bundle, tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    folder = tmp_path_factory.mktemp("several")
    made = [with_other_thresholds(small, folder / f"b{i}", 1 + i / 10) for i in range(3)]
    return [measured(bundle, 0.9 + i / 100) for i, bundle in enumerate(made)]


@pytest.fixture
def registry(several: list[Bundle], tmp_path: Path) -> Registry:
    made = Registry(str(tmp_path / "registry"))
    for i, bundle in enumerate(several):
        made.register(bundle.path, "ana@lab", f"night-{i}")
    return made


def states(registry: Registry) -> list[str]:
    return [b.state for b in registry.state().bundles]


def test_registering_checks_copies_and_enters(several: list[Bundle], registry: Registry) -> None:
    found = registry.resolve("registry:night-1")
    assert (found.digest, found.state, found.by) == (several[1].digest, "registered", "ana@lab")
    assert found.metrics == (("cluster accuracy", 0.91), ("cluster macro_f1", 0.9), ("cluster ece", 0.02))
    assert load_bundle(registry.location(found.digest)).digest == found.digest
    assert registry.resolve(found.digest[:8]) == registry.resolve(found.digest) == found
    registry.register(several[1].path, "eve", "night-1")
    registry.register(several[1].path, "eve", "another-name")  # content has one name
    assert [e.number for e in registry.entries()] == [1, 2, 3]


def test_a_bundle_that_nobody_measured_needs_a_reason(several: list[Bundle], tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "r"))
    bundle = with_other_thresholds(several[0], tmp_path / "new", 8.0)
    write_spec(bundle.path, bundle.spec.model_copy(update={"metrics": {}}))
    bundle = load_bundle(bundle.path)
    with pytest.raises(BundleError, match="has no metrics"):
        registry.register(bundle.path, "ana")
    assert registry.entries() == ()
    assert registry.register(bundle.path, "ana", without_metrics="timing only").note == "timing only"
    again = registry.register(measured(bundle, 0.5).path, "ana")
    assert (again.note, again.metrics[0]) == ("", ("cluster accuracy", 0.5))
    assert load_bundle(registry.location(bundle.digest)).spec.metrics
    other = {"bundle_digest": several[0].digest, "accuracy": 1.0}
    stranger = with_other_thresholds(several[0], tmp_path / "stranger", 9.0)
    write_spec(stranger.path, stranger.spec.model_copy(update={"metrics": other}))
    with pytest.raises(BundleError, match="measured on another one"):
        registry.register(stranger.path, "ana")


def test_what_is_damaged_or_badly_named_is_refused(several: list[Bundle], registry: Registry, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(several[0].path, copy)
    (copy / "classifier.safetensors").write_bytes(b"?")
    with pytest.raises(BundleError, match="was altered"):
        registry.register(copy, "ana", "bad")
    for name in ("approved", "a/b", "", "0123456789abcdef"):
        if name:
            with pytest.raises(ConfigError, match="cannot be a bundle's name"):
                registry.register(several[0].path, "ana", name)
    new = measured(with_other_thresholds(several[0], tmp_path / "new", 7.0), 0.5)
    with pytest.raises(ConfigError, match=r"the name night-0 stands for bundle [0-9a-f]{12}"):
        registry.register(new.path, "ana", "night-0")
    with pytest.raises(BundleError, match=r"there is no such bundle in the registry; registered: night-0 \("):
        registry.resolve("registry:night-9")


def test_approving_and_going_back(several: list[Bundle], registry: Registry) -> None:
    with pytest.raises(BundleError, match=r"no bundle of .* is approved"):
        registry.resolve("approved")
    a, b, c = (bundle.digest for bundle in several)
    registry.approve("night-0", "ana", "first")
    registry.approve(b[:10], "ben", "better")
    assert registry.resolve("approved").digest == b
    assert states(registry) == ["retired", "approved", "registered"]
    registry.approve("night-2", "ben", "better still")
    registry.approve("night-2", "ben", "again")  # nothing to do
    assert registry.rollback("ana", "worse").digest == b
    assert registry.resolve("registry:approved").digest == b
    assert registry.rollback("ana", "worse still").digest == a
    with pytest.raises(BundleError, match="no earlier approved bundle"):
        registry.rollback("ana", "")
    with pytest.raises(BundleError, match="none that was approved before"):
        registry.rollback("ana", "", to="night-2")
    registry.approve("night-1", "ana", "")
    registry.approve("night-2", "ana", "")
    assert registry.rollback("ana", "", to="night-0").digest == a
    assert states(registry) == ["approved", "retired", "retired"]
    actions = [e.action for e in registry.entries()]
    assert actions == ["register"] * 3 + ["approve"] * 3 + ["rollback"] * 2 + ["approve"] * 2 + ["rollback"]
    assert c not in registry.state().approvals


def test_a_bundle_that_is_damaged_in_the_registry_is_not_approved(registry: Registry, several: list[Bundle]) -> None:
    file = Path(registry.location(several[0].digest)) / "convnext.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(BundleError, match="register it again"):
        registry.approve("night-0", "ana", "")
    assert states(registry) == ["registered"] * 3
    registry.register(several[0].path, "ana", "night-0")  # mends it
    registry.approve("night-0", "ana", "")


def test_the_history_tells_when_it_was_altered(registry: Registry) -> None:
    registry.approve("night-0", "ana", "first")
    path = Path(registry.storage.uri("history/000004.json"))
    text = path.read_text()
    path.write_text(text.replace("ana", "eve"))
    registry.approve("night-1", "ana", "the next entry binds the altered one")
    path.write_text(text)
    with pytest.raises(StorageError, match=r"000005\.json was altered, or does not follow"):
        registry.state()


def test_cut_off_anywhere_the_registry_holds_the_old_state_or_the_new(
    several: list[Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crash(BaseException):
        pass

    originals = {verb: getattr(LocalStorage, verb) for verb in ("write", "create")}
    steps: list[str] = []

    def crash_at(patch: pytest.MonkeyPatch, step: int) -> None:
        for verb, original in originals.items():

            def stepped(self: Storage, key: str, data: bytes, verb: str = verb, original: Any = original) -> Any:
                if len(steps) >= step:
                    raise Crash
                steps.append(f"{verb} {key}")
                return original(self, key, data)

            patch.setattr(LocalStorage, verb, stepped)

    for step in range(20):
        registry = Registry(str(tmp_path / str(step)))
        registry.register(several[0].path, "ana", "old")
        registry.approve("old", "ana", "")
        steps.clear()
        with monkeypatch.context() as patch:
            crash_at(patch, step)
            try:
                registry.register(several[1].path, "ana", "new")
                registry.approve("new", "ana", "")
            except Crash:
                pass
            else:
                assert len(steps) == step > 4
                assert registry.resolve("approved").name == "new"
                break
        assert registry.resolve("approved").name == "old"
        for bundle in registry.state().bundles:
            registry.check(bundle.digest)
        registry.register(several[1].path, "ana", "new")
        registry.approve("new", "ana", "")
        assert registry.resolve("approved").digest == several[1].digest
    else:
        pytest.fail("it never came to its end")


def test_readers_and_writers_at_once_see_one_state_after_the_other(registry: Registry, several: list[Bundle]) -> None:
    registry.approve("night-0", "ana", "")
    digests, over = {b.digest for b in several}, threading.Event()

    def read() -> int:
        seen = 0
        while not over.is_set():
            state = Registry(registry.storage.root).state()
            assert [b.state for b in state.bundles].count("approved") == 1
            assert state.approved in digests
            seen += 1
        return seen

    def write(who: str) -> None:
        for i in range(12):
            Registry(registry.storage.root).approve(f"night-{(i + len(who)) % 3}", who, "")

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        writers = [pool.submit(write, who) for who in ("a", "bb")]
        try:
            for writer in writers:
                writer.result()
        finally:
            over.set()
        assert all(reader.result() > 0 for reader in readers)
    entries = registry.entries()
    assert [e.number for e in entries] == list(range(1, len(entries) + 1))
    assert {e.by for e in entries} == {"ana@lab", "ana", "a", "bb"}


def test_settings_that_ask_the_registry() -> None:
    assert [is_reference(b) for b in ("approved", "registry:x", "pocket", "./approved")] == [True, True, False, False]
    assert [reference(b) for b in ("approved", "registry:approved", "registry:x", "pocket")] == [
        "approved", "approved", "registry:x", "",
    ]  # fmt: skip
    assert headline_metrics({"auc": 0.5, "why": "x", "ok": True}) == (("auc", 0.5),)
    assert headline_metrics({}) == ()


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(write_zip(tmp_path / "smears.zip", smears(tmp_path / "sample", 16, seed=2, side=96)))


def settings(source: str, tmp_path: Path, registry: Registry, **more: Any) -> Any:
    chosen = {"bundle": "approved", "bundles": registry.storage.root, "shard_size": 16}
    return load_config(source=source, out=str(tmp_path / "out"), **(chosen | more))


def test_a_run_keeps_the_bundle_that_it_started_with(
    several: list[Bundle], registry: Registry, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.approve("night-0", "ana", "")
    config = settings(source, tmp_path, registry)
    first, named = open_run(config), open_run(settings(source, tmp_path, registry, run_id="named"))
    assert first.bundle.digest == several[0].digest
    assert first.bundle_uri == registry.location(several[0].digest)
    assert (first.binding.bundle, first.binding.bundle_reference) == (first.bundle_uri, "approved")
    assert json.loads(first.binding.config)["bundle"] == "approved"
    assert f"--bundle {first.bundle_uri}" in first.binding.command
    registry.approve("night-1", "ana", "")
    again = open_run(config)
    assert (again.run_id, again.bundle.digest, again.binding) == (first.run_id, several[0].digest, first.binding)
    again = open_run(settings(source, tmp_path, registry, run_id="named"))
    assert (again.bundle.digest, again.fingerprint) == (several[0].digest, named.fingerprint)
    with pytest.raises(RunConflictError):
        open_run(settings(source, tmp_path, registry, run_id="named", bundle="registry:night-1"))
    by_path = open_run(settings(source, tmp_path, registry, run_id="named", bundle=first.bundle_uri, bundles=None))
    assert by_path.fingerprint == named.fingerprint  # as the command that resumes has it


@pytest.mark.slow
def test_once_it_is_finished_the_newly_approved_bundle_gives_a_run_of_its_own(
    several: list[Bundle], registry: Registry, source: str, tmp_path: Path
) -> None:
    registry.approve("night-0", "ana", "")
    first = screen_here(source, tmp_path / "out", None, "approved", bundles=registry.storage.root)
    assert verify_run(first.root).ok
    manifest = read_manifest(open_storage(first.root))
    assert manifest is not None
    assert (manifest.bundle_digest, manifest.bundle_reference) == (several[0].digest, "approved")
    config = settings(source, tmp_path, registry)
    assert open_run(config).finished == manifest
    registry.approve("night-1", "ana", "")
    second = open_run(config)
    assert (second.bundle.digest, second.finished, second.run_id == first.run_id) == (several[1].digest, None, False)
    registry.approve("night-2", "ana", "")
    assert open_run(config).run_id == second.run_id  # started and not finished: it is taken up
    registry.rollback("ana", "", to="night-0")
    assert open_run(config).finished == manifest


def test_what_cannot_be_resolved_is_said(registry: Registry, source: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="LEUKOFLOW_BUNDLES"):
        open_run(settings(source, tmp_path, registry, bundles=None))
    with pytest.raises(BundleError, match="is approved"):
        open_run(settings(source, tmp_path, registry))
    assert not (tmp_path / "out").exists()
