"""A committed run over a sample archive, its masks taken from the truth, and a reader of the pages made of it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray

from leukoflow.core.codec import dumps
from leukoflow.runs.progress import RunBinding
from leukoflow.runs.receipts import StageTiming
from leukoflow.runs.records import Marker, PartRef, PlanSummary, RunManifest, Shard, ShardReceipt
from leukoflow.runs.schema import CELLS, PREDICTIONS, SCHEMA_VERSION, SLIDES
from leukoflow.sources.identify import identify
from leukoflow.tasks.intake.plan import plan

SHARD_SIZE = 16
MEMBERS = 20
STATUSES = {3: "abstained", 7: "rejected", 18: "quarantined"}
REASONS = {3: "ambiguous: 2 classes", 7: "out of focus: 1.8 < 4.0", 18: "damaged: checksum does not match"}


class Checker(HTMLParser):
    """Collects tags, attributes and text; the parser itself forgives, so balance is counted here."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in ("meta", "br", "link", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def plain(page: str) -> str:
    return re.sub(r"\s+", " ", " ".join(checked(page).texts))


def row_of(i: int, truth: int, index: int | None, run: str, uri: str) -> dict[str, object]:
    status = STATUSES.get(i, "predicted")
    labelled = status in ("predicted", "abstained")
    early = 0.02 + 0.9 * (i / MEMBERS)
    probabilities = [1 - early, early * 0.6, early * 0.3, early * 0.1] if labelled else [None] * 4
    label = None if not labelled else ("Benign", "Early", "Pre", "Pro")[int(np.argmax(probabilities))]
    return {
        "run_id": run,
        "image_key": f"field-{i:05d}.jpg",
        "source_uri": uri,
        "slide_id": f"slide-{i % 4:04d}",
        "um_per_px": 0.42,
        "status": status,
        "reason": REASONS.get(i),
        "label": label,
        "confidence": max(probabilities) if labelled else None,
        **dict(zip(("prob_benign", "prob_early", "prob_pre", "prob_pro"), probabilities, strict=True)),
        "prediction_set": [label] if label else None,
        "n_cells": truth if labelled else None,
        "shard": f"{i // SHARD_SIZE:05d}",
        "zarr_index": index,
        "n_tiles": 1 if labelled else 0,
        "bundle_digest": "b" * 64,
    }


def write_run(root: Path, archive: Path) -> tuple[PlanSummary, tuple[ShardReceipt, ...]]:
    """A committed run over the sample archive, its masks taken from the truth; no manifest, no heartbeat."""
    root.mkdir(parents=True)
    source = identify(str(archive / "smears.zip"))
    summary = plan(source, root / "plan.parquet", shard_size=SHARD_SIZE, um_per_px=0.42)
    receipts = []
    for shard in (Shard(0, 0, 16), Shard(1, 16, 4)):
        rows, cells, masks, measured, offsets = [], [], [], [], [0]
        for i in range(shard.first, shard.first + shard.count):
            mask = cv2.imread(str(archive / "truth/cells" / f"field-{i:05d}.png"), cv2.IMREAD_UNCHANGED)
            assert mask is not None
            diagnosed = STATUSES.get(i, "predicted") in ("predicted", "abstained")
            index = len(masks) if diagnosed else None
            rows.append(row_of(i, int(mask.max()), index, root.name, source.uri))
            if index is None:
                continue
            masks.append(mask)
            for cell_id in range(1, int(mask.max()) + 1):
                ys, xs = np.nonzero(mask == cell_id)
                measured.append((cell_id, xs.mean(), ys.mean()))
                zeros = {f.name: 0.0 for f in CELLS if pa.types.is_float32(f.type)}
                cells.append(
                    zeros
                    | {
                        "run_id": root.name,
                        "image_key": f"field-{i:05d}.jpg",
                        "cell_id": cell_id,
                        "attention": 1.0 / cell_id,
                    }
                    | {"nc_ratio": 0.8, "touches_border": False, "zarr_index": index}
                )
            offsets.append(len(cells))
        name = shard.name
        for folder, table in (
            ("predictions", pa.Table.from_pylist(rows, PREDICTIONS)),
            ("cells", pa.Table.from_pylist(cells, CELLS)),
        ):
            (root / folder).mkdir(exist_ok=True)
            pq.write_table(table, root / folder / f"part-{name}.parquet", use_dictionary=False)
        group = zarr.open_group(root / "masks.zarr" / name, mode="w")
        group.create_array("cells", data=np.stack(masks))
        table = group.create_array("cell_table", data=np.array(measured, np.float32))
        table.attrs["columns"] = ["cell_id", "field_x", "field_y"]
        group.create_array("cell_offsets", data=np.array(offsets, np.int64))
        group.create_array("to_source", data=np.tile(np.eye(2, 3, dtype=np.float32), (len(masks), 1, 1)))
        status = [r["status"] for r in rows]
        labels = [r["label"] for r in rows if r["status"] == "predicted"]
        receipt = ShardReceipt(
            shard,
            *(status.count(s) for s in ("predicted", "abstained", "rejected", "quarantined")),
            cells=len(cells),
            labels=tuple(labels.count(c) for c in ("Benign", "Early", "Pre", "Pro")),  # type: ignore[arg-type]
            reasons=tuple((str(r["reason"]).split(":")[0], 1) for r in rows if r["reason"]),
            seconds=12.5 + shard.ordinal,
            timings=(StageTiming("prepare", 1.5, shard.count), StageTiming("extract", 11.0, shard.count)),
        )
        (root / "markers/predictions").mkdir(parents=True, exist_ok=True)
        part = PartRef("predictions", name, "a1", "key", ())
        (root / "markers/predictions" / f"{name}.json").write_bytes(dumps(Marker(part, receipt)))
        receipts.append(receipt)
    binding = RunBinding(
        run_id=root.name,
        fingerprint="0123456789abcdef",
        source_uri=source.uri,
        members=summary.members,
        shards=2,
        shard_size=SHARD_SIZE,
        bundle="no-such-bundle",
        bundle_digest="b" * 64,
        device="cpu",
        started_at="2026-03-01T22:00:00+00:00",
        command="leukoflow run smears.zip --out out",
    )
    (root / "run.json").write_bytes(dumps(binding))
    return summary, tuple(receipts)


