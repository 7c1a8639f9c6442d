"""Runs a command that ends when the process that asked for it ends, however that happens. Standard library only.

Usage: `python -P _bound_process.py PARENT_PID COMMAND [ARGUMENT...]`. The kernel sends SIGTERM to this process when its
parent is gone (Linux: `prctl(PR_SET_PDEATHSIG)`, which survives the exec). Elsewhere the command just runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Bind this process to its parent, then become the command."""
    parent, command = int(arguments[0]), arguments[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it died before the kernel knew
            sys.exit(0)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
