"""The process that diagnoses for the web server: `python -m leukoflow.apps.web.engine_child PARENT_PID DESCRIPTOR`.

It imports and loads, which takes seconds, and then only forks: a worker that dies is replaced within the time that its
networks need to warm up. A worker reads frames (`apps.web.frames`) from its socket and answers there; it decodes in a
disposable child of its own. The engine has workers killed that take too long. All of them end when the engine is gone,
however that happened.
"""

from __future__ import annotations

import ctypes
import gc
import os
import queue
import resource
import select
import signal
import socket
import sys
import threading
from collections import OrderedDict
from contextlib import suppress
from typing import Any, BinaryIO, NoReturn

from leukoflow.apps.web.frames import (
    HEADER,
    Buffer,
    BundleCard,
    Ended,
    Failure,
    Frame,
    Hello,
    Kill,
    Order,
    Ready,
    Setup,
    Spawn,
    Stage,
    Withdrawn,
    finding_frame,
    frame,
    header_of,
    record_of,
)
from leukoflow.core.config import LimitSettings
from leukoflow.core.errors import BundleError, LeukoflowError, place_of
from leukoflow.tasks.decoding.ingest import Decoder
from leukoflow.tasks.inference.single import Finding, Models, examine, load_models, warm

MAX_ORDER = 1 << 16
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
        try:
            self.put(name, load_models(name))
        finally:
            _limit_memory(self._memory)
        return self._loaded[name]

    def put(self, name: str, models: Models) -> None:
        """A bundle that is loaded; makes it warm, and its decoder ready."""
        decoder = Decoder(self.limits, models.bundle.spec.method.segment)
        warm(models)
        decoder.decode_one(_dot())
        _limit_memory(self._memory)
        self._loaded[name] = models, decoder

    def full(self) -> bool:
        """Whether another bundle would push one out."""
        return len(self._loaded) >= self._kept


