"""Style of all plots: axes, colours, PNG. matplotlib is imported on the first plot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from multitrain.errors import ConfigError
from multitrain.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C564B")
"""Colours of Okabe and Ito, distinguishable for colour-blind readers."""
INK, FAINT = "#24292f", "#8b949e"


def figure(
    columns: int, rows: int, *, width: float, height: float, ratio: float = 1.0, widths: Sequence[float] | None = None
) -> tuple[Figure, Any]:
    """A figure of width × height inches and its axes [rows, columns].

    The first column is `ratio` times as wide as the others, or columns are as wide as `widths` say.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("pictures need matplotlib; pip install 'multitrain[report]'") from None
    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with rc_context(style):
        drawn = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        shares = widths or [ratio, *[1.0] * (columns - 1)]
        axes = drawn.subplots(rows, columns, squeeze=False, gridspec_kw={"width_ratios": shares})
    for axis in axes.ravel():
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e6e8eb", linewidth=0.7)
        axis.set_axisbelow(True)
    return drawn, axes


def cycle(count: int) -> list[str]:
    """`count` colours."""
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def png(drawn: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=125)
    return buffer.getvalue()


def label(text: str) -> str:
    """Text of a stranger for a picture: printable, and never a formula (matplotlib typesets what stands between ``$``)."""
    return printable(text).replace("$", r"\$")
