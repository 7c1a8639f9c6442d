"""Opening a run: identify the source, bind the run id, freeze the plan, and tell what is already done."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import zarr
from pydantic import ValidationError

from leukoflow.core.codec import dumps, loads
from leukoflow.core.config import RunConfig, explain
from leukoflow.core.errors import BundleError, ConfigError, RunConflictError, StorageError
from leukoflow.models.bundle import Bundle, load_bundle
from leukoflow.models.registry import APPROVED, opened, reference
from leukoflow.runs.ledger import Selection, read_selection
from leukoflow.runs.progress import RunBinding, now, read_manifest
from leukoflow.runs.records import PlanSummary, RunManifest, Source, SourceKind
from leukoflow.sources.members import identify
from leukoflow.storage.base import Storage
from leukoflow.tasks.intake.patient_key import PATIENT_KEY, check_value, patient_key
from leukoflow.tasks.intake.plan import plan, read_summary
from leukoflow.tasks.store.compact import expand_run
from leukoflow.tasks.store.tables import check_intent

_SAID: dict[str, Any] = dict.fromkeys(
    (
        "source", "out", "run_id", "manifest", "manifest_sha256", "selection", "bundle", "bundles", "reuse",
        "shadow_of", "shard_size", "um_per_px", "device", "deadline", "at_deadline",
    ),
    True,
) | {"cluster": {"address", "workers"}}  # fmt: skip
"""Settings that an option of `run` says, or that no later run takes up: a deadline belongs to its night."""

_RUNS_COMPARED = 50  # the last by name, as nights name them; a look at each costs a request
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHADOW_ID = re.compile(_RUN_ID.pattern + r"-shadow-[0-9a-f]{8}")
_TAKEN = ("inbox", "nights.html", "nights.json", "audit.jsonl", "audit.lock", "web-audit.jsonl")
"""What lies beside the runs of an output folder."""


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
    bundle_uri: str  # where workers find it
    device: str
    binding: RunBinding
    finished: RunManifest | None


def open_run(config: RunConfig, begun: Callable[[str], object] = lambda root: None) -> Run:
    """Binds the run's id, then plans the run or finds the plan that was frozen; starts neither Prefect nor Dask.

    `begun` is called with the run's root as soon as it is known that there is something to do for it, and before
    anything of it is done: from then on whatever goes wrong can be written down there.

    Raises SourceError (nothing usable there), RunConflictError (the id stands for something else), ConfigError,
    BundleError, StorageError.
    """
    with manifest_file(_wanted_manifest(config)) as manifest:
        return _open(config, manifest, begun)


def _open(config: RunConfig, manifest: Path | _FetchedFile | None, begun: Callable[[str], object]) -> Run:
    if config.run_id is not None:  # before anything that takes long, or can fail, is looked at
        _check_run_id(config.run_id, config.shadow_of)
    out = Storage(config.out)
    out.probe()
    asked = reference(config.bundle)
    bundle = None if asked else load_bundle(config.bundle)
    device = resolve_device(config.device, config.cluster.address)
    selection = read_selection(config.selection, config.shadow_of or config.run_id) if config.selection else None
    source = identify(config.source) if selection is None else selection.source(config.source)
    _apart(source, config.out)
    main = _accompanied(out, config, source)
    if manifest is not None and config.manifest_sha256 is None:
        config = config.model_copy(update={"manifest_sha256": _file_digest(manifest)})
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
    _check_run_id(run_id, config.shadow_of)
    storage = out.child(run_id)
    bound = _binding(storage)
    if bound is not None and not bound.is_planned and bound.fingerprint != fingerprint:
        bound = None  # it ended before it had anything; what was wrong with source or manifest may be mended by now
    if bound is not None and bound.fingerprint != fingerprint:
        raise RunConflictError(
            f"run {run_id} exists and was made from another source (or the same one written differently), another "
            f"manifest, bundle or device, or with other settings ({bound.fingerprint}, now {fingerprint}); choose a "
            f"new --run-id, and --reuse {run_id} to keep what holds"
        )
    if config.reuse and ((reused := _binding(out.child(config.reuse))) is None or not reused.is_planned):
        raise ConfigError(f"--reuse {config.reuse}: there is no such run in {config.out}, or it has done nothing yet")
    require_writable(storage)
    if bound is not None and main is None:
        _check_key(run_id, bound.patient_key_check)  # a refusal leaves the record of what the run did last
    if read_manifest(storage) is None:
        begun(storage.root)
    if bound is None:
        again = _binding(storage)  # another command may have begun the same meanwhile, and its plan is then ours
        bound = again if again is not None and again.fingerprint == fingerprint else None
        if bound is not None and main is None:
            _check_key(run_id, bound.patient_key_check)
    if bound is None:
        for key in ("plan.parquet", "missing.parquet"):
            storage.delete(key)  # of a source or manifest that nobody can tell any more
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
        storage.write("run.json", dumps(bound))
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
            plan_sha256=storage.digest("plan.parquet")[2],
            patient_key_check=summary.patient_key_check,
            command=resume_command(config, run_id, bundle_uri, planned=True),
        )
        storage.write("run.json", dumps(bound))
    if config.reuse and config.reuse != bound.reuse:
        bound = replace(bound, reuse=config.reuse, command=resume_command(config, run_id, bundle_uri, planned=True))
        storage.write("run.json", dumps(bound))
    for group in ("masks.zarr", "features.zarr", "activations.zarr"):
        zarr.open_group(storage.zarr(group), mode="a")
    return Run(
        config, run_id, storage.root, fingerprint, source, summary, bundle, bundle_uri, device, bound,
        _finished(storage),
    )  # fmt: skip


def _check_run_id(run_id: str, shadow_of: str | None) -> None:
    if not (_RUN_ID if shadow_of is None else _SHADOW_ID).fullmatch(run_id):
        raise ConfigError(
            f"run id {run_id!r} is not usable: letters, digits, '.', '_' and '-' only, a letter or digit first, at "
            "most 100"
        )
    if run_id in _TAKEN:
        raise ConfigError(f"run id {run_id!r} is not usable: the output folder keeps something else under that name")


def bound_config(binding: RunBinding) -> RunConfig:
    """The settings that a run was begun with. Raises ConfigError with the remedy for runs that did not keep them."""
    if not binding.config:
        raise ConfigError(f"run {binding.run_id} was begun by an older version; to take it up: {binding.command}")
    try:
        config = RunConfig.model_validate_json(binding.config)
    except ValidationError as error:
        raise ConfigError(f"run {binding.run_id}: {explain(error)}; to take it up: {binding.command}") from None
    # what it reuses may have been named only when it was taken up again
    return config.model_copy(update={"run_id": binding.run_id, "reuse": binding.reuse or config.reuse})


def shadow_id(main: str, digest: str) -> str:
    """Id of the shadow run of run `main` with the bundle of a digest."""
    return f"{main}-shadow-{digest[:8]}"


def resume_command(config: RunConfig, run_id: str, bundle: str, planned: bool = False) -> str:
    """Says which command takes this run up again, from wherever it is given, with the bundle that it began with.

    What no option of `run` says is kept with the run, which `rerun` reads. Only once the run is planned, however: the
    manifest of one that is not may be about to be mended, and `rerun` goes by what it was.
    """
    if config.shadow_of is not None:
        words = ["leukoflow", "shadow", config.out, config.shadow_of, "--bundle", bundle]
    elif config.selection or (planned and _says_more(config)):
        words = ["leukoflow", "rerun", config.out, run_id]
    else:
        words = run_words(config, run_id, bundle)
    places = [config.source, config.out, config.manifest, config.bundles, config.drift_reference]
    if Path(bundle, "bundle.json").is_file():  # else it is the name of one that comes with the program
        places.append(bundle)
    here = f"cd {shlex.quote(os.getcwd())} && " if any(map(_is_relative, places)) else ""
    return here + shlex.join(words)


def command_about(run: Run, name: str) -> str:
    """Says how to give command `name` (`status`, `report`) about a run, from wherever it is given."""
    return shlex.join(["leukoflow", name, Storage(run.config.out).root, run.run_id])


def _is_relative(place: str | None) -> bool:
    """Whether a place is another one when it is named in another folder."""
    return place is not None and "://" not in place and not Path(place).is_absolute()


def _says_more(config: RunConfig) -> bool:
    """Whether there are settings, other than the defaults, that no option of `run` says."""
    default = RunConfig.model_construct(source="", out="")
    return config.model_dump(exclude=_SAID) != default.model_dump(exclude=_SAID)


def run_words(config: RunConfig, run_id: str, bundle: str) -> list[str]:
    """Spells out the `run` command of these settings, as far as options say them."""
    words = ["leukoflow", "run", config.source, "--out", config.out, "--run-id", run_id]
    for option, value, default in (
        ("--manifest", config.manifest, None),
        ("--bundle", bundle, "pocket"),
        ("--reuse", config.reuse, None),
        ("--shard-size", config.shard_size, RunConfig.model_fields["shard_size"].default),
        ("--um-per-px", config.um_per_px, None),
        ("--device", config.device, "auto"),
        ("--cluster", config.cluster.address, "local"),
        ("--workers", config.cluster.workers, 0),
    ):
        if value != default:
            words += [option, str(value)]
    return words


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


def _binding(storage: Storage) -> RunBinding | None:
    try:
        return loads(RunBinding, storage.read("run.json"), storage.uri("run.json"))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _registered(config: RunConfig, asked: str, out: Storage, run_id_of: Callable[[str], str]) -> str:
    """Where the bundle is that the registry names; of a run that was begun, the one that it was begun with.

    A run that is named keeps its bundle. Without a name, a run of the same source that an earlier approved bundle has
    begun and not finished is taken up; else the approved bundle gives a run of its own.
    """
    registry = opened(config.bundles)

    def begun(run_id: str) -> RunBinding | None:
        bound = _binding(out.child(run_id))
        return bound if bound is not None and bound.bundle_reference == asked else None

    bound = begun(config.run_id) if config.run_id is not None else None
    if bound is None:
        found = registry.resolve(asked)
        if asked == APPROVED and config.run_id is None and _binding(out.child(run_id_of(found.digest))) is None:
            earlier = [b.digest for b in reversed(registry.ledger().bundles) if b.state == "retired"]
            for run_id in map(run_id_of, earlier):
                bound = begun(run_id)
                if bound is not None and read_manifest(out.child(run_id)) is None:
                    break
                bound = None
        if bound is None:
            return registry.location(found.digest)
    if not registry.holds(bound.bundle_digest):
        raise BundleError(
            f"run {bound.run_id} was begun with bundle {bound.bundle_digest[:12]}, which {registry.storage.root} does "
            f"not hold any more: register that bundle again, or begin a run with another --run-id"
        )
    logging.getLogger("leukoflow").info(
        "run %s keeps the bundle that it was begun with, %s", bound.run_id, bound.bundle_digest[:12]
    )
    return registry.location(bound.bundle_digest)


def _accompanied(out: Storage, config: RunConfig, source: Source) -> RunBinding | None:
    """The finished run that a shadow run accompanies; None for other runs. Raises ConfigError."""
    if config.shadow_of is None:
        return None
    main = out.child(config.shadow_of)
    bound, manifest = _binding(main), read_manifest(main)
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
    """A shadow run has the plan of the run that it accompanies, patients and all, whatever became of its manifest."""
    for key in ("missing.parquet", "plan.parquet"):
        if not storage.exists(key) and main.exists(key):
            storage.write(key, main.read(key))


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


def _check_alone(storage: Storage, bound: RunBinding, summary: PlanSummary, source: Source) -> None:
    """Refuses where another command has taken this run id for something else while this one was planning."""
    now_bound = _binding(storage)
    if now_bound is None or now_bound.fingerprint != bound.fingerprint or summary.source.identity != source.identity:
        raise RunConflictError(
            f"another command began run {bound.run_id} with another source or other settings at the same moment; "
            "choose another --run-id"
        )


def _check_key(run_id: str, check: str) -> None:
    """Refuses to go on with a run whose pseudonyms another key has made: its patients would be nobody's elsewhere.

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
            f"{PATIENT_KEY} (or the Prefect Secret block) holds now: if the key of before was right, "
            f"set it again; if this one is, choose a new --run-id and delete {run_id}, whose "
            "patients are found in no other run"
        )


