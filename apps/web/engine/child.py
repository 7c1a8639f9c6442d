"""The fork server: `python -m leukoflow.apps.web.engine.child PARENT_PID DESCRIPTOR`.

It imports and loads, which takes seconds, and then only forks: a worker that dies is replaced within the time that its
networks need to warm up. It takes orders over the socket DESCRIPTOR and reports on its standard output. It and all
workers end when the engine is gone, however that happened.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import select
import signal
import socket
import sys
from contextlib import suppress
from typing import Any, NoReturn

from leukoflow.apps.web.engine.frames import BundleCard, Ended, Failure, Frame, Hello, Kill, Ready, Setup, Spawn
from leukoflow.apps.web.engine.inference import work
from leukoflow.apps.web.engine.pipes import Speaker, parse, words_for_people
from leukoflow.core.errors import LeukoflowError, place_of
from leukoflow.tasks.inference.single import Models, load_models

MAX_ORDER = 1 << 16
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Load what workers need, then fork them on demand."""
    _bind_to(int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash must leave no copy of an image on disk
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from a terminal; the engine decides when this ends
    say = Speaker(os.dup(1))
    os.dup2(2, 1)  # what a library prints must not mix with the frames
    with socket.socket(fileno=int(sys.argv[2])) as orders:
        setup = parse(orders.recv(MAX_ORDER))
        assert isinstance(setup, Setup)
        try:
            models = _prepare(setup, say)
        except Exception as error:
            if not isinstance(error, LeukoflowError):
                print(place_of(error), file=sys.stderr)
            say(Failure(0, "bundle" if isinstance(error, LeukoflowError) else "error", words_for_people(error)))
            return
        gc.collect()
        gc.freeze()  # so that collecting in a worker does not copy what all share
        say(Ready())
        _ForkLoop(orders, say, setup, models).serve()


class _ForkLoop:
    """Forks workers, and ends them with all that they have started.

    Threads do not survive a fork, so there are none here: the environment says so to OpenMP, and to Arrow not to use
    the allocator that has one. Only workers ask for more.
    """

    def __init__(self, orders: socket.socket, say: Speaker, setup: Setup, models: Models) -> None:
        self._orders, self._say, self._setup, self._models = orders, say, setup, models
        self._workers: dict[int, int] = {}  # process to number
        self._wake, self._woken = os.pipe()
        for descriptor in (self._wake, self._woken):
            os.set_blocking(descriptor, False)

    def serve(self) -> None:
        """Obey orders until the engine is gone, however that happened."""
        signal.signal(signal.SIGCHLD, lambda number, at: None)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        try:
            while True:
                watched: list[Any] = [self._orders, self._wake]
                found, _, _ = select.select(watched, [], [])
                if self._wake in found:
                    with suppress(BlockingIOError):
                        os.read(self._wake, 4096)
                    self._reap()
                if self._orders in found:
                    data, descriptors, _, _ = socket.recv_fds(self._orders, MAX_ORDER, 1)
                    if not data:
                        return
                    self._obey(parse(data), descriptors)
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

    def _reap(self) -> None:
        for process in list(self._workers):
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            _kill(process)  # its decoder; while the process is not waited for, nobody else can have its number
            _, status = os.waitpid(process, 0)
            code = os.waitstatus_to_exitcode(status)
            words = f"signal {-code}" if code < 0 else f"exit code {code}"
            self._say(Ended(self._workers.pop(process), words))


def _kill(process: int) -> None:
    """Kill a worker and its process group, which contains its decoder."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)  # it may not have a group of its own yet


def _prepare(setup: Setup, say: Speaker) -> Models:
    """Open all bundles, report them, and load the first, without starting a thread."""
    import cv2

    from leukoflow.models.bundle import load_bundle

    cv2.setNumThreads(1)
    say(Hello(tuple(_card(name, load_bundle(name)) for name in setup.bundles)))
    return load_models(setup.bundles[0])


def _card(name: str, bundle: Any) -> BundleCard:
    spec = bundle.spec
    return BundleCard(name, bundle.digest, spec.name, spec.classes, _measured(spec.metrics), spec.calibration.alpha)


def _measured(metrics: dict[str, Any]) -> tuple[str, ...]:
    """Return what `leukoflow evaluate` measured, in sentences; empty if it was not run."""
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


def _bind_to(parent: int) -> None:
    """Have the kernel end this process once its parent is gone, even in the middle of a computation (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the kernel was asked
            os._exit(0)


if __name__ == "__main__":
    main()
    os._exit(0)  # torch's libraries complain of each other when an interpreter ends, on the console of the server
