"""The process that diagnoses for the web server: `python -m apps.web.engine_child PARENT_PID`, started by its engine.

It reads frames (`apps.web.frames`) on standard input and writes them on standard output. It keeps models loaded and
decodes in a child of its own. It is disposable: the engine kills it when an image takes too long, and it ends itself,
with its decoder, when the engine is gone, however that happened.
"""

from __future__ import annotations

import ctypes
import gc
import io
import os
import queue
import resource
import signal
import sys
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

from apps.web.frames import (
    HEADER,
    Buffer,
    BundleCard,
    Failure,
    Frame,
    Hello,
    Order,
    Ready,
    Setup,
    Stage,
    Withdrawn,
    finding_frame,
    frame,
    header_of,
    record_of,
)
from leukoflow.config import LimitSettings
from leukoflow.errors import BundleError, LeukoflowError
from tasks.ingest import Decoder
from tasks.single import Finding, Models, examine, load_models, warm

_PR_SET_PDEATHSIG = 1
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "insufficient memory")


class _WithdrawnError(Exception):
    """Nobody waits any more."""


class _Shelf:
    """Loaded bundles with their decoders, those used last."""

    def __init__(self, setup: Setup) -> None:
        self._kept, self._memory = setup.kept, setup.memory_mb << 20
        self.limits = LimitSettings.model_validate_json(setup.limits)
        self._loaded: OrderedDict[str, tuple[Models, Decoder]] = OrderedDict()

    def get(self, name: str) -> tuple[Models, Decoder]:
        """The bundle, loaded if it is not. Raises BundleError."""
        if name in self._loaded:
            self._loaded.move_to_end(name)
            return self._loaded[name]
        while len(self._loaded) >= self._kept:
            _, (_, decoder) = self._loaded.popitem(last=False)
            decoder.close()
        gc.collect()
        _limit_memory(None)
        models = load_models(name)
        decoder = Decoder(self.limits, models.bundle.spec.method.segment)
        warm(models)
        decoder.decode_one(_dot())
        _limit_memory(self._memory)
        self._loaded[name] = models, decoder
        return models, decoder

    def full(self) -> bool:
        """Whether another bundle would push one out."""
        return len(self._loaded) >= self._kept


def main() -> None:
    """Serves orders until the engine is gone."""
    _bind_to(int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash must leave no copy of an image on disk
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # nothing that a library prints may mix with the answers
    setup = _read(source)
    if setup is None:
        return
    assert isinstance(setup[0], Setup)
    say = _Speaker(sink)
    try:
        shelf = _prepared(setup[0], say)
    except Exception as error:
        if not isinstance(error, LeukoflowError):
            traceback.print_exc()
        say(Failure(0, "bundle" if isinstance(error, LeukoflowError) else "error", _words(error)))
        return
    orders: queue.Queue[tuple[Order, bytes]] = queue.Queue()
    withdrawn: set[int] = set()
    threading.Thread(target=_listen, args=(source, orders, withdrawn), daemon=True).start()
    say(Ready())
    later = list(setup[0].bundles[1:])
    while True:
        if later and orders.empty() and not shelf.full():
            try:
                shelf.get(later.pop(0))
            except Exception:  # whoever asks for it hears why
                continue
            continue
        order, data = orders.get()
        _serve(order, data, shelf, say, withdrawn)
        withdrawn.discard(order.number)
        del data


class _Speaker:
    """Writes whole frames."""

    def __init__(self, sink: BinaryIO | io.FileIO) -> None:
        self._descriptor = sink.fileno()
        self._sink = sink  # kept open

    def __call__(self, record: Frame) -> None:
        self.pieces(frame(record))

    def pieces(self, pieces: list[Buffer]) -> None:
        """A frame that is already one."""
        try:
            for piece in pieces:
                left = memoryview(piece)
                while left:
                    left = left[os.write(self._descriptor, left) :]
        except BrokenPipeError:
            _leave()


def _prepared(setup: Setup, say: Callable[[Frame], None]) -> _Shelf:
    """Opens all bundles, tells of them, and loads the first."""
    import cv2
    import torch

    from models.bundle import load_bundle

    torch.set_num_threads(setup.threads)
    cv2.setNumThreads(1)
    say(Hello(tuple(_card(name, load_bundle(name)) for name in setup.bundles)))
    shelf = _Shelf(setup)
    shelf.get(setup.bundles[0])
    return shelf


def _serve(order: Order, data: bytes, shelf: _Shelf, say: _Speaker, withdrawn: set[int]) -> None:
    """Answers one order with a finding or a failure, never with an exception."""

    def told(stage: str) -> None:
        if order.number in withdrawn:
            raise _WithdrawnError
        say(Stage(order.number, stage))

    finding: Finding | None = None
    failure = Failure(order.number, "error", "")
    try:
        models, decoder = shelf.get(order.bundle)
        finding = examine(data, order.um_per_px, models, shelf.limits, decoder, told)
    except _WithdrawnError:
        failure = Failure(order.number, "withdrawn", "")
    except BundleError as error:
        failure = Failure(order.number, "bundle", _words(error))
    except MemoryError:
        failure = Failure(order.number, "memory", "")
    except Exception as error:
        if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY):
            failure = Failure(order.number, "memory", "")
        else:
            traceback.print_exc()
            failure = Failure(order.number, "error", _words(error))
    if finding is None:
        gc.collect()
        say(failure)
        return
    say.pieces(finding_frame(order.number, finding))


