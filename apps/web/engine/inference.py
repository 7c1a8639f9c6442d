"""A worker: diagnoses the images that come over its socket.

Images are decoded in a disposable child of the worker's own. The engine has workers killed that take too long.
"""

from __future__ import annotations

import gc
import os
import queue
import resource
import sys
import threading
from collections import OrderedDict
from contextlib import suppress
from typing import BinaryIO

from leukoflow.apps.web.engine.frames import Failure, Order, Ready, Setup, Stage, Withdrawn, diagnosis_frame
from leukoflow.apps.web.engine.pipes import Speaker, leave, read_frame, words_for_people
from leukoflow.core.config import LimitSettings
from leukoflow.core.errors import BundleError, place_of
from leukoflow.tasks.decoding.ingest import Decoder
from leukoflow.tasks.inference.single import Examination, Models, examine, load_models, warm

_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "insufficient memory")


class WithdrawnError(Exception):
    """Nobody waits for the order any more."""


class _LoadedBundles:
    """Cache of loaded bundles with their decoders; the least recently used goes first."""

    def __init__(self, setup: Setup) -> None:
        self._kept, self._memory = setup.kept, setup.memory_mb << 20
        self.limits = LimitSettings.model_validate_json(setup.limits)
        self._loaded: OrderedDict[str, tuple[Models, Decoder]] = OrderedDict()

    def get(self, name: str) -> tuple[Models, Decoder]:
        """Return a bundle, loading it if necessary. Raises BundleError."""
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
        """Add a loaded bundle; warm it up and start its decoder."""
        decoder = Decoder(self.limits, models.bundle.spec.method.segment)
        warm(models)
        decoder.decode_one(_dot())
        _limit_memory(self._memory)
        self._loaded[name] = models, decoder

    def full(self) -> bool:
        """Return whether another bundle would push one out."""
        return len(self._loaded) >= self._kept


def work(descriptor: int, setup: Setup, models: Models) -> None:
    """Answer the orders that come over a socket until it closes."""
    _use_threads(setup.threads)
    source, say = os.fdopen(descriptor, "rb"), Speaker(os.dup(descriptor))
    orders: queue.Queue[tuple[Order, bytes]] = queue.Queue()
    withdrawn: set[int] = set()
    bundles = _LoadedBundles(setup)
    bundles.put(setup.bundles[0], models)
    threading.Thread(target=_listen, args=(source, orders, withdrawn), daemon=True).start()
    say(Ready())
    later = list(setup.bundles[1:])
    while True:
        if later and orders.empty() and not bundles.full():
            with suppress(Exception):  # an order for it gets the error
                bundles.get(later.pop(0))
            continue
        order, data = orders.get()
        _serve(order, data, bundles, say, withdrawn)
        withdrawn.difference_update([n for n in list(withdrawn) if n <= order.number])
        del data


def _serve(order: Order, data: bytes, bundles: _LoadedBundles, say: Speaker, withdrawn: set[int]) -> None:
    """Answer one order with a diagnosis or a failure, never with an exception."""

    def on_stage(stage: str) -> None:
        if order.number in withdrawn:
            raise WithdrawnError
        say(Stage(order.number, stage))

    diagnosis: Examination | None = None
    failure = Failure(order.number, "error", "")
    try:
        models, decoder = bundles.get(order.bundle)
        diagnosis = examine(data, order.um_per_px, models, bundles.limits, decoder, on_stage)
    except WithdrawnError:
        failure = Failure(order.number, "withdrawn", "")
    except BundleError as error:
        failure = Failure(order.number, "bundle", words_for_people(error))
    except MemoryError:
        failure = Failure(order.number, "memory", "")
    except Exception as error:
        if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY):
            failure = Failure(order.number, "memory", "")
        else:
            print(place_of(error), file=sys.stderr)
            failure = Failure(order.number, "error", words_for_people(error))
    if diagnosis is None:
        gc.collect()
        say(failure)
        return
    say.write(diagnosis_frame(order.number, diagnosis))


def _listen(source: BinaryIO, orders: queue.Queue[tuple[Order, bytes]], withdrawn: set[int]) -> None:
    """Receive orders while the main thread computes; end the process once the engine is gone."""
    try:
        while (said := read_frame(source)) is not None:
            record, body = said
            if isinstance(record, Order):
                orders.put((record, body))
            elif isinstance(record, Withdrawn):
                withdrawn.add(record.number)
    finally:
        leave()


def _use_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def _dot() -> bytes:
    """Return a small image; decoding it starts the decoder's process and loads its libraries."""
    import cv2
    import numpy as np

    return cv2.imencode(".png", np.full((64, 64, 3), 255, np.uint8))[1].tobytes()


def _limit_memory(more: int | None) -> None:
    """Allow `more` bytes of address space above what is in use; None lifts the limit."""
    limit = resource.RLIM_INFINITY
    if more is not None:
        with open("/proc/self/statm") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
