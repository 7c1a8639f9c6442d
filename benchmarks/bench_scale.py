"""How well red cells tell the scale, and what becomes of diagnoses where nobody states one.

    python benchmarks/bench_scale.py [--fields 520] [--bundle pocket] [--ruler-only]

Scale: of each set of pictures with a known scale, measured over known. Of the RBC fields the corners with the burned-in
bars are masked, and they are resized as well, so that nothing could be fitted to their one scale. Diagnoses: real
fields as they are, the middle 1/1.5 and 1/2 of each enlarged to its size, and four fields of one slide as one picture,
each as a run without any scale. The bundle has learned from these fields: what is compared is one way of showing them
with another, not accuracy.
"""

from __future__ import annotations

import argparse
import csv
import io
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.bench_damage import data_folder
from leukoflow.tasks.imaging.magnification import Magnification, magnify, magnify_alone, read_image
from leukoflow.tasks.imaging.ruler import measure_red_cells

Pixels = NDArray[np.uint8]
FIELD_UM = 0.42  # of all_fields, as bundles have it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fields", type=int, default=520, help="of all_fields, for the diagnoses")
    parser.add_argument("--bundle", default="pocket")
    parser.add_argument("--ruler-only", action="store_true")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    data = data_folder()
    if not (data / "all_fields.zip").is_file():
        sys.exit("the real data are not here: set LEUKOFLOW_DATA to their folder")
    print("| pictures | pooled over | images | without | measured / known | 5 to 95 % | error, median | error, 90 % |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    rbc_fields(data)
    for site in ("PBC", "Raabin"):
        one_site(data, site)
    fields(data)
    if not options.ruler_only:
        print()
        diagnoses(data, options.fields, options.bundle)


# --- the ruler -------------------------------------------------------------------------------------------------------


def read(archive: Path, names: Sequence[str]) -> list[Pixels]:
    with zipfile.ZipFile(archive) as file:
        inside = {name.rpartition("/")[2]: name for name in file.namelist()} | {name: name for name in file.namelist()}
        raw = [np.frombuffer(file.read(inside[name]), np.uint8) for name in names]
    return [np.asarray(cv2.cvtColor(cv2.imdecode(one, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB), np.uint8) for one in raw]


def rows(table: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.read_text())))


def line(name: str, pooled: str, found: Sequence[Magnification], known: Sequence[float]) -> None:
    ratio = np.array([one.um_per_px for one in found]) / np.array(known)
    error = np.abs(ratio - 1)
    low, middle, high = np.nanpercentile(ratio, [5, 50, 95])
    print(
        f"| {name} | {pooled} | {len(found):,} | {np.isnan(ratio).mean():.1%} | {middle:.3f} | "
        f"{low:.2f} to {high:.2f} | {np.nanmedian(error):.1%} | {np.nanpercentile(error, 90):.1%} |",
        flush=True,
    )


def resized(image: Pixels, factor: float) -> Pixels:
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return image if factor == 1 else np.asarray(cv2.resize(image, None, fx=factor, fy=factor, interpolation=how))


def rbc_fields(data: Path) -> None:
    known = [row for row in rows(data / "scale_fields.csv") if row["um_per_px_best"]]
    images = read(data / "scale_fields.zip", [row["image_key"] for row in known])
    for image in images:  # the bars lie at the lower right
        image[-90:, -260:] = np.median(image.reshape(-1, 3), axis=0)
    scales = [float(row["um_per_px_best"]) for row in known]
    for factor in (1.0, 0.6, 1.5):
        readings = [read_image(measure_red_cells(resized(image, factor))) for image in images]
        wanted = [scale / factor for scale in scales]
        line(f"RBC fields x {factor:g}", "nothing", [magnify_alone(one) for one in readings], wanted)
        line(f"RBC fields x {factor:g}", "the source", magnify(readings, [""] * len(readings)), wanted)


def one_site(data: Path, site: str) -> None:
    own = [row for row in rows(data / "healthy_pbc_raabin.csv") if row["site"].lower().startswith(site.lower())]
    images = read(data / "healthy_pbc_raabin.zip", [row["image_key"] for row in own])
    readings = [read_image(measure_red_cells(image)) for image in images]
    line(site, "the site", magnify(readings, [""] * len(own)), [float(row["um_per_px_estimated"]) for row in own])