def main() -> None:
    """Loads what workers need, then forks them on demand."""
    _bind_to(int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash must leave no copy of an image on disk
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the engine decides when this ends
    say = _Speaker(os.dup(1))
    os.dup2(2, 1)  # nothing that a library prints may mix with the answers
    with socket.socket(fileno=int(sys.argv[2])) as orders:
        setup = _parsed(orders.recv(MAX_ORDER))
        assert isinstance(setup, Setup)
        try:
            models = _prepared(setup, say)
        except Exception as error:
            if not isinstance(error, LeukoflowError):
                print(place_of(error), file=sys.stderr)
            say(Failure(0, "bundle" if isinstance(error, LeukoflowError) else "error", _words(error)))
            return
        gc.collect()
        gc.freeze()  # so that collecting in a worker does not copy what all share
        say(Ready())
        _Nursery(orders, say, setup, models).serve()


class _Nursery:
    """Forks workers, and ends them with all that they have started.

    Threads do not survive a fork, so there are none here: the environment says so to OpenMP, and to Arrow not to use
    the allocator that has one. Only workers ask for more.
    """

    def __init__(self, orders: socket.socket, say: _Speaker, setup: Setup, models: Models) -> None:
        self._orders, self._say, self._setup, self._models = orders, say, setup, models
        self._workers: dict[int, int] = {}  # process to number
        self._wake, self._woken = os.pipe()
        for descriptor in (self._wake, self._woken):
            os.set_blocking(descriptor, False)

    def serve(self) -> None:
        """Until the engine is gone, however that happened."""
        signal.signal(signal.SIGCHLD, lambda number, at: None)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        try:
            while True:
                watched: list[Any] = [self._orders, self._wake]
                found, _, _ = select.select(watched, [], [])
                if self._wake in found:
                    with suppress(BlockingIOError):
                        os.read(self._wake, 4096)
                    self._bury()
                if self._orders in found:
                    data, descriptors, _, _ = socket.recv_fds(self._orders, MAX_ORDER, 1)
                    if not data:
                        return
                    self._obey(_parsed(data), descriptors)
        finally:
            for process in self._workers:
                _kill(process)

    def _obey(self, order: Frame, descriptors: list[int]) -> None:
        if isinstance(order, Kill):
            for process, number in self._workers.items():
                if number == order.number:
                    _kill(process)
        elif isinstance(order, Spawn):
            (descriptor,) = descriptors
            starter = os.getpid()
            try:
                process = os.fork()
            except OSError as error:
                self._say(Ended(order.number, f"no process can be started: {error.strerror}"))
            else:
                if process == 0:
                    self._become_worker(descriptor, starter)
                self._workers[process] = order.number
            os.close(descriptor)

    def _become_worker(self, descriptor: int, starter: int) -> NoReturn:
        try:
            os.setpgid(0, 0)
            _bind_to(starter)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for inherited in (self._wake, self._woken, self._orders.fileno(), self._say.descriptor):
                os.close(inherited)
            work(descriptor, self._setup, self._models)
        except BaseException as error:
            print(place_of(error), file=sys.stderr)
        finally:
            os._exit(1)

    def _bury(self) -> None:
        for process in list(self._workers):
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            _kill(process)  # its decoder; while the process is not waited for, nobody else can have its number
            _, status = os.waitpid(process, 0)
            code = os.waitstatus_to_exitcode(status)
            words = f"signal {-code}" if code < 0 else f"exit code {code}"
            self._say(Ended(self._workers.pop(process), words))


def _kill(process: int) -> None:
    """Kills a worker and its process group, which its decoder is in."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)  # it may not have a group of its own yet


def _prepared(setup: Setup, say: _Speaker) -> Models:
    """Opens all bundles, tells of them, and loads the first, without a second thread."""
    import cv2

    from leukoflow.models.bundle import load_bundle

    cv2.setNumThreads(1)
    say(Hello(tuple(_card(name, load_bundle(name)) for name in setup.bundles)))
    return load_models(setup.bundles[0])


def _use_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def work(descriptor: int, setup: Setup, models: Models) -> None:
    """What a worker does: answers orders that come over a socket until it closes."""
    _use_threads(setup.threads)
    source, say = os.fdopen(descriptor, "rb"), _Speaker(os.dup(descriptor))
    orders: queue.Queue[tuple[Order, bytes]] = queue.Queue()
    withdrawn: set[int] = set()
    shelf = _Shelf(setup)
    shelf.put(setup.bundles[0], models)
    threading.Thread(target=_listen, args=(source, orders, withdrawn), daemon=True).start()
    say(Ready())
    later = list(setup.bundles[1:])
    while True:
        if later and orders.empty() and not shelf.full():
            with suppress(Exception):  # whoever asks for it hears why
                shelf.get(later.pop(0))
            continue
        order, data = orders.get()
        _serve(order, data, shelf, say, withdrawn)
        withdrawn.difference_update([n for n in list(withdrawn) if n <= order.number])
        del data


class _Speaker:
    """Writes whole frames."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __call__(self, record: Frame) -> None:
        self.pieces(frame(record))

    def pieces(self, pieces: list[Buffer]) -> None:
        """A frame that is already one."""
        try:
            for piece in pieces:
                left = memoryview(piece)
                while left:
                    left = left[os.write(self.descriptor, left) :]
        except BrokenPipeError:
            _leave()


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
            print(place_of(error), file=sys.stderr)
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


def _parsed(data: bytes) -> Frame:
    """A frame without a body that came as one message; the engine is trusted."""
    kind, words, _ = header_of(data[: HEADER.size])
    return record_of(kind, data[HEADER.size : HEADER.size + words])


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
    from leukoflow.tasks.report.model_card import TITLES
    from leukoflow.tasks.review.wording import repeated_words

    lines = []
    for name, title in TITLES.items():
        try:
            protocol = metrics["protocols"][name]
            ours = protocol["models"]["leukoflow"]
            low, high = ours["intervals_95"]["accuracy"]
            answered = ours.get("accuracy_answered")
            lines.append(
                f"{title}: {repeated_words(protocol, ours)}; taking the likeliest class even where the model "
                f"abstained, right in {100 * ours['accuracy']:.1f} % (95 % interval {100 * low:.1f} to "
                f"{100 * high:.1f} %); {100 * ours['abstention_rate']:.1f} % abstained"
                + (f"; right in {100 * answered:.1f} % of the others" if answered is not None else "")
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
    os._exit(0)  # torch's libraries complain of each other when an interpreter ends, to whoever stops the server