def _other_keys(out: Storage, key: bytes | None) -> tuple[str, ...]:
    """Says that patients of a new run will not be found in the runs beside it, since these have another key."""
    if key is None:
        return ()
    others = 0
    for name in out.names("")[-_RUNS_COMPARED:]:
        with suppress(StorageError, OSError):  # damage of another run is no reason not to begin this one
            bound = _binding(out.child(name))
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
    manifest: Path | _FetchedFile | None,
    selection: Selection | None,
) -> PlanSummary:
    """The plan that exists, else a new one; it is published whole or not at all."""
    try:
        with storage.open("plan.parquet") as file:
            return read_summary(file)
    except FileNotFoundError:
        pass
    if manifest is not None and _file_digest(manifest) != config.manifest_sha256:
        raise ConfigError(
            f"{config.manifest} is not the one that run {config.run_id} began with, and its plan is gone: put the "
            "former manifest back"
        )
    key = patient_key() if config.manifest else None  # nothing else names patients
    with tempfile.TemporaryDirectory(prefix="leukoflow-plan-") as scratch:
        draft, missing = Path(scratch) / "plan.parquet", Path(scratch) / "missing.parquet"
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
            remarks=_other_keys(Storage(config.out), key),
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
    if PurePosixPath(storage.root) == inside:
        raise ConfigError(f"--out {out} is the source itself; choose a place outside of it")
    if PurePosixPath(storage.root).is_relative_to(inside):
        raise ConfigError(f"--out {out} lies inside the source {source.uri}; choose a place outside of it")
    if not storage.is_local or not inside.is_relative_to(storage.root):
        return
    top = Path(storage.root)
    for folder in (Path(inside), *Path(inside).parents):
        if folder != top and folder.is_relative_to(top) and (folder / "run.json").is_file():
            raise ConfigError(f"{source.uri} lies inside the results of run {folder.name}; name the images themselves")


