"""The engine: answers as in a run, in turn, whatever happens to its workers."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
from harness import ROOT
from PIL import Image
from same_diagnosis import same

from leukoflow.apps.web.engine.engine import Engine
from leukoflow.apps.web.engine.errors import BusyError, EngineError
from leukoflow.apps.web.engine.fork_server import ForkServer
from leukoflow.core.config import LimitSettings
from leukoflow.core.errors import BundleError
from leukoflow.runs.records import Status
from leukoflow.tasks.decoding.ingest import Decoder
from leukoflow.tasks.inference.single import STAGES, Examination, examine, load_models

pytestmark = pytest.mark.timeout(300)
T = TypeVar("T")
DIES, FOREVER, GREEDY, ONCE, NONSENSE, FAULTY = ((13, 37, blue) for blue in range(200, 206))
LIMITS = LimitSettings(max_member_mb=8, max_megapixels=8, decode_memory_mb=512)
MADE_UP = Path(__file__).with_name("made_up_child.py")


def field(colour: tuple[int, int, int] = (200, 180, 220), side: int = 64) -> bytes:
    """An image whose first pixel says what comes of it."""
    sink = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(sink, "PNG")
    return sink.getvalue()


class Served:
    """An engine in an event loop of its own thread, for tests that are not coroutines."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def do(self, what: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self.loop).result(280)

    def examine(self, data: bytes, who: str = "anna", **settings: Any) -> Examination:
        return self.do(self.engine.examine(data, who=who, **settings))

    def restarts(self) -> int:
        """How often a worker was replaced, once there is one again."""
        self.do(self.engine.ready())
        return self.engine.load().restarts

    def end(self) -> None:
        self.do(self.engine.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What workers look at."""
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    """One engine for most tests, with made-up networks that make trouble on demand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ForkServer, "program", (str(MADE_UP),))
        patch.setenv("TEST_FOLDER", str(folder))
        patch.setenv("LEUKOFLOW_PATIENT_KEY", "a key that only these tests have")
        patch.setenv("AWS_ACCESS_KEY_ID", "a key that only these tests have")
        served = Served(
            Engine(["one", "two", "gone"], LIMITS, kept=1, threads=1, memory_mb=1024, waiting=12, waiting_each=8)
        )
        try:
            served.do(served.engine.start())
            served.do(served.engine.ready())
            yield served
        finally:
            served.end()


def starters() -> list[psutil.Process]:
    """The processes that fork workers with made-up networks; other tests have children and engines, too."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if str(MADE_UP) in child.cmdline():
                found.append(child)
    return found


def family(of: int | None = None) -> list[psutil.Process]:
    """Processes that engines here have started, or all that another process has."""
    if of is not None:
        return psutil.Process(of).children(recursive=True)
    return [p for starter in starters() for p in (starter, *starter.children(recursive=True))]


def played(story: Coroutine[Any, Any, None]) -> None:
    """Plays a story in a thread: a browser that other tests hold open has the loop of the main one."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, story).result()


def workers() -> list[psutil.Process]:
    """Those that compute: children of the one that starts them."""
    return [p for p in family() if str(MADE_UP) in p.cmdline() and p.ppid() != os.getpid()]


def gone(processes: list[psutil.Process], seconds: float = 10) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


# --- answers ---------------------------------------------------------------------------------------------------------


def test_an_answer_is_that_of_the_pure_function(tmp_path: Path) -> None:
    """With real networks, two bundles at a time."""
    from harness import small_bundle, smears, with_other_thresholds

    bundle = small_bundle(tmp_path / "small")
    other = with_other_thresholds(bundle, tmp_path / "other", 3.0)
    first, *_ = smears(tmp_path / "sample", 1, seed=3).values()
    with Decoder(LIMITS, bundle.spec.method.segment) as decoder:
        expected = examine(first, None, load_models(str(bundle.path)), LIMITS, decoder, lambda stage: None)

    async def story() -> None:
        async with Engine([str(bundle.path), str(other.path)], LIMITS, threads=1) as engine:
            assert [(c.name, c.digest) for c in engine.bundles] == [(str(b.path), b.digest) for b in (bundle, other)]
            assert engine.bundles[0].classes == ("Benign", "Early", "Pre", "Pro")
            heard: list[str] = []
            same(await engine.examine(first, who="anna", on_stage=heard.append), expected, rounding=1e-6)
            assert tuple(heard) == STAGES
            second = await engine.examine(first, who="anna", bundle=other.digest)
            assert second.bundle_digest == other.digest
            assert second.probabilities != expected.probabilities
            assert len((await engine.examine(first, who="anna", um_per_px=0.84)).tiles) > 1

    played(story())


