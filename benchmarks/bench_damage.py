"""What becomes of damaged pictures: caught, flagged, answered alike, or answered with another label.

    python benchmarks/bench_damage.py [--pictures 76] [--seed 1] [--bundle pocket] [--whole all|few]

Each picture (drawn ones, and real fields in turn where the data are there) is stored in each format and damaged in each
way, seeded: 76 pictures make 2,432 damaged files. All are decoded as a run does; only those that decode to other pixels
than the whole picture's are diagnosed. At the end, whole pictures: each format, and every real picture as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import struct
import sys
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from leukoflow.core.config import LimitSettings
from leukoflow.runs.records import CLASSES
from leukoflow.tasks.decoding.ingest import Decoded, Decoder
from leukoflow.tasks.imaging.synthetic import render_field
from leukoflow.tasks.inference.single import Models, examine, load_models

FORMATS = ("JPEG", "PNG", "TIFF", "BMP")
OUTCOMES = ("caught", "flagged", "same pixels", "same label", "no answer", "ANOTHER LABEL", "not diagnosed")
MISSING = ("cut", "cut, end mark", "zeros 512", "zeros 4096")
REAL = (
    "all_fields", "bccd_fields", "healthy_other_source", "healthy_pbc_raabin", "other_centre_allidb2", "scale_fields",
    "wbc_masks",
)  # fmt: skip
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")


def data_folder() -> Path:
    beside = Path(__file__).resolve().parents[1]
    places = [Path(p) for p in [os.environ.get("LEUKOFLOW_DATA", "")] if p]
    places += [beside / "shared" / "data", beside.parent / "shared" / "data"]
    return next((p for p in places if (p / "all_fields.zip").is_file()), Path("nowhere"))


def real_pictures(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every picture of blood there is; masks are none."""
    for name in REAL:
        if not (folder / f"{name}.zip").is_file():
            continue
        with zipfile.ZipFile(folder / f"{name}.zip") as archive:
            for key in archive.namelist():
                if key.lower().endswith(SUFFIXES) and not (name == "wbc_masks" and key.endswith(".png")):
                    yield name, archive.read(key)


def stored(picture: Image.Image, form: str, number: int) -> bytes:
    """The picture in that format, in one of the usual ways to write it."""
    ways: dict[str, list[dict[str, object]]] = {
        "JPEG": [{"quality": 92}, {"quality": 88, "optimize": True}, {"quality": 90, "progressive": True},
                 {"quality": 95, "subsampling": 0}],
        "PNG": [{}],
        "TIFF": [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}, {}],
        "BMP": [{}],
    }  # fmt: skip
    sink = io.BytesIO()
    options = ways[form][number % len(ways[form])]
    picture.save(sink, form, **options)  # type: ignore[arg-type]
    return sink.getvalue()


# --- damage: what disks, networks and copying do -------------------------------------------------------------------


def header_bytes(form: str) -> int:
    """So many bytes at the start are spared: who damages them makes a file that nobody opens."""
    return {"JPEG": 640, "PNG": 41, "TIFF": 256, "BMP": 54}[form]


def cut(data: bytes, other: bytes, form: str, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(header_bytes(form) + 64, len(data) - 16))]


def cut_with_end(data: bytes, other: bytes, form: str, rng: np.random.Generator) -> bytes:
    """With the format's end mark put on; formats without one keep their length, as a copy that was interrupted does."""
    short = cut(data, other, form, rng)
    if form == "JPEG":
        return short + b"\xff\xd9"
    if form == "PNG":
        return short + struct.pack(">L", 0) + b"IEND" + struct.pack(">L", zlib.crc32(b"IEND"))
    return short + bytes(len(data) - len(short))


