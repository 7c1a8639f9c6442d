"""The engine: answers as in a run, in turn, whatever happens to its workers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from harness import ROOT, dotted, small_bundle, smears, with_other_thresholds

from apps.web.engine import BusyError, Engine, EngineError, FairQueue
from apps.web.frames import (
    HEADER,
    Answer,
    FrameError,
    TileShape,
    finding_frame,
    finding_of,
    header_of,
    record_of,
)
from leukoflow.config import LimitSettings
from leukoflow.errors import BundleError
from leukoflow.records import Status
from models.bundle import Bundle
from tasks.ingest import Decoder
from tasks.single import STAGES, Finding, examine, load_models

pytestmark = pytest.mark.timeout(120)
LIMITS = LimitSettings(max_member_mb=8, max_megapixels=8, decode_memory_mb=512)
HOOKS = ROOT / "tests" / "hooks"
DECODER, NORMALIZE, FOREVER = (13, 37, 111), (13, 37, 112), (13, 37, 114)
GREEDY, ONCE, NONSENSE = (13, 37, 115), (13, 37, 116), (13, 37, 117)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("bundles") / "small")


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return list(smears(tmp_path_factory.mktemp("sample"), 4, seed=3).values())


@pytest.fixture(autouse=True)
def _hooked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Workers make trouble on demand."""
    monkeypatch.setenv("PYTHONPATH", str(HOOKS))
    monkeypatch.setenv("TEST_ONCE_FILE", str(tmp_path / "once"))


@asynccontextmanager
async def running(bundle: Bundle, **settings: Any) -> AsyncIterator[Engine]:
    chosen = {"seconds": 20, "threads": 1, "memory_mb": 1024} | settings
    async with Engine([str(bundle.path)], LIMITS, **chosen) as engine:
        yield engine


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "apps.web.engine_child" in p.cmdline()]


def decoders() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "tasks.decode_child" in p.cmdline()]


def gone(processes: list[psutil.Process], seconds: float = 10) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


# --- the queue -------------------------------------------------------------------------------------------------------


def test_persons_take_turns() -> None:
    queue: FairQueue[str] = FairQueue(100, 50)
    for i in range(4):
        queue.put("anna", f"a{i}")
    queue.put("bert", "b0")
    assert queue.take() == "a0"
    queue.put("cleo", "c0")
    queue.put("bert", "b1")
    taken = []
    while (item := queue.take()) is not None:
        taken.append(item)
    assert taken == ["b0", "a1", "c0", "b1", "a2", "a3"]


def test_the_queue_is_bounded_in_all_and_per_person() -> None:
    queue: FairQueue[int] = FairQueue(3, 2)
    for i, who in enumerate(["anna", "anna", "bert"]):
        assert queue.full_for(who) is None
        queue.put(who, i)
    assert queue.full_for("anna") == "2 of your images are waiting already"
    assert queue.full_for("cleo") == "3 images are waiting already"
    assert queue.discard("anna", 1)
    assert not queue.discard("anna", 1)
    assert queue.full_for("cleo") is None
    queue.put("bert", 9, again=True)
    assert [queue.take() for _ in range(4)] == [0, 9, 2, None]


# --- frames ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finding(bundle: Bundle, fields: list[bytes]) -> Finding:
    with Decoder(LIMITS, bundle.spec.method.segment) as decoder:
        return examine(fields[0], None, load_models(str(bundle.path)), LIMITS, decoder, lambda stage: None)


def parsed(pieces: list[Any]) -> tuple[Answer, bytes]:
    whole = b"".join(pieces)
    kind, words, length = header_of(whole[: HEADER.size])
    record = record_of(kind, whole[HEADER.size : HEADER.size + words])
    assert isinstance(record, Answer)
    body = whole[HEADER.size + words :]
    assert len(body) == length
    return record, body


