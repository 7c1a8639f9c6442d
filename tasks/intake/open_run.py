"""Opening a run: identify the source, bind the run id, freeze the plan, and find what is already done."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import zarr

from leukoflow.core.codec import dumps
from leukoflow.core.config import RunConfig
from leukoflow.core.errors import BundleError, ConfigError, RunConflictError, StorageError
from leukoflow.models.bundle import load_bundle
from leukoflow.models.registry import APPROVED, opened, reference
from leukoflow.runs.layout import RunKey
from leukoflow.runs.ledger import Selection, read_selection
from leukoflow.runs.progress import RunBinding, now, read_manifest
from leukoflow.runs.records import PlanSummary, RunManifest, Source, SourceKind
from leukoflow.sources.identify import identify
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.binding import Run, check_run_id, read_binding, shadow_id, stem
from leukoflow.tasks.intake.commands import resume_command
from leukoflow.tasks.intake.manifest_fetch import FetchedFile, digest_manifest, fetch_manifest, wanted_manifest
from leukoflow.tasks.intake.patient_key import PATIENT_KEY, check_value, patient_key
from leukoflow.tasks.intake.places import require_apart, require_writable
from leukoflow.tasks.intake.plan import plan
from leukoflow.tasks.intake.plan_file import read_summary
from leukoflow.tasks.store.compact import expand_run
from leukoflow.tasks.store.tables import check_intent

_RUNS_COMPARED = 50  # the last by name, as nights name them; a look at each costs a request


def open_run(config: RunConfig, started: Callable[[str], object] = lambda root: None) -> Run:
    """Bind the run's id, then plan the run or find the plan that was frozen; start neither Prefect nor Dask.

    `started` is called with the run's root as soon as it is known that there is something to do for it, and before
    anything of it is done: from then on whatever goes wrong can be written down there.

    Raises SourceError (nothing usable there), RunConflictError (the id stands for something else), ConfigError,
    BundleError, StorageError.
    """
    with fetch_manifest(wanted_manifest(config)) as manifest:
        return _open(config, manifest, started)


def _open(config: RunConfig, manifest: Path | FetchedFile | None, started: Callable[[str], object]) -> Run:
    if config.run_id is not None:  # before anything that takes long, or can fail, is looked at
        check_run_id(config.run_id, config.shadow_of)
    out = open_storage(config.out)
    out.probe()
    asked = reference(config.bundle)
    bundle = None if asked else load_bundle(config.bundle)
    device = resolve_device(config.device, config.cluster.address)
    selection = read_selection(config.selection, config.shadow_of or config.run_id) if config.selection else None
    source = identify(config.source) if selection is None else selection.source(config.source)
    require_apart(source, config.out)
    main = _accompanied(out, config, source)
    if manifest is not None and config.manifest_sha256 is None:
        config = config.model_copy(update={"manifest_sha256": digest_manifest(manifest)})
    manifest_digest = config.manifest_sha256 or "" if main is None else f"run {main.fingerprint}"
    selection_digest = selection.digest if selection else ""

    def name(digest: str) -> tuple[str, str]:
        """Fingerprint and id of the run with the bundle of a digest."""
        fingerprint = config.fingerprint(source.identity, digest, device, manifest_digest, selection_digest)
        if config.run_id is not None:
            return fingerprint, config.run_id
        if config.shadow_of is not None:
            return fingerprint, shadow_id(config.shadow_of, digest)
        return fingerprint, f"{stem(config.source)}-{fingerprint[:8]}"

    bundle_uri = config.bundle if bundle is not None else _registered(config, asked, out, lambda d: name(d)[1])
    bundle = bundle or load_bundle(bundle_uri)
    fingerprint, run_id = name(bundle.digest)
    check_run_id(run_id, config.shadow_of)
    storage = out.child(run_id)
    bound = read_binding(storage)
    if bound is not None and not bound.is_planned and bound.fingerprint != fingerprint:
        bound = None  # it ended before it had anything; what was wrong with source or manifest may be mended by now
    if bound is not None and bound.fingerprint != fingerprint:
        raise RunConflictError(
            f"run {run_id} exists and was made from another source (or the same one written differently), another "
            f"manifest, bundle or device, or with other settings ({bound.fingerprint}, now {fingerprint}); choose a "
            f"new --run-id, and --reuse {run_id} to keep what is still valid"
        )
    if config.reuse and ((reused := read_binding(out.child(config.reuse))) is None or not reused.is_planned):
        raise ConfigError(f"--reuse {config.reuse}: there is no such run in {config.out}, or it has done nothing yet")
    require_writable(storage)
    if bound is not None and main is None:
        _check_key(run_id, bound.patient_key_check)  # a refusal leaves the record of what the run did last
    if read_manifest(storage) is None:
        started(storage.root)
    if bound is None:
        again = read_binding(storage)  # another command may have started the same meanwhile, and its plan is then ours
        bound = again if again is not None and again.fingerprint == fingerprint else None
        if bound is not None and main is None:
            _check_key(run_id, bound.patient_key_check)
    if bound is None:
        for key in (RunKey.PLAN, RunKey.MISSING, RunKey.SCALES, RunKey.RED_CELLS):
            storage.delete(key)  # of a source or manifest that nobody knows any more
        bound = RunBinding(
            run_id=run_id,
            fingerprint=fingerprint,
            source_uri=source.uri,
            members=0,
            shards=0,
            shard_size=config.shard_size,
            bundle=bundle_uri,
            bundle_digest=bundle.digest,
            device=device,
            started_at=now(),
            command=resume_command(config, run_id, bundle_uri),
            reuse=config.reuse,
            config=config.canonical(),
            bundle_reference=asked,
            shadow_of=config.shadow_of,
        )
        storage.write(RunKey.BINDING, dumps(bound))
    _check_plan(storage, bound)
    if main is not None:
        _take_plan(out.child(main.run_id), storage)
    summary = _frozen_plan(storage, config, source, manifest, selection)
    if not bound.is_planned:
        if main is None:
            _check_key(run_id, summary.patient_key_check)  # planned, and cut off before it was bound
            _check_alone(storage, bound, summary, source)
        bound = replace(
            bound,
            members=summary.members,
            shards=summary.shards,
            shard_size=summary.shard_size,
            plan_sha256=storage.digest(RunKey.PLAN)[2],
            patient_key_check=summary.patient_key_check,
            command=resume_command(config, run_id, bundle_uri, planned=True),
        )
        storage.write(RunKey.BINDING, dumps(bound))
    if config.reuse and config.reuse != bound.reuse:
        bound = replace(bound, reuse=config.reuse, command=resume_command(config, run_id, bundle_uri, planned=True))
        storage.write(RunKey.BINDING, dumps(bound))
    for group in RunKey.STORES:
        zarr.open_group(storage.zarr(group), mode="a")
    return Run(
        config, run_id, storage.root, fingerprint, source, summary, bundle, bundle_uri, device, bound,
        _finished(storage),
    )  # fmt: skip


def resolve_device(device: str, cluster: str = "local") -> str:
    """Return `cpu` or `cuda`. Raises ConfigError when cuda is asked for and absent.

    `auto` looks at this machine; workers elsewhere may have GPUs that this one lacks, so `cuda` is taken at its word.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and cluster == "local" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; check `leukoflow doctor`, or use --device cpu")
    return device


