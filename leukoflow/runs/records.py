"""The frozen dataclasses that travel between parts. Small by design: pixels never ride in what Prefect sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from leukoflow.runs.receipts import Counts, StageTiming

CLASSES: tuple[str, str, str, str] = ("Benign", "Early", "Pre", "Pro")
"""Class order everywhere: labels on disk, logits, probability columns."""

CLASS_NAMES = {"Benign": "Benign", "Early": "Early Pre-B", "Pre": "Pre-B", "Pro": "Pro-B"}
"""As haematologists write them."""

DIED = "its processing kills the worker process"
"""How the reason of an image begins that no worker survives."""


OUT_OF_DISTRIBUTION = "out of distribution"
"""How the reason of an image begins that is unlike the fields that the model learned from."""
_FORMER = "foreign"  # how it began in runs of schema 1


def read_reason(reason: str | None) -> str | None:
    """Return a reason, or its kind, in today's words, whichever version of leukoflow stored it."""
    if reason is not None and (reason == _FORMER or reason.startswith(f"{_FORMER}:")):
        return OUT_OF_DISTRIBUTION + reason.removeprefix(_FORMER)
    return reason


def read_reasons(counts: Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """Count kinds of reasons in today's words, the most frequent first."""
    found = Counter[str]()
    for kind, count in counts:
        found[read_reason(kind) or ""] += count
    return tuple(found.most_common())


class Status(StrEnum):
    """What became of a member. Every member of the source ends in exactly one of these."""

    PREDICTED = "predicted"
    ABSTAINED = "abstained"
    REJECTED = "rejected"
    QUARANTINED = "quarantined"


class SourceKind(StrEnum):
    """The way in which members are reached."""

    DIRECTORY = "directory"  # a local folder, or an s3:// prefix
    ZIP = "zip"
    TAR = "tar"  # uncompressed, read in place
    COMPRESSED_TAR = "compressed-tar"  # gz, bz2, xz, zst: spooled shard by shard
    IMAGE = "image"  # one image file


@dataclass(frozen=True, slots=True)
class Source:
    """What was handed over. `identity` changes when the content may have: size and mtime, ETag, listing digest."""

    uri: str
    kind: SourceKind
    identity: str
    size_bytes: int


class ScaleSource(StrEnum):
    """How the micrometres per pixel of an image are known."""

    MANIFEST = "manifest"  # a person's word: the manifest's column, or the setting for images that have none there
    METADATA = "metadata"  # the image file's own, where the software that wrote it is known to mean it
    RULER = "ruler"  # measured on the smear's red cells
    ASSUMED = "assumed"  # that the picture is one field of the size that the model learned from


@dataclass(frozen=True, slots=True)
class ImageScale:
    """Micrometres per pixel of one image's source.

    `um_per_px` is the one in use, None where a field's size is assumed. `sd` is its standard deviation in the same
    unit, None where nobody knows it; `stated` is what manifest or file say. `doubt` says why the model gives no answer
    at this scale, `remark` what else is odd about it; both are empty where nothing is.
    """

    um_per_px: float | None = None
    source: ScaleSource = ScaleSource.ASSUMED
    sd: float | None = None
    stated: float | None = None
    doubt: str = ""
    remark: str = ""

    @property
    def known(self) -> float | None:
        """Micrometres per pixel that lengths and areas may be given in; None where they would rest on an assumption."""
        return None if self.source is ScaleSource.ASSUMED else self.um_per_px


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of the source, as the frozen plan records it.

    `locator` says where the bytes are: the path below the root for a directory, the name for an image; archives use
    `offset` instead (zip: of the local header; tar: of the data; compressed tar: within the shard's spool file).
    `refusal` is a reason for quarantine that planning already knew (encrypted, a symbolic link, ...). `um_per_px` is
    what was stated, `scale` what is in use: the plan does not know it, see `tasks.store.scales`.
    """

    ordinal: int
    image_key: str
    locator: str
    offset: int
    stored_bytes: int
    size_bytes: int
    method: int
    identity: str
    refusal: str | None = None
    slide_id: str | None = None
    patient_id: str | None = None  # already pseudonymised
    site: str | None = None
    scanner: str | None = None
    um_per_px: float | None = None
    meta: tuple[tuple[str, str | None], ...] = ()
    scale: ImageScale = ImageScale()


@dataclass(frozen=True, slots=True)
class Shard:
    """A run of consecutive members of the plan; the unit that Prefect sees."""

    ordinal: int
    first: int
    count: int

    @property
    def name(self) -> str:
        """Zero-padded ordinal: the name of the shard's Zarr groups and Parquet parts."""
        return f"{self.ordinal:05d}"


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """What planning found, without the members."""

    source: Source
    members: int
    ignored: int
    missing: int
    truncated: str | None  # why the source is known to be incomplete, or None
    shard_size: int
    digest: str  # of the members' identities, keys and manifest fields
    remarks: tuple[str, ...] = ()  # what is odd about source or manifest, for people; nothing that the manifest says
    patient_key_check: str = ""  # of the key that made the patients' pseudonyms; empty without patients

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.members // self.shard_size)


@dataclass(frozen=True, slots=True)
class Quality:
    """Quality of one field. `reasons` is empty when the field may be diagnosed."""

    focus: float  # variance of the Laplacian of lightness, at the model's scale
    exposure: float  # mean lightness, 0 to 1
    saturated: float  # share of pixels clipped black or white
    foreground: float  # share of pixels that are not background
    stain: float  # how far the stained pixels' hue is from blood stains, 0 (typical) upwards
    stain_red: float = 0.0  # optical density of the stained pixels in red over that in green, 0 where none is stained
    stain_blue: float = 0.0  # and in blue over green
    stain_density: float = 0.0  # their mean optical density in green: how strongly the slide is stained
    flags: tuple[str, ...] = ()  # remarks that do not reject
    reasons: tuple[str, ...] = ()  # why the field is rejected


FileRef = tuple[str, int, str]
"""A committed file: its key below the run, its bytes, and their SHA-256."""


@dataclass(frozen=True, slots=True)
class PartRef:
    """One committed part: what a stage wrote for a shard. Digest over all files' names and bytes."""

    stage: str
    shard: str
    attempt: str
    key: str  # content address: what the part was made from
    files: tuple[FileRef, ...]


@dataclass(frozen=True, slots=True)
class ShardReceipt:
    """What a shard's chain of Dask tasks returns to Prefect: counts, never pixels."""

    shard: Shard
    predicted: int
    abstained: int
    rejected: int
    quarantined: int
    cells: int
    labels: tuple[int, int, int, int]  # of predicted rows
    reasons: tuple[tuple[str, int], ...]  # reason of a row without a prediction, and how often
    seconds: float
    timings: tuple[StageTiming, ...] = field(default=())
    resumed: tuple[str, ...] = field(default=())  # stages whose stored part was used

    @property
    def counts(self) -> Counts:
        """Return the shard's numbers in the one shape that all code uses."""
        return Counts(
            predicted=self.predicted,
            abstained=self.abstained,
            rejected=self.rejected,
            quarantined=self.quarantined,
            cells=self.cells,
            labels=self.labels,
        )

    @property
    def rows(self) -> int:
        """Rows written for this shard: must equal the shard's count."""
        return self.counts.accounted


@dataclass(frozen=True, slots=True)
class Marker:
    """`markers/<stage>/<shard>.json`: created once, names the winning attempt; with it the stage is committed."""

    part: PartRef
    receipt: ShardReceipt | None = None  # only of the last stage, `predictions`


@dataclass(frozen=True, slots=True)
class Host:
    """A machine as its computing processes see it. It has no name: alike machines compute alike."""

    cpu: str
    capability: str  # the vector instructions that torch chose
    cores: int  # that this process may use
    threads: int  # that torch computes with
    thread_variables: tuple[tuple[str, str], ...]  # OMP_NUM_THREADS and its like, where they are set
    gpus: tuple[str, ...]
    cuda: str  # of torch, with that of cuDNN; empty without
    blas: str  # of torch
    system: str
    python: str
    code: str  # digest of leukoflow's own files
    software: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class RunManifest:
    """`manifest.json`, written last of all: what the run was, what became of every member, and digests of all parts."""

    run_id: str
    schema_version: int
    fingerprint: str
    source: Source
    source_truncated: str | None
    bundle: str
    bundle_digest: str
    device: str
    shard_size: int
    started_at: str  # ISO 8601, UTC
    finished_at: str
    startup_seconds: float  # before the first shard: planning, Prefect, Dask, models
    processing_seconds: float  # of the session that finished the run
    processed: int  # members that this session did; fewer than all where the run was resumed
    members: int
    predicted: int
    abstained: int
    rejected: int
    quarantined: int
    missing: int
    ignored: int
    cells: int
    labels: tuple[int, int, int, int]  # of predicted rows, in the order of CLASSES; schema 1: of abstained ones too
    reasons: tuple[tuple[str, int], ...]
    conflicts: int  # images found under more than one patient, see duplicates.parquet
    timings: tuple[StageTiming, ...]  # summed over shards
    slowest: tuple[tuple[str, float], ...]  # (shard, seconds)
    parts: tuple[PartRef, ...]
    tables: tuple[FileRef, ...]  # plan, scales, slides, duplicates, missing
    software: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = field(default=())  # what the numbers do not say, for people
    hosts: tuple[Host, ...] = field(default=())  # the kinds of machines that computed parts
    config: str = ""  # all settings of the session that finished the run, as canonical JSON
    bundle_reference: str = ""  # as it was asked for, where a registry said which bundle that is
    shadow_of: str | None = None  # the run that this one only accompanies: not the night's result

    @property
    def counts(self) -> Counts:
        """Return the run's numbers in the one shape that all code uses."""
        return Counts(
            predicted=self.predicted,
            abstained=self.abstained,
            rejected=self.rejected,
            quarantined=self.quarantined,
            missing=self.missing,
            cells=self.cells,
            labels=self.labels,
        )

    @property
    def exit_code(self) -> int:
        """What the command line returns for this run."""
        if self.missing or self.source_truncated:
            return 4
        return 3 if self.quarantined else 0
