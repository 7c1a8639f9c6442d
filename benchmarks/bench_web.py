"""Does the web application answer as the nightly run does, how soon, for how many, and what does it survive?

    python benchmarks/bench_web.py parity    [--fields 200] [--run OUT/RUN_ID]   engine against a run's tables
    python benchmarks/bench_web.py latency   [--images 100]     one after the other: engine alone, then upload to result
    python benchmarks/bench_web.py users     [--users 20] [--seconds 60]         all at once over HTTP
    python benchmarks/bench_web.py mutations [--cases 5000]     altered images and archives over HTTP, good ones between

The fields are those of LEUKOFLOW_DATA/all_fields.zip, drawn smears where it is absent. The server is a process of its
own on the loopback interface, with one worker; clients and server share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from altered_files import mutated, originals
from bench_scaling import archive

ROOT = Path(__file__).resolve().parent.parent
PROBABILITIES = ("prob_benign", "prob_early", "prob_pre", "prob_pro")
PASSWORD = "a smear under the lamp at night"


def machine() -> str:
    """What else the machine does: a number from a busy machine says little."""
    return f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}"


def contents(source: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(source) as file:
        return {name: file.read(name) for name in file.namelist() if not name.endswith("/")}


def shares(seconds: list[float]) -> str:
    """Median, 95 % and the worst of it."""
    ordered = sorted(seconds)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return (
        f"median {statistics.median(ordered):.3f} s, p95 {p95:.3f} s, longest {ordered[-1]:.3f} s (n = {len(ordered)})"
    )


# --- the same answers ------------------------------------------------------------------------------------------------


def nightly(source: Path, out: Path, bundle: str) -> Path:
    """A real run over the source, by the command line."""
    command = [
        sys.executable,
        "-c",
        "from leukoflow.apps.cli.main import main; main()",
        "run",
        str(source),
        "--out",
        str(out),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*command, "--run-id", "parity", "--bundle", bundle, "--workers", "1", "--shard-size", "64"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode not in (0, 3):
        raise SystemExit(f"the run failed: {done.stdout[-2000:]} {done.stderr[-2000:]}")
    return out / "parity"


def parity(folder: Path, fields: int, bundle: str, run: Path | None, threads: int) -> int:
    """Prints how far the engine's answers are from a run's; 1 unless labels are equal and probabilities within 1e-5."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from leukoflow.apps.web.engine.engine import Engine
    from leukoflow.core.config import LimitSettings

    if run is None:
        source = archive(folder, fields)
        run = nightly(source, folder / "out", bundle)
    else:
        source = Path(json.loads((run / "run.json").read_text())["source_uri"])
    read = {
        name: pa.concat_tables([pq.read_table(file) for file in sorted((run / name).glob("*.parquet"))])
        for name in ("predictions", "cells")
    }
    rows = read["predictions"].to_pylist()
    rows = rows[:: max(1, len(rows) // fields)][:fields]
    cells = read["cells"]
    first_of: dict[str, list[int]] = {}
    for place, key in enumerate(cells["image_key"].to_pylist()):
        first_of.setdefault(key, []).append(place)
    wrong: list[str] = []
    apart: dict[str, list[float]] = {"probability": [], "distance from training": [], "attention": []}

    async def story() -> None:
        async with Engine([bundle], LimitSettings(), threads=threads) as engine:
            with zipfile.ZipFile(source) as file:
                for row in rows:
                    found = await engine.examine(file.read(row["image_key"]), who="bench", um_per_px=row["um_per_px"])
                    mine = (
                        str(found.status), found.reason, found.label, list(found.prediction_set),
                        None if found.cells is None else len(found.cells),
                    )  # fmt: skip
                    theirs = (
                        row["status"], row["reason"], row["label"], list(row["prediction_set"] or []), row["n_cells"]
                    )  # fmt: skip
                    if mine != theirs:
                        wrong.append(f"{row['image_key']}: {mine} against {theirs}")
                        continue
                    if found.cells is None or row["label"] is None:
                        continue
                    expected = np.array([row[name] for name in PROBABILITIES])
                    apart["probability"].append(float(np.abs(expected - found.probabilities).max()))
                    apart["distance from training"].append(abs(row["ood_score"] - (found.ood or 0.0)))
                    own = cells.take(first_of.get(row["image_key"], []))
                    if not all(
                        found.cells[c].equals(own[c]) for c in ("cell_id", "bbox_xmin_px", "cell_area_px", "nc_ratio")
                    ):
                        wrong.append(f"{row['image_key']}: its cells differ")
                    if len(own):
                        difference = found.cells["attention"].to_numpy() - own["attention"].to_numpy()
                        apart["attention"].append(float(np.abs(difference).max()))

    asyncio.run(story())
    print(f"parity of {len(rows)} fields with {run.name}, {threads} threads ({machine()})")
    print(f"  status, reason, label, set or cells differ: {len(wrong)}")
    for line in wrong[:10]:
        print(f"    {line}")
    for what, values in apart.items():
        if values:
            print(f"  {what}: largest difference {max(values):.2e}, median {statistics.median(values):.2e}")
    bad = bool(wrong) or max(apart["probability"], default=0.0) > 1e-5
    print("  " + ("NOT the same" if bad else "the same: no label differs, no probability by more than 1e-5"))
    return int(bad)


# --- a server --------------------------------------------------------------------------------------------------------


def serve(folder: Path, bundle: str, users: int) -> None:
    """The server's process: says where it listens and which tokens open it, and at the end what became of it."""
    import uvicorn
    from argon2 import PasswordHasher

    from leukoflow.apps.web.app import create_app
    from leukoflow.apps.web.engine.engine import Engine
    from leukoflow.apps.web.settings import Rates, WebSettings
    from leukoflow.core.config import LimitSettings

    logging.basicConfig(level=logging.WARNING)
    signal.signal(signal.SIGTERM, lambda number, at: None)  # uvicorn raises it once more when it has ended
    often = (1_000_000, 1e-6)
    limits = LimitSettings(max_megapixels=50, decode_seconds=20, decode_memory_mb=1024)
    settings = WebSettings(
        out=str(folder / "out"), users_file=folder / "state" / "users.json", bundles=(bundle,), limits=limits,
        rates=Rates(logins_by_address=often, logins_by_name=often, uploads=often),
    )  # fmt: skip
    (folder / "out").mkdir(exist_ok=True)

    async def story() -> None:
        engine = Engine([bundle], limits, seconds=20)
        await engine.start()
        app = create_app(settings, engine)  # type: ignore[arg-type]
        accounts = app.state.gate.accounts
        accounts._hasher = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
        tokens = []
        for i in range(users):
            accounts.add(f"user{i}", "viewer", PASSWORD)
            tokens.append(accounts.add_token(f"user{i}", "bench", ("read", "diagnose"), 1.0)[1])
        await engine.ready()
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, ws="none"))
        with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
            ready = {"url": f"http://127.0.0.1:{listening.getsockname()[1]}", "tokens": tokens}
            (folder / "ready.part").write_text(json.dumps(ready))
            os.replace(folder / "ready.part", folder / "ready.json")
            await server.serve(sockets=[listening])
        load = engine.load()
        (folder / "load.json").write_text(json.dumps({"restarts": load.restarts, "answered": load.answered}))
        await engine.close()

    asyncio.run(story())


