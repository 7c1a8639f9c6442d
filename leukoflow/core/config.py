"""RunConfig: what a run is asked to do, from a TOML file, the environment (`LEUKOFLOW_...`) and the command line."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import AwareDatetime, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from leukoflow.core.errors import ConfigError
from leukoflow.core.geometry import MAX_UM_PER_PX, MIN_UM_PER_PX
from leukoflow.core.method import Settings

MICRO_BATCH = 16
"""Fields per inference batch. Shard sizes are multiples of it, so that no float depends on how a run was cut."""


class LimitSettings(Settings):
    """Bounds on what one image, one shard or one run may take."""

    max_member_mb: int = Field(1024, ge=1, description="largest stored or decompressed member, MB")
    max_megapixels: float = Field(120.0, gt=0, description="largest decoded image, megapixels")
    min_side_px: int = Field(32, ge=1, description="smallest side of an image, pixels")
    decode_seconds: float = Field(60.0, gt=0, description="time to decode one image")
    decode_memory_mb: int = Field(4096, ge=256, description="address space of the decoding process, MB")
    block_mb: int = Field(64, ge=1, description="decoded pixels a shard holds at once, MB")
    stage_seconds: float = Field(1800.0, gt=0, description="time for one stage of one shard, from its start")
    shard_retries: int = Field(2, ge=0, description="further attempts at a shard that failed")
    retry_delay_seconds: float = Field(2.0, ge=0, description="pause before a shard is tried again")


class TlsSettings(Settings):
    """PEM files for `tls://`. What is left out comes from Dask's own configuration (`distributed.comm.tls`)."""

    ca_file: str | None = Field(None, description="certificate of the authority that signed all others")
    cert: str | None = Field(None, description="this side's certificate")
    key: str | None = Field(None, description="its private key; may also be part of `cert`")


class SlurmSettings(Settings):
    """What a worker's job asks Slurm for. One job is one worker process; the scheduler runs beside the flow."""

    partition: str | None = None
    account: str | None = None
    walltime: str = Field("08:00:00", description="time limit of a job, as Slurm spells it")
    cores: int = Field(1, ge=1, description="cores of a worker")
    memory: str = Field("4GB", description="memory of a worker")
    gpu_cores: int = Field(4, ge=1, description="cores of a worker with a GPU")
    gpu_memory: str = Field("16GB", description="memory of a worker with a GPU")
    gpu_directive: str = Field("--gres=gpu:1", description="how a job asks for its one GPU")
    directives: tuple[str, ...] = Field((), description="further #SBATCH lines, as in `--qos=night`")
    prologue: tuple[str, ...] = Field((), description="shell lines before the worker starts: modules, exports")
    python: str | None = Field(None, description="interpreter on the nodes; the flow's own when left out")
    interface: str | None = Field(None, description="network interface between the flow and the nodes")
    port: int = Field(0, ge=0, le=65535, description="the scheduler's port on the flow's machine; 0 = any free one")
    log_directory: str | None = Field(None, description="where jobs write their output")
    local_directory: str | None = Field(None, description="scratch of a worker on its node")


class KubernetesSettings(Settings):
    """What the pods of the Dask operator look like; scheduler and workers use one image."""

    image: str = Field("leukoflow:latest", description="an image that holds the very wheel the flow runs")
    name: str = Field("leukoflow-{uuid}", description="of the DaskCluster; {user} and {uuid} are filled in")
    namespace: str | None = Field(None, description="the current context's when left out")
    cores: str = Field("1", description="CPU of a worker, as Kubernetes spells it")
    memory: str = Field("4Gi", description="memory of a worker")
    gpu_cores: str = Field("4", description="CPU of a worker with a GPU")
    gpu_memory: str = Field("16Gi", description="memory of a worker with a GPU")
    gpu_resource: str = Field("nvidia.com/gpu", description="the resource of which such a worker gets one")
    env: dict[str, str] = Field({}, description="further environment variables; nothing secret")
    env_secrets: tuple[str, ...] = Field((), description="Secrets whose entries become environment variables")
    node_selector: dict[str, str] = Field({}, description="labels of the nodes for pods without a GPU")
    gpu_node_selector: dict[str, str] = Field({}, description="labels of the nodes for pods with a GPU")
    gpu_tolerations: tuple[str, ...] = Field((), description="taint keys that pods with a GPU tolerate")
    service_account: str | None = None
    image_pull_secret: str | None = None


