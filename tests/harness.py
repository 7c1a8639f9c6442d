"""What the tests of whole runs share: a tiny bundle, archives of made-up smears, runs, and how results are compared."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from PIL import Image
from torch import nn

from leukoflow.cluster.code import code_digest
from leukoflow.core.config import RunConfig, load_config
from leukoflow.models.bundle import Bundle, load_bundle, random_bundle, save_bundle, write_spec
from leukoflow.runs.records import Shard
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.imaging.synthetic import write_sample
from leukoflow.tasks.inference.measure import measure, settle_scales
from leukoflow.tasks.inference.stages import classify, extract, prepare, segment
from leukoflow.tasks.inference.worker import members_of
from leukoflow.tasks.intake.binding import Run
from leukoflow.tasks.intake.open_run import open_run
from leukoflow.tasks.intake.plan_file import shards
from leukoflow.tasks.publish.publish import publish
from leukoflow.tasks.store.commit import adopt_stages, stage_keys
from leukoflow.tasks.store.job import ShardJob

ROOT = Path(__file__).resolve().parent.parent
RUN_COLUMNS = ("run_id", "source_uri")
"""Columns that name the run; everything else must not depend on how often or where it was started."""


# --- bundles ---------------------------------------------------------------------------------------------------------


def small_bundle(path: Path, seed: int = 0) -> Bundle:
    """Random tiny networks behind the classical segmentation, so that there are real cells to count."""
    whole = random_bundle(path.with_name(path.name + "-unet"), seed, tiny=True)
    return save_bundle(path, whole.spec.model_copy(update={"unet": None}), _networks(whole), whole.statistics)


def with_other_thresholds(bundle: Bundle, path: Path, temperature: float) -> Bundle:
    """The same weights with another calibration: another digest, other confidences, made in no time."""
    shutil.copytree(bundle.path, path)
    calibration = bundle.spec.calibration.model_copy(update={"temperature": temperature})
    write_spec(path, bundle.spec.model_copy(update={"calibration": calibration}))
    return load_bundle(path)


def with_other_classifier(bundle: Bundle, path: Path, seed: int) -> Bundle:
    """The same backbones and statistics with another classifier."""
    other = small_bundle(path.with_name(path.name + "-donor"), seed)
    networks = _networks(bundle) | {"classifier": other.classifier()}
    return save_bundle(path, bundle.spec, networks, bundle.statistics)


def _networks(bundle: Bundle) -> dict[str, nn.Module]:
    return {"classifier": bundle.classifier(), **dict(bundle.hybrid().backbones.items())}


# --- archives --------------------------------------------------------------------------------------------------------


def smears(folder: Path, images: int, seed: int = 0, side: int = 224) -> dict[str, bytes]:
    """Name and bytes of made-up fields, in order."""
    made = write_sample(folder, images, seed, side)
    return {f"slide-a/{p.name}": p.read_bytes() for p in sorted((made.directory / "fields").iterdir())}


def white(side: int = 224) -> bytes:
    """A field without a cell, which quality rejects."""
    sink = io.BytesIO()
    Image.new("RGB", (side, side), "white").save(sink, "PNG")
    return sink.getvalue()


def dotted(data: bytes, color: tuple[int, int, int]) -> bytes:
    """The image with one corner pixel of a colour that a test listens for."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.putpixel((0, 0), color)
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    return path


def write_tar(path: Path, members: dict[str, bytes], compression: str = "") -> Path:
    with tarfile.open(path, f"w:{compression}") as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def write_folder(path: Path, members: dict[str, bytes]) -> Path:
    for name, data in members.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


# --- runs without a cluster ------------------------------------------------------------------------------------------


def screen_here(source: Path | str, out: Path | str, run_id: str | None, bundle: Bundle | str, **settings: Any) -> Run:
    """A finished run, made by the functions that Dask runs, in this process and without Prefect."""
    chosen = {"shard_size": 16} | settings
    named = bundle if isinstance(bundle, str) else str(bundle.path)
    return finish_here(load_config(source=str(source), out=str(out), run_id=run_id, bundle=named, **chosen))


def finish_here(config: RunConfig) -> Run:
    """The same from a whole configuration; what `reuse` offers is taken over."""
    run = open_run(config)
    jobs = jobs_of(run)
    measure_here(run)
    for shard, job in jobs.items():
        done: dict[str, Any] = {}
        if config.reuse is not None:
            keys = stage_keys(run.bundle, members_of(job), run.device)
            done = adopt_stages(job, open_storage(config.out).child(config.reuse), keys, {})
        features = None if "features" in done else extract(job, segment(job, prepare(job, shard.first)))
        classify(job, features, tuple(done))
    publish(run, 1.0, 2.0, run.summary.members)
    open_storage(run.root).delete("_attempts")
    return run


def jobs_of(run: Run) -> dict[Shard, ShardJob]:
    """The shards of a run with the one attempt at each."""
    return {
        shard: ShardJob(
            run.root, run.run_id, run.source, shard, "one", run.bundle_uri, run.bundle.digest, run.device,
            code_digest(), run.config.limits, run.config.meta_columns,
        )
        for shard in shards(run.summary)
    }  # fmt: skip


