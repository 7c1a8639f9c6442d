"""Shadow runs: a candidate bundle sees what a finished run saw, and nobody takes its answers for the night's.

A shadow run has the plan, the settings and the device of the run that it accompanies, and takes over the stages that
hold. What differs between the two is written beside it as `shadow.json`, without a name of an image or a slide.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import dataclass

from leukoflow.core.codec import dumps
from leukoflow.core.config import RunConfig, load_config
from leukoflow.core.errors import ConfigError, LeukoflowError
from leukoflow.models.bundle import load_bundle
from leukoflow.models.registry import is_reference, opened
from leukoflow.runs.layout import OutKey, RunKey
from leukoflow.runs.progress import RunBinding, list_runs, now, read_binding, read_manifest, read_state
from leukoflow.runs.records import CLASSES, RunManifest
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.binding import shadow_id
from leukoflow.tasks.upkeep.diff import RunDiff, diff_runs

_NOT_TAKEN = (
    "source", "out", "run_id", "bundle", "bundles", "manifest", "manifest_sha256", "reuse", "shadow_of", "device",
    "cluster", "deadline", "at_deadline", "urgent",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ShadowSummary:
    """`shadow.json`: in what a shadow run differs from the run that it accompanies, in numbers."""

    run_id: str
    shadow_of: str
    bundle_digest: str
    main_bundle_digest: str
    at: str
    images: int
    moved: int  # another label or status
    changed: int  # anything differs, `moved` included
    slides_changed: int
    slides_moved: int
    transitions: tuple[tuple[str, str, int], ...]  # (verdict there, verdict here, images), unchanged ones included
    fields: tuple[tuple[str, int], ...]
    setup: tuple[tuple[str, str, str], ...]
    manifest_sha256: str
    main_manifest_sha256: str


def summarise(found: RunDiff, shadow: RunManifest, digests: tuple[str, str]) -> ShadowSummary:
    """Sum up the comparison of a run (A) and its shadow (B); `digests` are those of their manifests."""
    assert shadow.shadow_of is not None
    bundles = {name: (a, b) for name, a, b in found.setup}
    return ShadowSummary(
        run_id=shadow.run_id,
        shadow_of=shadow.shadow_of,
        bundle_digest=shadow.bundle_digest,
        main_bundle_digest=bundles.get("bundle_digest", (shadow.bundle_digest, ""))[0],
        at=now(),
        images=found.images,
        moved=sum(n for a, b, n in found.transitions if a != b),
        changed=found.changed + found.only_a + found.only_b,
        slides_changed=len(found.slides),
        slides_moved=sum(1 for slide in found.slides if slide.moved),
        transitions=found.transitions,
        fields=found.fields,
        setup=found.setup,
        manifest_sha256=digests[1],
        main_manifest_sha256=digests[0],
    )


def as_markdown(s: ShadowSummary) -> str:
    """Write the comparison as Markdown for the dashboard."""
    order = {name: i for i, name in enumerate(CLASSES)}
    rows = sorted((t for t in s.transitions if t[0] != t[1]), key=lambda t: (-t[2], order.get(t[0], 9)))
    lines = [
        f"## Shadow run {s.run_id}",
        "",
        f"**Not the night's result.** Bundle {s.bundle_digest[:12]} saw what run {s.shadow_of} saw with bundle "
        f"{s.main_bundle_digest[:12]}: {s.moved} of {s.images} images get another label or status, {s.changed} differ "
        f"in some way; slides affected: {s.slides_moved}.",
        "",
    ]
    if rows:
        lines += ["| there | here | images |", "|---|---|---:|", *(f"| {a} | {b} | {n} |" for a, b, n in rows)]
    return "\n".join([*lines, "", "Research use only."])


# --- an output folder ------------------------------------------------------------------------------------------------


def newest_run(out: str) -> str:
    """Find the finished run that ended last, shadow runs left out. Raises ConfigError where there is none."""
    found = []
    for name in list_runs(out):
        try:
            state = read_state(f"{out.rstrip('/')}/{name}")
        except LeukoflowError:  # a damaged run is nothing to accompany
            continue
        if state.state == "finished" and state.shadow_of is None:
            found.append((state.last_activity, name))
    if not found:
        raise ConfigError(f"{out} holds no finished run that a shadow run could accompany")
    return max(found)[1]


def shadow_config(
    out: str, run_id: str | None, bundle: str, workers: int | None = None, cluster: str | None = None
) -> RunConfig:
    """Make the settings of the shadow run of a finished run (by default the newest) with a candidate bundle.

    Raises ConfigError where the run did not record its settings, or is not there.
    """
    run_id = run_id or newest_run(out)
    main = open_storage(out).child(run_id)
    try:
        binding = read_binding(main)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"there is no run {run_id} in {out}") from None
    if not binding.config:
        raise ConfigError(
            f"run {run_id} was made by a version that did not record all settings, so it cannot "
            f"have a shadow with the same settings; compare it with a run of its own: {_by_hand(binding, out, bundle)}"
        )
    recorded = {name: value for name, value in json.loads(binding.config).items() if name not in _NOT_TAKEN}
    config = load_config(
        None,
        **recorded,
        source=binding.source_uri,
        out=out,
        bundle=bundle,
        reuse=run_id,
        shadow_of=run_id,
        device=binding.device,
        cluster={"workers": workers, "address": cluster},
    )
    digest = opened(config.bundles).resolve(bundle).digest if is_reference(bundle) else load_bundle(bundle).digest
    return config.model_copy(update={"run_id": shadow_id(run_id, digest)})


def _by_hand(binding: RunBinding, out: str, bundle: str) -> str:
    """Return commands that show what a candidate would have changed, where no shadow run can."""
    run = ["leukoflow", "run", binding.source_uri, "--out", out, "--run-id", "NEW", "--bundle", bundle]
    roots = [f"{out.rstrip('/')}/{name}" for name in (binding.run_id, "NEW")]
    return f"{shlex.join([*run, '--reuse', binding.run_id])}, then {shlex.join(['leukoflow', 'diff', *roots])}"


def compare(out: str, run_id: str) -> ShadowSummary:
    """Compare a finished shadow run with its run and write `shadow.json`. Raises StorageError where one is gone."""
    storage = open_storage(out)
    shadow = read_manifest(storage.child(run_id))
    if shadow is None or shadow.shadow_of is None:
        raise ConfigError(f"run {run_id} is not a finished shadow run")
    found = diff_runs(storage.uri(shadow.shadow_of), storage.uri(run_id))
    digests = [
        hashlib.sha256(storage.read(OutKey.of_run(name, RunKey.MANIFEST))).hexdigest()
        for name in (shadow.shadow_of, run_id)
    ]
    summary = summarise(found, shadow, (digests[0], digests[1]))
    storage.write(OutKey.of_run(run_id, RunKey.SHADOW), dumps(summary))
    return summary