def sectors(data: bytes, form: str, size: int, rng: np.random.Generator, count: int) -> list[int]:
    choice = np.arange(-(-header_bytes(form) // size), max(len(data) // size, -(-header_bytes(form) // size) + count))
    return [int(v) * size for v in rng.choice(choice, count, replace=False)]


def zeros(size: int) -> Callable[[bytes, bytes, str, np.random.Generator], bytes]:
    def damage(data: bytes, other: bytes, form: str, rng: np.random.Generator) -> bytes:
        (at,) = sectors(data, form, size, rng, 1)
        return data[:at] + bytes(len(data[at : at + size])) + data[at + size :]

    return damage


def flips(data: bytes, other: bytes, form: str, rng: np.random.Generator) -> bytes:
    """1 to 16 bits."""
    out = bytearray(data)
    for at in rng.integers(header_bytes(form), len(out) - 2, 2 ** int(rng.integers(0, 5))):
        out[at] ^= 1 << int(rng.integers(8))
    return bytes(out)


def joined(data: bytes, other: bytes, form: str, rng: np.random.Generator) -> bytes:
    """The head of one file and the tail of another, from a sector's border on."""
    (at,) = sectors(data[: min(len(data), len(other))], form, 512, rng, 1)
    return data[:at] + other[at:]


def appended(data: bytes, other: bytes, form: str, rng: np.random.Generator) -> bytes:
    """Another file behind the whole one."""
    return data + other


def swapped(data: bytes, other: bytes, form: str, rng: np.random.Generator) -> bytes:
    size = 4096 if rng.random() < 0.5 and len(data) > 5 * 4096 else 512
    a, b = sorted(sectors(data[: len(data) // size * size], form, size, rng, 2))
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


KINDS: dict[str, Callable[[bytes, bytes, str, np.random.Generator], bytes]] = {
    "cut": cut, "cut, end mark": cut_with_end, "zeros 512": zeros(512), "zeros 4096": zeros(4096), "bit flips": flips,
    "joined": joined, "swapped": swapped, "appended": appended,
}  # fmt: skip


# --- what becomes of it ----------------------------------------------------------------------------------------------


class Judge:
    """Decodes and diagnoses files; each set of pixels is diagnosed once."""

    def __init__(self, bundle: str) -> None:
        import torch

        torch.set_num_threads(1)  # on a busy machine, threads that wait for each other cost more than they gain
        self.models: Models = load_models(bundle)
        self.limits = LimitSettings()
        self.decoder = Decoder(self.limits, self.models.bundle.spec.method.segment)
        self.known: dict[str, tuple[str, str | None]] = {}

    def decode(self, data: bytes) -> Decoded:
        return self.decoder.decode_one(data)

    def verdict(self, data: bytes) -> tuple[str, str | None]:
        """Status and label."""
        rgb = self.decode(data).rgb
        assert rgb is not None
        key = hashlib.sha256(rgb.tobytes() + str(rgb.shape).encode()).hexdigest()
        if key not in self.known:
            found = examine(data, None, self.models, self.limits, self.decoder, lambda stage: None)
            self.known[key] = (str(found.status.value), found.label)
        return self.known[key]

    def seen(self, before: Decoded, damaged: bytes) -> tuple[str, bool]:
        """What decoding alone says: "caught", "same pixels" or "other pixels", and whether a remark was made."""
        image = self.decode(damaged)
        if image.rgb is None:
            return "caught", False
        assert before.rgb is not None, before.reason
        alike = image.rgb.shape == before.rgb.shape and bool((image.rgb == before.rgb).all())
        return "same pixels" if alike else "other pixels", set(image.remarks) != set(before.remarks)

    def compared(self, whole: bytes, damaged: bytes) -> str:
        """What the networks say of a file with other pixels."""
        status, label = self.verdict(damaged)
        if status != "predicted":
            return "no answer"
        return "same label" if self.verdict(whole) == (status, label) else "ANOTHER LABEL"


def pictures(count: int, rng: np.random.Generator, folder: Path) -> list[tuple[str, Image.Image]]:
    real = []
    if (folder / "all_fields.zip").is_file():
        with zipfile.ZipFile(folder / "all_fields.zip") as archive:
            keys = [k for k in archive.namelist() if k.lower().endswith(SUFFIXES)]
            for i in rng.choice(len(keys), count // 2, replace=False):
                real.append(("real", Image.open(io.BytesIO(archive.read(keys[i]))).convert("RGB")))
    drawn = [
        ("drawn", Image.fromarray(render_field(rng, CLASSES[i % len(CLASSES)]).rgb)) for i in range(count - len(real))
    ]
    return drawn + real


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=76)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bundle", default="pocket")
    parser.add_argument("--whole", choices=("all", "few"), default="all", help="real pictures for false alarms")
    parser.add_argument("--decode-only", action="store_true", help="a minute; what is not caught is not diagnosed")
    options = parser.parse_args()
    began, folder = time.perf_counter(), data_folder()
    rng = np.random.default_rng(options.seed)
    chosen = pictures(options.pictures, rng, folder)
    judge = Judge(options.bundle)
    table: dict[tuple[str, str], Counter[str]] = {(f, k): Counter() for f in FORMATS for k in KINDS}
    alarms: Counter[str] = Counter()
    doubtful: list[tuple[str, str, str, bytes, bytes]] = []
    for form in FORMATS:
        files = [stored(picture, form, i // 2) for i, (_, picture) in enumerate(chosen)]
        for i, whole in enumerate(files):
            image = judge.decode(whole)
            alarms[f"{form} as stored here"] += 1
            alarms[f"{form} as stored here, caught"] += image.rgb is None
            alarms[f"{form} as stored here, flagged"] += bool(image.remarks)
            for kind, damage in KINDS.items():
                other = files[int(rng.integers(len(files)))]
                broken = damage(whole, other, form, rng)
                if broken == whole:  # the file was there twice, or only zeros lay there
                    table[form, kind]["unchanged"] += 1
                    continue
                result, remarked = judge.seen(image, broken)
                table[form, kind]["flagged"] += remarked
                if result == "other pixels":
                    doubtful.append((form, kind, chosen[i][0], whole, broken))
                else:
                    table[form, kind][result] += 1
    print(f"{len(doubtful):,} files with other pixels are not caught ({time.perf_counter() - began:.0f} s)", flush=True)
    for form, kind, origin, whole, broken in doubtful:
        result = "not diagnosed" if options.decode_only else judge.compared(whole, broken)
        table[form, kind][result] += 1
        table[form, kind][origin] += result == "ANOTHER LABEL"
    show(table)
    if folder.is_dir():
        few = Counter()
        for name, data in real_pictures(folder):
            few[name] += 1
            if options.whole == "few" and few[name] > 100:
                continue
            image = judge.decode(data)
            alarms[name] += 1
            alarms[f"{name}, caught"] += image.rgb is None
            alarms[f"{name}, flagged"] += bool(image.remarks)
    print("\nwhole pictures: false alarms")
    for name in [n for n in alarms if "," not in n]:
        print(f"  {name:24} {alarms[name]:6,}  caught {alarms[name + ', caught']}, "
              f"flagged {alarms[name + ', flagged']}")  # fmt: skip
    print(f"\n{time.perf_counter() - began:.0f} s; {len(judge.known):,} pictures diagnosed")
    judge.decoder.close()
    return 0


def show(table: dict[tuple[str, str], Counter[str]]) -> None:
    columns = " ".join(f"{o:>13}" for o in OUTCOMES)
    print(f"{'format':6} {'damage':14} {'files':>6} {columns}")
    total: Counter[str] = Counter()
    for (form, kind), counts in table.items():
        files = sum(counts[o] for o in OUTCOMES if o != "flagged")
        print(f"{form:6} {kind:14} {files:6} " + " ".join(f"{counts[o]:13}" for o in OUTCOMES))
        total += counts
        if kind in MISSING:
            total["missing"] += files
            total["missing caught"] += counts["caught"]
    files = sum(total[o] for o in OUTCOMES if o != "flagged")
    print(f"{'all':6} {'':14} {files:6} " + " ".join(f"{total[o]:13}" for o in OUTCOMES))
    print(
          f"\ncaught {total['caught'] / files:.1%} of {files:,}; of those with data missing "
          f"{total['missing caught'] / max(total['missing'], 1):.1%} of {total['missing']:,}"
          + ("" if total["not diagnosed"] else f"; answered with another label {total['ANOTHER LABEL'] / files:.2%} "
             f"(real {total['real']}, drawn {total['drawn']})")
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
