"""``multitrain convert``: convert weights between file formats."""

from __future__ import annotations

import sys

from multitrain.commands.common import MODEL
from multitrain.config.arguments import Arguments, Parser, whole_number
from multitrain.text import printable


def _parser() -> Parser:
    parser = Parser(
        "convert",
        "Convert weights to .pyth, .safetensors + config.json, or a folder in MultiTrain's format.",
        "multitrain convert runs/k400_mit_ssv2 model.pyth",
    )
    parser.add_model(MODEL)
    parser.add_argument(
        "target", help="a new file, whose suffix sets the format: .pyth or .safetensors; or a new folder"
    )
    parser.add_argument(
        "--frames", type=whole_number, help="new number of frames per clip: interpolates the position tables"
    )
    parser.add_argument(
        "--crop", type=whole_number, help="new side of a clip in pixels: interpolates the position tables"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing target if this command made it")
    parser.add_argument("--weights-only", action="store_true", help="leave out the optimizer's state")
    parser.add_argument(
        "--optimizer",
        choices=("ddp", "single"),
        default="ddp",
        help="parameter groups in a .pyth file made from a run: those of the published code on several GPUs (ddp) or on one (single)",
    )
    parser.add_argument(
        "--copy",
        metavar="NAME",
        help="name of the set of weights to take instead of the trained ones, e.g. model_ema",
    )
    return parser


def main(arguments: Arguments) -> int:
    """``multitrain convert``; returns the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    given.source, _ = parser.model_and_words(given, [])
    from multitrain.interop.convert import convert as write

    done = write(
        given.source,
        given.target,
        frames=given.frames,
        crop=given.crop,
        force=given.force,
        weights_only=given.weights_only,
        grouping=given.optimizer,
        copy=given.copy,
    )
    heads = ", ".join(f"{name} ({classes})" for name, classes in done.datasets.items())
    print(printable(f"{done.target}: {done.tensors} tensors, {done.parameters:,} parameters; heads: {heads}"))
    for note in done.notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    return 0