def measure_here(run: Run) -> None:
    """Settle the scales of a run, where nothing has yet."""
    storage = open_storage(run.root)
    if not storage.exists("scales.parquet"):
        for job in jobs_of(run).values():
            measure(job)
        settle_scales(storage, run.summary)


# --- what a run has left ---------------------------------------------------------------------------------------------


def table(root: Path, name: str, drop: tuple[str, ...] = RUN_COLUMNS) -> pa.Table:
    """`predictions`, `cells` or `fields` in plan order, or `slides`, without the columns that name the run."""
    files = [root / f"{name}.parquet"] if name == "slides" else sorted((root / name).iterdir())
    whole = pa.concat_tables([pq.read_table(file) for file in files])
    return whole.drop_columns([c for c in drop if c in whole.column_names])


def tables(root: Path, drop: tuple[str, ...] = RUN_COLUMNS) -> dict[str, list[dict[str, Any]]]:
    """All tables as rows."""
    return {name: table(root, name, drop).to_pylist() for name in ("predictions", "cells", "slides")}


def arrays(root: Path, store: str, name: str) -> list[np.ndarray[Any, Any]]:
    """An array of every shard, read with zarr alone."""
    group = zarr.open_group(str(root / store), mode="r")
    return [np.asarray(group[f"{shard}/{name}"][:]) for shard in sorted(group.group_keys())]  # type: ignore[index]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def zarr_bytes(root: Path) -> dict[str, str]:
    return digests(root / "masks.zarr") | {f"features/{k}": v for k, v in digests(root / "features.zarr").items()}


def assert_same(one: Path, other: Path, drop: tuple[str, ...] = RUN_COLUMNS) -> None:
    """Same rows to the last bit, and the same bytes in Zarr."""
    mine, theirs = tables(one, drop), tables(other, drop)
    for name in mine:
        assert len(mine[name]) == len(theirs[name]), name
        different = [(a, b) for a, b in zip(mine[name], theirs[name], strict=True) if a != b]
        assert not different, (name, different[0])
    assert zarr_bytes(one) == zarr_bytes(other)


# --- processes -------------------------------------------------------------------------------------------------------


@dataclass
class Command:
    """A `leukoflow` command in a process group of its own, as a terminal would start it."""

    process: subprocess.Popen[bytes]
    log: Path
    seen: dict[int, psutil.Process] = field(default_factory=dict)
    worker_pids: set[int] = field(default_factory=set)

    @property
    def pid(self) -> int:
        return self.process.pid

    def family(self) -> list[psutil.Process]:
        """Living descendants now; all that were ever seen are remembered for `survivors`."""
        try:
            found = psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        self.seen |= {p.pid: p for p in found}
        return found

    def find(self, word: str) -> list[psutil.Process]:
        """Descendants whose command line holds `word`."""
        found = []
        for p in self.family():
            try:
                if word in " ".join(p.cmdline()):
                    found.append(p)
            except psutil.Error:
                continue
        return found

    def workers(self) -> list[psutil.Process]:
        """Dask's worker processes: spawned by multiprocessing, below the flow."""
        found = [p for p in self.find("multiprocessing.spawn") if p.ppid() == self.pid]
        self.worker_pids |= {p.pid for p in found}
        return found

    def wait(self, seconds: float = 240) -> int:
        """The exit code; descendants are noted while it runs."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it does not end: {self.text()[-3000:]}"
            self.workers()
            time.sleep(0.1)
        return self.process.returncode

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def survivors(self, seconds: float = 30) -> list[str]:
        """Command lines of descendants that outlive this process by so many seconds."""
        _, alive = psutil.wait_procs(list(self.seen.values()), timeout=seconds)
        lines = []
        for p in alive:
            try:
                if p.status() != psutil.STATUS_ZOMBIE:
                    lines.append(" ".join(p.cmdline()))
            except psutil.Error:
                continue
        return lines

    def end(self) -> None:
        """Leaves nothing behind, also after a failed test."""
        self.family()
        for p in [*self.seen.values()]:
            try:
                p.kill()
            except psutil.Error:
                continue
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def start(arguments: list[str], log: Path, **environment: str) -> Command:
    """Starts `leukoflow ARGUMENTS`; its words go to `log`."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    path = os.pathsep.join(filter(None, [environment.pop("EXTRA_PATH", ""), str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = {"PYTHONPATH": path, "NO_COLOR": "1", "COLUMNS": "160", **environment}
    with log.open("ab") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "leukoflow", *arguments],
            env=inherited | settings,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Command(process, log)


def until(what: Callable[[], Any], seconds: float, words: str, alive: Command | None = None) -> Any:
    """Waits for something to be true and returns it."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, f"not within {seconds} s: {words}"
        assert alive is None or alive.process.poll() is None, f"ended before {words}: {alive.text()[-3000:]}"
        time.sleep(0.05)
    return found


def committed_shards(root: Path) -> list[str]:
    """Shards whose last marker is there."""
    folder = root / "markers" / "predictions"
    return sorted(p.stem for p in folder.glob("*.json")) if folder.is_dir() else []


class Pipe(io.RawIOBase):
    """A sink that cannot seek, so that zipfile writes sizes behind the data."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        self.data += bytes(data)  # type: ignore[call-overload]
        return len(bytes(data))  # type: ignore[call-overload]
