"""What orchestration costs: a whole run on two workers against the same stage functions in two plain processes.

    python benchmarks/bench_orchestration.py SOURCE [--bundle NAME] [--images N]

Both sides decode, normalise, segment, extract and classify the same members with the same models on two processes of
one compute thread each. The plain side has no Prefect, no Dask and writes nothing. Start-up is excluded on both sides.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARD = 128


def plain_worker(
    source: str, bundle_name: str, size: int, first: int, count: int, ready: object, go: object, out: object
) -> None:
    """The stage functions over some members, in this process alone."""
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    from leukoflow.cluster.code import code_digest
    from leukoflow.core.config import LimitSettings
    from leukoflow.models.bundle import load_bundle
    from leukoflow.runs.records import Shard
    from leukoflow.sources.identify import identify
    from leukoflow.tasks.inference.chain import diagnose_block, load_networks
    from leukoflow.tasks.inference.stages import prepare
    from leukoflow.tasks.inference.worker import open_plan
    from leukoflow.tasks.intake.plan import plan
    from leukoflow.tasks.store.job import ShardJob

    with tempfile.TemporaryDirectory() as root:
        found = identify(source)
        plan(found, Path(root) / "plan.parquet", shard_size=size)
        bundle = load_bundle(bundle_name)
        networks, jobs = load_networks(bundle), []
        for ordinal in range(first, first + count):
            piece = Shard(ordinal, ordinal * size, open_plan(root).metadata.row_group(ordinal).num_rows)
            jobs.append(
                ShardJob(
                    root=root, run_id="plain", source=found, shard=piece, attempt="plain", bundle=bundle_name,
                    bundle_digest=bundle.digest, device="cpu", code=code_digest(), limits=LimitSettings(),
                    meta_columns=(),
                )
            )  # fmt: skip
        ready.put(os.getpid())  # type: ignore[attr-defined]
        go.wait()  # type: ignore[attr-defined]
        started, served = time.perf_counter(), 0
        for job in jobs:
            served += len(diagnose_block(prepare(job, job.shard.first), networks).images)
        out.put((served, time.perf_counter() - started))  # type: ignore[attr-defined]


def plain(source: str, bundle: str, members: int, size: int = SHARD, processes: int = 2) -> float:
    """Seconds of plain processes that share the shards evenly, start-up excluded."""
    shards = -(-members // size)
    ends = [shards * i // processes for i in range(processes + 1)]
    context = multiprocessing.get_context("spawn")
    ready, out, go = context.Queue(), context.Queue(), context.Event()
    spans = [(first, end - first) for first, end in itertools.pairwise(ends)]
    workers = [
        context.Process(target=plain_worker, args=(source, bundle, size, *span, ready, go, out)) for span in spans
    ]
    for worker in workers:
        worker.start()
    for _ in workers:
        ready.get()
    started = time.perf_counter()
    go.set()
    served = [out.get() for _ in workers]
    elapsed = time.perf_counter() - started
    for worker in workers:
        worker.join()
    print(
        f"plain: {sum(n for n, _ in served)} images, {elapsed:.1f} s, each process {[round(s, 1) for _, s in served]}"
    )
    return elapsed


def whole(source: str, bundle: str, size: int = SHARD, workers: int = 2) -> float:
    """Seconds that the run itself reports for its processing."""
    from leukoflow.runs.progress import list_runs, read_manifest
    from leukoflow.storage.opening import open_storage

    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "leukoflow", "run", source, "--out", out, "--bundle", bundle]
        command += ["--shard-size", str(size), "--workers", str(workers)]
        started = time.perf_counter()
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        elapsed = time.perf_counter() - started
        (run,) = list_runs(out)
        manifest = read_manifest(open_storage(out).child(run))
        if manifest is None:
            raise SystemExit("the run did not finish")
        print(
            f"whole run: {manifest.members} images, start to exit {elapsed:.1f} s, start-up "
            f"{manifest.startup_seconds:.1f} s, processing {manifest.processing_seconds:.1f} s"
        )
        for timing in manifest.timings:
            print(f"  {timing.stage}: {timing.seconds:.1f} worker seconds")
        print(f"  stages, each of {workers} workers: {sum(t.seconds for t in manifest.timings) / workers:.1f} s")
        return manifest.processing_seconds


def main() -> None:
    """Prints both times and their ratio, plain first and last, so that a drift of the machine shows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("--bundle", default="pocket")
    options = parser.parse_args()
    from leukoflow.sources.identify import identify
    from leukoflow.tasks.intake.plan import plan

    with tempfile.TemporaryDirectory() as scratch:
        members = plan(identify(options.source), Path(scratch) / "p", shard_size=SHARD).members
    before = plain(options.source, options.bundle, members)
    run = whole(options.source, options.bundle)
    after = plain(options.source, options.bundle, members)
    print(f"ratio: {run / ((before + after) / 2):.3f} (plain {before:.1f} and {after:.1f} s, whole run {run:.1f} s)")


if __name__ == "__main__":
    main()
