"""report.html: every number in its place, nothing foreign unescaped, useful for unfinished runs and lost sources."""

from __future__ import annotations

import base64
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from numpy.typing import NDArray

from leukoflow.core.codec import dumps
from leukoflow.core.errors import StorageError
from leukoflow.runs.progress import Heartbeat, RunBinding, now
from leukoflow.runs.records import Marker, PartRef, PlanSummary, RunManifest, Shard, ShardReceipt, StageTiming
from leukoflow.runs.schema import CELLS, PREDICTIONS, SCHEMA_VERSION, SLIDES
from leukoflow.sources.members import identify
from leukoflow.tasks.imaging.synthetic import write_sample
from leukoflow.tasks.intake.plan import plan
from leukoflow.tasks.report.run_report import _outline, _text, build_report

SHARD_SIZE = 16
MEMBERS = 20
STATUSES = {3: "abstained", 7: "rejected", 18: "quarantined"}
REASONS = {3: "ambiguous: 2 classes", 7: "out of focus: 1.8 < 4.0", 18: "damaged: checksum does not match"}


class _Checker(HTMLParser):
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


def _checked(page: str) -> _Checker:
    checker = _Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def _plain(page: str) -> str:
    return re.sub(r"\s+", " ", " ".join(_checked(page).texts))


def _row(i: int, truth: int, index: int | None, run: str, uri: str) -> dict[str, object]:
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


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("archive")
    write_sample(directory, images=MEMBERS, seed=5)
    return directory


def _write_run(root: Path, archive: Path) -> tuple[PlanSummary, tuple[ShardReceipt, ...]]:
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
            rows.append(_row(i, int(mask.max()), index, root.name, source.uri))
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


def _manifest(root: Path, summary: PlanSummary, receipts: tuple[ShardReceipt, ...]) -> RunManifest:
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


@pytest.fixture
def run(tmp_path: Path, archive: Path) -> tuple[Path, RunManifest]:
    root = tmp_path / "out" / "demo"
    summary, receipts = _write_run(root, archive)
    return root, _manifest(root, summary, receipts)


def test_a_finished_run_reconciles_and_shows_its_fields(run: tuple[Path, RunManifest]) -> None:
    root, manifest = run
    page = build_report(str(root), manifest)
    text = _plain(page)
    assert "Reconciled. Each of the 20 members has exactly one row: 17 predicted + 1 abstained" in text
    assert "5.0 per second" in text
    assert "1,100.0 ms" in text
    assert "Research use only." in text
    assert page.count("data:image/jpeg;base64,") == 24  # twelve suspicious and twelve uncertain fields
    assert "only the mask is shown" not in text
    for i in (3, 7, 18):
        assert f"field-{i:05d}.jpg" in text
        assert _text(REASONS[i]) in page


def _change(root: Path, folder: str, key: str, **values: object) -> None:
    """Rewrites the rows of one image in the first shard."""
    path = root / folder / "part-00000.parquet"
    rows = [row | values if row["image_key"] == key else row for row in pq.read_table(path).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path, use_dictionary=False)


def test_a_field_without_an_answer_shows_none(run: tuple[Path, RunManifest]) -> None:
    root, manifest = run
    given = {"confidence": 0.3, "prediction_set": ["Pre"], "label": "Pre", "um_per_px": None}
    _change(root, "predictions", "field-00003.jpg", **given, width_px=2592, height_px=1944)
    page = build_report(str(root), manifest)
    figure = _figures(page, "uncertain")["field-00003.jpg"]
    caption = figure.partition("<figcaption>")[2]
    assert '<p class="said">No answer: the model abstained.</p>' in caption
    assert "The likeliest cause is the missing scale: the picture has 2592 × 1944 px" in caption
    assert "--um-per-px" in caption
    assert "rediction set" not in caption
    assert "0.300" not in caption
    before, _, after = caption.partition("<details>")
    assert "Pre-B" not in before
    assert after.startswith("<summary>Probabilities, which are no answer</summary>")
    assert "1 of 1 abstention is from a picture of another size than the training fields (224 px)" in _plain(page)


def test_an_answer_of_unknown_scale_is_cautioned_against(run: tuple[Path, RunManifest]) -> None:
    root, manifest = run
    assert "Do not rely on" not in build_report(str(root), manifest)
    _change(root, "predictions", "field-00014.jpg", um_per_px=None, width_px=112, height_px=112)
    page = build_report(str(root), manifest)
    figures = _figures(page, "suspicious")
    caption = figures["field-00014.jpg"].partition("<figcaption>")[2]
    assert caption.index("No scale was given and this picture is not of the training size") < caption.index('"said"')
    assert "Do not rely on this answer" not in figures["field-00019.jpg"]
    assert "1 of 17 answers is to a picture of another size" in _plain(page)


