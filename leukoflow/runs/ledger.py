"""What was taken from an inbox, by which night, for which run: an append-only ledger of claims.

A claim is one Parquet file, `inbox/<site>/claims/<number>.parquet` below OUT, with one row per file that was taken and
its identity at that moment. Claims are numbered without gaps and each is created only if absent, so of two nights that
reach for the same files one gets them, and the other looks again. A claim is never changed: the run that does it can be
cut off and taken up as often as need be, always with the same files under the same run id.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from leukoflow.core.codec import dumps, loads
from leukoflow.core.errors import SourceError, StorageError, words_of
from leukoflow.runs.layout import LedgerKey, OutKey
from leukoflow.runs.records import Source, SourceKind
from leukoflow.sources.identify import identify
from leukoflow.sources.survey import Entry, survey, unaltered
from leukoflow.storage.opening import open_storage

CLAIM = pa.schema(
    [
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("item", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("supplement", pa.bool_(), nullable=False),
        pa.field("image_key", pa.string(), nullable=False),
        pa.field("locator", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("identity", pa.string(), nullable=False),
        pa.field("refusal", pa.string()),
    ]
)
"""One row per file that was taken. Files of folders and single images share a run; an archive has one of its own.
`kind` is `folder`, `image` or `archive`."""

_HEAD = b"leukoflow.claim"


@dataclass(frozen=True, slots=True)
class ClaimHead:
    """What a claim says of itself, in the metadata of its file."""

    number: int
    site: str
    inbox: str
    night: str  # the date that the night began on, in the site's time zone, ISO 8601
    name: str  # of the night's claim, and of its run of folders and images
    taken_at: str
    runs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """What became of one run of a claim. `exit_code` is that of `leukoflow run`."""

    run_id: str
    exit_code: int
    message: str
    members: int = 0
    settled: bool = True  # nothing is to be done any more


@dataclass(frozen=True, slots=True)
class ClaimOutcome:
    """`outcomes/<number>.json`: written when every run of the claim is settled."""

    number: int
    night: str
    settled_at: str
    runs: tuple[RunOutcome, ...]


@dataclass(frozen=True, slots=True)
class Taken:
    """All that was ever taken."""

    heads: tuple[ClaimHead, ...]
    items: frozenset[str]
    keys: frozenset[str]  # image keys, whatever version
    versions: frozenset[tuple[str, str]]  # (image key, identity)


class Ledger:
    """The claims of one site below one output folder or prefix."""

    def __init__(self, out: str, site: str) -> None:
        self.storage = open_storage(out).child(OutKey.ledger(site))
        self._read: list[tuple[ClaimHead, pa.Table]] = []

    def uri(self, number: int) -> str:
        """Return where a claim lies."""
        return self.storage.uri(LedgerKey.claim(number))

    def read(self) -> Taken:
        """Read everything that was taken so far. Raises StorageError where a claim is absent or damaged."""
        while True:
            number = len(self._read) + 1
            try:
                data = self.storage.read(LedgerKey.claim(number))
            except FileNotFoundError:
                break
            self._read.append(_decode(data, self.uri(number)))
        names = self.storage.names(LedgerKey.CLAIMS)
        if len(names) > len(self._read) and LedgerKey.claim(len(self._read) + 1).rpartition("/")[2] not in names:
            raise StorageError(
                f"{self.uri(len(self._read) + 1)} is absent, and there are later claims: the ledger lost a part; "
                "restore it from a backup, since without it images would be taken twice"
            )
        tables = [table for _, table in self._read]
        keys = [k for t in tables for k in t["image_key"].to_pylist()]
        identities = [i for t in tables for i in t["identity"].to_pylist()]
        return Taken(
            heads=tuple(head for head, _ in self._read),
            items=frozenset(i for t in tables for i in pc.unique(t["item"]).to_pylist()),
            keys=frozenset(keys),
            versions=frozenset(zip(keys, identities, strict=True)),
        )

    def archives(self) -> frozenset[str]:
        """Return the items that were taken as archives, as far as `read` has read."""
        tables = [t.filter(pc.equal(t["kind"], "archive")) for _, t in self._read]
        return frozenset(i for t in tables for i in t["item"].to_pylist())

    def append(self, make: Callable[[Taken], tuple[ClaimHead, pa.Table] | None]) -> ClaimHead | None:
        """Add the claim that `make` returns, given what is taken already; None when it returns none.

        `make` is called again when another process has added a claim in between.
        """
        while True:
            made = make(self.read())
            if made is None:
                return None
            head, table = made
            if self.storage.create(LedgerKey.claim(head.number), encode(head, table)):
                return head

    def outcome(self, number: int) -> ClaimOutcome | None:
        """Read what became of a claim; None while something is to be done."""
        key = LedgerKey.outcome(number)
        try:
            return loads(ClaimOutcome, self.storage.read(key), self.storage.uri(key))
        except FileNotFoundError:
            return None

    def settle(self, outcome: ClaimOutcome) -> None:
        """Note that nothing is left to be done of a claim."""
        self.storage.write(LedgerKey.outcome(outcome.number), dumps(outcome))


def encode(head: ClaimHead, table: pa.Table) -> bytes:
    """Return the bytes of a claim's file."""
    sink = io.BytesIO()
    stamped = table.cast(CLAIM).replace_schema_metadata({_HEAD: json.dumps(asdict(head))})
    pq.write_table(stamped, sink, compression="zstd", use_dictionary=False)
    return sink.getvalue()


