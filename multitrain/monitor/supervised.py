"""What a launcher gives to the ranks it starts, by environment variables."""

from __future__ import annotations

import signal

PULSE_FD = "MULTITRAIN_PULSE_FD"
"""File descriptor of a pipe. Once a second the rank writes a line there: the seconds that it may be silent."""

STORE_KEY = "MULTITRAIN_STORE_KEY"
"""Key in hexadecimal digits by which the ranks of a start know each other's values in torch's store."""

STORE_FD = "MULTITRAIN_STORE_FD"
"""File descriptor of the socket, bound to MASTER_PORT, at which rank 0 serves torch's store."""

STACKS = signal.SIGRTMIN + 3
"""Signal at which a rank that writes to its pipe prints the stacks of its threads."""
