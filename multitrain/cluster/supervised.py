"""Environment variables, signals and sockets that a launcher passes to the ranks that it starts."""

from __future__ import annotations

import signal
import socket

PULSE_FD = "MULTITRAIN_PULSE_FD"
"""File descriptor of the heartbeat pipe. Once per second the rank writes a line to it: the seconds that it may be silent."""

STORE_KEY = "MULTITRAIN_STORE_KEY"
"""Key in hexadecimal digits with which the ranks of a start authenticate each other's values in torch's store."""

STORE_FD = "MULTITRAIN_STORE_FD"
"""File descriptor of the socket, bound to MASTER_PORT, on which rank 0 serves torch's store."""

STACKS = signal.SIGRTMIN + 3
"""Signal that makes a rank with a heartbeat pipe print the stacks of its threads."""


def listen(here: bool, port: int) -> socket.socket:
    """A socket that listens on `port` (0: any free port): on this machine only if `here`, else on all networks.

    Raises:
        OSError: the port is taken.
    """
    if here:
        return socket.create_server(("127.0.0.1", port), backlog=512)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=512, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=512)
