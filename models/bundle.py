"""The bundle: one directory with `bundle.json` and `*.safetensors` that fixes everything a prediction depends on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import nn

from leukoflow.core.errors import BundleError
from leukoflow.core.method import MethodSettings, Settings
from leukoflow.models.attention_classifier import AttentionClassifier, ClassifierSpec
from leukoflow.models.attention_unet import AttentionUNet, UNetSpec
from leukoflow.models.fetch import cache_folder, fetch, read_remote
from leukoflow.models.hybrid_cn_nas import BackboneSpec, HybridCNNas, build_backbone
from leukoflow.models.presets import PresetName, preset
from leukoflow.runs.records import CLASSES

SCHEMA_VERSION = 2
EMBEDDED = Path(__file__).parent / "default"
Component = Literal["segmenter", "features", "classifier"]
M = TypeVar("M", bound=nn.Module)


class Calibration(Settings):
    """What was fitted on answers out of fold: of each field by a classifier that had not seen its cluster."""

    temperature: float = Field(default=1.0, gt=0)
    alpha: float = 0.05  # wanted miss rate of the prediction sets, per class
    conformal: tuple[float, ...] = (1.0,) * len(CLASSES)  # c is in the set if 1 - p[c] <= conformal[c]
    min_cells: int = 1
    min_confidence: float = 0.0
    max_ood: float = 1e9  # JSON knows no infinity


class Training(Settings):
    """The origin of the weights."""

    data_digest: str = "none"
    seed: int = 0
    fields: int = 0
    clusters: tuple[str, ...] = ()
    command: str = ""
    notes: str = ""  # anything that the command does not say
    minutes: dict[str, float] = Field(default_factory=dict)  # wall clock of each phase


class BundleSpec(Settings):
    """Content of `bundle.json`. `files` names every weight file with its SHA-256."""

    schema_version: int = SCHEMA_VERSION
    name: str
    preset: str
    classes: tuple[str, ...] = CLASSES
    method: MethodSettings
    unet: UNetSpec | None
    backbones: tuple[BackboneSpec, ...]
    classifier: ClassifierSpec
    selected: tuple[int, ...]  # columns of the hybrid vector, in the order of their choice
    calibration: Calibration = Calibration()
    training: Training = Training()
    metrics: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _agree_on_classes(self) -> BundleSpec:
        counts = {len(self.classes), self.classifier.classes, len(self.calibration.conformal)}
        if len(counts) > 1:
            raise ValueError(
                f"classes, classifier and thresholds are of different numbers of classes: {sorted(counts)}"
            )
        return self


@dataclass(frozen=True, slots=True)
class Statistics:
    """Arrays fitted on training data. D = hybrid columns, K = selected ones."""

    mean: NDArray[np.float32]  # [D], of fields; their cells are z-scored alike, so that averages stay averages
    std: NDArray[np.float32]  # [D]
    ood_mean: NDArray[np.float32]  # [K]
    ood_whitening: NDArray[np.float32]  # [K, K]: differences times this have covariance 1 among training fields

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """Return arrays by name, as stored."""
        return {name: np.ascontiguousarray(getattr(self, name), np.float32) for name in self.__slots__}


def _sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(value: object) -> str:
    """Return the hex SHA-256 of the canonical JSON of a value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def spec_digest(spec: BundleSpec) -> str:
    """Compute what `Bundle.digest` is: it names the weights by their digests, so it is known before they are there."""
    return _digest(spec.model_dump(mode="json", exclude={"metrics"}))


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk whose files have been checked against the digests in `bundle.json`."""

    path: Path
    spec: BundleSpec
    statistics: Statistics

    @property
    def digest(self) -> str:
        """SHA-256 over `bundle.json` and all weights. Metrics are left out: measuring a bundle does not change it."""
        return spec_digest(self.spec)

    def component_digest(self, component: Component) -> str:
        """Compute the digest of what one stage depends on; a new classifier leaves segmenter and features unchanged."""
        spec = self.spec
        dump = spec.model_dump(mode="json")
        method, files = dump["method"], spec.files
        if component == "segmenter":
            names = ["segmenter.safetensors"]
            value = [dump["unet"], method["quality"], method["normalize"], method["segment"]]
        elif component == "features":
            names = [f"{b.name}.safetensors" for b in spec.backbones]
            value = [dump["backbones"], method["features"]]
        else:
            names = ["classifier.safetensors", "statistics.safetensors"]
            keys = ("classes", "classifier", "selected", "calibration")
            value = [method["select"], method["classify"], *(dump[key] for key in keys)]
        return _digest([component, value, {name: files.get(name) for name in names}])

    def segmenter(self, device: str | torch.device = "cpu") -> AttentionUNet | None:
        """Load the U-Net in evaluation mode, or None for a bundle trained without one."""
        if self.spec.unet is None:
            return None
        model = AttentionUNet(self.spec.unet)
        return self._ready(model, "segmenter", device)

    def hybrid(self, device: str | torch.device = "cpu") -> HybridCNNas:
        """Load both backbones in evaluation mode."""
        nets = [self._filled(build_backbone(spec), spec.name) for spec in self.spec.backbones]
        return _evaluation(HybridCNNas(self.spec.backbones, nets), device)

    def classifier(self, device: str | torch.device = "cpu") -> AttentionClassifier:
        """Load the classifier in evaluation mode."""
        return self._ready(AttentionClassifier(self.spec.classifier), "classifier", device)

    def _filled(self, model: M, name: str) -> M:
        state = {k: v.float() if v.is_floating_point() else v for k, v in load_tensors(self._file(name)).items()}
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise BundleError(f"{self._file(name)} does not fit its architecture in bundle.json: {error}") from error
        return model

    def _ready(self, model: M, name: str, device: str | torch.device) -> M:
        return _evaluation(self._filled(model, name), device)

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"


def _evaluation(model: M, device: str | torch.device) -> M:
    """Put a model in evaluation mode, frozen, on the device, in the memory layout that is fastest for convolutions."""
    model.eval().requires_grad_(False)
    model.to(device)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return model


def load_bundle(name_or_dir: str | Path, digest: str | None = None) -> Bundle:
    """Open a bundle by the name of an embedded one (`pocket`), its directory or `s3://` prefix; check every file.

    One on an object store is fetched into this machine's cache, where the next one finds it; with `digest` (what is
    wanted, if that is known) the store is not even asked. Raises BundleError when it is absent, incomplete, altered, or
    of another schema version.
    """
    if str(name_or_dir).startswith("s3://"):
        return _load_remote(str(name_or_dir), digest)
    path = Path(name_or_dir)
    if not (path / "bundle.json").is_file() and path.name == str(name_or_dir):
        path = EMBEDDED / path.name
    document = path / "bundle.json"
    if not document.is_file():
        known = sorted(p.parent.name for p in EMBEDDED.glob("*/bundle.json"))
        raise BundleError(
            f"there is no bundle {str(name_or_dir)!r}: name a folder that holds a bundle.json, or one that comes with "
            f"leukoflow ({', '.join(known)})"
        )
    try:
        data = document.read_bytes()
    except OSError as error:
        raise BundleError(f"{document} cannot be read: {error}") from error
    return _opened(path, _parsed(data, str(document)))


def _parsed(data: bytes, document: str) -> BundleSpec:
    """Read the content of a `bundle.json`."""
    try:
        raw = json.loads(data)
    except ValueError as error:
        raise BundleError(f"{document} cannot be read: {error}") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{document} has schema version {version!r}, this leukoflow reads {SCHEMA_VERSION}: "
            "train the bundle again, or use the leukoflow that wrote it"
        )
    try:
        return BundleSpec.model_validate(raw)
    except ValidationError as error:
        raise BundleError(f"{document} is not a valid bundle: {error}") from error


def _opened(path: Path, spec: BundleSpec) -> Bundle:
    """Open the bundle at `path`, its files checked."""
    _check_files(path, spec)
    arrays = load_arrays(path / "statistics.safetensors")
    try:
        statistics = Statistics(**{name: arrays[name] for name in Statistics.__slots__})
    except KeyError as error:
        raise BundleError(f"{path / 'statistics.safetensors'} lacks {error}; train the bundle again") from error
    return Bundle(path, spec, statistics)


def _load_remote(uri: str, digest: str | None) -> Bundle:
    """Open the bundle at an `s3://` prefix, by way of the cache."""
    if digest is not None:
        try:
            kept = load_bundle(cache_folder() / digest)
            if kept.digest == digest:
                return kept
        except BundleError:
            pass  # not there yet, or damaged: it is fetched
    document = read_remote(uri)
    spec = _parsed(document, f"{uri.rstrip('/')}/bundle.json")
    if strange := [name for name in spec.files if Path(name).name != name or name == "bundle.json"]:
        raise BundleError(f"bundle {uri} names {strange[0]!r}, which cannot be one of its files")
    target = cache_folder() / spec_digest(spec)
    try:
        if (target / "bundle.json").read_bytes() == document:  # the digest leaves out the metrics
            return _opened(target, spec)
    except (OSError, BundleError):
        pass
    fetch(uri, document, sorted(spec.files), target)
    return _opened(target, spec)


def _check_files(path: Path, spec: BundleSpec) -> None:
    """Check that every weight file is there and unaltered, and that every one that the spec needs is named."""
    needed = {"classifier.safetensors", "statistics.safetensors", *(f"{b.name}.safetensors" for b in spec.backbones)}
    if spec.unet is not None:
        needed.add("segmenter.safetensors")
    if needed - set(spec.files):
        raise BundleError(f"{path / 'bundle.json'} names no digest for {sorted(needed - set(spec.files))}")
    for name, digest in sorted(spec.files.items()):
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise BundleError(f"bundle {path} is incomplete: {name} is missing; copy the whole directory again")
        if _sha256(file) != digest:
            raise BundleError(f"bundle {path} was altered: {name} does not have the digest that bundle.json records")


def save_bundle(
    path: Path,
    spec: BundleSpec,
    modules: Mapping[str, nn.Module],
    statistics: Statistics,
) -> Bundle:
    """Write weights (half precision where they are large), statistics and, last, `bundle.json`; return it loaded.

    `modules` maps `segmenter`, `classifier` and each backbone's name to its module.
    """
    path.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    for name, module in modules.items():
        file = path / f"{name}.safetensors"
        half = name != "classifier"
        state = {k: _stored(v, half) for k, v in module.state_dict().items()}
        save_tensors(state, file)
        file.chmod(0o644)  # safetensors makes files that only their owner can read; bundles are shared
        files[file.name] = _sha256(file)
    file = path / "statistics.safetensors"
    save_arrays(statistics.arrays(), file)
    file.chmod(0o644)
    files[file.name] = _sha256(file)
    write_spec(path, spec.model_copy(update={"files": files}))
    return load_bundle(path)


def write_spec(path: Path, spec: BundleSpec) -> None:
    """Write `bundle.json` atomically, so that it never names files that are not there."""
    temporary = path / "bundle.json.part"
    temporary.write_text(spec.model_dump_json(indent=1) + "\n", "utf-8")
    os.replace(temporary, path / "bundle.json")


def _stored(value: torch.Tensor, half: bool) -> torch.Tensor:
    """Return a contiguous CPU tensor; half precision unless it is small (normalisation statistics keep their range)."""
    value = value.detach().cpu().contiguous()
    return value.half() if half and value.is_floating_point() and value.dim() > 1 else value


def random_bundle(path: Path, seed: int = 0, preset_name: PresetName = "pocket", *, tiny: bool = False) -> Bundle:
    """Make a structurally complete bundle with random weights: for tests and timing, useless for diagnosis."""
    preset_name = "tiny" if tiny else preset_name
    chosen = preset(preset_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hybrid = HybridCNNas(chosen.backbones)
        rng = np.random.default_rng(seed)
        total = hybrid.num_features
        k = min(chosen.method.select.k, total)
        classifier = AttentionClassifier(
            ClassifierSpec(inputs=k, width=chosen.classifier_width, layers=chosen.classifier_layers)
        )
        modules: dict[str, nn.Module] = {"segmenter": AttentionUNet(chosen.unet), "classifier": classifier}
        modules |= dict(hybrid.backbones.items())
    statistics = Statistics(
        mean=np.zeros(total, np.float32),
        std=np.ones(total, np.float32),
        ood_mean=np.zeros(k, np.float32),
        ood_whitening=np.linalg.qr(rng.normal(size=(k, k)))[0].astype(np.float32),
    )
    spec = BundleSpec(
        name=f"random-{preset_name}-{seed}",
        preset=preset_name,
        method=chosen.method,
        unet=chosen.unet,
        backbones=chosen.backbones,
        classifier=classifier.spec,
        selected=tuple(int(i) for i in rng.permutation(total)[:k]),
        training=Training(seed=seed, command="random weights"),
    )
    return save_bundle(path, spec, modules, statistics)