class ClusterSettings(Settings):
    """The source of Dask's workers.

    A run on GPUs has two kinds of workers: `gpu_workers` with one GPU each, and `workers` without, which read and
    normalise images for them. Between `min_workers` and `max_workers` is scaled what limits a run: the workers with a
    GPU where it uses some (not locally, where the GPUs are what they are), else those without.
    """

    address: str = Field(
        "local", description="`local`, the tcp:// or tls:// address of a scheduler, `slurm`, or `kubernetes`"
    )
    workers: int = Field(0, ge=0, description="worker processes without a GPU; locally 0 = one per core")
    gpu_workers: int = Field(0, ge=0, description="worker processes with a GPU; locally 0 = one for each that is there")
    min_workers: int = Field(1, ge=1, description="workers that stay when the number is scaled")
    max_workers: int = Field(0, ge=0, description="scale the number of workers up to this one; 0 = it is fixed")
    memory_limit: str = Field("auto", description="memory limit of a local worker, as Dask spells it")
    wait_seconds: float = Field(60.0, gt=0, description="how long to wait for the first workers or a resource")
    lost_seconds: float = Field(300.0, gt=0, description="how long a run waits for a scheduler or workers that it lost")
    tls: TlsSettings = TlsSettings()
    slurm: SlurmSettings = SlurmSettings()
    kubernetes: KubernetesSettings = KubernetesSettings()

    @field_validator("address")
    @classmethod
    def _known_address(cls, value: str) -> str:
        if value not in ("local", "slurm", "kubernetes") and not value.startswith(("tcp://", "tls://")):
            raise ValueError(
                "must be local, slurm, kubernetes, or a scheduler's address: tcp://HOST:8786, tls://HOST:8786"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_workers and self.max_workers < self.min_workers:
            raise ValueError(f"max_workers ({self.max_workers}) is below min_workers ({self.min_workers})")
        if self.max_workers and "://" in self.address:
            raise ValueError(
                "max_workers: the workers of a scheduler given by its address are up to the person who started it"
            )
        if self.tls != TlsSettings() and self.address.startswith("tcp://"):
            raise ValueError(f"tls: {self.address} is a scheduler without TLS; write tls:// where it has certificates")
        if self.tls != TlsSettings() and self.address == "kubernetes":
            raise ValueError("tls: the Dask operator starts its scheduler without TLS; give a tls:// address instead")
        return self


class UrgentSettings(Settings):
    """The choice of urgent images, whose shards are worked first. Neither the plan nor any number depends on it."""

    # not `keys`: what has an attribute of that name is taken for a mapping by Prefect, which looks through parameters
    image_keys: tuple[str, ...] = Field((), description="patterns of image keys, as a shell has them: STAT-*")
    column: str | None = Field(None, description="a manifest column, such as slide_id, or one of meta_columns")
    values: tuple[str, ...] = Field((), description="patterns of that column's values")

    @model_validator(mode="after")
    def _whole(self) -> UrgentSettings:
        if (self.column is None) != (not self.values):
            raise ValueError("column and values go together: a column of the manifest, and the values that are urgent")
        return self


class AlertSettings(Settings):
    """From when on a finished run calls somebody: a Prefect event each, for automations to act on."""

    quarantined_share: float = Field(0.05, ge=0, le=1, description="share of quarantined images above which to tell")
    abstained_share: float = Field(0.25, ge=0, le=1, description="share of abstained images above which to tell")
    drift: float = Field(0.25, gt=0, description="stability index above chance from which on to tell")


class RunConfig(BaseSettings):
    """All settings of a nightly run. Anything that changes a number is part of `fingerprint()`; the rest is not."""

    model_config = SettingsConfigDict(
        env_prefix="LEUKOFLOW_",
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        nested_model_default_partial_update=True,
    )

    source: str
    out: str
    run_id: str | None = None
    manifest: str | None = None
    manifest_sha256: str | None = Field(
        None, description="digest of the manifest that the run was planned with; a later one is not looked at"
    )
    selection: str | None = Field(None, description="the claim of an inbox that says what to take of the source")
    bundle: str = Field("pocket", description="name or place of a bundle; `approved` or `registry:NAME` of a registry")
    bundles: str | None = Field(None, description="folder or s3:// prefix of the bundle registry")
    reuse: str | None = None
    shadow_of: str | None = Field(None, description="the finished run in `out` that this one only accompanies")
    shard_size: int = Field(128, ge=MICRO_BATCH, le=4096)
    um_per_px: float | None = Field(
        None, ge=MIN_UM_PER_PX, le=MAX_UM_PER_PX, description="scale of all images whose manifest row gives none"
    )
    meta_columns: tuple[str, ...] = Field((), description="further manifest columns to carry along, as meta_<name>")
    device: str = Field("auto", description="`auto`, `cpu` or `cuda`")
    deadline: AwareDatetime | None = Field(None, description="when people want to read the results")
    at_deadline: Literal["continue", "stop"] = Field("continue", description="what an unfinished run does then")
    urgent: UrgentSettings = UrgentSettings()
    limits: LimitSettings = LimitSettings()
    cluster: ClusterSettings = ClusterSettings()
    alerts: AlertSettings = AlertSettings()
    drift_reference: str | None = Field(None, description="file of the drift reference; else the bundle's, or OUT's")
    metrics_port: int | None = Field(None, ge=0, le=65535, description="port of the flow's own Prometheus metrics")
    metrics_address: str = Field("127.0.0.1", description="address at which the flow's metrics are served")
    web_url: str | None = Field(
        None, pattern=r"^https?://\S+$", description="address of the web application of `out`, for links in Prefect"
    )

    @field_validator("shard_size")
    @classmethod
    def _whole_batches(cls, value: int) -> int:
        if value % MICRO_BATCH:
            near = value // MICRO_BATCH * MICRO_BATCH + MICRO_BATCH
            raise ValueError(f"must be a multiple of {MICRO_BATCH} (the fixed inference batch); try {near}")
        return value

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if value not in ("auto", "cpu", "cuda"):
            raise ValueError("must be auto, cpu or cuda")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the command line win over the environment, and the environment over the file (see `load_config`)."""
        return (init_settings, env_settings, _FileSource(settings_cls))

    def bound_as(self, bound: RunConfig) -> RunConfig:
        """Return these settings with all that decides the output taken from `bound`, with which a run was started."""
        limits = self.limits.model_copy(update={k: getattr(bound.limits, k) for k in _DECIDING_LIMITS})
        return self.model_copy(update={k: getattr(bound, k) for k in _DECIDING} | {"limits": limits})

    def canonical(self) -> str:
        """Return all settings as JSON, always written alike."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def fingerprint(
        self, source_identity: str, bundle_digest: str, device: str, manifest_digest: str, selection_digest: str = ""
    ) -> str:
        """Compute the hex digest (16 digits) of everything that decides the output: equal ones mean the same run."""
        binding = {
            "source": self.source.rstrip("/"),
            "identity": source_identity,
            "manifest": manifest_digest,
            "bundle": bundle_digest,
            "device": device,
            "shard_size": self.shard_size,
            "um_per_px": self.um_per_px,
            "meta_columns": list(self.meta_columns),
            "limits": {k: v for k, v in self.limits.model_dump().items() if k in _DECIDING_LIMITS},
        }
        if selection_digest:
            binding["selection"] = selection_digest
        if self.shadow_of is not None:
            binding["shadow_of"] = self.shadow_of
        return hashlib.sha256(json.dumps(binding, sort_keys=True).encode()).hexdigest()[:16]