def same(one: Finding, other: Finding) -> None:
    """Everything but the time it took."""
    for name in Finding.__slots__:
        mine, theirs = getattr(one, name), getattr(other, name)
        if name == "tiles":
            assert len(mine) == len(theirs)
            for a, b in zip(mine, theirs, strict=True):
                for field in type(a).__slots__:
                    x, y = np.asarray(getattr(a, field)), np.asarray(getattr(b, field))
                    assert x.dtype == y.dtype
                    assert np.array_equal(x, y), field
        elif name == "seconds":
            assert [s for s, _ in mine] == [s for s, _ in theirs]
        elif name == "cells":
            assert (mine is None) == (theirs is None)
            assert mine is None or mine.equals(theirs)
        else:
            assert mine == theirs, name


def test_a_finding_passes_unaltered(finding: Finding) -> None:
    answer, body = parsed(finding_frame(7, finding))
    assert answer.number == 7
    same(finding_of(answer, body), finding)


def test_bytes_that_the_shapes_do_not_account_for_are_refused(finding: Finding) -> None:
    from dataclasses import replace

    answer, body = parsed(finding_frame(7, finding))
    tile = answer.tiles[0]
    for wrong in (
        replace(answer, cells=1 << 30),
        replace(answer, tiles=(replace(tile, height=1 << 31, width=1 << 31),)),
        replace(answer, tiles=(replace(tile, cells=tile.cells + 1),)),
        replace(answer, tiles=(*answer.tiles, TileShape(0, 0, 0, 0, 0))),
        replace(answer, tiles=()),
    ):
        with pytest.raises(FrameError):
            finding_of(wrong, body)
    with pytest.raises(FrameError):
        finding_of(answer, body[:-1])
    with pytest.raises(FrameError):
        finding_of(answer, body + b"x")


def test_what_is_no_frame_is_refused() -> None:
    for head in (HEADER.pack(200, 0, 0), HEADER.pack(1, 1 << 31, 0), HEADER.pack(1, 0, 1 << 60)):
        with pytest.raises(FrameError):
            header_of(head)
    for words in (b"", b"{", b"[" * 100_000, b'{"number": "x"}', b"\x80\x04cos\nsystem\n."):
        with pytest.raises(FrameError):
            record_of(7, words)


# --- answers ---------------------------------------------------------------------------------------------------------


def test_an_answer_is_that_of_the_pure_function(bundle: Bundle, fields: list[bytes], finding: Finding) -> None:
    async def story() -> None:
        async with running(bundle) as engine:
            (card,) = engine.bundles
            assert (card.name, card.digest) == (str(bundle.path), bundle.digest)
            assert card.classes == ("Benign", "Early", "Pre", "Pro")
            heard: list[str] = []
            found = await engine.examine(fields[0], who="anna", told=heard.append)
            same(found, finding)
            assert tuple(heard) == STAGES
            scaled = await engine.examine(fields[0], who="anna", bundle=bundle.digest, um_per_px=0.84)
            assert len(scaled.tiles) > 1
            load = engine.load()
            assert (load.waiting, load.running, load.restarts, load.answered) == (0, 0, 0, 2)
            assert 0 < load.p50_seconds <= load.p95_seconds
            for wrong in (0.0, -1.0, float("nan"), float("inf")):
                with pytest.raises(ValueError, match="positive number"):
                    await engine.examine(fields[0], who="anna", um_per_px=wrong)
            with pytest.raises(BundleError, match="no bundle 'other' is loaded here"):
                await engine.examine(fields[0], who="anna", bundle="other")

    asyncio.run(story())


def test_images_that_are_none_are_findings_too(bundle: Bundle, fields: list[bytes]) -> None:
    async def story() -> None:
        async with running(bundle) as engine:
            rng = np.random.default_rng(0)
            hostile = {
                b"": "empty: 0 bytes",
                b"hello": "not an image: text",
                rng.bytes(5000): "not an image: its first bytes are those of no JPEG, PNG, TIFF or BMP",
                fields[0][:700]: "truncated",
                b"\xff\xd8\xff" + bytes(9 << 20): "too large: 9,437,187 bytes",
                dotted(fields[0], DECODER): "decoding it kills the decoder (SIGSEGV)",
            }
            for data, words in hostile.items():
                found = await engine.examine(data, who="anna")
                assert found.status is Status.QUARANTINED
                assert found.reason is not None
                assert found.reason.startswith(words)
            assert (await engine.examine(fields[1], who="anna")).label is not None
            assert engine.load().restarts == 0

    asyncio.run(story())