def test_the_load_is_counted(served: Served) -> None:
    before = served.engine.load()
    assert served.examine(field()).label == "Pre"
    assert served.examine(field(side=100)).width_px == 100
    load = served.engine.load()
    assert (load.waiting, load.running, load.answered - before.answered) == (0, 0, 2)
    assert (load.workers, load.ready, load.trouble) == (1, 1, "")
    assert 0 < load.p50_seconds <= load.p95_seconds


def test_requests_that_make_no_sense_are_refused(served: Served) -> None:
    for wrong in (0.0, -1.0, float("nan"), float("inf"), 1e9):
        with pytest.raises(ValueError, match=r"between 0\.01 and 100"):
            served.examine(field(), um_per_px=wrong)
    with pytest.raises(BundleError, match="no bundle 'other' is loaded here; there are: one, two, gone"):
        served.examine(field(), bundle="other")


def test_images_that_are_none_are_diagnoses_too(served: Served) -> None:
    before = served.restarts()
    hostile = {
        b"": "empty: 0 bytes",
        b"hello": "not an image: text",
        np.random.default_rng(0).bytes(5000): "not an image: its first bytes are those of no JPEG, PNG, TIFF or BMP",
        b"\0\0\0\x18ftypheic" + bytes(400): "not supported: an HEIC picture; export it as JPEG, PNG or TIFF",
        field(side=500)[:300]: "truncated",
        b"\xff\xd8\xff" + bytes(9 << 20): "too large: 9,437,187 bytes",
        field(side=3000): "too large: 3,000 x 3,000 px",
    }
    for data, words in hostile.items():
        found = served.examine(data)
        assert found.status is Status.QUARANTINED
        assert found.reason is not None
        assert found.reason.startswith(words)
    assert served.examine(field()).label == "Pre"
    assert served.restarts() == before


def test_bundles_are_loaded_when_asked_for(served: Served) -> None:
    first, second, again = (served.examine(field(), bundle=name) for name in ("", "two", "one"))
    assert (first.bundle, second.bundle, again.bundle) == ("one", "two", "one")
    with pytest.raises(BundleError, match="no longer there"):
        served.examine(field(), bundle="gone")
    assert served.examine(field()).bundle == "one"
    assert (
        len([p for p in family() if "leukoflow.tasks.decoding.decode_child" in p.cmdline()]) == 1
    )  # at most one stays loaded


def test_a_bundle_that_cannot_be_opened_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ForkServer, "program", (str(MADE_UP),))

    async def story() -> None:
        before = family()
        engine = Engine(["nothing"], LIMITS)
        with pytest.raises(EngineError, match="not running"):
            await engine.examine(b"", who="anna")
        with pytest.raises(BundleError, match="no bundle 'nothing'"):
            await engine.start()
        with pytest.raises(EngineError, match="not running"):
            await engine.examine(b"", who="anna")
        assert set(family()) <= set(before)

    played(story())
    with pytest.raises(BundleError, match="no bundle was named"):
        Engine([], LIMITS)


def test_workers_know_no_secrets(served: Served) -> None:
    served.do(served.engine.ready())
    assert len(family()) == 3
    for process in family():
        assert "a key that only these tests have" not in process.environ().values()


# --- the queue at work -----------------------------------------------------------------------------------------------


