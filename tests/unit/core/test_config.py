from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from leukoflow.core.config import RunConfig, load_config
from leukoflow.core.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [n for n in os.environ if n.startswith("LEUKOFLOW_")]:
        monkeypatch.delenv(name)


def config(**settings: Any) -> RunConfig:
    return load_config(**({"source": "in.zip", "out": "out"} | settings))


def test_file_then_environment_then_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "site.toml"
    file.write_text(
        'source = "file.zip"\nout = "file"\nshard_size = 32\num_per_px = 0.1\n'
        "[limits]\nblock_mb = 48\nstage_seconds = 7.0\nshard_retries = 5\n[cluster]\nworkers = 3\n"
    )
    monkeypatch.setenv("LEUKOFLOW_SHARD_SIZE", "48")
    monkeypatch.setenv("LEUKOFLOW_OUT", "environment")
    monkeypatch.setenv("LEUKOFLOW_LIMITS__STAGE_SECONDS", "8")
    found = load_config(file, source="argument.zip", run_id=None, cluster={"workers": None, "address": "tcp://a:1"})
    assert (found.source, found.out, found.shard_size, found.um_per_px) == ("argument.zip", "environment", 48, 0.1)
    assert (found.limits.block_mb, found.limits.stage_seconds, found.limits.shard_retries) == (48, 8.0, 5)
    assert (found.cluster.workers, found.cluster.address) == (3, "tcp://a:1")
    assert found.limits.decode_seconds == 60.0
    assert config().shard_size == 48  # the file of one call is forgotten in the next
    assert config().limits.block_mb != 48


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shard_size": 100}, "shard_size.*multiple of 16.*try 112"),
        ({"shard_size": 8}, "shard_size"),
        ({"device": "gpu"}, "device.*auto, cpu or cuda"),
        ({"um_per_px": 0}, "um_per_px: must be at least 0.01"),
        ({"um_per_px": 1e9}, "um_per_px: must be at most 100"),
        ({"shard_sice": 16}, "shard_sice: there is no setting of this name"),
        ({"limits": {"blok_mb": 1}}, "limits.blok_mb: there is no setting of this name"),
        ({"limits": {"max_member_mb": "many"}}, "limits.max_member_mb: must be a whole number"),
        ({"limits": {"max_megapixels": 0}}, "limits.max_megapixels: must be above 0"),
        ({"cluster": {"workers": -1}}, "cluster.workers: must be at least 0"),
        ({"at_deadline": "wait"}, "at_deadline: must be 'continue' or 'stop'"),
        ({"source": None}, "source: is missing"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**settings)


def test_an_unusable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "absent.toml", source="a", out="b")
    (tmp_path / "bad.toml").write_text("source = [")
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML"):
        load_config(tmp_path / "bad.toml")


BASE = {"source_identity": "i", "bundle_digest": "b", "device": "cpu", "manifest_digest": ""}


@pytest.mark.parametrize(
    "settings",
    [
        {"source": "other.zip"},
        {"shard_size": 32},
        {"um_per_px": 0.5},
        {"meta_columns": ("ward",)},
        {"limits": {"max_megapixels": 1.0}},
        {"limits": {"min_side_px": 64}},
    ],
)
def test_what_decides_the_numbers_is_in_the_fingerprint(settings: dict[str, Any]) -> None:
    assert config(**settings).fingerprint(**BASE) != config().fingerprint(**BASE)


@pytest.mark.parametrize("name", BASE)
def test_so_are_source_bundle_device_and_manifest(name: str) -> None:
    assert config().fingerprint(**(BASE | {name: "x"})) != config().fingerprint(**BASE)


@pytest.mark.parametrize(
    "settings",
    [
        {"out": "elsewhere"},
        {"run_id": "name"},
        {"reuse": "other"},
        {"source": "in.zip/"},
        {"cluster": {"workers": 7, "address": "tcp://a:1"}},
        {"limits": {"block_mb": 8, "stage_seconds": 1.0, "shard_retries": 9}},
    ],
)
def test_what_does_not_is_not(settings: dict[str, Any]) -> None:
    assert config(**settings).fingerprint(**BASE) == config().fingerprint(**BASE)


@pytest.mark.parametrize(
    ("name", "value"), [("LEUKOFLOW_META_COLUMNS", "ward,7-Mary"), ("LEUKOFLOW_CLUSTER", "slurm-Mary")]
)
def test_a_variable_that_is_no_json_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as refused:
        config()
    assert str(refused.value) == (
        f'{name} is not usable: write lists as JSON, ["a", "b"], and one setting of a table as {name}__SETTING'
    )
