"""Decide which bundles of a registry may go: none that is approved, that a rollback may need, or that a run needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from leukoflow.core.errors import ConfigError, LeukoflowError, StorageError, words_of
from leukoflow.models.registry import Registered, Registry, RegistryState
from leukoflow.runs.progress import list_runs, read_binding
from leukoflow.storage.opening import open_storage


@dataclass(frozen=True, slots=True)
class BundleDecision:
    """What is to become of a bundle, and why."""

    bundle: Registered
    remove: bool
    why: str


def decide(
    state: RegistryState, needed: Mapping[str, str], keep_days: float, moment: datetime
) -> tuple[BundleDecision, ...]:
    """Decide what is to become of every bundle; `needed` maps the digests that runs need to one of these runs."""
    found = []
    for bundle in state.bundles:
        if bundle.state == "removed":
            continue
        days = (moment - datetime.fromisoformat(bundle.changed_at)).total_seconds() / 86400
        if bundle.digest == state.approved:
            decision = BundleDecision(bundle, False, "it is approved")
        elif bundle.digest in state.approvals[-2:]:
            decision = BundleDecision(bundle, False, "a rollback goes back to it")
        elif bundle.digest in needed:
            decision = BundleDecision(bundle, False, f"run {needed[bundle.digest]} needs it")
        elif days < keep_days:
            decision = BundleDecision(bundle, False, f"{bundle.state} within {keep_days:g} days")
        else:
            decision = BundleDecision(bundle, True, f"{bundle.state} for {days:.0f} days, and no run needs it")
        found.append(decision)
    return tuple(found)


def needed_bundles(outs: Sequence[str]) -> dict[str, str]:
    """List the digests of the bundles that the runs of output folders were made with, each with one of those runs.

    Raises ConfigError for a folder without a run, StorageError where a run's records cannot be read: what it needs is
    not known then.
    """
    found: dict[str, str] = {}
    for out in outs:
        names = list_runs(out)
        if not names:
            raise ConfigError(f"{out} holds no run; name the folders or prefixes that were given to `run --out`")
        for name in names:
            storage = open_storage(out).child(name)
            try:
                binding = read_binding(storage)
            except LeukoflowError as error:
                raise StorageError(
                    f"what bundle run {name} needs is not known ({words_of(error)}); repair or delete it first. "
                    "Nothing was removed"
                ) from None
            found.setdefault(binding.bundle_digest, f"{out.rstrip('/')}/{name}")
    return found


def prune(
    registry: Registry, outs: Sequence[str], keep_days: float, by: str, dry_run: bool = False
) -> tuple[BundleDecision, ...]:
    """Remove bundles that nothing needs, and return what has become of every one. The history tells of each."""
    if not outs:
        raise ConfigError("name every folder or prefix that holds runs (--out), so that no bundle of theirs goes")
    decisions = decide(registry.state(), needed_bundles(outs), keep_days, datetime.now(UTC))
    if not dry_run:
        registry.prune([(v.bundle.digest, v.why) for v in decisions if v.remove], by)
    return decisions
