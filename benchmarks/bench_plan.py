"""Planning an archive of a million members: seconds and peak memory.

    python -m benchmarks.bench_plan [MEMBERS]

The archive is written with the zip format's own records, since a library would take longer to write it than planning
takes to read it; every tenth name is repeated, and the manifest names every member.
"""

from __future__ import annotations

import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

from leukoflow.sources import identify
from tasks.plan import plan, read_summary

DATA = b"\xff\xd8\xff" + b"0123456789" * 10


def write_archive(path: Path, members: int) -> None:
    """A zip64 archive of tiny stored members."""
    crc, size = zlib.crc32(DATA), len(DATA)
    with path.open("wb") as file, tempfile.TemporaryFile() as directory:
        for i in range(members):
            name = b"site-%02d/slide-%05d/field-%08d.jpg" % (i % 7, i // 300, i - (i % 10 == 9))
            offset = file.tell()
            file.write(struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 33, crc, size, size, len(name), 0))
            file.write(name + DATA)
            directory.write(
                struct.pack("<4s6H3L5H2L", b"PK\1\2", 788, 20, 0, 0, 0, 33, crc, size, size, len(name), 0, 0, 0, 0, 0,
                            offset)
            )  # fmt: skip
            directory.write(name)
        start, length = file.tell(), directory.tell()
        directory.seek(0)
        while chunk := directory.read(1 << 20):
            file.write(chunk)
        end = file.tell()
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, members, members, length, start))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, length, start, 0))


def write_manifest(path: Path, members: int) -> None:
    """Slide and site of every distinct member."""
    with path.open("w") as file:
        file.write("image_key,slide_id,patient_id,site\n")
        for i in range(members):
            if i % 10 != 9:
                name = f"site-{i % 7:02d}/slide-{i // 300:05d}/field-{i:08d}.jpg"
                file.write(f"{name},S{i // 300:05d},P{i // 900:05d},site-{i % 7:02d}\n")


def measure(archive: Path, manifest: Path | None, out: Path) -> None:
    """Plan once in this process and print what it took; memory includes the interpreter and its libraries."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    summary = plan(identify(archive), out, shard_size=256, manifest=manifest, patient_key=b"benchmark")
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    assert read_summary(out) == summary
    again = time.perf_counter() - started
    print(
        f"{summary.members:,} members, {'with' if manifest else 'no'} manifest: {seconds:.1f} s, peak RSS "
        f"{peak / 1024:.0f} MiB ({before / 1024:.0f} MiB before), {summary.shards:,} shards, "
        f"plan {out.stat().st_size / 1e6:.1f} MB, summary read back in {again * 1000:.0f} ms"
    )


def main() -> None:
    """Each measurement in a process of its own, so that peaks do not mix."""
    if len(sys.argv) > 2:
        archive, manifest, out = (Path(word) for word in sys.argv[1:4])
        measure(archive, manifest if manifest.name != "-" else None, out)
        return
    members = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        archive, manifest = Path(folder) / "million.zip", Path(folder) / "manifest.csv"
        write_archive(archive, members)
        write_manifest(manifest, members)
        for chosen in ("-", str(manifest)):
            words = [sys.executable, "-m", "benchmarks.bench_plan", str(archive), chosen, f"{folder}/plan.parquet"]
            subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
