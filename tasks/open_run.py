"""Opening a run: identify the source, bind the run id, freeze the plan, and tell what is already done."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, cast

import zarr

from leukoflow.codec import dumps, loads
from leukoflow.config import RunConfig
from leukoflow.errors import ConfigError, RunConflictError, StorageError
from leukoflow.progress import RunBinding, now, read_manifest
from leukoflow.records import PlanSummary, RunManifest, Source, SourceKind
from leukoflow.sources import identify
from leukoflow.storage import Storage
from models.bundle import Bundle, load_bundle
from tasks.compact import expand_run
from tasks.plan import plan, read_summary
from tasks.tables import check_intent

PATIENT_KEY = "LEUKOFLOW_PATIENT_KEY"
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class Run:
    """An opened run. `finished` is its manifest when there is nothing left to do."""

    config: RunConfig
    run_id: str
    root: str
    fingerprint: str
    source: Source
    summary: PlanSummary
    bundle: Bundle
    device: str
    binding: RunBinding
    finished: RunManifest | None


def open_run(config: RunConfig) -> Run:
    """Plans the run, or finds the plan that was frozen, and binds its id; starts neither Prefect nor Dask.

    Raises SourceError (nothing usable there), RunConflictError (the id stands for something else), ConfigError,
    BundleError, StorageError.
    """
    with _manifest_file(config.manifest) as manifest:
        return _open(config, manifest)


def _open(config: RunConfig, manifest: Path | _FetchedFile | None) -> Run:
    out = Storage(config.out)
    out.probe()
    bundle = load_bundle(config.bundle)
    device = resolve_device(config.device, config.cluster.address)
    source = identify(config.source)
    _apart(source, config.out)
    manifest_digest = _file_digest(manifest) if manifest else ""
    fingerprint = config.fingerprint(source.identity, bundle.digest, device, manifest_digest)
    run_id = config.run_id or f"{stem(config.source)}-{fingerprint[:8]}"
    if not _RUN_ID.fullmatch(run_id):
        raise ConfigError(f"run id {run_id!r} is not usable: letters, digits, '.', '_' and '-' only, at most 100")
    storage = out.child(run_id)
    bound = _binding(storage)
    if bound is not None and bound.fingerprint != fingerprint:
        raise RunConflictError(
            f"run {run_id} exists and was made from another source, other settings or another bundle "
            f"({bound.fingerprint}, now {fingerprint}); choose a new --run-id, and --reuse {run_id} to keep what holds"
        )
    if config.reuse and _binding(out.child(config.reuse)) is None:
        raise ConfigError(f"--reuse {config.reuse}: there is no such run in {config.out}")
    if bound is not None:
        _check_plan(storage, bound)
    summary = _frozen_plan(storage, config, source, manifest)
    if bound is None:
        bound = RunBinding(
            run_id=run_id,
            fingerprint=fingerprint,
            source_uri=source.uri,
            members=summary.members,
            shards=summary.shards,
            shard_size=summary.shard_size,
            bundle=config.bundle,
            bundle_digest=bundle.digest,
            device=device,
            started_at=now(),
            command=resume_command(config, run_id),
            plan_sha256=storage.digest("plan.parquet")[2],
            reuse=config.reuse,
        )
        storage.create("run.json", dumps(bound))
    elif config.reuse and config.reuse != bound.reuse:
        bound = replace(bound, reuse=config.reuse, command=resume_command(config, run_id))
        storage.write("run.json", dumps(bound))
    for group in ("masks.zarr", "features.zarr", "activations.zarr"):
        zarr.open_group(storage.zarr(group), mode="a")
    return Run(
        config, run_id, storage.root, fingerprint, source, summary, bundle, device, bound, _finished(storage)
    )  # fmt: skip


def resume_command(config: RunConfig, run_id: str) -> str:
    """The command that takes this run up again."""
    words = ["leukoflow", "run", config.source, "--out", config.out, "--run-id", run_id]
    for option, value, default in (
        ("--manifest", config.manifest, None),
        ("--bundle", config.bundle, "pocket"),
        ("--reuse", config.reuse, None),
        ("--shard-size", config.shard_size, RunConfig.model_fields["shard_size"].default),
        ("--um-per-px", config.um_per_px, None),
        ("--device", config.device, "auto"),
        ("--cluster", config.cluster.address, "local"),
    ):
        if value != default:
            words += [option, str(value)]
    return shlex.join(words)


def resolve_device(device: str, cluster: str = "local") -> str:
    """`cpu` or `cuda`. Raises ConfigError when cuda is asked for and absent.

    `auto` looks at this machine; workers elsewhere may have GPUs that this one lacks, so `cuda` is taken at its word.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and cluster == "local" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; check `leukoflow doctor`, or use --device cpu")
    return device


