"""Planning an archive of a million members: seconds and peak memory.

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

import pytest

from leukoflow.sources.identify import identify
from leukoflow.tasks.intake.plan import plan
from leukoflow.tasks.intake.plan_file import read_summary

MEMBERS = 1_000_000
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
    started = time.perf_counter()
    summary = plan(
        identify(archive), out, shard_size=256, manifest=manifest, patient_key=b"a key for nothing but a benchmark"
    )
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.perf_counter()
    assert read_summary(out) == summary
    again = time.perf_counter() - started
    print(
        f"{summary.members:,} members, {'with' if manifest else 'no'} manifest: {seconds:.1f} s, "
        f"peak RSS {peak:.0f} MiB, {summary.shards:,} shards, "
        f"plan {out.stat().st_size / 1e6:.1f} MB, summary read back in {again * 1000:.0f} ms"
    )
    assert seconds < 120
    assert peak < 954  # 1 GB


@pytest.mark.parametrize("with_manifest", [False, True], ids=["no manifest", "manifest"])
def test_a_million_members_are_planned(tmp_path: Path, with_manifest: bool) -> None:
    archive, manifest = tmp_path / "million.zip", tmp_path / "manifest.csv"
    write_archive(archive, MEMBERS)
    if with_manifest:
        write_manifest(manifest, MEMBERS)
    words = [sys.executable, "-m", "benchmarks.bench_plan", str(archive), str(manifest), str(tmp_path / "plan.parquet")]
    subprocess.run(words, check=True, cwd=Path(__file__).parent.parent)
    archive.unlink()


if __name__ == "__main__":  # in a process of its own, so that the peak is of planning alone
    named = Path(sys.argv[2])
    measure(Path(sys.argv[1]), named if named.exists() else None, Path(sys.argv[3]))
