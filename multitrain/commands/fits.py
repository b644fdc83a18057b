"""Whether the initial weights of a run fit its network: ``python -m multitrain.commands.fits CONFIG.yaml``.

A submission asks this in a process of its own, since it does without torch itself. The answer is that of the run's start:
the same code copies the same weights, into a network that has no memory.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from multitrain.config import ConfigError, RunConfig, load
from multitrain.config.arguments import MISTAKE


def fits(config: RunConfig) -> str:
    """One line about what of `init_from` a run's network would take.

    Raises:
        ConfigError: there are no weights, they are damaged, or they are another network's.
    """
    import warnings

    import torch

    from multitrain.data.catalog import resolve_classes
    from multitrain.interop.start import initialise_from
    from multitrain.model import MultiTrain

    if config.init_from is None:
        return "no initial weights"
    datasets = {name: resolve_classes(dataset) for name, dataset in config.data.datasets.items()}
    with torch.device("meta"):
        model = MultiTrain(config.model, datasets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copying into a network without memory does nothing
        return str(initialise_from(model, config.init_from, interpolate_positions=config.interpolate_positions))


def main(arguments: Sequence[str]) -> int:
    """The command. Returns the exit status: 0, or 2 with one line about weights that cannot be used."""
    try:
        print(fits(load(arguments[0])))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