def manifest_of(root: Path, summary: PlanSummary, receipts: tuple[ShardReceipt, ...]) -> RunManifest:
    slides = [
        dict.fromkeys(SLIDES.names, 0)
        | {
            "run_id": root.name,
            "rank": i + 1,
            "slide_id": f"slide-{3 - i:04d}",
            "grouping": "manifest",
            "patient_id": None,
        }
        | {"site": "Site-A", "urgency": 0.9 - 0.2 * i, "label": "Early", "top_image_key": "field-00019.jpg"}
        for i in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(slides, SLIDES), root / "slides.parquet")
    return RunManifest(
        run_id=root.name,
        schema_version=SCHEMA_VERSION,
        fingerprint="0123456789abcdef",
        source=summary.source,
        source_truncated=None,
        bundle="no-such-bundle",
        bundle_digest="b" * 64,
        device="cpu",
        shard_size=SHARD_SIZE,
        started_at="2026-03-01T22:00:00+00:00",
        finished_at="2026-03-01T22:10:00+00:00",
        startup_seconds=12.0,
        processing_seconds=4.0,
        processed=MEMBERS,
        members=MEMBERS,
        predicted=17,
        abstained=1,
        rejected=1,
        quarantined=1,
        missing=0,
        ignored=2,
        cells=sum(r.cells for r in receipts),
        labels=tuple(sum(r.labels[i] for r in receipts) for i in range(4)),  # type: ignore[arg-type]
        reasons=(("ambiguous", 1), ("damaged", 1), ("out of focus", 1)),
        conflicts=0,
        timings=(StageTiming("prepare", 3.0, MEMBERS), StageTiming("extract", 22.0, MEMBERS)),
        slowest=(("00001", 13.5), ("00000", 12.5)),
        parts=(),
        tables=(),
        software=(("python", "3.11.7"),),
    )


def change(root: Path, folder: str, key: str, **values: object) -> None:
    """Rewrites the rows of one image in the first shard."""
    path = root / folder / "part-00000.parquet"
    rows = [row | values if row["image_key"] == key else row for row in pq.read_table(path).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path, use_dictionary=False)


def store_maps(root: Path, shard: str) -> NDArray[np.float16]:
    """Activation maps of a committed shard, float16 [m, 4, 2, 2]: each cell's row in one class, quarter by quarter."""
    count = zarr.open_group(root / "masks.zarr" / shard, mode="r")["cell_table"].shape[0]  # type: ignore[union-attr]
    maps = np.zeros((count, 4, 2, 2), np.float16)
    maps[:] = np.array([[[1, -1], [0.5, 0]], [[-1, 0], [0, 1]], [[9, 9], [9, 9]], [[9, 9], [9, 9]]])
    array = zarr.open_group(root / "activations.zarr" / shard, mode="w").create_array("maps", data=maps)
    array.attrs.update({"classes": ["Benign", "Early", "Pre", "Pro"], "window_px": 44, "grid": 2})
    marker = root / "markers/activations" / f"{shard}.json"
    marker.parent.mkdir(exist_ok=True)
    marker.write_bytes(dumps(Marker(PartRef("activations", shard, "a1", "key", ()))))
    return maps


def figures_of(page: str, section: str) -> dict[str, str]:
    """Drawing of each field of a gallery."""
    part = page.partition(f'id="{section}"')[2].partition("</section>")[0]
    return {re.findall(r'<p class="key">([^<]+)', f)[0]: f for f in part.split("<figure>")[1:]}