def test_headings_say_what_is_shown(run: tuple[Path, RunManifest]) -> None:
    page = build_report(str(run[0]), run[1])
    for heading in ("Most suspicious field of each slide, then others", "Least certain fields, answered or not"):
        assert f"<h2>{heading}</h2>" in page
    assert "<h3>Highest probability</h3>" in page
    assert "<h3>Confidence</h3>" not in page


def test_the_patient_of_a_slide_is_said_to_be_the_first(run: tuple[Path, RunManifest]) -> None:
    rows = [{**dict.fromkeys(SLIDES.names), **s} for s in pq.read_table(run[0] / "slides.parquet").to_pylist()]
    note = "Where fields of several patients are on a slide, only the first patient is named; the web application shows"
    for patient, said in ((None, False), ("p-1", True)):
        table = pa.Table.from_pylist([r | {"patient_id": patient} for r in rows], SLIDES)
        pq.write_table(table, run[0] / "slides.parquet")
        page = build_report(str(run[0]), run[1])
        assert ">first patient</th>" in page
        assert (note in _plain(page)) is said


def test_a_set_of_one_is_no_exclusion_in_the_report(run: tuple[Path, RunManifest]) -> None:
    text = _plain(build_report(str(run[0]), run[1]))
    assert "Prediction set: Early Pre-B. " in text
    assert "This excludes no other class: by design, up to 1 field in 20 has" in text
    assert "Early Pre-B alone" not in text
    assert "remains possible" not in text
    assert "Mean malignant probability" in text


def test_a_ratio_that_was_not_measured_is_a_dash(run: tuple[Path, RunManifest]) -> None:
    _change(run[0], "cells", "field-00014.jpg", nc_ratio=1.0)
    figures = _figures(build_report(str(run[0]), run[1]), "suspicious")
    assert "nucleus / cell area – (cytoplasm not seen)" in figures["field-00014.jpg"]
    assert "nucleus / cell area 1.00" not in figures["field-00014.jpg"]
    assert "nucleus / cell area 0.80" in figures["field-00019.jpg"]


def test_labels_are_counted_over_the_predicted(run: tuple[Path, RunManifest]) -> None:
    text = _plain(build_report(str(run[0]), run[1]))
    counts = [int(n) for n in re.findall(r"(?:Benign|Pre-B|Pro-B) (\d+) [\d.]+ %", text.partition("Labels")[2])]
    assert sum(counts) == run[1].predicted == 17
    assert "Of the 17 predicted fields. Fields that were abstained from, 1, have no label here." in text


def test_patients_whose_slides_disagree_are_named(run: tuple[Path, RunManifest]) -> None:
    root, manifest = run
    rows = pq.read_table(root / "slides.parquet").to_pylist()
    assert "not agree on the class" not in build_report(str(root), manifest)
    for row, label in zip(rows, ("Early", "Pro", "Pre", "Pre"), strict=True):
        row |= {"patient_id": "p_one" if row["rank"] < 3 else "p_two", "label": label, "n_predicted": 5}
    pq.write_table(pa.Table.from_pylist(rows, SLIDES), root / "slides.parquet")
    text = _plain(build_report(str(root), manifest))
    assert "The slides of 1 patient do not agree on the class." in text
    assert "p_one Early Pre-B in slide-0003 (5 fields); Pro-B in slide-0002 (5 fields)." in text
    assert "p_two Pre" not in text


def test_benign_as_the_likeliest_of_malignant_classes_is_told(run: tuple[Path, RunManifest]) -> None:
    root, manifest = run
    rows = pq.read_table(root / "slides.parquet").to_pylist()
    for row, score in zip(rows, (0.58, 0.42, 0.9, 0.9), strict=True):
        row |= {"malignant_score": score, "label": "Benign" if row["rank"] < 3 else "Pro"}
    pq.write_table(pa.Table.from_pylist(rows, SLIDES), root / "slides.parquet")
    text = _plain(build_report(str(root), manifest))
    assert text.count("malignant classes together 0.") == 1
    assert "Benign is the most probable single class; malignant classes together 0.580" in text


