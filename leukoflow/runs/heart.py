"""A run's sign of life: who works on it, and what it does or waits for, from its first moment to its last word."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from leukoflow.core.codec import dumps
from leukoflow.core.errors import QUOTING, LeukoflowError, RunCancelledError, place_of, words_of
from leukoflow.runs.layout import RunKey
from leukoflow.runs.progress import HEARTBEAT_SECONDS, Heartbeat, now
from leukoflow.runs.runlog import log_once
from leukoflow.storage.opening import open_storage

LAST_WORD_TRIES = 3
RETRY_SECONDS = 2.0
"""How often the end of a run tries to write its last word where that has failed, and the pause in between."""

State = Literal["running", "cancelled", "failed", "finished"]
_beating: dict[str, Heart] = {}


class Heart:
    """Writes a run's heartbeat file, in a thread of its own, until `stop`."""

    def __init__(self, root: str, phase: str) -> None:
        self.storage = open_storage(root)
        self.dashboard = ""
        self._phase, self._note = phase, ""
        self._last: Heartbeat | None = None
        self._said = False  # whether the last word is written
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="leukoflow-heart", daemon=True)

    def start(self) -> None:
        """Write the first beat, then one every few seconds. Raises StorageError where none can be written."""
        self._write(self._now())
        self._thread.start()

    def phase(self, words: str) -> None:
        """Say what the run does from now on, as in "starting 2 workers"; written at once."""
        self._phase = words
        self._try_write()

    def note(self, words: str) -> None:
        """Set what `leukoflow status` says of a running run beside its phase, from the next beat on."""
        self._note = words

    def say(self, state: State, message: str, exit_code: int) -> None:
        """Say the last word; the first one that is said stays. Later beats do not change it."""
        if self._last is None:
            self._last = self._now(state, message, exit_code)
            self._try_write()

    def ended_by(self, error: BaseException) -> None:
        """Say what an error that ends the run means."""
        if isinstance(error, RunCancelledError):
            self.say("cancelled", str(error), error.exit_code)
        elif isinstance(error, KeyboardInterrupt):
            self.say("cancelled", f"it was stopped at once while {self._phase}", 130)
        elif isinstance(error, LeukoflowError):
            self.say("failed", str(error), error.exit_code)
        else:
            quoting = isinstance(error, QUOTING)
            what = place_of(error) if quoting else type(error).__name__
            said = "" if quoting else f": {error}".rstrip(": ")
            self.say("failed", f"{what} while {self._phase}{said}", 1)

    def stop(self) -> None:
        """End the beats; without a last word the run is taken for one whose process is gone, once it is."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=30)
        for attempt in range(LAST_WORD_TRIES):
            if self._last is None or self._said:
                return
            if attempt:
                time.sleep(RETRY_SECONDS)
            self._try_write()

    @property
    def last(self) -> Heartbeat | None:
        """The last word, once it was said."""
        return self._last

    def _now(self, state: State = "running", message: str = "", exit_code: int | None = None) -> Heartbeat:
        words = message or self._note
        return Heartbeat(
            os.getpid(), socket.gethostname(), now(), state, words, self.dashboard, self._phase, exit_code
        )  # fmt: skip

    def _write(self, beat: Heartbeat) -> None:
        with self._lock:
            last = self._last
            self.storage.write(RunKey.HEARTBEAT, dumps(last or beat))
            self._said = last is not None

    def _try_write(self) -> None:
        try:
            self._write(self._now())
        except Exception as error:  # a missed beat must not end a night's work, nor hide what ended it
            logging.getLogger("leukoflow").warning("heartbeat: %s", words_of(error))

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS / 2):
            if not self._said:  # a last word that could not be written is said again
                self._try_write()


@contextmanager
def beating(root: str, phase: str) -> Iterator[Heart]:
    """Keep a run's heart beating for the block; an error that ends the block becomes the run's last word.

    Inside of another such block of this process for the same run, that one's heart is used and goes on beating.
    """
    key = open_storage(root).root
    outer = _beating.get(key)
    heart = outer or Heart(root, phase)
    if outer is None:
        heart.start()
        _beating[key] = heart
    else:
        heart.phase(phase)
    try:
        yield heart
    except BaseException as error:
        heart.ended_by(error)
        if heart.last is not None and heart.last.state == "failed":
            log_once(root, heart.last.message)
        raise
    finally:
        if outer is None:
            del _beating[key]
            heart.stop()