def _decode(data: bytes, uri: str) -> tuple[ClaimHead, pa.Table]:
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{uri} is damaged ({words_of(error)}); restore it from a backup") from None
    head = (table.schema.metadata or {}).get(_HEAD)
    if head is None:
        raise StorageError(f"{uri} is not a claim of an inbox; take it out of that folder")
    return loads(ClaimHead, head, uri), table.replace_schema_metadata(None)


# --- what a run of a claim reads -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """The part of a claim that one run does."""

    uri: str
    run_id: str
    table: pa.Table = field(repr=False)

    @property
    def archive(self) -> str | None:
        """Name of the archive that the run is of; None for a run of folders and images."""
        return str(self.table["item"][0].as_py()) if self.table["kind"][0].as_py() == "archive" else None

    @cached_property
    def digest(self) -> str:
        """Over everything that was taken."""
        digest = hashlib.blake2b(digest_size=16)
        for batch in self.table.to_batches():
            for row in batch.to_pylist():
                digest.update(json.dumps([row[f.name] for f in CLAIM]).encode())
        return digest.hexdigest()

    def entries(self) -> Iterator[Entry]:
        """Yield what was taken, in the order of the plan."""
        for batch in self.table.to_batches():
            for r in batch.to_pylist():
                yield Entry(r["image_key"], r["locator"], r["size_bytes"], r["identity"], 0.0, r["refusal"])

    def expected_items(self) -> frozenset[str]:
        """Return the items taken for the first time: what the manifest names in these is missing if it is not there."""
        return frozenset(self.table.filter(pc.invert(self.table["supplement"]))["item"].to_pylist())

    def source(self, uri: str) -> Source:
        """Return the source of the run, given where it lies.

        Single files that are gone or have changed become rows that say so. Raises SourceError where an archive is
        another one by now, or the inbox is empty, which looks more like a mount that is missing.
        """
        if self.archive is not None:
            found = identify(uri)
            if found.identity != self.table["identity"][0].as_py():
                raise SourceError(f"{uri} has changed since it was taken: what it is now goes into the next night")
            return found
        if not any(unaltered(uri, entry) for entry in self.entries()) and not any(True for _ in survey(uri)):
            raise SourceError(f"{uri} is empty, and {len(self.table):,} files were taken from it; is it mounted?")
        return Source(uri, SourceKind.DIRECTORY, self.digest, sum(self.table["size_bytes"].to_pylist()))


def read_selection(uri: str, run_id: str | None) -> Selection:
    """Read what a claim has taken for a run. Raises StorageError where the claim is absent, or has no such run."""
    folder, _, name = uri.rpartition("/")
    try:
        _, table = _decode(open_storage(folder).read(name), uri)
    except FileNotFoundError:
        raise StorageError(f"{uri} does not exist: the run {run_id} takes its images from there; restore it") from None
    mine = table.filter(pc.equal(table["run_id"], run_id))
    if not len(mine):
        raise StorageError(f"{uri} has taken nothing for run {run_id}: give the run id that the claim names")
    return Selection(uri, str(run_id), mine)
