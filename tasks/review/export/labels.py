"""Verdicts as training labels: what people have accepted or corrected, with its images, for `leukoflow train`."""

from __future__ import annotations

import csv
import hashlib
import io
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from leukoflow.core.errors import ConfigError, LeukoflowError, NotFoundError
from leukoflow.runs.layout import RunKey
from leukoflow.runs.records import SourceKind
from leukoflow.sources.reading import open_reader
from leukoflow.tasks.intake.plan_file import read_shard, read_summary
from leukoflow.tasks.review.runs import list_runs, open_run_table

LABELS = ("image_key", "label", "slide_id", "cluster_id")
"""What `leukoflow train` reads in `all_fields.csv`."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A field that a person has labelled. `slide` and `group` are numbers within one export: they name no patient."""

    image_key: str  # in the export
    label: str
    slide: str
    group: str
    run_id: str
    stored_key: str  # in the run
    ordinal: int


def training_labels(out: str, run_keys: Sequence[str] | None = None) -> list[Labelled]:
    """Collect the labels that people gave or accepted, of the given runs or of all: one for each image, the latest.

    Left out are flagged fields and shadow runs. Images of one patient share a group, which training keeps together; so
    do those of one slide where there is no patient. Neither is named.
    """
    found: dict[str, tuple[str, Labelled]] = {}
    slides: dict[tuple[str, str], str] = {}
    groups: dict[str, str] = {}
    for line in list_runs(out):
        if (
            line.shadow_of is not None
            or line.state == "damaged"
            or (run_keys is not None and line.run_key not in run_keys)
        ):
            continue
        try:
            table = open_run_table(out, line.run_key)
        except NotFoundError:
            continue
        frame = table.frame
        places: dict[str, int] = {}
        digests: list[str | None] = []
        for (kind, key), standing in table.reviews.standings.items():
            decision = standing.decision
            if kind != "image" or standing.flagged or decision is None or decision.said is None:
                continue
            if not places:
                places = {name: row for row, name in enumerate(frame.keys.to_pylist())}
                digests = frame.column("member_sha256").to_pylist()
            row = places.get(key, -1)
            digest = digests[row] if row >= 0 else None
            if digest is None:
                continue
            slide = (line.run_key, frame.slides[frame.slide[row]])
            patient = frame.patients[frame.patient[row]] if frame.patient[row] >= 0 else "\0".join(slide)
            name = f"{digest[:32]}{_suffix(key)}"
            labelled = Labelled(
                image_key=name,
                label=decision.said,
                slide=slides.setdefault(slide, f"S{len(slides):04d}"),
                group=groups.setdefault(patient, f"G{len(groups):04d}"),
                run_id=line.run_id,
                stored_key=key,
                ordinal=int(frame.ordinals[row]),
            )
            if digest not in found or found[digest][0] < decision.at:
                found[digest] = (decision.at, labelled)
    return [labelled for _, labelled in sorted(found.values(), key=lambda f: f[1].image_key)]


def _suffix(key: str) -> str:
    """Return the ending of an image's name where it is one; the rest may name a patient."""
    suffix = Path(key).suffix.lower()
    return suffix if suffix in (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp") else ""


def labels_csv(labels: Iterable[Labelled]) -> bytes:
    """Write labels as `all_fields.csv`, which `leukoflow train` reads."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(LABELS)
    writer.writerows((x.image_key, x.label, x.slide, x.group) for x in labels)
    return sink.getvalue().encode()


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """What `write_training_set` wrote. `lost` are labelled images that cannot be read any more; they are left out."""

    folder: Path
    images: int
    lost: int


def write_training_set(out: str, folder: str | Path, run_keys: Sequence[str] | None = None) -> TrainingSet:
    """Write `all_fields.csv` and `all_fields.zip` of everything that people have labelled, for `leukoflow train`.

    The images are read again from their sources and named by their digests. Raises ConfigError where the folder has
    such files, or nothing is labelled.
    """
    target = Path(folder)
    labels = training_labels(out, run_keys)
    if not labels:
        raise ConfigError("nobody has accepted or corrected a prediction yet: there is nothing to train on")
    paths = target / "all_fields.csv", target / "all_fields.zip"
    if any(p.exists() for p in paths):
        raise ConfigError(f"{target} has training data already: name another folder")
    target.mkdir(parents=True, exist_ok=True)
    kept: list[Labelled] = []
    with zipfile.ZipFile(paths[1], "w", zipfile.ZIP_STORED) as archive:
        for labelled, data in _images(out, labels):
            archive.writestr(zipfile.ZipInfo(labelled.image_key, (1980, 1, 1, 0, 0, 0)), data)
            kept.append(labelled)
    paths[0].write_bytes(labels_csv(sorted(kept, key=lambda x: x.image_key)))
    return TrainingSet(target, len(kept), len(labels) - len(kept))


def _images(out: str, labels: Sequence[Labelled]) -> Iterator[tuple[Labelled, bytes]]:
    """Read the bytes of labelled images, run by run; those that are gone or have changed are left out."""
    runs: dict[str, list[Labelled]] = {}
    for labelled in labels:
        runs.setdefault(labelled.run_id, []).append(labelled)
    keys = {line.run_id: line.run_key for line in list_runs(out)}
    for run_id, own in runs.items():
        with ExitStack() as stack:
            try:
                table = open_run_table(out, keys[run_id])
                plan = pq.ParquetFile(stack.enter_context(table.storage.open(RunKey.PLAN)))
                source = read_summary(stack.enter_context(table.storage.open(RunKey.PLAN))).source
                if source.kind is SourceKind.COMPRESSED_TAR:
                    continue
                reader = stack.enter_context(open_reader(source))
            except (LeukoflowError, OSError, KeyError):
                continue
            members: Mapping[int, Any] = {}
            for labelled in sorted(own, key=lambda x: x.ordinal):
                if labelled.ordinal not in members:
                    shard = labelled.ordinal // table.shard_size
                    members = {m.ordinal: m for m in read_shard(plan, shard)}
                try:
                    data = reader.read(members[labelled.ordinal])
                except (LeukoflowError, OSError, KeyError):
                    continue
                if hashlib.sha256(data).hexdigest().startswith(Path(labelled.image_key).stem):
                    yield labelled, data