def _registered(config: RunConfig, asked: str, out: Storage, run_id_of: Callable[[str], str]) -> str:
    """Return where the bundle is that the registry names; of a run that was started, the one that it was started with.

    A run that is named keeps its bundle. Without a name, a run of the same source that an earlier approved bundle has
    started and not finished is taken up; else the approved bundle gives a run of its own.
    """
    registry = opened(config.bundles)

    def started_with(run_id: str) -> RunBinding | None:
        bound = read_binding(out.child(run_id))
        return bound if bound is not None and bound.bundle_reference == asked else None

    bound = started_with(config.run_id) if config.run_id is not None else None
    if bound is None:
        found = registry.resolve(asked)
        if asked == APPROVED and config.run_id is None and read_binding(out.child(run_id_of(found.digest))) is None:
            earlier = [b.digest for b in reversed(registry.state().bundles) if b.state == "retired"]
            for run_id in map(run_id_of, earlier):
                bound = started_with(run_id)
                if bound is not None and read_manifest(out.child(run_id)) is None:
                    break
                bound = None
        if bound is None:
            return registry.location(found.digest)
    if not registry.holds(bound.bundle_digest):
        raise BundleError(
            f"run {bound.run_id} was started with bundle {bound.bundle_digest[:12]}, which {registry.storage.root} "
            f"does not hold any more: register that bundle again, or start a run with another --run-id"
        )
    logging.getLogger("leukoflow").info(
        "run %s keeps the bundle that it was started with, %s", bound.run_id, bound.bundle_digest[:12]
    )
    return registry.location(bound.bundle_digest)


def _accompanied(out: Storage, config: RunConfig, source: Source) -> RunBinding | None:
    """Return the finished run that a shadow run accompanies; None for other runs. Raises ConfigError."""
    if config.shadow_of is None:
        return None
    main = out.child(config.shadow_of)
    bound, manifest = read_binding(main), read_manifest(main)
    if bound is None:
        raise ConfigError(f"there is no run {config.shadow_of} in {config.out}")
    check_intent(main)
    if manifest is None:
        raise ConfigError(f"run {config.shadow_of} is not finished; a shadow run comes after it")
    if bound.shadow_of is not None:
        raise ConfigError(f"run {config.shadow_of} is a shadow run itself; name {bound.shadow_of}")
    if source.identity != manifest.source.identity:
        raise ConfigError(
            f"{source.uri} was changed since run {config.shadow_of}; a shadow run needs what that one saw"
        )
    return bound


