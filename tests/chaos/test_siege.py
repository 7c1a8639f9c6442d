"""Many runs, each hit by a fault every few seconds: nothing may be lost, doubled or moved by a bit.

`make chaos` plays 22 runs with 10 faults each, half of them on a local disk and half on S3; one world has SQLite behind
the Prefect server and one with Postgres where that is installed. Which faults come when is drawn from
LEUKOFLOW_CHAOS_SEED and logged. `make chaos-short` plays one run of each kind.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from chaos.world import World, can_run_postgres, freeze, healthy, kill
from faults import FaultyProxy, moto_server, s3_account
from harness import Command, assert_same, digests, screen_here, small_bundle, smears, table, until, white, write_zip

from leukoflow.core.codec import loads
from leukoflow.runs.progress import read_manifest
from leukoflow.runs.records import Marker
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.upkeep.verify import verify_run

SEED = int(os.environ.get("LEUKOFLOW_CHAOS_SEED", "1"))
RUNS = int(os.environ.get("LEUKOFLOW_CHAOS_RUNS", "22"))
FAULTS = int(os.environ.get("LEUKOFLOW_CHAOS_FAULTS", "10"))  # per run
FEW_FAULTS = 4  # of the single night that is played after every change
IMAGES, SHARD = 80, 16
SLOW = 0.5  # seconds an image takes while there are faults to come
RUN_SECONDS = 900.0
DISK = "320m"
WEATHER = ("error", "throttle", "slow", "cut_request", "cut_response", "lost")
pytestmark = [pytest.mark.chaos]


@dataclass
class Place:
    """Where the runs of one world go: a disk of limited size, or S3 behind a proxy."""

    out: str
    disk: Path | None = None
    proxy: FaultyProxy | None = None


@dataclass
class Night:
    """One run under fire."""

    world: World
    place: Place
    run_id: str
    source: Path
    bundle: Path
    dice: random.Random
    log: Path
    command: Command | None = None
    lines: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    codes: Counter[int] = field(default_factory=Counter)
    starts: int = 0
    launched: float = 0.0
    hit: Counter[str] = field(default_factory=Counter)

    @property
    def root(self) -> str:
        return f"{self.place.out}/{self.run_id}"

    @property
    def running(self) -> Command:
        assert self.command is not None
        return self.command

    def say(self, words: str) -> None:
        self.lines.append(f"{time.monotonic() - self.began:6.1f} s  {self.run_id}: {words}")

    def launch(self) -> None:
        words = ["run", str(self.source), "--out", self.place.out, "--run-id", self.run_id]
        words += ["--bundle", str(self.bundle), "--shard-size", str(SHARD)]
        environment = {"AWS_ENDPOINT_URL": self.place.proxy.url} if self.place.proxy else {}
        self.command = self.world.run(words, self.log, **environment)
        self.starts += 1
        self.launched = time.time() + 1.0

    def has_started(self) -> bool:
        """Whether images are processed for the command that runs now."""
        seen = self.world.delay.with_name("delay.seen")
        return seen.exists() and seen.stat().st_mtime > self.launched


# --- faults: each returns how many it hit, 0 when there was nothing to hit ------------------------------------------


def one(found: list[psutil.Process], night: Night) -> list[psutil.Process]:
    return [night.dice.choice(found)] if found else []


def flow(night: Night) -> list[psutil.Process]:
    return [psutil.Process(night.running.pid)] if night.running.process.poll() is None else []


def service(name: str) -> Callable[[Night], list[psutil.Process]]:
    def find(night: Night) -> list[psutil.Process]:
        found = night.world.services.get(name)
        return found.family()[:1] if found else []

    return find


def killed(find: Callable[[Night], list[psutil.Process]]) -> Callable[[Night], int]:
    return lambda night: kill(find(night))


def frozen(find: Callable[[Night], list[psutil.Process]]) -> Callable[[Night], int]:
    return lambda night: freeze(find(night), night.dice.uniform(1.0, 5.0))


def frozen_for_good(night: Night) -> int:
    """A worker that never comes back although its process is there: the scheduler gives it up."""
    hit = one(night.world.worker_processes(), night)
    for p in hit:
        p.suspend()
    return len(hit)


def clock_jumps(night: Night) -> int:
    """An hour forward or back, and right again after a few seconds."""
    night.world.clock.write_text(str(night.dice.choice([-3600, 3600])))
    time.sleep(night.dice.uniform(1.0, 4.0))
    night.world.clock.write_text("0")
    return 1


def disk_fills(night: Night) -> int:
    if night.place.disk is None:
        return 0
    ballast = night.place.disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 20))
        except OSError:
            pass
    time.sleep(night.dice.uniform(1.0, 4.0))
    ballast.unlink()
    return 1


def store_away(night: Night) -> int:
    if night.place.proxy is None:
        return 0
    with night.place.proxy.outage(night.dice.choice(["refuse", "503", "hang"])):
        time.sleep(night.dice.uniform(0.5, 4.0))
    return 1


def store_errs(night: Night) -> int:
    if night.place.proxy is None:
        return 0
    night.place.proxy.set(rate=0.15, kinds=WEATHER, seed=night.dice.randrange(1 << 30))
    time.sleep(night.dice.uniform(1.0, 4.0))
    night.place.proxy.set(rate=0.0)
    return 1


def part_harmed(night: Night) -> int:
    """The flow dies, and before it is started again a committed file is gone or has another byte."""
    hit = kill(flow(night))
    night.running.process.wait()
    storage = open_storage(night.root)
    stage = night.dice.choice(["masks", "features", "predictions"])
    shards = storage.names(f"markers/{stage}")
    if not hit or not shards:
        return hit
    key = f"markers/{stage}/{night.dice.choice(shards)}"
    name, size, _ = night.dice.choice(loads(Marker, storage.read(key), key).part.files)
    try:
        data = bytearray(storage.read(name))
    except FileNotFoundError:  # committed and not yet moved
        return hit
    if night.dice.random() < 0.5 or not size:
        storage.delete(name)
        night.say(f"deleted {name}")
    else:
        data[night.dice.randrange(len(data))] ^= 1
        storage.write(name, bytes(data))
        night.say(f"altered {name}")
    return hit


def worker(night: Night) -> list[psutil.Process]:
    return one(night.world.worker_processes(), night)


KINDS: dict[str, Callable[[Night], int]] = {
    "flow killed": killed(flow),
    "worker killed": killed(worker),
    "all workers killed": killed(lambda night: night.world.worker_processes()),
    "nanny killed": killed(lambda night: one(night.world.nannies(), night)),
    "scheduler killed": killed(service("scheduler")),
    "Prefect server killed": killed(service("prefect server")),
    "database killed": killed(service("postgres")),
    "flow frozen": frozen(flow),
    "worker frozen": frozen(worker),
    "worker frozen for good": frozen_for_good,
    "scheduler frozen": frozen(service("scheduler")),
    "Prefect server frozen": frozen(service("prefect server")),
    "database frozen": frozen(service("postgres")),
    "clock jumped": clock_jumps,
    "disk full": disk_fills,
    "store away": store_away,
    "store errs": store_errs,
    "part harmed": part_harmed,
}


def deck(place: Place, world: World, dice: random.Random) -> Iterator[str]:
    """Kinds that can happen here, in ever new orders, so that each has its turn."""
    absent = {"disk full"} if place.disk is None else {"store away", "store errs"}
    if "postgres" not in world.services:
        absent |= {"database killed", "database frozen"}
    here = [kind for kind in KINDS if kind not in absent]
    while True:
        dice.shuffle(here)
        yield from here


# --- a run under fire ------------------------------------------------------------------------------------------------


def play(night: Night, kinds: Iterator[str], wanted: int) -> None:
    """Strikes every few seconds until so many faults have hit, and starts again what is gone, until the run ends."""
    world, dice = night.world, night.dice
    world.delay.write_text(str(SLOW if wanted else 0))
    night.launch()
    end = time.monotonic() + RUN_SECONDS
    strike, early = time.monotonic() + dice.uniform(1.0, 4.0), dice.random() < 0.2
    mended = 0.0
    while True:
        assert time.monotonic() < end, "\n".join([*night.lines, "it does not end:", night.running.text()[-3000:]])
        if time.monotonic() > mended:
            world.supervise()
            mended = time.monotonic() + 0.7
        code = night.running.process.poll()
        if code is not None:
            night.codes[code] += 1
            if code != -9:
                night.say(f"ended with {code}: {' '.join(night.running.text()[-300:].split())}")
            if code in (0, 3):
                break
            until(lambda: (world.supervise(), healthy(world.api))[1], 120, "the Prefect server is back")
            night.launch()
            strike, early = time.monotonic() + dice.uniform(1.0, 4.0), dice.random() < 0.2
        if night.hit.total() >= wanted:
            world.delay.write_text("0")
        elif time.monotonic() > strike and (early or night.has_started()):
            kind = next(kinds)
            night.say(kind)
            if KINDS[kind](night):
                night.hit[kind] += 1
            strike, early = time.monotonic() + dice.uniform(0.5, 3.5), False
        time.sleep(0.1)


def check(night: Night, whole: Path, images: list[str], scratch: Path) -> Counter[str]:
    """Same rows and bytes as the undisturbed run in this process, nothing left behind; what was counted."""
    storage = open_storage(night.root)
    verification = verify_run(night.root)
    assert verification.ok, verification.findings
    # the last task of a flow that was killed may still be at work
    until(lambda: not storage.exists("_attempts"), 60, f"{storage.uri('_attempts')} is gone")
    root = Path(night.root)
    if not storage.is_local:
        root = scratch / night.run_id
        storage.fs.get(storage.root, str(root), recursive=True)
    rows = table(root, "predictions")["image_key"].to_pylist()
    lost, doubled = (Counter(images) - Counter(rows)).total(), (Counter(rows) - Counter(images)).total()
    assert (lost, doubled) == (0, 0)
    assert rows == images
    assert_same(whole, root)
    manifest = read_manifest(storage)
    assert manifest is not None
    assert manifest.members == len(images)
    if not any("activation maps are absent" in note for note in manifest.notes):
        assert digests(root / "activations.zarr") == digests(whole / "activations.zarr")
    return Counter(rows=len(rows), lost=lost, doubled=doubled, files=verification.files)


@contextmanager
def place(kind: str, folder: Path) -> Iterator[Place]:
    if kind == "s3":
        with moto_server() as url, pytest.MonkeyPatch.context() as patch, FaultyProxy(url) as proxy:
            for name, value in s3_account(url).items():
                patch.setenv(name, value)
            open_storage("s3://nights").fs.mkdir("nights")
            yield Place("s3://nights", proxy=proxy)
        return
    disk = folder / "disk"
    disk.mkdir()
    if os.geteuid() or os.system(f"mount -t tmpfs -o size={DISK} tmpfs '{disk}' 2>/dev/null"):
        yield Place(str(disk))  # without a disk that can be filled
        return
    try:
        yield Place(str(disk), disk=disk)
    finally:
        os.system(f"umount -l '{disk}'")


def siege(kind: str, runs: int, faults: int, folder: Path, seed: int, show: Callable[[str], None]) -> Counter[str]:
    """So many runs under fire in one world; the faults that hit."""
    dice, total, began = random.Random(f"{seed} {kind}"), Counter[str](), time.monotonic()
    bundle = small_bundle(folder / "bundle")
    fields = smears(folder / "sample", IMAGES - 1, seed=21) | {"slide-b/blank.png": white()}
    source = write_zip(folder / "night.zip", fields)
    torch.set_num_threads(1)
    quiet = screen_here(source, folder / "quiet", "whole", bundle, shard_size=SHARD)
    codes, counted = Counter[int](), Counter[str]()
    with ExitStack() as stack:
        here = stack.enter_context(place(kind, folder))
        postgres = kind == "s3" and can_run_postgres() is None
        environment = {"AWS_ENDPOINT_URL": here.proxy.url} if here.proxy else {}
        world = stack.enter_context(World(folder, postgres=postgres, environment=environment))
        kinds = deck(here, world, dice)
        for number in range(runs):
            night = Night(world, here, f"night-{number}", source, bundle.path, dice, folder / f"night-{number}.log")
            try:
                play(night, kinds, faults)
                world.switch_off_frozen()
                counted += check(night, Path(quiet.root), list(fields), folder)
                assert night.running.survivors(20) == []
            except BaseException:
                show("\n".join(night.lines))
                raise
            finally:
                night.running.end()
            total += night.hit
            codes += night.codes
            seconds = time.monotonic() - night.began
            show(f"{night.run_id} on {kind}: {night.hit.total()} faults, all as undisturbed, {seconds:.0f} s")
            open_storage(here.out).delete(night.run_id)
        restarts = sum(s.starts - 1 for s in world.services.values())
    left = world.strays()
    assert left == [], left
    counts = ", ".join(f"{name} {count}" for name, count in sorted(total.items()))
    weather = f", {sum(here.proxy.made().values())} requests met a fault" if here.proxy else ""
    show(
        f"chaos on {kind}: {runs} runs, {total.total()} faults ({counts}{weather}), {restarts} services started again, "
        f"exit codes {dict(sorted(codes.items()))}, {counted['rows']} rows, "
        f"{counted['lost']} lost, {counted['doubled']} doubled, {counted['files']} files with the right bytes, "
        f"{time.monotonic() - began:.0f} s"
    )
    return total


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    def say(words: str) -> None:
        with capsys.disabled():
            print(f"\n{words}", flush=True)

    return say


@pytest.mark.timeout(RUN_SECONDS * RUNS)
@pytest.mark.parametrize("kind", ["disk", "s3"])
def test_nights_full_of_faults(kind: str, tmp_path: Path, show: Any) -> None:
    runs = -(-RUNS // 2)
    hit = siege(kind, runs, FAULTS, tmp_path, SEED, show)
    assert hit.total() >= runs * FAULTS * 0.9  # a run may be through before its last fault


@pytest.mark.chaos_short
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["disk", "s3"])
def test_one_night_with_some_faults(kind: str, tmp_path: Path, show: Any) -> None:
    assert siege(kind, 1, FEW_FAULTS, tmp_path, SEED + 1, show).total() >= FEW_FAULTS // 2
