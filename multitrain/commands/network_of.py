"""Print the network of weights as JSON: ``python -m multitrain.commands.network_of WEIGHTS``.

A submission runs this in a separate process, because it does not import torch itself. Weights that do not say their network are
refused in one line, with exit status 2.
"""

from __future__ import annotations

import sys

from multitrain.config.arguments import answered


def _print_network(weights: str) -> int:
    from multitrain.interop.weights import run_config

    print(run_config(weights).model.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(answered(lambda: _print_network(sys.argv[1])))
