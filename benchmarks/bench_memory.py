"""Peak memory of every process of a run, and cost per image, as the archive grows.

    python benchmarks/bench_memory.py [--sizes 500 1000 5000] [--large 50] [--bundle pocket]

Archives hold rendered fields, repeated under new names. The tree of the run's processes is sampled every 0.2 s; the
figure is the largest resident set of any single process. `--large N` adds an archive of N fields of 8,000 px.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
import psutil


def small_archive(path: Path, images: int) -> None:
    """`images` fields of 224 px; 64 different ones, each time under a new name."""
    from leukoflow.tasks.imaging.synthetic import render_field

    rng = np.random.default_rng(5)
    labels = ("Benign", "Early", "Pre", "Pro")
    kinds = [
        cv2.imencode(".jpg", cv2.cvtColor(render_field(rng, labels[i % 4], 224).rgb, cv2.COLOR_RGB2BGR))[1].tobytes()
        for i in range(64)
    ]
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(images):
            archive.writestr(f"fields/{i:06d}.jpg", kinds[i % len(kinds)])


def large_archive(path: Path, images: int, side: int = 8000) -> None:
    """`images` fields of `side` px: rendered fields, enlarged and laid out as a mosaic."""
    from leukoflow.tasks.imaging.synthetic import render_field

    rng = np.random.default_rng(6)
    piece = cv2.resize(render_field(rng, "Pre", 224).rgb, (1000, 1000), interpolation=cv2.INTER_CUBIC)
    whole = np.tile(piece, (side // 1000, side // 1000, 1))
    data = cv2.imencode(".jpg", cv2.cvtColor(whole, cv2.COLOR_RGB2BGR))[1].tobytes()
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(images):
            archive.writestr(f"fields/{i:06d}.jpg", data)


def measure(source: Path, bundle: str, out: str) -> tuple[dict[str, float], float, float]:
    """Peak resident megabytes by kind of process, processing seconds and start-up seconds of one run."""
    from leukoflow.runs.progress import list_runs, read_manifest
    from leukoflow.storage.opening import open_storage

    command = [
        sys.executable,
        "-m",
        "leukoflow",
        "run",
        str(source),
        "--out",
        out,
        "--bundle",
        bundle,
        "--workers",
        "2",
    ]
    log = Path(f"{out}.log")
    with log.open("wb") as sink:
        process = psutil.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
    peaks: dict[str, float] = {}
    while process.poll() is None:
        try:
            tree = [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        for one in tree:
            try:
                kind = role(one.cmdline())
                peaks[kind] = max(peaks.get(kind, 0.0), one.memory_info().rss / 1e6)
            except psutil.Error:
                continue
        time.sleep(0.2)
    (run,) = [r for r in list_runs(out) if r.startswith(source.stem)]
    manifest = read_manifest(open_storage(out).child(run))
    if manifest is None:
        raise SystemExit(f"the run over {source} did not finish: {log.read_text()[-2000:]}")
    return peaks, manifest.processing_seconds, manifest.startup_seconds


def role(command: list[str]) -> str:
    """What a process of the tree is."""
    line = " ".join(command)
    for sign, name in (("decode_child", "decoder"), ("prefect", "prefect server"), ("multiprocessing", "dask worker")):
        if sign in line:
            return name
    return "flow" if "-m leukoflow run" in line else "other"


def main() -> None:
    """One line per archive, then the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[500, 1000, 5000])
    parser.add_argument("--large", type=int, default=50)
    parser.add_argument("--bundle", default="pocket")
    options = parser.parse_args()
    found: dict[int, tuple[dict[str, float], float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for size in options.sizes:
            archive = Path(scratch) / f"small{size}.zip"
            small_archive(archive, size)
            peaks, seconds, startup = measure(archive, options.bundle, f"{scratch}/out")
            found[size] = (peaks, seconds / size)
            shown = ", ".join(f"{kind} {mb:.0f} MB" for kind, mb in sorted(peaks.items()))
            print(
                f"{size} fields of 224 px: {1000 * seconds / size:.1f} ms each, start-up {startup:.0f} s; {shown}",
                flush=True,
            )
        if options.large:
            archive = Path(scratch) / "large.zip"
            large_archive(archive, options.large)
            peaks, seconds, _ = measure(archive, options.bundle, f"{scratch}/out")
            shown = ", ".join(f"{kind} {mb:.0f} MB" for kind, mb in sorted(peaks.items()))
            print(f"{options.large} fields of 8,000 px: {seconds / options.large:.2f} s each; {shown}", flush=True)
    if len(found) > 1:
        least, most = min(found), max(found)
        for kind in sorted(found[most][0]):
            print(f"memory {most}/{least}, {kind}: {found[most][0][kind] / found[least][0].get(kind, np.inf):.3f}")
        second = sorted(found)[-2]
        print(f"cost per image {most}/{second}: {found[most][1] / found[second][1]:.3f}")


if __name__ == "__main__":
    main()
