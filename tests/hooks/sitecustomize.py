"""Makes trouble on demand in every process that has this folder on its PYTHONPATH.

`TEST_DELAY_SECONDS` slows each image down, or the number that the file `TEST_DELAY_FILE` holds at that moment. The
wall clock is wrong by as many seconds as the file `TEST_CLOCK_FILE` says. An image whose top left pixel has one of
these colours kills the decoding process, the worker while it normalises or extracts features, or takes for ever.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import signal
import sys
import time
from typing import Any

DECODER, NORMALIZE, EXTRACT, FOREVER = (13, 37, 111), (13, 37, 112), (13, 37, 113), (13, 37, 114)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _number(variable: str) -> float:
    """The number in the file that the variable names, 0 without one."""
    try:
        with open(os.environ[variable]) as file:
            return float(file.read() or 0)
    except (KeyError, OSError, ValueError):
        return 0.0


def _normalize(module: Any) -> None:
    import numpy as np

    normalize = module.normalize

    def trapped(rgb: Any, settings: Any) -> Any:
        if "TEST_DELAY_FILE" in os.environ:
            with open(os.environ["TEST_DELAY_FILE"] + ".seen", "w"):
                pass  # its time says when an image was processed last
        time.sleep(float(os.environ.get("TEST_DELAY_SECONDS", "0")) + _number("TEST_DELAY_FILE"))
        color = tuple(rgb[0, 0])
        if color == NORMALIZE:
            _die()
        if color == FOREVER:
            time.sleep(3600)
        return np.full_like(rgb, EXTRACT) if color == EXTRACT else normalize(rgb, settings)

    module.normalize = trapped


def _extract(module: Any) -> None:
    crop_cells = module.crop_cells

    def trapped(rgb: Any, *rest: Any) -> Any:
        if (rgb == EXTRACT).all():
            _die()
        return crop_cells(rgb, *rest)

    module.crop_cells = trapped


TRAPS = {"leukoflow.tasks.imaging.normalize": _normalize, "leukoflow.tasks.imaging.cells": _extract}


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in TRAPS:
            return None
        trap = TRAPS.pop(name)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            trap(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _in_decoder() -> bool:
    return "leukoflow.tasks.decoding.decode_child" in getattr(sys, "orig_argv", [])


if _in_decoder():  # it runs as __main__, so its own functions cannot be replaced; the library's can
    from PIL import Image

    _load = Image.Image.load

    def _trapped(self: Any) -> Any:
        loaded = _load(self)
        if loaded is not None and self.mode == "RGB" and loaded[0, 0] == DECODER:
            os.kill(os.getpid(), signal.SIGSEGV)
        return loaded

    Image.Image.load = _trapped  # type: ignore[method-assign]
else:
    sys.meta_path.insert(0, _Finder())

if "TEST_CLOCK_FILE" in os.environ:
    _right, _asked, _wrong = time.time, 0.0, 0.0

    def _time() -> float:
        global _asked, _wrong
        if abs(time.monotonic() - _asked) > 0.2:
            _asked, _wrong = time.monotonic(), _number("TEST_CLOCK_FILE")
        return _right() + _wrong

    time.time = _time