def require_writable(storage: Storage) -> None:
    """Makes a run's folder. Raises ConfigError where none can be made, or nothing can be written into it."""
    if not storage.is_local:
        return
    folder = Path(storage.root)
    in_the_way = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
    if in_the_way is not None:
        raise ConfigError(f"--out: {in_the_way} is a file; name a folder, new or existing")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out: the folder {folder} cannot be made ({error.strerror}); name one where this user may write"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--out: {folder} cannot be written by this user; change its permissions, or name another one"
        )


@dataclass(frozen=True, slots=True)
class _FetchedFile(os.PathLike[str]):
    """A copy on the local disk, which in messages bears the name that the user knows."""

    local: str
    uri: str

    def __fspath__(self) -> str:
        return self.local

    def __str__(self) -> str:
        return self.uri


def _wanted_manifest(config: RunConfig) -> str | None:
    """The manifest, but for a run that has its plan, or takes it from another one: all that it says is in there."""
    if config.shadow_of is not None:
        return None
    begun = config.manifest_sha256 is not None and config.run_id is not None
    if begun and Storage(config.out).child(str(config.run_id)).exists("plan.parquet"):
        return None
    return config.manifest


@contextmanager
def manifest_file(path: str | None) -> Iterator[Path | _FetchedFile | None]:
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
        what = (
            "is a folder; name the CSV or Parquet file in it"
            if isinstance(error, IsADirectoryError)
            else f"cannot be read: {error.strerror}"
        )
        raise ConfigError(f"--manifest {path} {what}") from None


def spooled(source: Source) -> bool:
    """Whether the source's members must be unpacked to scratch before workers can read them."""
    return source.kind is SourceKind.COMPRESSED_TAR
