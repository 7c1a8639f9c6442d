"""A Prefect server on a socket that somebody else has opened: nobody can take its port while it starts.

Usage: `python -P _prefect_process.py DESCRIPTOR`, with Prefect's settings in the environment. It is what
`prefect server start` does in the foreground, except that that command opens its port only after many seconds.
"""

from __future__ import annotations

import socket
import sys


def main(descriptor: int) -> None:
    """Serve Prefect's API and dashboard on the listening socket with this file descriptor, until SIGTERM."""
    import uvicorn
    from prefect.server.api.server import create_app

    with socket.socket(fileno=descriptor) as listening:
        server = uvicorn.Server(uvicorn.Config(create_app(final=True), log_level="warning"))
        server.run(sockets=[listening])
    if not server.started:
        sys.exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
