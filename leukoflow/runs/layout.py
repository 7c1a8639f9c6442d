"""Spell every key of a run, of the output folder around it, and of an inbox's ledger: once, here.

A key is a path below a root: `RunKey` below `OUT/RUN_ID/`, `OutKey` below `OUT/`, `LedgerKey` below
`OUT/inbox/<site>/`. `docs/data-format.md` describes what lies there; a test holds its lists equal to this module. Keys
are stored in manifests, markers and claims, so a name here is never changed.
"""

from __future__ import annotations

import re
import uuid
from typing import Final, final

_PART: Final = re.compile(r"part-([0-9]+(?:-[0-9]+)?)\.parquet")


@final
class Stage:
    """The stages of a shard, in order, as their markers name them."""

    MASKS: Final = "masks"
    FEATURES: Final = "features"
    ACTIVATIONS: Final = "activations"
    PREDICTIONS: Final = "predictions"  # the last one: its marker carries the shard's receipt


@final
class RunKey:
    """Keys below a run's root.

    `shard` is a shard's name: its ordinal in the plan, zero-padded to five digits (`Shard.name`).
    """

    # what the run is, and what came of it
    BINDING: Final = "run.json"
    PLAN: Final = "plan.parquet"
    SCALES: Final = "scales.parquet"
    MISSING: Final = "missing.parquet"
    SLIDES: Final = "slides.parquet"
    DUPLICATES: Final = "duplicates.parquet"
    REPORT: Final = "report.html"
    DRIFT: Final = "drift.json"  # of a bundle, too: the reference beside its bundle.json
    MANIFEST: Final = "manifest.json"
    SHADOW: Final = "shadow.json"

    # tables: folders of Parquet parts
    PREDICTIONS: Final = "predictions"
    CELLS: Final = "cells"
    FIELDS: Final = "fields"

    # stores: Zarr groups with a group for each shard
    MASKS: Final = "masks.zarr"
    FEATURES: Final = "features.zarr"
    ACTIVATIONS: Final = "activations.zarr"
    STORES: Final = (MASKS, FEATURES, ACTIVATIONS)

    # what an unfinished run hands over at its deadline; it goes when the run is finished
    PARTIAL: Final = "partial"
    PARTIAL_SLIDES: Final = "partial/slides.parquet"
    PARTIAL_REPORT: Final = "partial/report.html"

    VERDICTS: Final = "verdicts"

    # the run's own book-keeping
    MARKERS: Final = "markers"
    ATTEMPTS: Final = "_attempts"
    RED_CELLS: Final = "_attempts/red-cells"  # a table while the run has no `scales.parquet`
    LOGS: Final = "logs"
    HOSTS: Final = "hosts"
    FAILURES: Final = "failures"
    HEARTBEAT: Final = "heartbeat.json"
    LOCK: Final = "compact.lock"  # held while the run's files are compacted, erased from or corrected
    INTENT: Final = "amend.json"  # there while an erasure or a correction comes into force; no repair before that

    FILES: Final = (
        BINDING, PLAN, SCALES, MISSING, SLIDES, DUPLICATES, REPORT, DRIFT, MANIFEST, SHADOW, HEARTBEAT, LOCK, INTENT,
    )  # fmt: skip
    """All files that may lie directly below the root."""

    FOLDERS: Final = (
        PREDICTIONS, CELLS, FIELDS, *STORES, PARTIAL, VERDICTS, MARKERS, ATTEMPTS, LOGS, HOSTS, FAILURES,
    )  # fmt: skip
    """All folders that may lie there."""

    @staticmethod
    def part(table: str, shard: str) -> str:
        """Return the key of a shard's part of a table; `shard` is `00000-00063` for a merged part."""
        return f"{table}/part-{shard}.parquet"

    @staticmethod
    def group(store: str, shard: str) -> str:
        """Return the key of a shard's group in one of the `STORES`."""
        return f"{store}/{shard}"

    @staticmethod
    def markers(stage: str) -> str:
        """Return the folder of a stage's markers."""
        return f"markers/{stage}"

    @staticmethod
    def marker(stage: str, shard: str) -> str:
        """Return the key of the marker with which a stage of a shard is committed."""
        return f"markers/{stage}/{shard}.json"

    @staticmethod
    def attempt(name: str) -> str:
        """Return the prefix below which something is written aside, before it comes into force."""
        return f"_attempts/{name}"

    @staticmethod
    def new_attempt(kind: str) -> str:
        """Return a prefix for a piece of work of this kind (`compact`, `amend`, ...) that no other process has."""
        return f"_attempts/{kind}-{uuid.uuid4().hex[:8]}"

    @staticmethod
    def log(name: str) -> str:
        """Return the key of a log, given its name with the ending."""
        return f"logs/{name}"

    @staticmethod
    def host(name: str) -> str:
        """Return the key of the description of a kind of machine, given its file's name."""
        return f"hosts/{name}"

    @staticmethod
    def failure(shard: str) -> str:
        """Return the key that says how a shard has failed."""
        return f"failures/{shard}.json"

    @staticmethod
    def verdict(number: int) -> str:
        """Return the key of an entry of the verdicts, counted from 1."""
        return f"verdicts/{number:05d}.parquet"

    @staticmethod
    def verdict_seal(number: int) -> str:
        """Return the key of the seal of that entry."""
        return f"verdicts/{number:05d}.json"

    # --- reading keys back -------------------------------------------------------------------------------------------

    @staticmethod
    def top(key: str) -> str:
        """Return the first part of a key: the folder that it lies in, or the file that it is."""
        return key.partition("/")[0]

    @staticmethod
    def is_store(top: str) -> bool:
        """Say whether the first part of a key names a Zarr store, known to this version or not."""
        return top.endswith(".zarr")

    @staticmethod
    def shard_of_json(name: str) -> str:
        """Return the shard that the file name of a marker or of a failure names."""
        return name.removesuffix(".json")

    @staticmethod
    def shard_of_part(name: str) -> str | None:
        """Return the shard, or the span of shards (`00000-00063`), that a part's file name names; None for others."""
        found = _PART.fullmatch(name)
        return found[1] if found else None

    @staticmethod
    def in_table(key: str, table: str) -> str:
        """Return the key of the same part in another table: `predictions/part-00003.parquet` as `cells/...`."""
        return f"{table}/{key.partition('/')[2]}"


