"""``multitrain preflight``: run launch.preflight in a subprocess, because this package does not import the launcher."""

from __future__ import annotations

import argparse
import subprocess
import sys

from multitrain.config.arguments import Arguments


def main(arguments: Arguments) -> int:
    """``multitrain preflight``; returns the exit status. Ignores ``--config-dir``, which has no effect on a check of nodes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", action="append")
    rest = parser.parse_known_args(list(arguments))[1]
    return subprocess.run([sys.executable, "-m", "launch.preflight", *rest], check=False).returncode