def test_no_probability_is_rounded_to_a_certainty(run: tuple[Path, RunManifest]) -> None:
    root, manifest = run
    for path in sorted((root / "predictions").iterdir()):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            if row["status"] == "predicted":
                row |= {"prob_benign": 1e-9, "prob_early": 0.0, "prob_pre": 1e-5, "prob_pro": 0.99999}
                row |= {"label": "Pro", "confidence": 0.99999}
        pq.write_table(pa.Table.from_pylist(rows, PREDICTIONS), path, use_dictionary=False)
    html = build_report(str(root), manifest)
    assert '<span class="n">&gt; 0.999</span>' in html
    assert '<td class="n">&lt; 0.001</td>' in html
    assert not re.search(r'class="n">(1|0)\.000<', html)


def test_the_page_needs_nothing_from_outside(run: tuple[Path, RunManifest]) -> None:
    _store_maps(run[0], "00000")
    checker = _checked(build_report(str(run[0]), run[1]))
    assert "script" not in checker.tags
    assert checker.sources
    assert all(s.startswith(("data:image/jpeg;base64,", "data:image/png;base64,", "#")) for s in checker.sources)
    assert not any("url(" in text or "@import" in text for text in checker.texts)


def test_suspicious_fields_come_slide_by_slide_in_order_of_urgency(run: tuple[Path, RunManifest]) -> None:
    page = build_report(str(run[0]), run[1])
    section = page.partition('id="suspicious"')[2].partition("</section>")[0]
    keys = re.findall(r'<p class="key">(field-\d+)', section)
    assert keys[:5] == ["field-00019", "field-00014", "field-00017", "field-00016", "field-00015"]
    uncertain = page.partition('id="uncertain"')[2].partition("</section>")[0]
    confidences = [float(c) for c in re.findall(r'<span class="n">(\d\.\d+)</span></p>', uncertain)]
    assert len(confidences) == 12
    assert confidences == sorted(confidences)


def _store_maps(root: Path, shard: str) -> NDArray[np.float16]:
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


def _figures(page: str, section: str) -> dict[str, str]:
    """Drawing of each field of a gallery."""
    part = page.partition(f'id="{section}"')[2].partition("</section>")[0]
    return {re.findall(r'<p class="key">([^<]+)', f)[0]: f for f in part.split("<figure>")[1:]}


def test_activation_maps_lie_on_the_cells_that_weigh_most(run: tuple[Path, RunManifest]) -> None:
    root, manifest = run
    for shard in ("00000", "00001"):
        _store_maps(root, shard)
    page = build_report(str(root), manifest)
    _checked(page)
    assert page.count('type="checkbox"') == 2  # one switch for each gallery
    assert "no activation maps" not in page
    figures = _figures(page, "suspicious")
    for i, label in ((19, "Early"), (8, "Benign")):  # it is the map of the field's own label
        key = f"field-{i:05d}.jpg"
        drawing = figures[key]
        heats = re.findall(
            r'<image class="heat" x="([^"]+)" y="([^"]+)" width="44" height="44" href="([^"]+)"', drawing
        )
        masks = zarr.open_group(root / "masks.zarr" / f"{i // SHARD_SIZE:05d}", mode="r")
        cells = pq.read_table(root / "cells" / f"part-{i // SHARD_SIZE:05d}.parquet").to_pylist()
        mine = [c for c in cells if c["image_key"] == key]
        first = int(masks["cell_offsets"][mine[0]["zarr_index"]])  # type: ignore[index]
        assert len(heats) == min(3, len(mine))
        for n, (x, y, href) in enumerate(heats):  # cells weigh 1, 1/2, 1/3 ...
            _, cx, cy = masks["cell_table"][first + n]  # type: ignore[index,misc]
            assert (float(x), float(y)) == (pytest.approx(cx - 21.5, abs=0.01), pytest.approx(cy - 21.5, abs=0.01))
            raw = np.frombuffer(base64.b64decode(href.partition(",")[2]), np.uint8)
            pixels = cv2.imdecode(raw, cv2.IMREAD_UNCHANGED)
            full = round(217 / (n + 1))
            expected = [[full, 0], [0, full]] if label == "Early" else [[full, full], [round(full / 2), 0]]
            assert pixels[..., 3].tolist() == expected
            assert pixels[0, 0, 2] != pixels[1, 1, 2]  # against it, and for it


