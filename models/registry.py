"""The bundle registry: which bundles there are, which one is approved for production, and who decided so.

A registry is a folder or an `s3://` prefix. `bundles/<digest>/` holds a bundle, by its digest; `history/<number>.json`
holds what was done, one object each, created only if absent and never changed. There is no pointer to the approved
bundle: it follows from the history, so that one atomic write decides, a crash leaves either the old state or the new
one, and anyone who reads meanwhile sees one of the two. Each entry carries the SHA-256 of the one before it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from leukoflow.core.codec import dumps, loads
from leukoflow.core.errors import BundleError, ConfigError, StorageError
from leukoflow.models.bundle import BundleSpec, load_bundle, spec_digest
from leukoflow.runs.progress import now
from leukoflow.storage.opening import open_storage

VARIABLE = "LEUKOFLOW_BUNDLES"
APPROVED = "approved"
PREFIX = "registry:"
NOTHING = "0" * 64
"""What the first entry names as the digest of the entry before it."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{8,64}")
_ATTEMPTS = 100

Action = Literal["register", "approve", "rollback", "prune"]
State = Literal["registered", "approved", "retired", "removed"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the history."""

    number: int
    at: str  # ISO 8601, UTC
    by: str
    action: Action
    digest: str
    name: str
    why: str
    metrics: tuple[tuple[str, float], ...]  # the headline figures; empty but for registering
    previous: str  # SHA-256 of the entry before


@dataclass(frozen=True, slots=True)
class Registered:
    """A bundle of the registry, as the history leaves it."""

    name: str
    digest: str
    state: State
    at: str  # when it was registered
    by: str
    changed_at: str  # when its state changed last
    metrics: tuple[tuple[str, float], ...]
    note: str  # why it was registered without metrics


@dataclass(frozen=True, slots=True)
class RegistryState:
    """What a history amounts to. `approvals`: the digests in force one after the other, without those rolled back."""

    bundles: tuple[Registered, ...]
    approvals: tuple[str, ...]

    @property
    def approved(self) -> str | None:
        """Digest of the bundle that is approved now."""
        return self.approvals[-1] if self.approvals else None

    def find(self, wanted: str) -> Registered:
        """Find a bundle by its name, its digest, or at least 8 digits of it. Raises BundleError."""
        by_name = [b for b in self.bundles if b.name == wanted]
        found = by_name or [b for b in self.bundles if _DIGEST.fullmatch(wanted) and b.digest.startswith(wanted)]
        if len(found) == 1:
            return found[0]
        known = ", ".join(f"{b.name} ({b.digest[:12]})" for b in self.bundles) or "none"
        what = f"{len(found)} bundles have digests that begin so" if found else "there is no such bundle"
        raise BundleError(f"{wanted!r}: {what} in the registry; registered: {known}")


@dataclass(frozen=True, slots=True)
class _Change:
    """What is to be entered into the history."""

    action: Action
    digest: str
    name: str
    why: str
    metrics: tuple[tuple[str, float], ...] = ()


# --- pure ------------------------------------------------------------------------------------------------------------


def fold(entries: Sequence[Entry]) -> RegistryState:
    """Say what a history amounts to."""
    bundles: dict[str, Registered] = {}
    approvals: list[str] = []
    for e in entries:
        if e.action == "register":
            known = bundles.get(e.digest)
            if known is None or known.state == "removed":
                bundles[e.digest] = Registered(e.name, e.digest, "registered", e.at, e.by, e.at, e.metrics, e.why)
            else:
                bundles[e.digest] = replace(known, metrics=e.metrics, note=e.why)
            continue
        before = approvals[-1] if approvals else None
        if e.action == "approve":
            approvals.append(e.digest)
        elif e.action == "rollback":
            while approvals and approvals[-1] != e.digest:
                approvals.pop()
            approvals = approvals or [e.digest]
        else:
            bundles[e.digest] = replace(bundles[e.digest], state="removed", changed_at=e.at)
            approvals = [digest for digest in approvals if digest != e.digest]
            continue
        if before is not None:
            bundles[before] = replace(bundles[before], state="retired", changed_at=e.at)
        bundles[e.digest] = replace(bundles[e.digest], state="approved", changed_at=e.at)
    return RegistryState(tuple(bundles.values()), tuple(approvals))


def headline_metrics(metrics: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    """Choose the figures of `bundle.json` that a list has room for: those of the strictest protocol evaluated."""
    protocols: Any = metrics.get("protocols")
    for protocol in ("cluster", "slide", "random"):
        try:
            found = protocols[protocol]["models"]["leukoflow"]
            return tuple((f"{protocol} {name}", float(found[name])) for name in _FIGURES if name in found)
        except (KeyError, TypeError, ValueError):
            continue
    plain = {name: v for name, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return tuple((name, float(value)) for name, value in sorted(plain.items())[: len(_FIGURES)])


_FIGURES = ("accuracy", "macro_f1", "ece")


def is_reference(bundle: str) -> bool:
    """Say whether a setting `bundle` asks the registry: `approved`, or `registry:` with name, digest or `approved`."""
    return bundle == APPROVED or bundle.startswith(PREFIX)


def reference(bundle: str) -> str:
    """Write a setting `bundle` in one way: `approved`, or `registry:NAME`; empty for other bundles."""
    name = bundle.removeprefix(PREFIX)
    return "" if not is_reference(bundle) else APPROVED if name == APPROVED else f"{PREFIX}{name}"


# --- a registry ------------------------------------------------------------------------------------------------------


class Registry:
    """The registry at a folder or `s3://` prefix."""

    def __init__(self, root: str) -> None:
        self.storage = open_storage(root)

    # reading

    def entries(self) -> tuple[Entry, ...]:
        """Read the whole history. Raises StorageError where it was tampered with."""
        return self._read()[0]

    def state(self) -> RegistryState:
        """Say what the history amounts to now."""
        return fold(self.entries())

    def location(self, digest: str) -> str:
        """Return the folder or prefix of a bundle."""
        return self.storage.uri(f"bundles/{digest}")

    def resolve(self, wanted: str) -> Registered:
        """Find the bundle that `approved`, `registry:...`, a name or a digest stands for now.

        Raises BundleError where none is approved, there is no such bundle, or it was removed.
        """
        state, name = self.state(), wanted.removeprefix(PREFIX)
        if name == APPROVED:
            if state.approved is None:
                raise BundleError(
                    f"no bundle of {self.storage.root} is approved; `leukoflow bundles list` shows them, and "
                    "`leukoflow bundles approve NAME --by WHO --why TEXT` approves one"
                )
            name = state.approved
        found = state.find(name)
        if found.state == "removed":
            raise BundleError(
                f"bundle {found.name} ({found.digest[:12]}) was removed from {self.storage.root} on "
                f"{found.changed_at}; register it again from where it is kept"
            )
        return found

    def holds(self, digest: str) -> bool:
        """Say whether the bundle of a digest is registered and there."""
        return any(b.digest == digest and b.state != "removed" for b in self.state().bundles)

    # writing

    def register(self, source: str | Path, by: str, name: str | None = None, without_metrics: str = "") -> Registered:
        """Check a bundle, copy it to its digest, and enter it; a bundle that is there already gets its new metrics.

        `without_metrics` says why a bundle that was never evaluated is registered all the same. Raises BundleError for
        a bundle that is damaged or has no metrics, ConfigError for a name that cannot be had. Cut off before the entry
        is made, the same call finishes.
        """
        bundle = load_bundle(source)
        digest, metrics = bundle.digest, bundle.spec.metrics
        name = name or bundle.spec.name
        if not _NAME.fullmatch(name) or name == APPROVED or _DIGEST.fullmatch(name):
            raise ConfigError(
                f"{name!r} cannot be a bundle's name: letters, digits, '.', '_' and '-', at most 64, neither "
                f"{APPROVED!r} nor the look of a digest; choose another one with --name"
            )
        if not metrics and not without_metrics:
            raise BundleError(
                f"bundle {source} has no metrics, so nobody knows how good it is: measure it with `leukoflow evaluate "
                f"{source} DATA --out DIR`, or say with --without-metrics why it is to be registered all the same"
            )
        if metrics.get("bundle_digest", digest) != digest:
            raise BundleError(
                f"the metrics of bundle {source} were measured on another one ({metrics['bundle_digest'][:12]}, this "
                f"is {digest[:12]}): measure it with `leukoflow evaluate {source} DATA --out DIR`"
            )
        headline = headline_metrics(metrics)

        def entered(state: RegistryState) -> _Change | None:
            same = [b for b in state.bundles if b.digest == digest]
            taken = [b for b in state.bundles if b.name == name and b.digest != digest]
            if taken:
                raise ConfigError(
                    f"the name {name} stands for bundle {taken[0].digest[:12]} in {self.storage.root}; choose another "
                    "one with --name"
                )
            if same and same[0].state != "removed" and (same[0].metrics == headline or not metrics):
                return None
            known = same[0].name if same else name
            return _Change("register", digest, known, "" if metrics else without_metrics, headline)

        entered(self.state())  # a name that cannot be had is reported before anything is copied
        self._copy(bundle.path, digest, [*bundle.spec.files], bool(metrics))
        self._enter(by, entered)
        self.check(digest)  # a removal at the same time may have taken the files along
        return self.state().find(digest)

    def approve(self, wanted: str, by: str, why: str) -> Registered:
        """Make a registered bundle the approved one. Raises BundleError where it is not there whole."""

        def entered(state: RegistryState) -> _Change | None:
            found = self.resolve(state.find(wanted).digest)
            self.check(found.digest)
            return None if state.approved == found.digest else _Change("approve", found.digest, found.name, why)

        self._enter(by, entered)
        return self.state().find(wanted)

    def rollback(self, by: str, why: str, to: str | None = None) -> Registered:
        """Make the bundle that was approved before the approved one again, or an earlier one by name or digest.

        Raises BundleError where there is none, or the one that is wanted was never in force.
        """
        target = ""

        def entered(state: RegistryState) -> _Change | None:
            nonlocal target
            if to is None:
                if len(state.approvals) < 2:
                    raise BundleError(f"{self.storage.root} has no earlier approved bundle to go back to")
                target = state.approvals[-2]
            else:
                target = state.find(to).digest
                if target not in state.approvals:
                    raise BundleError(
                        f"bundle {to} is none that was approved before; `leukoflow bundles approve {to}` approves it"
                    )
            self.check(target)
            return None if target == state.approved else _Change("rollback", target, state.find(target).name, why)

        self._enter(by, entered)
        return self.state().find(target)

    def prune(self, chosen: Sequence[tuple[str, str]], by: str) -> tuple[Registered, ...]:
        """Remove bundles, given as (digest, why): the entry comes first, then the files go.

        What is approved, or was before that, stays whatever is asked. Cut off in between, the next call removes the
        files of what the history says is removed.
        """
        for digest, why in chosen:

            def entered(state: RegistryState, digest: str = digest, why: str = why) -> _Change | None:
                found = state.find(digest)
                if digest in state.approvals[-2:] or found.state == "removed":
                    return None
                return _Change("prune", digest, found.name, why)

            self._enter(by, entered)
        removed = [b for b in self.state().bundles if b.state == "removed"]
        for bundle in removed:
            self.storage.delete(f"bundles/{bundle.digest}")
        wanted = {digest for digest, _ in chosen}
        return tuple(b for b in removed if b.digest in wanted)

    def check(self, digest: str) -> None:
        """Check that a bundle of the registry is whole, every byte of it. Raises BundleError."""
        place = self.storage.child(f"bundles/{digest}")
        wrong = ""
        try:
            spec = BundleSpec.model_validate_json(place.read("bundle.json"))
            wrong = "" if spec_digest(spec) == digest else "bundle.json is that of another bundle"
            for name, sha256 in sorted(spec.files.items()):
                if place.digest(name)[2] != sha256:
                    wrong = f"{name} was altered"
        except (FileNotFoundError, NotADirectoryError) as error:
            wrong = f"a file is missing ({error})"
        except ValidationError:
            wrong = "bundle.json was altered"
        if wrong:
            raise BundleError(f"bundle {place.root}: {wrong}; register it again from where it is kept")

    def _copy(self, source: Path, digest: str, names: Sequence[str], replace_spec: bool) -> None:
        """Copy weights first, `bundle.json` last, so that a bundle that can be opened is whole."""
        for name in names:
            data = (source / name).read_bytes()
            key = f"bundles/{digest}/{name}"
            if not self.storage.intact([(key, len(data), hashlib.sha256(data).hexdigest())]):
                self.storage.write(key, data)
        key = f"bundles/{digest}/bundle.json"
        if replace_spec or not self.storage.exists(key):
            self.storage.write(key, (source / "bundle.json").read_bytes())
        self.check(digest)

    def _enter(
        self,
        by: str,
        entered: Callable[[RegistryState], _Change | None],
    ) -> None:
        """Add what `entered` makes of the present state, if anything; start again when somebody else was first."""
        for _ in range(_ATTEMPTS):
            entries, previous = self._read()
            found = entered(fold(entries))
            if found is None:
                return
            number = len(entries) + 1
            entry = Entry(number, now(), by, found.action, found.digest, found.name, found.why, found.metrics, previous)
            if self.storage.create(_key(number), dumps(entry)):
                return
        raise StorageError(f"{self.storage.root}: others write to its history all the time; run the command again")

    def _read(self) -> tuple[tuple[Entry, ...], str]:
        """Read the history and the digest of its last entry. Objects are asked for by number, never listed."""
        entries: list[Entry] = []
        previous = NOTHING
        for number in count(1):
            key = _key(number)
            try:
                data = self.storage.read(key)
            except (FileNotFoundError, NotADirectoryError):
                return tuple(entries), previous
            entry = loads(Entry, data, self.storage.uri(key))
            if entry.number != number or entry.previous != previous or dumps(entry) != data:
                raise StorageError(
                    f"{self.storage.uri(key)} was altered, or does not follow the entry before it: take the history "
                    "from a backup, and find out what happened"
                )
            entries.append(entry)
            previous = hashlib.sha256(data).hexdigest()
        raise AssertionError  # count() has no end


def _key(number: int) -> str:
    return f"history/{number:06d}.json"


def opened(root: str | None) -> Registry:
    """Open the registry that the setting `bundles` names. Raises ConfigError where none is named."""
    if not root:
        raise ConfigError(
            f"no bundle registry is named: set {VARIABLE} (or `bundles` in the configuration file) to its folder or "
            "s3:// prefix"
        )
    return Registry(root)
