"""How a run grows with its workers, how well it hides a slow object store, and whether a GPU is kept fed.

    python benchmarks/bench_scaling.py workers [--members 384]   two workers against one, as plain processes do it
    python benchmarks/bench_scaling.py storage [--members 1024 --shard-size 128]   four workers, S3 with and without
                                                                 latency per request
    python benchmarks/bench_scaling.py pipeline [--members 256]  one worker that offers a GPU, one that prepares for it

The source is LEUKOFLOW_DATA/all_fields.zip, its first members; drawn smears where it is absent. Everything that is
compared runs within one call, the reference before and after, so that a drift of the machine shows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench_orchestration import plain, whole

SIZE = 32


def archive(folder: Path, members: int) -> Path:
    """A zip of so many fields, real ones where they are."""
    here = Path(os.environ.get("LEUKOFLOW_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (here / "all_fields.zip").is_file():
        from leukoflow.tasks.imaging.synthetic import write_sample

        print("the fields are drawn ones")
        return write_sample(folder / "sample", members, seed=5).directory / "smears.zip"
    target = folder / "fields.zip"
    with zipfile.ZipFile(here / "all_fields.zip") as source, zipfile.ZipFile(target, "w") as cut:
        names = [n for n in source.namelist() if not n.endswith("/")]
        for name in names[:: max(1, len(names) // members)][:members]:
            cut.writestr(zipfile.ZipInfo(name), source.read(name))
    return target


# --- two workers against one -----------------------------------------------------------------------------------------


def workers(source: Path, members: int, bundle: str) -> None:
    """Prints what a second worker brings, and what a second plain process brings."""
    one, two = (plain(str(source), bundle, members, SIZE, n) for n in (1, 2))
    run_one, run_two = (whole(str(source), bundle, SIZE, n) for n in (1, 2))
    again = plain(str(source), bundle, members, SIZE, 2)
    expected, found = one / ((two + again) / 2), run_one / run_two
    print(f"plain processes: {one:.1f} s alone, {two:.1f} and {again:.1f} s in two: {expected:.2f} times as fast")
    print(f"runs: {run_one:.1f} s with one worker, {run_two:.1f} s with two: {found:.2f} times as fast")
    print(f"ratio of the scalings: {found / expected:.3f}; run to plain in two: {2 * run_two / (two + again):.3f}")


# --- a slow object store ---------------------------------------------------------------------------------------------


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
    """Passes bytes on, each piece `delay` seconds later; pieces on the way do not wait for each other."""
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def pass_on() -> None:
        while True:
            due, piece = await queue.get()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if not piece:
                break
            writer.write(piece)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.close()

    sender = asyncio.create_task(pass_on())
    with contextlib.suppress(OSError):
        while piece := await reader.read(1 << 16):
            queue.put_nowait((time.monotonic() + delay, piece))
    queue.put_nowait((time.monotonic() + delay, b""))
    with contextlib.suppress(OSError):
        await sender


def proxy(port: int, milliseconds: float, ready: Any) -> None:
    """A process between client and store: what is asked arrives later, answers come at once."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(_relay(reader, back, milliseconds / 1000), _relay(there, writer, 0.0))

    async def serve() -> None:
        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        ready.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