@contextmanager
def server(folder: Path, bundle: str, users: int) -> Iterator[tuple[str, list[str], subprocess.Popen[bytes]]]:
    """Address and tokens of a server that is ready, and its process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, __file__, "serve", "--folder", str(folder), "--bundle", bundle, "--users", str(users)],
        env=environment,
    )  # fmt: skip
    try:
        while not (folder / "ready.json").is_file():
            if process.poll() is not None:
                raise SystemExit("the server does not start")
            time.sleep(0.1)
        ready = json.loads((folder / "ready.json").read_text())
        yield ready["url"], ready["tokens"], process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ended(folder: Path) -> str:
    """What the engine says of itself at the end."""
    try:
        load = json.loads((folder / "load.json").read_text())
    except OSError:
        return "the server did not end by itself"
    return f"{load['answered']:,} images answered, workers replaced: {load['restarts']}"


def memory(process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Resident MiB of the server, and of all that it has started (memory that they share counts once)."""
    import psutil

    own = psutil.Process(process.pid)
    children = 0.0
    for child in own.children(recursive=True):
        try:
            children += child.memory_full_info().pss
        except psutil.Error:
            continue
    return own.memory_info().rss / 2**20, children / 2**20


def spent() -> float:
    """CPU seconds that this process and all that it has started have used: what a busy machine does not change much."""
    import psutil

    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
            total += times.user + times.system
        except psutil.Error:
            continue
    return total


