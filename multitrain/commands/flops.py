"""``multitrain flops``: parameters and multiply-accumulates of a model, and how each tensor is trained."""

from __future__ import annotations

from multitrain.commands.common import MODEL, configured, stored
from multitrain.config import RunConfig
from multitrain.config.arguments import Arguments, Parser


def main(arguments: Arguments) -> int:
    """``multitrain flops``; returns the exit status."""
    parser = Parser("flops", "Parameters, and multiply-accumulates per clip.", "multitrain flops model=mvit_b16_16x4")
    parser.add_model(f"{MODEL}, instead of the default configuration")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="options, e.g. experiment=k400 model.frames=16"
    )
    parser.add_argument(
        "--tensors",
        action="store_true",
        help="list every tensor instead: its shape, its layer, its learning rate and weight decay, or whether it is frozen",
    )
    given = parser.parse_with_overrides(arguments)
    from multitrain.data.catalog import resolve_classes
    from multitrain.model.cost import flops as count

    model = given.checkpoint or given.model
    if model:
        config = stored(model, given.overrides, given.config_dir)
    else:
        config = configured(None, given.overrides, given.config_dir)
    datasets = {name: resolve_classes(d) for name, d in config.data.datasets.items()}
    if given.tensors:
        print(*_tensors(config, datasets), sep="\n")
        return 0
    parameters, operations = count(config.model, datasets)
    m = config.model
    print(
        f"{parameters:,} parameters, {operations / 1e9:.2f} G multiply-accumulates for a clip of {m.frames} × {m.crop}²"
    )
    return 0


def _tensors(config: RunConfig, datasets: dict[str, int]) -> list[str]:
    """One line for each tensor of a run's network. Raises ConfigError."""
    import torch

    from multitrain.engine.parameters import freeze, full_table, treatments
    from multitrain.model import MultiTrain

    with torch.device("meta"):
        model = MultiTrain(config.model, datasets)
    freeze(model, config.optim.freeze, config.loss)
    return full_table(treatments(model, config.optim))
