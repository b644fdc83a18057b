"""``multitrain preflight``: the check of the launcher, which this package does not import."""

from __future__ import annotations

import argparse
import subprocess
import sys

from multitrain.config.arguments import Arguments


def main(arguments: Arguments) -> int:
    """``multitrain preflight``; returns the exit status. It looks at nodes, so ``--config-dir``, as of other verbs, is passed over."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", action="append")
    rest = parser.parse_known_args(list(arguments))[1]
    return subprocess.run([sys.executable, "-m", "launch.preflight", *rest], check=False).returncode
