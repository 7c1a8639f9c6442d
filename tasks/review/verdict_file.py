"""Files of verdicts: `00001.parquet` with its rows and the digest of the file before it, `00001.json` with its seal."""

from __future__ import annotations

import hashlib
import io
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from leukoflow.core.codec import dumps, loads
from leukoflow.core.errors import StorageError, words_of
from leukoflow.runs.layout import RunKey
from leukoflow.runs.schema import VERDICTS
from leukoflow.tasks.review.verdict_record import Action, Verdict

FOLDER = RunKey.VERDICTS
_HEAD = b"leukoflow.verdicts"


@dataclass(frozen=True, slots=True)
class Entry:
    """What a file says of itself. `erased` counts the rows whose digests are here, but which were erased."""

    number: int
    previous: str
    rows: tuple[str, ...]
    erased: tuple[int, ...] = ()

    @property
    def digest(self) -> str:
        """The digest that the next file names: it does not change when rows are erased."""
        body = json.dumps([self.number, self.previous, self.rows], separators=(",", ":"))
        return hashlib.sha256(body.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Seal:
    """`00001.json`: the bytes of a file, so that one bit, or the loss of the last file, is found."""

    number: int
    entry: str
    sha256: str
    size: int


def row_of(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as a row of `VERDICTS`, with a fresh salt."""
    row = asdict(verdict) | {"action": str(verdict.action), "salt": secrets.token_hex(8)}
    row["at"] = datetime.fromisoformat(verdict.at).astimezone(UTC)
    return {name: row[name] for name in VERDICTS.names}


def verdict_of(row: Mapping[str, Any]) -> Verdict:
    """Return the verdict that a row holds."""
    kept = {name: value for name, value in row.items() if name != "salt"}
    kept["at"] = row["at"].astimezone(UTC).isoformat(timespec="milliseconds")
    return Verdict(**(kept | {"action": Action(row["action"])}))


def row_digest(row: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a row, in hex; its salt keeps anybody from finding out by trial what an erased row said."""
    values = [row[name] for name in VERDICTS.names if name != "at"]
    body = json.dumps([*values, row["at"].astimezone(UTC).isoformat(timespec="microseconds")], ensure_ascii=False)
    return hashlib.sha256(body.encode()).hexdigest()


def encode(entry: Entry, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Write a file of verdicts: rows of `VERDICTS`, and its entry in the metadata."""
    table = pa.Table.from_pylist([dict(row) for row in rows], VERDICTS)
    sink = io.BytesIO()
    stamped = table.replace_schema_metadata({_HEAD: json.dumps(asdict(entry), sort_keys=True)})
    pq.write_table(stamped, sink, compression="zstd", use_dictionary=False)
    return sink.getvalue()


def decode(data: bytes, uri: str) -> tuple[Entry, list[dict[str, Any]]]:
    """Read a file of verdicts. Raises StorageError where the bytes are none."""
    try:
        table = pq.ParquetFile(io.BytesIO(data)).read()
        head = (table.schema.metadata or {}).get(_HEAD)
        if head is None or table.schema.names != VERDICTS.names:
            raise StorageError(f"{uri} holds no verdicts; take it out of that folder")
        return loads(Entry, head, uri), list(table.to_pylist())
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(f"{uri} is damaged ({words_of(error)}); restore it from a backup") from None


def make_seal(data: bytes, entry: Entry) -> bytes:
    """Write the seal of a file's bytes."""
    return dumps(Seal(entry.number, entry.digest, hashlib.sha256(data).hexdigest(), len(data)))


def key_of(number: int, kind: str = "parquet") -> str:
    """Return the key of a file of verdicts, or of its seal (`json`), below its run."""
    return f"{FOLDER}/{number:05d}.{kind}"