@contextlib.contextmanager
def store(milliseconds: float) -> Iterator[tuple[str, str]]:
    """Addresses of an S3 interface, directly and through the proxy."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    between = context.Process(target=proxy, args=(port, milliseconds, ready), daemon=True)
    between.start()
    yield f"http://127.0.0.1:{port}", f"http://127.0.0.1:{ready.get()}"
    between.terminate()
    server.stop()


def storage(source: Path, bundle: str, size: int, count: int, milliseconds: float, again: bool) -> None:
    """Prints how much longer a run takes when each request to the store takes longer."""
    import boto3

    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= keys
    with store(milliseconds) as (near, far):
        client = boto3.client("s3", endpoint_url=near)
        client.create_bucket(Bucket="lab")
        client.put_object(Bucket="lab", Key="in/fields.zip", Body=source.read_bytes())

        def run(name: str, address: str) -> float:
            command = [
                sys.executable,
                "-m",
                "leukoflow",
                "run",
                "s3://lab/in/fields.zip",
                "--out",
                "s3://lab/out",
            ]
            command += ["--run-id", name, "--bundle", bundle, "--workers", str(count), "--shard-size", str(size)]
            words = os.environ | {"AWS_ENDPOINT_URL": address}
            done = subprocess.run(command, env=words, check=False, capture_output=True, text=True)
            os.environ["AWS_ENDPOINT_URL"] = near
            from leukoflow.runs.progress import read_manifest
            from leukoflow.storage.opening import open_storage

            manifest = read_manifest(open_storage(f"s3://lab/out/{name}"))
            if manifest is None:
                raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
            stages = ", ".join(f"{t.stage} {t.seconds:.1f} s" for t in manifest.timings)
            print(f"{name}: processing {manifest.processing_seconds:.1f} s (all workers: {stages})")
            return manifest.processing_seconds

        quick = [run("near", near)]
        slow = run("far", far)
        if again:
            quick.append(run("near-again", near))
        ratio = slow / (sum(quick) / len(quick))
        print(f"{count} workers, shards of {size}, {milliseconds:.0f} ms a request: {ratio:.3f} of the time without")


# --- a GPU that is kept fed ------------------------------------------------------------------------------------------


def _on_cpu(stage: str, job: Any, *rest: Any) -> Any:
    """A stage with CPU torch, on a worker that offers a GPU; leaves behind when and where it ran."""
    from distributed import get_worker

    from leukoflow.tasks.inference import stages

    began = time.time()
    found = getattr(stages, stage)(replace(job, device="cpu"), *rest)
    words = f"{stage} {get_worker().name} {began} {time.time()}\n"
    with (Path(job.root) / f"times-{os.getpid()}.txt").open("a") as file:
        file.write(words)
    return found


def prepare(*words: Any) -> Any:
    return _on_cpu("prepare", *words)


def segment(*words: Any) -> Any:
    return _on_cpu("segment", *words)


def extract(*words: Any) -> Any:
    return _on_cpu("extract", *words)


def classify(*words: Any) -> Any:
    return _on_cpu("classify", *words)


def pipeline(source: Path, bundle: str, folder: Path) -> None:
    """Prints how much of the time the worker with the GPU computes, from its first stage to its last."""
    import leukoflow.cluster.workers
    from leukoflow.cluster.cluster import open_cluster
    from leukoflow.cluster.code import code_digest
    from leukoflow.core.config import ClusterSettings, load_config
    from leukoflow.flows import shard_task
    from leukoflow.tasks.inference.worker import load_models
    from leukoflow.tasks.intake.open_run import open_run
    from leukoflow.tasks.intake.plan_file import shards
    from leukoflow.tasks.store.job import ShardJob

    leukoflow.cluster.workers.visible_gpus = lambda: ["0"]  # type: ignore[assignment]
    for stage in (prepare, segment, extract, classify):
        setattr(shard_task, stage.__name__, stage)
    config = load_config(source=str(source), out=str(folder / "out"), bundle=bundle, shard_size=SIZE, device="cpu")
    run = open_run(config)
    with open_cluster(ClusterSettings(workers=1), gpu=True) as cluster:
        cluster.prepare_workers(partial(load_models, bundle, run.bundle.digest, "cpu"))

        def one(shard: Any) -> None:
            job = ShardJob(
                run.root, run.run_id, run.source, shard, "a", bundle, run.bundle.digest, "cuda", code_digest(),
                config.limits, (),
            )  # fmt: skip
            shard_task.run_chain(cluster, job, ())

        with ThreadPoolExecutor(cluster.in_flight) as pool:
            list(pool.map(one, shards(run.summary)))
    rows = [line.split() for file in Path(run.root).glob("times-*.txt") for line in file.read_text().splitlines()]
    placed = {(stage, "GPU" if "gpu" in name else "CPU") for stage, name, _, _ in rows}
    busy = [(float(began), float(ended)) for _, name, began, ended in rows if "gpu" in name]
    span = max(e for _, e in busy) - min(b for b, _ in busy)
    print("placed: " + ", ".join(f"{stage} on {kind}" for stage, kind in sorted(placed)))
    print(f"GPU worker: {sum(e - b for b, e in busy):.1f} of {span:.1f} s in stages, "
          f"idle {100 * (1 - sum(e - b for b, e in busy) / span):.1f} %")  # fmt: skip


def main() -> None:
    """Runs one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["workers", "storage", "pipeline"])
    parser.add_argument("--members", type=int, default=256)
    parser.add_argument("--bundle", default="pocket")
    parser.add_argument("--workers", type=int, default=4, help="of the runs on the object store")
    parser.add_argument("--shard-size", type=int, default=SIZE, help="of the runs on the object store")
    parser.add_argument("--milliseconds", type=float, default=50.0, help="added to each request")
    parser.add_argument("--once", action="store_true", help="leave out the second run without latency")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = archive(Path(scratch), options.members)
        if options.what == "workers":
            workers(source, options.members, options.bundle)
        elif options.what == "storage":
            storage(source, options.bundle, options.shard_size, options.workers, options.milliseconds, not options.once)
        else:
            pipeline(source, options.bundle, Path(scratch))


if __name__ == "__main__":
    main()