def stem(uri: str) -> str:
    """A source's name without folders and endings, fit for a run id."""
    name = PurePosixPath(uri.rstrip("/")).name or "source"
    name = re.sub(r"(\.tar)?\.(zip|tar|gz|tgz|bz2|xz|zst)$", "", name, flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "source"


def patient_key() -> bytes | None:
    """The key for pseudonyms, from the environment or, where a Prefect API is configured, from a Secret block."""
    if value := os.environ.get(PATIENT_KEY):
        return value.encode()
    if not os.environ.get("PREFECT_API_URL"):
        return None
    import httpx
    from prefect.blocks.system import Secret

    try:
        block = cast(Any, Secret.load)("leukoflow-patient-key", _sync=True)
    except ValueError:  # there is no such block
        return None
    except httpx.HTTPError as error:
        raise ConfigError(
            f"the Prefect server at {os.environ['PREFECT_API_URL']} does not answer ({error}), and it may hold the key "
            f"for the patients in the manifest; start it, or set {PATIENT_KEY}"
        ) from None
    return str(block.get()).encode()


def _binding(storage: Storage) -> RunBinding | None:
    try:
        return loads(RunBinding, storage.read("run.json"), storage.uri("run.json"))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _check_plan(storage: Storage, bound: RunBinding) -> None:
    """A plan that is gone is made anew from the same source; one that was altered would mix up members."""
    try:
        _, _, found = storage.digest("plan.parquet")
    except FileNotFoundError:
        return
    if bound.plan_sha256 not in ("", found):
        raise StorageError(
            f"{storage.uri('plan.parquet')} was altered or is damaged; delete it and run the same command again: "
            "it is planned anew, and what is committed stays"
        )


def _frozen_plan(
    storage: Storage, config: RunConfig, source: Source, manifest: Path | _FetchedFile | None
) -> PlanSummary:
    """The plan that exists, else a new one; it is published whole or not at all."""
    try:
        with storage.open("plan.parquet") as file:
            return read_summary(file)
    except FileNotFoundError:
        pass
    with tempfile.TemporaryDirectory(prefix="leukoflow-plan-") as scratch:
        draft, missing = Path(scratch) / "plan.parquet", Path(scratch) / "missing.parquet"
        summary = plan(
            source,
            draft,
            shard_size=config.shard_size,
            um_per_px=config.um_per_px,
            manifest=manifest,
            meta_columns=config.meta_columns,
            patient_key=patient_key() if config.manifest else None,  # nothing else names patients
            member_bytes=config.limits.max_member_mb << 20,
            missing_out=missing,
        )
        if missing.exists():
            storage.write("missing.parquet", missing.read_bytes())
        storage.write("plan.parquet", draft.read_bytes())
    return summary


def _finished(storage: Storage) -> RunManifest | None:
    """The manifest, if every part that it lists is there and unaltered; a manifest that no longer holds is removed.

    Merged parts are then taken apart again, since a run is repaired shard by shard.
    """
    while (manifest := read_manifest(storage)) is not None:
        if intact(storage, [p.files for p in manifest.parts] + [manifest.tables]):
            return manifest
        check_intent(storage)
        if read_manifest(storage) == manifest:  # else it was compacted while its files were looked at
            expand_run(storage, manifest)
            storage.delete("manifest.json")
    return None


def intact(storage: Storage, groups: Sequence[Sequence[tuple[str, int, str]]]) -> bool:
    """Whether all files of all groups are there and unaltered; hashing runs in threads."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return all(pool.map(storage.intact, groups))


def _apart(source: Source, out: str) -> None:
    """An output inside the source would change what the source is while it is read."""
    storage = Storage(out)
    if source.kind is not SourceKind.DIRECTORY or storage.is_local != ("://" not in source.uri):
        return
    inside = Path(source.uri).absolute() if storage.is_local else PurePosixPath(source.uri)
    if PurePosixPath(storage.root).is_relative_to(inside):
        raise ConfigError(f"--out {out} lies inside the source {source.uri}; choose a place outside of it")


@dataclass(frozen=True, slots=True)
class _FetchedFile(os.PathLike[str]):
    """A copy on the local disk, which in messages bears the name that the user knows."""

    local: str
    uri: str

    def __fspath__(self) -> str:
        return self.local

    def __str__(self) -> str:
        return self.uri


@contextmanager
def _manifest_file(path: str | None) -> Iterator[Path | _FetchedFile | None]:
    """The manifest as a local file, for as long as the block lasts. Raises ConfigError where it cannot be read."""
    if path is None or not path.startswith("s3://"):
        yield Path(path) if path else None
        return
    folder, _, name = path.rpartition("/")
    with tempfile.TemporaryDirectory(prefix="leukoflow-manifest-") as scratch:
        copy = Path(scratch) / "manifest"
        try:
            with copy.open("wb") as file:
                for piece in Storage(folder).pieces(name):
                    file.write(piece)
        except FileNotFoundError:
            raise ConfigError(f"--manifest {path} does not exist: check bucket, key and endpoint") from None
        except StorageError as error:
            raise ConfigError(f"--manifest {error}") from error
        yield _FetchedFile(str(copy), path)


def _file_digest(path: Path | _FetchedFile) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"--manifest {path} cannot be read: {error.strerror}") from None


def spooled(source: Source) -> bool:
    """Whether the source's members must be unpacked to scratch before workers can read them."""
    return source.kind is SourceKind.COMPRESSED_TAR
