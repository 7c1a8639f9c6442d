"""The inbox: what has arrived whole, what is still arriving, what a night takes, what was expected and is not there.

An item is an entry of the inbox's top level: a folder (the images of a slide), an archive, or an image. Files that come
into a folder after it was taken, and files that were replaced since, are not lost: they make a supplement, which is
taken like an item of its own.
"""

from __future__ import annotations

import io
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from fnmatch import fnmatchcase
from typing import Literal
from urllib.parse import unquote, unquote_to_bytes

import pyarrow as pa
import pyarrow.parquet as pq

from leukoflow.core.site import ArrivalSettings, Site
from leukoflow.runs.layout import LedgerKey
from leukoflow.runs.ledger import CLAIM, ClaimHead, Ledger, Taken
from leukoflow.runs.progress import now
from leukoflow.sources.filenames import is_unfinished
from leukoflow.sources.survey import Entry, is_archive, survey
from leukoflow.tasks.intake.binding import stem
from leukoflow.tasks.intake.manifest import manifest_keys
from leukoflow.tasks.intake.manifest_fetch import fetch_manifest
from leukoflow.tasks.intake.manifest_join import item_of, items_by_spelling
from leukoflow.tasks.intake.matching import match

ItemState = Literal["complete", "arriving", "taken"]
_STEM = 40  # characters of an archive's name in a run id
_ODD_ARCHIVE = "archive with a name that is no UTF-8: rename it, and the next night takes it"

MISSING = pa.schema(
    [
        pa.field("image_key", pa.string(), nullable=False),
        pa.field("item", pa.string(), nullable=False),
        pa.field("state", pa.string(), nullable=False),
    ]
)
"""`missing.parquet`: what the manifest names and was not taken. `state`: `absent`, `arriving` or `missing`, where the
item was taken without it."""


@dataclass(frozen=True, slots=True)
class Item:
    """An entry of the inbox's top level as it is now. `files` are those that were not taken yet, in this version."""

    name: str
    state: ItemState
    reason: str  # why it is in this state, for people
    folder: bool
    files: tuple[Entry, ...]
    supplement: bool  # some of it was taken before
    changed: int  # of `files`, those of which another version was taken
    quiet_seconds: float  # since it last changed


@dataclass(frozen=True, slots=True)
class Expected:
    """What the manifest names and was not taken: numbers of images, and names of items."""

    absent: tuple[str, ...]  # items of which there is no trace
    absent_images: int
    arriving_images: int
    missing_images: int  # absent from items that were taken

    @property
    def images(self) -> int:
        """All of them."""
        return self.absent_images + self.arriving_images + self.missing_images


@dataclass(frozen=True, slots=True)
class InboxView:
    """One look at an inbox."""

    items: tuple[Item, ...]
    expected: Expected | None  # None without a manifest
    missing: pa.Table  # as MISSING
    leftovers: int  # unfinished files that nobody has written to for long, which are not taken

    def of(self, state: ItemState) -> list[Item]:
        """Return the items in one state, in order of name."""
        return [item for item in self.items if item.state == state]


# --- pure ------------------------------------------------------------------------------------------------------------


def judge(entries: Iterable[Entry], taken: Taken, rules: ArrivalSettings, moment: float) -> tuple[list[Item], int]:
    """Return the items that an inbox's entries make at a moment (seconds since the epoch), and how many leftovers."""
    groups: dict[str, list[Entry]] = defaultdict(list)
    done: dict[str, float] = {}
    for entry in entries:
        item, _, rest = entry.key.partition("/")
        if rest == rules.sentinel:
            done[item] = entry.changed_at
        elif not rest and item.endswith(rules.done_suffix):
            done[item.removesuffix(rules.done_suffix)] = entry.changed_at
        else:
            groups[item].append(entry)
    items, leftovers = [], 0
    for name in sorted(groups.keys() | done.keys()):
        judged = _judge_item(name, groups.get(name, []), done.get(name), taken, rules, moment)
        if judged is not None:
            items.append(judged[0])
            leftovers += judged[1]
    return items, leftovers