def _listen(source: BinaryIO, orders: queue.Queue[tuple[Order, bytes]], withdrawn: set[int]) -> None:
    """Hears what the engine says while the main thread computes; leaves when it says no more."""
    try:
        while (said := _read(source)) is not None:
            record, body = said
            if isinstance(record, Order):
                orders.put((record, body))
            elif isinstance(record, Withdrawn):
                withdrawn.add(record.number)
    finally:
        _leave()


def _leave() -> None:
    """Ends this process and its decoder, which are a process group."""
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def _read(source: BinaryIO) -> tuple[Frame, bytes] | None:
    """One frame, None at the end."""
    head = source.read(HEADER.size)
    if len(head) < HEADER.size:
        return None
    kind, words, length = header_of(head)
    record, body = record_of(kind, source.read(words)), source.read(length)
    return (record, body) if len(body) == length else None


def _card(name: str, bundle: Any) -> BundleCard:
    spec = bundle.spec
    return BundleCard(name, bundle.digest, spec.name, spec.classes, _measured(spec.metrics), spec.calibration.alpha)


def _measured(metrics: dict[str, Any]) -> tuple[str, ...]:
    """What `leukoflow evaluate` found out, in sentences; empty where nothing was measured."""
    from tasks.model_card import TITLES

    lines = []
    for name, title in TITLES.items():
        try:
            ours = metrics["protocols"][name]["models"]["leukoflow"]
            low, high = ours["intervals_95"]["accuracy"]
            lines.append(
                f"{title}: {100 * ours['accuracy']:.1f} % of {ours['fields']:,} fields right "
                f"(95 % interval {100 * low:.1f} to {100 * high:.1f} %), "
                f"{100 * ours['abstention_rate']:.1f} % abstained"
            )
        except (KeyError, TypeError, ValueError):
            continue
    return tuple(lines)


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, LeukoflowError) else type(error).__name__


def _dot() -> bytes:
    """A small image, so that the decoder's process is there and has its libraries."""
    import cv2
    import numpy as np

    return cv2.imencode(".png", np.full((64, 64, 3), 255, np.uint8))[1].tobytes()


def _limit_memory(more: int | None) -> None:
    """Allows `more` bytes of address space above what is taken now; None lifts the limit."""
    limit = resource.RLIM_INFINITY
    if more is not None:
        with open("/proc/self/statm") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def _bind_to(parent: int) -> None:
    """Lets the kernel end this process when the engine's is gone, even amid a computation (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the kernel knew
            os._exit(0)


if __name__ == "__main__":
    main()