def test_a_person_with_many_images_does_not_hold_up_another(served: Served) -> None:
    engine = served.engine

    async def story() -> None:
        order: list[str] = []

        async def one(who: str) -> None:
            await engine.examine(field(), who=who)
            order.append(who)

        many = [asyncio.create_task(one("anna")) for _ in range(8)]
        await asyncio.sleep(0)
        few = [asyncio.create_task(one("bert")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match="8 of your images are waiting") as busy:
            await engine.examine(field(), who="anna")
        assert busy.value.retry_after >= 1
        await asyncio.gather(*many, *few)
        assert order[:5].count("bert") == 2
        assert engine.load().waiting == 0

    served.do(story())


def test_who_goes_away_takes_the_image_back(served: Served, folder: Path) -> None:
    engine, before = served.engine, served.restarts()
    (folder / "seconds").write_text("0.3")

    async def story() -> None:
        heard: list[str] = []
        at_work = asyncio.create_task(engine.examine(field(), who="anna", on_stage=heard.append))
        waiting = asyncio.create_task(engine.examine(field(), who="anna", on_stage=heard.append))
        while "normalize" not in heard:
            await asyncio.sleep(0.01)
        assert (engine.load().waiting, engine.load().running) == (1, 1)
        at_work.cancel()
        waiting.cancel()
        done = await asyncio.gather(at_work, waiting, return_exceptions=True)
        assert [type(d) for d in done] == [asyncio.CancelledError] * 2
        assert engine.load().waiting == 0
        assert (await engine.examine(field(), who="bert")).label == "Pre"
        assert heard == ["decode", "normalize"]

    try:
        served.do(story())
    finally:
        (folder / "seconds").unlink()
    assert served.restarts() == before


# --- workers that die ------------------------------------------------------------------------------------------------


def test_what_kills_its_worker_is_quarantined_and_nobody_else_notices(served: Served) -> None:
    engine, before = served.engine, served.restarts()

    async def story() -> None:
        poison = asyncio.create_task(engine.examine(field(DIES), who="mallory"))
        others = [asyncio.create_task(engine.examine(field(), who=f"p{i}")) for i in range(4)]
        assert all(f.label == "Pre" for f in await asyncio.gather(*others))
        found = await poison
        assert found.status is Status.QUARANTINED
        assert found.reason == "its processing kills the worker process: signal 9"

    served.do(story())
    assert served.restarts() == before + 2


def test_a_death_that_is_not_the_images_fault_costs_it_nothing(served: Served, folder: Path) -> None:
    (folder / "once").unlink(missing_ok=True)
    before = served.restarts()
    heard: list[str] = []
    assert served.examine(field(ONCE), on_stage=heard.append).label == "Pre"
    assert heard == ["decode", "normalize", *STAGES]
    # ... also where the worker is killed while nothing is asked of it
    (worker,) = workers()
    worker.kill()
    assert gone([worker])
    assert served.examine(field()).label == "Pre"
    assert served.restarts() == before + 2


def test_what_takes_for_ever_is_stopped(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(served.engine, "_seconds", 1.5)
        found = served.examine(field(FOREVER))
    assert found.reason == "its processing kills the worker process: it ran longer than 1.5 s"
    assert served.examine(field()).label == "Pre"


def test_what_wants_all_memory_is_refused_and_the_worker_lives(served: Served) -> None:
    before = served.restarts()
    found = served.examine(field(GREEDY))
    assert found.reason == "too large: diagnosing it needs more memory than the limit allows"
    assert served.examine(field()).label == "Pre"
    assert served.restarts() == before


def test_a_fault_of_the_program_is_tried_on_another_worker(served: Served) -> None:
    before = served.restarts()
    found = served.examine(field(FAULTY))
    assert found.reason == "its processing kills the worker process: a bug in the program (ValueError)"
    assert served.restarts() == before + 2


def test_nonsense_from_a_worker_harms_nobody(served: Served) -> None:
    found = served.examine(field(NONSENSE))
    assert found.status is Status.QUARANTINED
    assert "nonsense" in (found.reason or "")
    assert served.examine(field()).label == "Pre"


def test_the_process_that_starts_workers_may_die(served: Served) -> None:
    """Its workers die with it, and all start again."""
    served.restarts()
    before = family()
    (starter,) = starters()
    starter.kill()
    assert gone(before)
    assert served.examine(field()).label == "Pre"


# --- the end ---------------------------------------------------------------------------------------------------------

HOLDER = """
import asyncio, sys
from leukoflow.apps.web.engine.engine import Engine
from leukoflow.apps.web.engine.fork_server import ForkServer
from leukoflow.core.config import LimitSettings

async def main():
    ForkServer.program = (sys.argv[1],)
    engine = Engine(["one"], LimitSettings(), threads=1)
    await engine.start()
    show = lambda stage: print(stage, flush=True)
    await engine.examine(open(sys.argv[2], "rb").read(), who="anna", on_stage=show)

asyncio.run(main())
"""


def test_workers_end_with_a_server_that_is_killed(tmp_path: Path) -> None:
    """Also one that is amid an image which takes for ever."""
    image = tmp_path / "image.png"
    image.write_bytes(field(FOREVER))
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(MADE_UP), str(image)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as server:  # fmt: skip
        assert server.stdout is not None
        assert [server.stdout.readline() for _ in range(2)] == ["decode\n", "normalize\n"]
        started = family(server.pid)
        assert len(started) == 3  # one that starts workers, a worker, its decoder
        server.send_signal(signal.SIGKILL)
        server.wait()
    assert gone(started)


def test_closing_leaves_no_process_and_nobody_waiting(served: Served) -> None:
    """The last test, since it closes the engine of all others."""
    engine = served.engine

    async def story() -> None:
        await engine.ready()
        started = family()
        assert len(started) == 3
        tasks = [asyncio.create_task(engine.examine(field(FOREVER), who="anna")) for _ in range(3)]
        while not engine.load().running:
            await asyncio.sleep(0.01)
        await engine.close()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, EngineError)
        assert gone(started, 5)
        await engine.close()  # twice is fine

    served.do(story())
