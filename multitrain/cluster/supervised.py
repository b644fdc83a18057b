"""What a launcher gives to the ranks it starts, by environment variables."""

from __future__ import annotations

import signal
import socket

PULSE_FD = "MULTITRAIN_PULSE_FD"
"""File descriptor of a pipe. Once a second the rank writes a line there: the seconds that it may be silent."""

STORE_KEY = "MULTITRAIN_STORE_KEY"
"""Key in hexadecimal digits by which the ranks of a start know each other's values in torch's store."""

STORE_FD = "MULTITRAIN_STORE_FD"
"""File descriptor of the socket, bound to MASTER_PORT, at which rank 0 serves torch's store."""

STACKS = signal.SIGRTMIN + 3
"""Signal at which a rank that writes to its pipe prints the stacks of its threads."""


def listen(here: bool, port: int) -> socket.socket:
    """A socket that listens at `port` (0: one that is free): to this machine only where `here`, else to all networks.

    Raises:
        OSError: the port is taken.
    """
    if here:
        return socket.create_server(("127.0.0.1", port), backlog=512)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=512, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=512)