async def upload(client: Any, token: str, data: bytes, name: str = "field.jpg") -> Any:
    """One image or archive, with its whole result."""
    return await client.post(
        "/api/v1/diagnoses", files={"file": (name, data, "application/octet-stream")},
        headers={"Authorization": f"Bearer {token}"},
    )  # fmt: skip


# --- how soon --------------------------------------------------------------------------------------------------------


def latency(folder: Path, images: int, bundle: str, threads: int) -> None:
    """Prints how long one field takes, one after the other, once all is warm."""
    import httpx

    from leukoflow.apps.web.engine.engine import Engine
    from leukoflow.core.config import LimitSettings

    fields = list(contents(archive(folder, images)).values())[:images]

    async def alone() -> None:
        took: list[float] = []
        stages: dict[str, list[float]] = {}
        async with Engine([bundle], LimitSettings(), threads=threads) as engine:
            await engine.ready()
            for data in fields[:3]:
                await engine.examine(data, who="bench")
            before = spent()
            for data in fields:
                began = time.perf_counter()
                found = await engine.examine(data, who="bench")
                took.append(time.perf_counter() - began)
                for stage, seconds in found.seconds:
                    stages.setdefault(stage, []).append(seconds)
            cpu = (spent() - before) / len(fields)
        print(f"engine alone, {threads} threads: {shares(took)}, {cpu:.3f} s of CPU an image ({machine()})")
        print("  medians: " + ", ".join(f"{s} {1000 * statistics.median(v):.0f} ms" for s, v in stages.items()))

    async def over_http() -> None:
        took: list[float] = []
        with server(folder, bundle, 1) as (url, (token,), _):
            async with httpx.AsyncClient(base_url=url, timeout=120) as client:
                for data in fields[:3]:
                    await upload(client, token, data)
                before = spent()
                for data in fields:
                    began = time.perf_counter()
                    answer = await upload(client, token, data)
                    took.append(time.perf_counter() - began)
                    assert answer.status_code == 200, answer.text
                    assert answer.json()["items"][0]["status"], answer.text
                cpu = (spent() - before) / len(fields)
        print(f"upload to full result over HTTP: {shares(took)}, {cpu:.3f} s of CPU an image ({machine()})")

    asyncio.run(alone())
    asyncio.run(over_http())


# --- many at once ----------------------------------------------------------------------------------------------------


def users(folder: Path, people: int, seconds: float, bundle: str) -> int:
    """Prints what people get who all upload at the same time, one field after the other each."""
    import httpx

    fields = list(contents(archive(folder, 100)).values())
    took: list[float] = []
    each: Counter[int] = Counter()
    errors: Counter[str] = Counter()
    held: list[tuple[float, float, float]] = []

    async def person(client: Any, number: int, token: str, until: float) -> None:
        chooser = random.Random(number)
        while time.perf_counter() < until:
            began = time.perf_counter()
            try:
                answer = await upload(client, token, chooser.choice(fields))
                item = answer.json()["items"][0] if answer.status_code == 200 else {}
                if item.get("status") not in ("predicted", "abstained", "rejected"):
                    errors[f"HTTP {answer.status_code} {item.get('error') or item.get('reason')}"] += 1
                    continue
            except httpx.HTTPError as error:
                errors[type(error).__name__] += 1
                continue
            took.append(time.perf_counter() - began)
            each[number] += 1

    async def watch(process: subprocess.Popen[bytes], until: float) -> None:
        began = time.perf_counter()
        while time.perf_counter() < until:
            held.append((time.perf_counter() - began, *memory(process)))
            await asyncio.sleep(10)

    async def story() -> None:
        with server(folder, bundle, people) as (url, tokens, process):
            limits = httpx.Limits(max_connections=people)
            async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
                until = time.perf_counter() + seconds
                await asyncio.gather(
                    watch(process, until), *(person(client, i, t, until) for i, t in enumerate(tokens))
                )
                held.append((seconds, *memory(process)))

    asyncio.run(story())
    share = sorted(each[i] for i in range(people))
    print(f"{people} users for {seconds:.0f} s: {len(took)} answers, {sum(errors.values())} errors ({machine()})")
    for words, count in errors.most_common(5):
        print(f"  {count} times {words}")
    print(f"  {shares(took)}")
    print(f"  answers per user: least {share[0]}, median {share[people // 2]}, most {share[-1]}")
    print("  server, its processes (MiB): " + ", ".join(f"{t:.0f} s {a:.0f}, {b:.0f}" for t, a, b in held))
    print(f"  {ended(folder)}")
    return int(bool(errors))