def test_two_bundles_are_compared(bundle: Bundle, fields: list[bytes], tmp_path: Path) -> None:
    other = with_other_thresholds(bundle, tmp_path / "other", 3.0)

    async def story() -> None:
        places = [str(bundle.path), str(other.path)]
        async with Engine(places, LIMITS, kept=1, threads=1) as engine:
            assert [card.digest for card in engine.bundles] == [bundle.digest, other.digest]
            first, second, again = [
                await engine.examine(fields[0], who="anna", bundle=name) for name in ("", other.digest, places[0])
            ]
            assert first.bundle_digest == again.bundle_digest != second.bundle_digest
            assert first.probabilities == again.probabilities != second.probabilities
            assert len(decoders()) == 1  # at most one bundle stays loaded

    asyncio.run(story())


def test_a_bundle_that_cannot_be_opened_ends_the_start(tmp_path: Path) -> None:
    async def story() -> None:
        engine = Engine([str(tmp_path / "nothing")], LIMITS)
        with pytest.raises(BundleError, match="no bundle"):
            await engine.start()
        with pytest.raises(EngineError):
            await engine.examine(b"", who="anna")
        assert children() == []

    asyncio.run(story())
    with pytest.raises(BundleError):
        Engine([], LIMITS)


# --- the queue at work -----------------------------------------------------------------------------------------------


