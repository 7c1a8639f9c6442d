"""Find the members that kill their worker.

The search runs in processes of its own, so that blame never falls on a neighbour.

Dask marks every task that was assigned to a dead worker as suspicious, and the operating system kills for memory whom
it likes. Here each suspect set is processed alone in a child that does nothing else; a set is guilty if its child died.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from leukoflow.runs.records import DIED
from leukoflow.tasks.inference.stages import probe
from leukoflow.tasks.inference.worker import members_of
from leukoflow.tasks.store.job import ShardJob


def find_culprits(job: ShardJob) -> tuple[tuple[int, str], ...]:
    """Return (ordinal, reason) of each member whose processing alone ends the process; write nothing."""
    known = {ordinal for ordinal, _ in job.culprits}
    suspects = [m.ordinal for m in members_of(job) if m.refusal is None and m.ordinal not in known]
    found: list[tuple[int, str]] = []
    search(suspects, lambda ordinals: _kills(job, ordinals), found)
    return tuple(found)


def search(
    suspects: Sequence[int],
    kills: Callable[[Sequence[int]], str | None],
    found: list[tuple[int, str]],
    presumed: bool = False,
) -> bool:
    """Halve a guilty set until single members remain; append (ordinal, reason). Returns whether the set is guilty.

    Innocent sets cost one look each. Where the first half of a guilty set is innocent, the second is `presumed` guilty
    and not looked at as a whole; a single member always is, so that nobody is blamed for what only several do together.
    """
    if not suspects:
        return False
    if len(suspects) == 1 or not presumed:
        reason = kills(suspects)
        if reason is None:
            return False
        if len(suspects) == 1:
            found.append((suspects[0], reason))
            return True
    middle = len(suspects) // 2
    first = search(suspects[:middle], kills, found)
    search(suspects[middle:], kills, found, presumed=not first)
    return True


def _kills(job: ShardJob, ordinals: Sequence[int]) -> str | None:
    """Say why the child that processed these members died, or None when it lived."""
    alone = replace(job, only=tuple(ordinals))
    limit = job.limits.stage_seconds * 3
    try:
        done = subprocess.run(
            [sys.executable, "-m", "leukoflow.tasks.inference.bisect", str(os.getpid())],
            input=pickle.dumps(alone),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{DIED}: longer than {limit:.0f} s"
    if done.returncode < 0:
        return f"{DIED}: signal {-done.returncode}"
    if done.returncode == 75:
        return f"{DIED}: a stage ran longer than {job.limits.stage_seconds:.0f} s"
    return None if done.returncode == 0 else f"{DIED}: exit code {done.returncode}"


def _die_with(parent: int) -> None:
    """End this process when its worker is gone; nobody else would."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_die_with, args=(int(sys.argv[1]),), daemon=True).start()
    probe(pickle.loads(sys.stdin.buffer.read()))
