"""Networks of the official MViT and MViTv2 releases: which of their tensors this network can take, and why not the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from multitrain.config import ConfigError
from multitrain.interop.matching import POSITIONS, Report, Shape, listed

NO_PLACE = "this network has no such tensor"
_NAMED = (
    ("rel_pos_", "relative position embedding; this network adds absolute tables to its tokens"),
    ("cls_token", "class token; this network averages all tokens"),
    ("pos_embed_class", "position of a class token; this network has none"),
    (
        "cls_positional_encoding",
        "positions in the layout of pytorchvideo; this network's are pos_embed_spatial and pos_embed_temporal",
    ),
)
_SHORTCUT = "shortcut that projects the normalised input; this network's proj_max_pool projects the un-normalised one"
_JOINT_TABLE = "one table for all places and times; this network has a spatial and a temporal one"


class UnfitWeights(ConfigError):
    """Weights of a network that this one cannot compute; `reasons` has every tensor that does not fit, and why."""

    def __init__(self, message: str, reasons: Mapping[str, str]) -> None:
        super().__init__(message)
        self.reasons = dict(reasons)

    @property
    def details(self) -> list[str]:
        """One line a tensor that does not fit: its name, and why."""
        return [f"  {name}: {why}" for name, why in self.reasons.items()]


def official_reasons(state: Mapping[str, object]) -> dict[str, str]:
    """Tensors by which a file of the official layout is known, each with the reason why it has no place here.

    Empty for a file of the published MultiTrain layout.
    """
    found = {}
    for name in state:
        why = next((why for mark, why in _NAMED if mark in name), None)
        parts = name.split(".")
        if parts[0] == "blocks" and len(parts) == 4 and parts[2] == "proj":
            why = _SHORTCUT
        if name == "pos_embed":
            why = _JOINT_TABLE
        if why is not None:
            found[name] = why
    return found


def unfit(path: Path, report: Report, found: Mapping[str, Shape]) -> UnfitWeights | None:
    """The error of starting from a file whose backbone does not fit, or None when it does.

    Args:
        path: the file, for the message.
        report: of comparing the file with the model; heads, projections and the expander do not count.
        found: every tensor of the file.
    """
    known = official_reasons(found)
    reasons = {name: known.get(name, NO_PLACE) for name in report.unexpected if _of_backbone(name)}
    reasons |= {
        name: f"{list(was)} in the file, {list(wanted)} in this network"
        for name, was, wanted in report.reshaped
        if _of_backbone(name)
    }
    reasons |= {name: "not in the file; this network needs it" for name in report.missing if _of_backbone(name)}
    if not reasons:
        return None
    fits = sum(_of_backbone(name) for name in report.matched)
    return UnfitWeights(
        f"{path}: {len(reasons)} backbone tensors do not fit ({_by_reason(reasons)}), {fits} would; "
        "start from a published MultiTrain checkpoint instead",
        reasons,
    )


def refusal(path: Path, state: Mapping[str, object]) -> UnfitWeights | None:
    """The error of loading a file of the official layout as a whole model; None for a file of another layout."""
    reasons = official_reasons(state)
    if not reasons:
        return None
    reasons |= {name: "not in the file; this network needs it" for name in POSITIONS if name not in state}
    return UnfitWeights(
        f"{path}: an official MViT checkpoint, which this network cannot compute: {_by_reason(reasons)}; "
        "start from a published MultiTrain checkpoint instead",
        reasons,
    )


def _of_backbone(name: str) -> bool:
    return not name.startswith(("head.", "heads.", "projections.", "expander."))


def _by_reason(reasons: Mapping[str, str]) -> str:
    """``48 × relative position embedding; … (name, name, … 46 more)`` for each reason; shapes count as one."""
    groups: dict[str, list[str]] = {}
    for name, why in reasons.items():
        groups.setdefault("of another shape" if " in the file, " in why else why, []).append(name)
    return "; ".join(f"{len(names)} × {why} ({listed(names, most=2)})" for why, names in groups.items())


__all__ = ["UnfitWeights", "official_reasons", "refusal", "unfit"]