@final
class OutKey:
    """Keys below an output folder or prefix, beside its runs."""

    NIGHTS_PAGE: Final = "nights.html"
    NIGHTS: Final = "nights.json"
    BASELINE: Final = "_baseline/drift.json"  # what the drift of the folder's runs is measured against
    AUDIT: Final = "audit.jsonl"
    AUDIT_LOCK: Final = "audit.lock"
    WEB_AUDIT: Final = "web-audit.jsonl"  # who saw what in the web application, in the form of the audit log
    INBOX: Final = "inbox"

    RESERVED: Final = (INBOX, NIGHTS_PAGE, NIGHTS, AUDIT, AUDIT_LOCK, WEB_AUDIT)
    """Names that no run may have. None begins with an underscore: a run id doesn't either."""

    @staticmethod
    def of_run(run_id: str, key: str) -> str:
        """Return a run's key as seen from the output folder."""
        return f"{run_id}/{key}"

    @staticmethod
    def ledger(site: str) -> str:
        """Return the prefix of the ledger of a site's inbox."""
        return f"inbox/{site}"


@final
class LedgerKey:
    """Keys below the prefix of a site's ledger; claims and outcomes are counted from 1."""

    CLAIMS: Final = "claims"
    OUTCOMES: Final = "outcomes"
    MISSING: Final = "missing.parquet"

    @staticmethod
    def claim(number: int) -> str:
        """Return the key of a claim."""
        return f"claims/{number:05d}.parquet"

    @staticmethod
    def outcome(number: int) -> str:
        """Return the key of what became of a claim."""
        return f"outcomes/{number:05d}.json"