def _judge_item(
    name: str, entries: Sequence[Entry], done_at: float | None, taken: Taken, rules: ArrivalSettings, moment: float
) -> tuple[Item, int] | None:
    partial = [e for e in entries if _is_partial(e.key, rules)]
    whole = [e for e in entries if not _is_partial(e.key, rules)]
    fresh = tuple(e for e in whole if (e.key, e.identity) not in taken.versions)
    folder = any("/" in e.key for e in entries) or not entries
    changed = sum(e.key in taken.keys for e in fresh)
    supplement = name in taken.items
    newest = max((e.changed_at for e in [*fresh, *partial]), default=done_at or 0.0)
    quiet = moment - newest

    def item(state: ItemState, reason: str) -> tuple[Item, int]:
        left = len(partial) if state != "arriving" else 0
        return Item(name, state, reason, folder, fresh, supplement, changed, quiet), left

    if not whole and not partial:
        # a sentinel without anything: the folder's files are on their way, or a NAME.done was left behind
        return None if supplement or done_at is None else item("arriving", "only its sentinel is there, and no file")
    if whole and not fresh:
        return item("taken", "")
    if unreadable := [e for e in fresh if not e.identity]:
        return item("arriving", f"{unreadable[0].refusal}")
    if not fresh:
        return item("arriving", "only unfinished files are there")
    if done_at is not None and done_at >= (newest if supplement else 0.0):
        return item("complete", "sentinel")
    if rules.complete == "sentinel" and not supplement:
        return item("arriving", "its sentinel is not there yet")
    if quiet < -rules.settle_seconds:
        return item("arriving", "its time lies in the future: the clocks of this machine and of the store differ")
    if quiet < rules.settle_seconds:
        return item("arriving", f"it changed {max(0.0, quiet):.0f} s ago")
    return item("complete", f"nothing has changed for {quiet:.0f} s")


def _is_partial(key: str, rules: ArrivalSettings) -> bool:
    name = key.rpartition("/")[2]
    return is_unfinished(key) or any(fnmatchcase(name, pattern) for pattern in rules.partial)


def claim_of(
    site: Site, night: date, items: Sequence[Item], archives: frozenset[str], taken: Taken
) -> tuple[ClaimHead, pa.Table]:
    """Return the claim of a night that takes these items; `archives` names those that are archives."""
    before = sum(head.night == night.isoformat() for head in taken.heads)
    base = f"{site.name}-{night.isoformat()}" + (f"-{before + 1}" if before else "")
    runs: dict[str, None] = {}
    rows = []
    for item in items:
        run_id, kind = base, "folder" if item.folder else "image"
        if item.name in archives:
            run_id, kind = _archive_run(base, item.name, runs), "archive"
        runs[run_id] = None
        rows += [
            {
                "run_id": run_id,
                "item": item.name,
                "kind": kind,
                "supplement": item.supplement,
                "image_key": e.key,
                "locator": e.locator,
                "size_bytes": e.size_bytes,
                "identity": e.identity,
                "refusal": e.refusal,
            }
            for e in item.files
        ]
    head = ClaimHead(len(taken.heads) + 1, site.name, site.inbox, night.isoformat(), base, now(), tuple(runs))
    return head, pa.Table.from_pylist(rows, CLAIM)


def _archive_run(base: str, name: str, used: Mapping[str, None]) -> str:
    short = re.sub(r"[^A-Za-z0-9._-]", "-", stem(name))[:_STEM]
    number = 1
    while (run_id := f"{base}.{short}" + (f"-{number}" if number > 1 else "")) in used:
        number += 1
    return run_id