def test_a_person_with_many_images_does_not_hold_up_another(bundle: Bundle, fields: list[bytes]) -> None:
    async def story() -> None:
        async with running(bundle, waiting=12, waiting_each=8) as engine:
            order: list[str] = []

            async def one(who: str) -> None:
                await engine.examine(fields[0], who=who)
                order.append(who)

            many = [asyncio.create_task(one("anna")) for _ in range(8)]
            await asyncio.sleep(0)
            few = [asyncio.create_task(one("bert")) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(BusyError, match="8 of your images are waiting") as busy:
                await engine.examine(fields[0], who="anna")
            assert busy.value.retry_after >= 1
            await asyncio.gather(*many, *few)
            assert order[:4].count("bert") == 2
            assert engine.load().waiting == 0

    asyncio.run(story())


def test_who_goes_away_takes_the_image_back(
    bundle: Bundle, fields: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_DELAY_SECONDS", "0.3")

    async def story() -> None:
        async with running(bundle) as engine:
            heard: list[str] = []
            at_work = asyncio.create_task(engine.examine(fields[0], who="anna", told=heard.append))
            waiting = asyncio.create_task(engine.examine(fields[1], who="anna", told=heard.append))
            while "normalize" not in heard:
                await asyncio.sleep(0.01)
            assert (engine.load().waiting, engine.load().running) == (1, 1)
            at_work.cancel()
            waiting.cancel()
            done = await asyncio.gather(at_work, waiting, return_exceptions=True)
            assert [type(d) for d in done] == [asyncio.CancelledError] * 2
            assert engine.load().waiting == 0
            assert (await engine.examine(fields[2], who="bert")).label is not None
            assert heard == ["decode", "normalize"]
            assert engine.load().restarts == 0

    asyncio.run(story())


# --- workers that die ------------------------------------------------------------------------------------------------


def test_what_kills_its_worker_is_quarantined_and_nobody_else_notices(bundle: Bundle, fields: list[bytes]) -> None:
    async def story() -> None:
        async with running(bundle) as engine:
            poison = asyncio.create_task(engine.examine(dotted(fields[0], NORMALIZE), who="mallory"))
            others = [asyncio.create_task(engine.examine(f, who=f"p{i}")) for i, f in enumerate(fields)]
            assert all(f.label is not None for f in await asyncio.gather(*others))
            found = await poison
            assert found.status is Status.QUARANTINED
            assert found.reason == "its processing kills the worker process: signal 9"
            assert engine.load().restarts == 2

    asyncio.run(story())


def test_a_death_that_is_not_the_images_fault_costs_it_nothing(bundle: Bundle, fields: list[bytes]) -> None:
    async def story() -> None:
        async with running(bundle) as engine:
            heard: list[str] = []
            found = await engine.examine(dotted(fields[0], ONCE), who="anna", told=heard.append)
            assert found.label is not None
            assert heard == ["decode", "normalize", *STAGES]
            # ... also where the worker is killed while nothing is asked of it
            await engine.ready()
            (worker,) = children()
            worker.kill()
            assert gone([worker])
            assert (await engine.examine(fields[1], who="anna")).label is not None
            assert engine.load().restarts == 2

    asyncio.run(story())


def test_what_takes_for_ever_is_stopped(bundle: Bundle, fields: list[bytes]) -> None:
    async def story() -> None:
        async with running(bundle, seconds=3) as engine:
            await engine.ready()
            found = await engine.examine(dotted(fields[0], FOREVER), who="anna")
            assert found.reason == "its processing kills the worker process: it ran longer than 3 s"
            assert (await engine.examine(fields[1], who="anna")).label is not None

    asyncio.run(story())


def test_what_wants_all_memory_is_refused_and_the_worker_lives(bundle: Bundle, fields: list[bytes]) -> None:
    async def story() -> None:
        async with running(bundle) as engine:
            found = await engine.examine(dotted(fields[0], GREEDY), who="anna")
            assert found.reason == "too large: diagnosing it needs more memory than the limit allows"
            assert (await engine.examine(fields[1], who="anna")).label is not None
            assert engine.load().restarts == 0

    asyncio.run(story())


def test_nonsense_from_a_worker_harms_nobody(bundle: Bundle, fields: list[bytes]) -> None:
    async def story() -> None:
        async with running(bundle) as engine:
            found = await engine.examine(dotted(fields[0], NONSENSE), who="anna")
            assert found.status is Status.QUARANTINED
            assert "nonsense" in (found.reason or "")
            assert (await engine.examine(fields[1], who="anna")).label is not None

    asyncio.run(story())


# --- the end ---------------------------------------------------------------------------------------------------------


def test_closing_leaves_no_process_and_nobody_waiting(bundle: Bundle, fields: list[bytes]) -> None:
    async def story() -> None:
        engine = Engine([str(bundle.path)], LIMITS, threads=1)
        await engine.start()
        await engine.ready()
        family = children() + decoders()
        assert len(family) == 2
        tasks = [asyncio.create_task(engine.examine(dotted(fields[0], FOREVER), who="anna")) for _ in range(3)]
        while not engine.load().running:
            await asyncio.sleep(0.01)
        await engine.close()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, EngineError)
        assert gone(family, 5)
        await engine.close()  # twice is fine

    asyncio.run(story())


HOLDER = """
import asyncio, sys
from apps.web.engine import Engine
from leukoflow.config import LimitSettings

async def main():
    engine = Engine([sys.argv[1]], LimitSettings(), threads=1)
    await engine.start()
    await engine.ready()
    print("ready", flush=True)
    await asyncio.gather(*(engine.examine(open(f, "rb").read(), who="anna") for f in sys.argv[2:]))

asyncio.run(main())
"""


def test_workers_end_with_a_server_that_is_killed(bundle: Bundle, fields: list[bytes], tmp_path: Path) -> None:
    """Also one that is amid an image which takes for ever."""
    image = tmp_path / "image.png"
    image.write_bytes(dotted(fields[0], FOREVER))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{HOOKS}"}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(bundle.path), str(image)], stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        family = psutil.Process(server.pid).children(recursive=True)
        assert len(family) == 2
        time.sleep(0.5)  # until the image is at work
        server.send_signal(signal.SIGKILL)
        server.wait()
    assert gone(family)


def test_workers_know_no_secrets(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEUKOFLOW_PATIENT_KEY", "secret")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "secret")

    async def story() -> None:
        async with running(bundle):
            (worker,) = children()
            assert "secret" not in worker.environ().values()

    asyncio.run(story())
