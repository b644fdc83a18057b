"""``multitrain preflight``: the check of the launcher, which this package does not import."""

from __future__ import annotations

import subprocess
import sys

from multitrain.config.arguments import Arguments


def main(arguments: Arguments) -> int:
    """``multitrain preflight``; returns the exit status."""
    return subprocess.run([sys.executable, "-m", "launch.preflight", *arguments], check=False).returncode