# --- what it survives ------------------------------------------------------------------------------------------------


def mutations(folder: Path, cases: int, bundle: str, seed: int) -> int:
    """Prints what a server does with altered files, and whether it still answers good ones as before."""
    import httpx

    fields = list(contents(archive(folder, 4)).values())
    seeds = originals(fields)
    dice = random.Random(seed)
    outcomes: Counter[str] = Counter()
    hangs, crashes, changed = 0, 0, 0
    slowest = 0.0

    async def story() -> None:
        nonlocal hangs, crashes, changed, slowest
        with server(folder, bundle, 5) as (url, tokens, process):
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:

                async def good() -> Any:
                    item = (await upload(client, tokens[4], fields[1])).json()["items"][0]
                    return item["status"], item["label"], item["probabilities"]

                before = await good()

                async def mallory(token: str, count: int) -> None:
                    nonlocal hangs, crashes, changed, slowest
                    for i in range(count):
                        data = mutated(dice.choice(seeds), dice)
                        began = time.perf_counter()
                        try:
                            answer = await upload(client, token, data, "x.bin")
                        except httpx.TimeoutException:
                            hangs += 1
                            (folder / f"hang-{hangs}.bin").write_bytes(data)
                            continue
                        except httpx.HTTPError as error:
                            crashes += 1
                            outcomes[type(error).__name__] += 1
                            continue
                        slowest = max(slowest, time.perf_counter() - began)
                        if answer.status_code >= 500:
                            crashes += 1
                        words = str(answer.status_code)
                        if answer.status_code == 200:
                            items = answer.json()["items"]
                            words += " " + (items[0]["status"] or "refused" if items else "nothing in it")
                        outcomes[words] += 1
                        if i % 100 == 99 and await good() != before:
                            changed += 1

                await asyncio.gather(*(mallory(token, cases // 4) for token in tokens[:4]))
                changed += await good() != before
                if process.poll() is not None:
                    crashes += 1

    began = time.perf_counter()
    asyncio.run(story())
    took = time.perf_counter() - began
    print(
        f"{cases} altered files in {took:.0f} s ({machine()}): "
        + ", ".join(f"{k} {n}" for k, n in outcomes.most_common())
    )
    print(f"  crashes and errors 5xx {crashes}, hangs (60 s) {hangs}, slowest answer {slowest:.2f} s")
    print(f"  a good image between them was answered otherwise {changed} times")
    print(f"  {ended(folder)}")
    return int(bool(crashes or hangs or changed))


def quick(folder: Path) -> str:
    """Tiny random networks: mutations are about files, not about weights."""
    sys.path.insert(0, str(ROOT / "tests"))
    from harness import small_bundle

    return str(small_bundle(folder / "tiny").path)


def main() -> None:
    """Runs one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["parity", "latency", "users", "mutations", "serve"])
    parser.add_argument("--bundle", default="", help="default: pocket; tiny random networks for mutations")
    parser.add_argument("--fields", type=int, default=200)
    parser.add_argument("--run", type=Path, help="folder of a finished run to compare with, instead of a new one")
    parser.add_argument("--threads", type=int, default=1, help="of the worker's networks")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "serve":
        serve(options.folder, options.bundle, options.users)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder, bundle, code = Path(scratch), options.bundle or "pocket", 0
        if options.what == "parity":
            code = parity(folder, options.fields, bundle, options.run, options.threads)
        elif options.what == "latency":
            latency(folder, options.images, bundle, options.threads)
        elif options.what == "users":
            code = users(folder, options.users, options.seconds, bundle)
        else:
            code = mutations(folder, options.cases, options.bundle or quick(folder), options.seed)
    sys.exit(code)


if __name__ == "__main__":
    main()