def enlarged(image: Pixels, factor: float) -> Pixels:
    """The middle of a field at the size of the whole."""
    height, width = image.shape[:2]
    h, w = round(height / factor), round(width / factor)
    y, x = (height - h) // 2, (width - w) // 2
    return np.asarray(cv2.resize(image[y : y + h, x : x + w], (width, height), interpolation=cv2.INTER_CUBIC))


def fields(data: Path) -> None:
    listed = rows(data / "all_fields.csv")
    images = read(data / "all_fields.zip", [row["image_key"] for row in listed])
    slides = [row["slide_id"] for row in listed]
    readings = {
        f: [read_image(measure_red_cells(enlarged(i, f) if f != 1 else i)) for i in images] for f in (1, 1.5, 2)
    }
    for factor, own in readings.items():
        known = [FIELD_UM / factor] * len(own)
        line(f"ALL fields x {factor:g}", "slides of the source", magnify(own, slides), known)
        line(f"ALL fields x {factor:g}", "one folder", magnify(own, [""] * len(own)), known)
    for factor in (1.5, 2):
        mixed = [readings[factor if i % 3 == 0 else 1][i] for i in range(len(images))]
        known = [FIELD_UM / (factor if i % 3 == 0 else 1) for i in range(len(images))]
        line(f"ALL fields, a third x {factor:g}", "one folder", magnify(mixed, [""] * len(mixed)), known)


# --- diagnoses -------------------------------------------------------------------------------------------------------


def diagnoses(data: Path, count: int, bundle: str) -> None:
    listed = rows(data / "all_fields.csv")
    chosen = listed[:: max(1, len(listed) // count)][:count]
    keys = [row["image_key"] for row in chosen]
    images = dict(zip(keys, read(data / "all_fields.zip", keys), strict=True))
    slides: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in chosen:
        slides[row["slide_id"], row["label"]].append(row["image_key"])
    labels = {row["image_key"]: row["label"] for row in chosen}
    print("| shown | images | answered | of these right | of all fields right | abstentions |")
    print("|---|---:|---:|---:|---:|---|")
    for factor in (1.0, 1.5, 2.0):
        shown = {key: enlarged(image, factor) if factor != 1 else image for key, image in images.items()}
        report(f"x {factor:g}", shown, labels, bundle)
    mosaics, truth = {}, {}
    for (slide, label), own in slides.items():
        for i in range(0, len(own) - 3, 4):
            name = f"{slide}-{label}-{i}.png"
            four = [images[key] for key in own[i : i + 4]]
            if len({image.shape for image in four}) == 1:
                mosaics[name] = np.vstack([np.hstack(four[:2]), np.hstack(four[2:])])
                truth[name] = label
    report("four fields as one", mosaics, truth, bundle)


def report(name: str, shown: dict[str, Pixels], labels: dict[str, str], bundle: str) -> None:
    """Run the command over pictures in a zip, and print a line."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for key, image in shown.items():
                data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
                archive.writestr(key.rpartition(".")[0] + ".png", data)
        command = [sys.executable, "-m", "leukoflow", "run", str(source), "--out", f"{folder}/out", "--run-id", "r"]
        done = subprocess.run([*command, "--bundle", bundle], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
        parts = sorted(Path(folder, "out", "r", "predictions").iterdir())
        found = {row["image_key"]: row for part in parts for row in pq.read_table(part).to_pylist()}
    truth = {key.rpartition(".")[0] + ".png": label for key, label in labels.items()}
    answered = {key: row["label"] for key, row in found.items() if row["status"] == "predicted"}
    right = sum(truth[key] == label for key, label in answered.items())
    kinds = Counter(str(row["reason"]).split(":")[0] for row in found.values() if row["status"] != "predicted")
    print(
        f"| {name} | {len(found)} | {len(answered) / len(found):.1%} | {right / max(1, len(answered)):.3f} | "
        f"{right / len(found):.3f} | {', '.join(f'{kind} {n}' for kind, n in kinds.most_common()) or 'none'} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
