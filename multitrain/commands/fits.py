"""Check whether the initial weights of a run fit its network: ``python -m multitrain.commands.fits CONFIG.yaml``.

A submission runs this in a separate process, because it does not import torch itself. The result is that of the run's start:
the same code copies the same weights, into a network on the meta device.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from multitrain.cluster.exit_status import Exit
from multitrain.config import ConfigError, RunConfig, load

if TYPE_CHECKING:
    from multitrain.interop.state_dict_report import LoadReport


def report(config: RunConfig) -> LoadReport:
    """Which tensors of `init_from` a run's network would load.

    Raises:
        ConfigError: the weights are missing, damaged, or those of another network.
    """
    import warnings

    import torch

    from multitrain.data.catalog import resolve_classes
    from multitrain.interop.start import initialise_from
    from multitrain.model import MultiTrain

    if config.init_from is None:
        raise ConfigError("init_from is not set, so there are no weights to check; set init_from=FILE")
    datasets = {name: resolve_classes(dataset) for name, dataset in config.data.datasets.items()}
    with torch.device("meta"):
        model = MultiTrain(config.model, datasets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that copying to the meta device does nothing
        return initialise_from(model, config.init_from, interpolate_positions=config.interpolate_positions)


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status: 0, or 2 with a one-line error about weights that cannot be used."""
    try:
        print(report(load(arguments[0])))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return Exit.MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