_DECIDING_LIMITS = ("max_member_mb", "max_megapixels", "min_side_px")
_DECIDING = (
    "source", "run_id", "manifest", "manifest_sha256", "selection", "bundle", "bundles", "reuse", "shadow_of",
    "shard_size", "um_per_px", "meta_columns", "device",
)  # fmt: skip
_file: ContextVar[dict[str, Any] | None] = ContextVar("configuration file", default=None)


class _FileSource(PydanticBaseSettingsSource):
    """The TOML table that `load_config` has read."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return one field's value, as pydantic-settings asks for it."""
        return (_file.get() or {}).get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return the whole table."""
        return _file.get() or {}


def load_config(file: str | Path | None = None, **overrides: Any) -> RunConfig:
    """Read settings: `file` (TOML), then `LEUKOFLOW_*` variables, then `overrides` that are not None; later ones win.

    Nested tables merge key by key. Raises ConfigError naming each wrong setting.
    """
    return config_from(read_toml(file) if file is not None else {}, **overrides)


def config_from(table: Mapping[str, Any], **overrides: Any) -> RunConfig:
    """Read settings as `load_config` does, with the file's content at hand."""
    token = _file.set(dict(table))
    try:
        return RunConfig(**_without_none(overrides))
    except ValidationError as error:
        raise ConfigError(explain(error)) from None
    except SettingsError as error:  # of the environment; its own words quote values
        found = re.search(r'field "(\w+)"', str(error))
        name = f"LEUKOFLOW_{found[1].upper()}" if found else "a LEUKOFLOW_ variable"
        raise ConfigError(
            f'{name} is not usable: write lists as JSON, ["a", "b"], and one setting of a table as {name}__SETTING'
        ) from None
    finally:
        _file.reset(token)


def read_toml(file: str | Path) -> dict[str, Any]:
    """Read the tables of a TOML file. Raises ConfigError."""
    if str(file).startswith("s3:/"):
        raise ConfigError(f"configuration file {file}: it must be on the local disk")
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        why = {
            FileNotFoundError: "does not exist; correct its path",
            IsADirectoryError: "is a folder; name the TOML file in it",
        }.get(type(error), f"cannot be read: {error.strerror}")
        raise ConfigError(f"configuration file {file} {why}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {file} is not valid TOML: {error}") from None


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    cleaned = {k: _without_none(v) if isinstance(v, dict) else v for k, v in table.items() if v is not None}
    return {k: v for k, v in cleaned.items() if v != {}}


def explain(error: ValidationError) -> str:
    """Say of each wrong setting what is wrong about it."""
    lines = [f"{'.'.join(str(p) for p in e['loc']) or 'settings'}: {_in_words(e)}" for e in error.errors()]
    return "the configuration is not usable: " + "; ".join(lines)


_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "there is no setting of this name",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text, in quotes",
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
}
"""Kinds of errors of pydantic, as an operator reads them; of others, pydantic's own words."""


def _in_words(error: ErrorDetails) -> str:
    words = _WORDS.get(error["type"])
    return error["msg"].removeprefix("Value error, ") if words is None else words.format(**error.get("ctx", {}))
