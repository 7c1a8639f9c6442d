"""A million planned members through planning, dispatch, publishing, report and verification; images cost nothing.

    python benchmarks/bench_million.py FOLDER [--members 1000000] [--seconds 280]

Decoding, networks and diagnosis are replaced (`benchmarks/hooks`), so nothing here says how fast images are; everything
around them is real: Prefect with its own server, Dask with two worker processes, shards of 512 members, parts, markers,
manifest. FOLDER keeps the run: after `--seconds` it is stopped with SIGTERM, and the same command goes on with it.
Printed at the end: the peak resident set of each kind of process, and what Prefect and Dask add to a shard's stages,
as the median over the first and over the last tenth of the shards.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
SHARD = 512


def kind(process: psutil.Process, flow: int) -> str:
    """What a process of the run is."""
    if process.pid == flow:
        return "flow with Dask scheduler"
    words = " ".join(process.cmdline())
    if "prefect" in words:
        return "Prefect server"
    return "Dask worker" if "multiprocessing.spawn" in words else "other"


def sample(flow: psutil.Process, peaks: dict[str, int]) -> dict[str, float]:
    """Raises the peaks; CPU seconds so far by kind."""
    cpu: dict[str, float] = {}
    try:
        family = [flow, *flow.children(recursive=True)]
    except psutil.Error:
        return cpu
    for p in family:
        try:
            name, times = kind(p, flow.pid), p.cpu_times()
            peaks[name] = max(peaks.get(name, 0), p.memory_info().rss)
            cpu[name] = cpu.get(name, 0.0) + times.user + times.system
        except psutil.Error:
            continue
    return cpu


def run(folder: Path, end: float) -> int:
    """One session of the run, stopped when the monotonic clock says `end`; its exit code."""
    peaks_file = folder / "peaks.json"
    peaks: dict[str, int] = json.loads(peaks_file.read_text()) if peaks_file.exists() else {}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")} | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks" / "hooks"), str(ROOT)]),
        "BENCH_TIMES": str(folder / "times.csv"),
        "LEUKOFLOW_PATIENT_KEY": "a key for nothing but a benchmark",
        "LEUKOFLOW_PREFECT_HOME": str(folder / "prefect"),
        "NO_COLOR": "1",
    }
    words = [
        sys.executable,
        "-m",
        "leukoflow",
        "run",
        str(folder / "million.zip"),
        "--out",
        str(folder / "out"),
    ]
    words += ["--run-id", "million", "--manifest", str(folder / "manifest.csv"), "--bundle", str(folder / "bundle")]
    words += ["--shard-size", str(SHARD), "--workers", "2"]
    started = time.monotonic()
    cpu: list[tuple[int, dict[str, float]]] = []
    with (folder / "log").open("ab") as sink:
        flow = psutil.Popen(words, env=environment, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT)
    stopped = False
    while flow.poll() is None:
        found = sample(flow, peaks)
        times = folder / "times.csv"
        cpu.append((times.read_bytes().count(b"\n") if times.exists() else 0, found))
        peaks_file.write_text(json.dumps(peaks))
        if not stopped and time.monotonic() > end:
            flow.send_signal(signal.SIGTERM)
            stopped = True
        time.sleep(0.5)
    print(f"session of {time.monotonic() - started:.0f} s ended with {flow.returncode}")
    _cpu_per_shard(cpu)
    return int(flow.returncode)


def _cpu_per_shard(samples: list[tuple[int, dict[str, float]]]) -> None:
    """CPU per shard by kind in this session's first and last fifth of the shards: other work here does not blur it."""
    going = [(done, cpu) for done, cpu in samples if "Dask worker" in cpu and samples[0][0] < done]
    if len(going) < 20:
        return
    fifth = max(1, len(going) // 5)
    for name in ("flow with Dask scheduler", "Prefect server", "Dask worker"):
        figures = []
        for part in (going[:fifth], going[-2 * fifth : -fifth]):  # the end of the last session publishes
            shards = part[-1][0] - part[0][0]
            figures.append((part[-1][1].get(name, 0) - part[0][1].get(name, 0)) / shards if shards else float("nan"))
        print(
            f"  CPU of {name}: {figures[0] * 1000:.0f} ms a shard at its beginning, {figures[1] * 1000:.0f} at its end"
        )


def overheads(times: Path) -> None:
    """Medians of the first and of the last tenth of the shards."""
    rows = sorted(
        {
            int(r[0]): [float(x) for x in r[1:]] for r in (line.split(",") for line in times.read_text().splitlines())
        }.values()
    )
    tenth = max(1, len(rows) // 10)
    for name, value in (
        ("Prefect", lambda r: r[1] - r[2]),
        ("Dask, markers and plan", lambda r: r[2] - r[3]),
        ("stages", lambda r: r[3]),
    ):
        first, last = (statistics.median(map(value, part)) for part in (rows[:tenth], rows[-tenth:]))
        print(
            f"{name}: median of the first tenth {first * 1000:.1f} ms a shard, of the last {last * 1000:.1f} ms, "
            f"ratio {last / first:.2f}"
        )


def verify(folder: Path) -> None:
    """`leukoflow verify`, with its own peak."""
    words = [sys.executable, "-m", "leukoflow", "verify", str(folder / "out"), "million"]
    peaks: dict[str, int] = {}
    started = time.monotonic()
    flow = psutil.Popen(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    while flow.poll() is None:
        sample(flow, peaks)
        time.sleep(0.2)
    print(
        f"verify: exit code {flow.returncode}, {time.monotonic() - started:.0f} s, peak "
        f"{max(peaks.values(), default=0) >> 20} MiB"
    )


def main() -> None:
    """Makes what is missing, runs a session, and prints the figures once the run is finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--members", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=280.0)
    options = parser.parse_args()
    folder: Path = options.folder
    end = time.monotonic() + options.seconds
    folder.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(ROOT))
    from benchmarks.bench_plan import write_archive, write_manifest
    from leukoflow.models.bundle import random_bundle

    if not (folder / "bundle").exists():
        write_archive(folder / "million.zip", options.members)
        write_manifest(folder / "manifest.csv", options.members)
        random_bundle(folder / "bundle", 0, tiny=True)
    if run(folder, end) == 130:
        print("not finished; the same command goes on")
        return
    from leukoflow.runs.progress import read_manifest
    from leukoflow.storage.opening import open_storage

    manifest = read_manifest(open_storage(str(folder / "out" / "million")))
    if manifest is None:
        raise SystemExit(f"the run failed; see {folder / 'log'}")
    print(
        f"{manifest.members:,} members in {len(manifest.parts) // 4:,} shards, {manifest.predicted:,} predicted, "
        f"{len(manifest.parts):,} parts, manifest of {(folder / 'out/million/manifest.json').stat().st_size >> 20} MiB"
    )
    for name, size in sorted(json.loads((folder / "peaks.json").read_text()).items()):
        print(f"peak resident set, {name}: {size >> 20} MiB")
    overheads(folder / "times.csv")
    verify(folder)


if __name__ == "__main__":
    main()