def compare(keys: Iterable[str], items: Sequence[Item], taken: Taken, archives: frozenset[str]) -> pa.Table:
    """List what a manifest names and was not taken, as MISSING; images of `archives` are known to their runs alone."""
    new = {item.name for item in items if not item.supplement and item.state != "taken"}
    fresh = {e.key for item in items for e in item.files}
    named = items_by_spelling({*new, *taken.items, *archives, *(item.name for item in items)})
    keys = [key for key in keys if key not in taken.keys and named(key) not in archives]
    theirs = {named(key) for key in keys}
    came, arriving = (
        _spelled_otherwise(keys, [image for image in images if item_of(image) in theirs])
        for images in (taken.keys.difference(keys), fresh - taken.keys)
    )
    rows = []
    for key in keys:
        if key in came:
            continue
        item = named(key) or item_of(key)
        here = key in fresh or key in arriving or item in new
        state = "arriving" if here else "missing" if item in taken.items else "absent"
        rows.append({"image_key": key, "item": item, "state": state})
    return pa.Table.from_pylist(rows, MISSING)


def _spelled_otherwise(keys: Sequence[str], images: Sequence[str]) -> set[str]:
    """Return those keys of the manifest that are an image spelled otherwise: folders are never left out here."""
    found = match(keys, images, matched=True)
    return {keys[row] for row in found.rows.values()}


# --- an inbox --------------------------------------------------------------------------------------------------------


def look(site: Site, ledger: Ledger, moment: float) -> InboxView:
    """Look at what the inbox holds. Raises SourceError, StorageError or ConfigError (manifest)."""
    taken = ledger.read()
    items, leftovers = judge(survey(site.inbox), taken, site.arrival, moment)
    if site.manifest is None:
        return InboxView(tuple(items), None, MISSING.empty_table(), leftovers)
    with fetch_manifest(site.manifest) as manifest:
        assert manifest is not None
        missing = compare(manifest_keys(manifest), items, taken, ledger.archives())
    states = missing["state"].to_pylist()
    absent = sorted({i for i, s in zip(missing["item"].to_pylist(), states, strict=True) if s == "absent"})
    expected = Expected(tuple(absent), *(states.count(s) for s in ("absent", "arriving", "missing")))
    return InboxView(tuple(items), expected, missing, leftovers)


def take(site: Site, ledger: Ledger, night: date, moment: float) -> ClaimHead | None:
    """Claim what is complete; None when nothing is. Two calls at the same time never take the same file."""

    def make(taken: Taken) -> tuple[ClaimHead, pa.Table] | None:
        items, _ = judge(survey(site.inbox), taken, site.arrival, moment)
        complete = [item for item in items if item.state == "complete"]
        if not complete:
            return None
        complete = [_with_odd_archives_refused(site, item) for item in complete]
        files = [item.name for item in complete if not item.folder and not _is_odd(item)]
        archives = frozenset(name for name in files if is_archive(f"{site.inbox}/{name}", name))
        return claim_of(site, night, complete, archives, taken)

    return ledger.append(make)


def _is_odd(item: Item) -> bool:
    """Tell whether the name of a single file is written with escapes, so that no path leads to it."""
    return any(unquote(e.locator) != e.key for e in item.files)


def _with_odd_archives_refused(site: Site, item: Item) -> Item:
    """Return the item, with a reason for the row of an archive that no path leads to."""
    if item.folder or not _is_odd(item):
        return item

    def is_one(entry: Entry) -> bool:
        return is_archive(f"{site.inbox}/{os.fsdecode(unquote_to_bytes(entry.locator))}", item.name)

    files = tuple(replace(e, refusal=e.refusal or _ODD_ARCHIVE) if is_one(e) else e for e in item.files)
    return replace(item, files=files)


def write_missing(ledger: Ledger, missing: pa.Table) -> None:
    """Write `missing.parquet` in place of the one before; it is absent when nothing is missing."""
    if not len(missing):
        ledger.storage.delete(LedgerKey.MISSING)
        return
    sink = io.BytesIO()
    pq.write_table(missing, sink, compression="zstd", use_dictionary=False)
    ledger.storage.write(LedgerKey.MISSING, sink.getvalue())
