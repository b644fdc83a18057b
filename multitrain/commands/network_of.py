"""Print the network of weights as JSON: ``python -m multitrain.commands.network_of WEIGHTS``.

A submission runs this in a separate process, because it does not import torch itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from multitrain.cluster.exit_status import Exit
from multitrain.config import ConfigError


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status: 0, or 2 with a one-line error about weights that do not say their network."""
    from multitrain.interop.weights import run_config

    try:
        print(run_config(arguments[0]).model.model_dump_json())
    except ConfigError as error:
        print(error, file=sys.stderr)
        return Exit.MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
