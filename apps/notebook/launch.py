"""A run from Python: the same command, in a process of its own, so that nothing of the notebook can disturb it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import leukoflow
from leukoflow.apps.cli.common import ROOT_FILE
from leukoflow.apps.notebook.stored import Run, open_run
from leukoflow.core.errors import LeukoflowError


class RunFailedError(LeukoflowError):
    """A run that did not finish; the message is what the command said."""


def run(source: str | Path, out: str | Path, show: Callable[[str], object] | None = print, **options: Any) -> Run:
    """Run the nightly flow over a source and open what it leaves; the same as the command `leukoflow run`.

    The same call resumes a run that was stopped, and returns at once for a finished one. Interrupting once lets
    the shards in work finish, a second time ends the run at once, as Ctrl-C does.

    Args:
        source: a folder, a zip, a tar, one image, or an `s3://` address of these.
        out: folder or `s3://` prefix; the run writes to OUT/RUN_ID.
        show: called with each line that the command prints; None keeps it quiet.
        options: those of the command, with `_` for `-`: run_id, manifest, bundle, config, workers, shard_size, cluster,
            reuse, device, um_per_px.

    Returns:
        The finished run; images that could not be predicted have their reason in `predictions`.

    Raises:
        RunFailedError: the run did not finish; the message says why and what to do.

    Examples:
        >>> run = leukoflow.run("smears.zip", out="out", manifest="slides.csv", workers=4)       # doctest: +SKIP
    """
    words = [sys.executable, "-P", "-m", "leukoflow", "run", str(source), "--out", str(out)]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    paths = [str(Path(leukoflow.__file__).resolve().parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as folder:
        noted = Path(folder) / "root.json"
        environment = os.environ | {ROOT_FILE: str(noted), "PYTHONPATH": os.pathsep.join(paths), "NO_COLOR": "1"}
        with subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", env=environment, start_new_session=True,
        ) as process:  # fmt: skip
            said = follow(process, show)
        if process.returncode not in (0, 3, 4) or not noted.exists():
            raise RunFailedError(next((s for s in reversed(said) if s.startswith("error: ")), "\n".join(said[-5:])))
        return open_run(json.loads(noted.read_text())["root"])


def follow(process: subprocess.Popen[str], show: Callable[[str], object] | None) -> list[str]:
    """Read the lines of a process until it ends, and return them; each interrupt is passed on to it, once.

    The process must have a session of its own, or a terminal and some notebooks would interrupt it a second time, which
    ends a run at once.

    Raises:
        KeyboardInterrupt: after the process has ended, if there was one.
    """
    assert process.stdout is not None
    said: list[str] = []
    interrupted = False
    while True:
        try:
            for line in process.stdout:
                said.append(line.rstrip())
                if show is not None:
                    show(said[-1])
            process.wait()
            break
        except KeyboardInterrupt:
            interrupted = True
            process.send_signal(signal.SIGINT)
    if interrupted:
        raise KeyboardInterrupt
    return said