def _take_plan(main: Storage, storage: Storage) -> None:
    """Give a shadow run plan and scales of the run that it accompanies, patients and all, whatever became of it."""
    for key in (RunKey.MISSING, RunKey.SCALES, RunKey.PLAN):
        if not storage.exists(key) and main.exists(key):
            storage.write(key, main.read(key))


def _check_plan(storage: Storage, bound: RunBinding) -> None:
    """Refuse a plan that was altered: it would mix up members. One that is gone is made again from the same source."""
    try:
        _, _, found = storage.digest(RunKey.PLAN)
    except FileNotFoundError:
        return
    if bound.plan_sha256 not in ("", found):
        raise StorageError(
            f"{storage.uri(RunKey.PLAN)} was altered or is damaged; delete it and run the same command again: "
            "it is planned again, and what is committed stays"
        )


def _check_alone(storage: Storage, bound: RunBinding, summary: PlanSummary, source: Source) -> None:
    """Refuse where another command has taken this run id for something else while this one was planning."""
    now_bound = read_binding(storage)
    if now_bound is None or now_bound.fingerprint != bound.fingerprint or summary.source.identity != source.identity:
        raise RunConflictError(
            f"another command started run {bound.run_id} with another source or other settings at the same moment; "
            "choose another --run-id"
        )


def _check_key(run_id: str, check: str) -> None:
    """Refuse to go on with a run whose pseudonyms another key has made: its patients would be nobody's elsewhere.

    Without any key there is nothing to confuse, and the plan has its pseudonyms.
    """
    if not check:
        return
    try:
        key = patient_key()
    except ConfigError:  # the server that may hold it is away: what is planned needs no key
        return
    if key is not None and check_value(key) != check:
        raise RunConflictError(
            f"the pseudonyms of run {run_id} were made with a different patient key from the one that "
            f"{PATIENT_KEY} (or the Prefect Secret block) holds now: if the earlier key was right, "
            f"set it again; if the present one is, choose a new --run-id and delete {run_id}, whose "
            "patients cannot be found in any other run"
        )


def _other_keys(out: Storage, key: bytes | None) -> tuple[str, ...]:
    """Say that patients of a new run will not be found in the runs beside it, since these have another key."""
    if key is None:
        return ()
    others = 0
    for name in out.names("")[-_RUNS_COMPARED:]:
        with suppress(StorageError, OSError):  # damage of another run is no reason not to start this one
            bound = read_binding(out.child(name))
            others += bound is not None and bound.patient_key_check not in ("", check_value(key))
    if not others:
        return ()
    return (
        f"the patients of this run are not found in {others} of the runs beside it, whose pseudonyms another "
        f"patient key has made: if {PATIENT_KEY} is wrong now, set it right and give a new --run-id",
    )


def _frozen_plan(
    storage: Storage,
    config: RunConfig,
    source: Source,
    manifest: Path | FetchedFile | None,
    selection: Selection | None,
) -> PlanSummary:
    """Return the plan that exists, else make one; it is published whole or not at all."""
    try:
        with storage.open(RunKey.PLAN) as file:
            return read_summary(file)
    except FileNotFoundError:
        pass
    if manifest is not None and digest_manifest(manifest) != config.manifest_sha256:
        raise ConfigError(
            f"{config.manifest} is not the one that run {config.run_id} started with, and its plan is gone: put the "
            "original manifest back"
        )
    key = patient_key() if config.manifest else None  # nothing else names patients
    with tempfile.TemporaryDirectory(prefix="leukoflow-plan-") as scratch:
        draft, missing = Path(scratch) / RunKey.PLAN, Path(scratch) / RunKey.MISSING
        summary = plan(
            source,
            draft,
            shard_size=config.shard_size,
            um_per_px=config.um_per_px,
            manifest=manifest,
            meta_columns=config.meta_columns,
            patient_key=key,
            member_bytes=config.limits.max_member_mb << 20,
            missing_out=missing,
            selection=selection,
            remarks=_other_keys(open_storage(config.out), key),
        )
        if missing.exists():
            storage.write(RunKey.MISSING, missing.read_bytes())
        storage.write(RunKey.PLAN, draft.read_bytes())
    return summary


def _finished(storage: Storage) -> RunManifest | None:
    """Return the manifest, if every part that it lists is there and unaltered; one that no longer holds is removed.

    Merged parts are then taken apart again, since a run is repaired shard by shard.
    """
    while (manifest := read_manifest(storage)) is not None:
        if intact(storage, [p.files for p in manifest.parts] + [manifest.tables]):
            return manifest
        check_intent(storage)
        if read_manifest(storage) == manifest:  # else it was compacted while its files were looked at
            expand_run(storage, manifest)
            storage.delete(RunKey.MANIFEST)
    return None


def intact(storage: Storage, groups: Sequence[Sequence[tuple[str, int, str]]]) -> bool:
    """Tell whether all files of all groups are there and unaltered; hashing runs in threads."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return all(pool.map(storage.intact, groups))


def spooled(source: Source) -> bool:
    """Tell whether the source's members must be unpacked to scratch before workers can read them."""
    return source.kind is SourceKind.COMPRESSED_TAR