def test_fields_without_activation_maps_are_counted(run: tuple[Path, RunManifest]) -> None:
    root, manifest = run
    page = build_report(str(root), replace(manifest, notes=("activation maps are absent for 2 of 2 shards",)))
    assert "These fields have no activation maps." in _plain(page)
    assert "note activation maps are absent for 2 of 2 shards" in _plain(page)
    assert 'type="checkbox"' not in page
    assert 'class="heat"' not in page
    _store_maps(root, "00001")
    page = build_report(str(root), manifest)
    assert "9 of these 12 fields have no activation maps." in _plain(page)  # shard 00001 has three diagnosed fields
    shutil.rmtree(root / "activations.zarr")
    assert 'class="heat"' not in build_report(str(root), manifest)


def test_activation_maps_that_are_not_committed_are_not_shown(run: tuple[Path, RunManifest]) -> None:
    root, manifest = run
    _store_maps(root, "00000")
    (root / "markers/activations/00000.json").unlink()
    assert 'class="heat"' not in build_report(str(root), manifest)


def test_a_lost_source_leaves_the_masks(run: tuple[Path, RunManifest], tmp_path: Path) -> None:
    root, manifest = run
    gone = replace(manifest, source=replace(manifest.source, uri=str(tmp_path / "gone.zip")))
    file = pq.ParquetFile(root / "plan.parquet")
    table, metadata = file.read(), file.schema_arrow.metadata
    file.close()
    moved = {k: v.replace(b"smears.zip", b"moved-away.zip") for k, v in metadata.items()}
    pq.write_table(table.replace_schema_metadata(moved), root / "plan.parquet", row_group_size=SHARD_SIZE)
    page = build_report(str(root), gone)
    assert "only masks are shown" in _plain(page)
    assert "data:image" not in page
    assert page.count("nophoto") > 20


def test_unfinished_runs_are_labelled_as_such(run: tuple[Path, RunManifest]) -> None:
    root, _ = run
    shutil.rmtree(root / "cells")
    (root / "markers/predictions/00001.json").unlink()
    beat = Heartbeat(pid=2**22 + 1, host="elsewhere", at="2026-03-01T22:05:00+00:00", state="running")
    (root / "heartbeat.json").write_bytes(dumps(beat))
    (root / "failures").mkdir()
    (root / "failures/00001.json").write_text('{"message": "its worker <died>"}')
    text = _plain(build_report(str(root), None))
    assert "Not a final result: the run is killed." in text
    assert "16 of 20 members are accounted for so far" in text
    assert "To continue: leukoflow run smears.zip --out out" in text
    assert "Shard 00001 failed: its worker <died>" in text
    assert "Reconciled" not in text
    assert "cannot be read (FileNotFoundError)" in text  # the cells are gone: said, and no reason to fail
    running = replace(beat, at=now())
    (root / "heartbeat.json").write_bytes(dumps(running))
    assert "the run is running." in _plain(build_report(str(root), None))


def test_a_run_that_does_not_balance_says_so(run: tuple[Path, RunManifest]) -> None:
    text = _plain(build_report(str(run[0]), replace(run[1], predicted=16, missing=3, conflicts=2)))
    assert "The totals do not balance" in text
    assert "make 19, not 20 members" in text
    assert "3 images that the manifest lists were not in the source" in text
    assert "identical images under different patients" in text


def test_hostile_names_stay_text(run: tuple[Path, RunManifest]) -> None:
    root, manifest = run
    part = root / "predictions/part-00000.parquet"
    rows = pq.read_table(part).to_pylist()
    rows[7]["image_key"] = '"><script>alert(1)</script>\u202egpj.exe'
    rows[7]["reason"] = "<img src=x onerror=alert(1)>"
    pq.write_table(pa.Table.from_pylist(rows, PREDICTIONS), part)
    page = build_report(str(root), manifest)
    checker = _checked(page)
    assert "script" not in checker.tags
    assert "&lt;script&gt;" in page
    assert "\u202e" not in page
    assert "onerror=alert(1)>" not in page


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="holds no run"):
        build_report(str(tmp_path), None)


def test_text_is_escaped_and_bounded() -> None:
    assert _text("a<b>&\n") == "a&lt;b&gt;&amp;\\u000a"
    assert len(_text("x" * 1000, 40)) == 41


def test_an_outline_encloses_its_cell() -> None:
    mask = np.zeros((9, 9), bool)
    mask[2:6, 3:8] = True
    assert _outline(mask) == "M3.5 2.5L3.5 5.5L7.5 5.5L7.5 2.5Z"
