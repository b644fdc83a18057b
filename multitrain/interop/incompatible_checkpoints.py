"""Initial weights without a description of their network: the tensors that the run's network cannot load, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from multitrain.config import ConfigError
from multitrain.interop.state_dict_report import LoadReport, Shape, abbreviated

NO_SUCH_TENSOR = "this network has no such tensor"
_REASONS = (
    ("rel_pos_", "relative position embedding, which this network does not have"),
    ("cls_token", "class token; this network has none"),
    ("pos_embed_class", "position of a class token; this network has none"),
    ("cls_positional_encoding", "positions in the layout of pytorchvideo, which is not read"),
)
_SHORTCUT = "shortcut that projects the normalised input, which this network does not have"
_JOINT_TABLE = "one table for all places and times; this network has another"
_MVITV2 = (
    "the file is an official MViT or MViTv2: choose its network with model=mvitv2_s, mvitv2_b or mvitv2_l, which load such files, "
    "or start from a published MultiTrain checkpoint"
)


class IncompatibleWeights(ConfigError):
    """The weights belong to a network that this one cannot compute; `reasons` maps each tensor that does not fit to the reason."""

    def __init__(self, message: str, reasons: Mapping[str, str]) -> None:
        super().__init__(message)
        self.reasons = dict(reasons)

    @property
    def details(self) -> list[str]:
        """One line per tensor that does not fit: its name and the reason."""
        return [f"  {name}: {why}" for name, why in self.reasons.items()]


def official_tensors(state: Mapping[str, object]) -> dict[str, str]:
    """The tensors that mark a file of the official layout, each with the reason why the published network has no such tensor.

    Empty for a file of the published MultiTrain layout.
    """
    found = {}
    for name in state:
        why = next((why for mark, why in _REASONS if mark in name), None)
        parts = name.split(".")
        if parts[0] == "blocks" and len(parts) == 4 and parts[2] == "proj":
            why = _SHORTCUT
        if name == "pos_embed":
            why = _JOINT_TABLE
        if why is not None:
            found[name] = why
    return found


def backbone_mismatch(path: Path, report: LoadReport, found: Mapping[str, Shape]) -> IncompatibleWeights | None:
    """The error for initial weights whose backbone does not fit, or None if it fits.

    Args:
        path: the file, for the message.
        report: the comparison of the file with the model; heads, projections and the expander are ignored.
        found: shapes of all tensors of the file, by name.
    """
    known = official_tensors(found)
    reasons = {name: known.get(name, NO_SUCH_TENSOR) for name in report.unexpected if of_backbone(name)}
    reasons |= {
        name: f"{list(was)} in the file, {list(wanted)} in this network"
        for name, was, wanted in report.reshaped
        if of_backbone(name)
    }
    reasons |= {name: "not in the file; this network needs it" for name in report.missing if of_backbone(name)}
    if not reasons:
        return None
    fits = sum(of_backbone(name) for name in report.matched)
    official = any(name in known for name in report.unexpected)
    remedy = _MVITV2 if official else "start from a checkpoint of this network instead"
    return IncompatibleWeights(
        f"{path}: {len(reasons)} backbone tensors do not fit ({_by_reason(reasons)}), {fits} would; {remedy}", reasons
    )


def of_backbone(name: str) -> bool:
    """Whether a tensor belongs to the backbone, by MultiTrain's or the published name."""
    return not name.startswith(("head.", "heads.", "projections.", "expander."))


def _by_reason(reasons: Mapping[str, str]) -> str:
    """``48 × relative position embedding … (name, name, … 46 more)`` for each reason; all wrong shapes are one reason."""
    groups: dict[str, list[str]] = {}
    for name, why in reasons.items():
        groups.setdefault("of another shape" if " in the file, " in why else why, []).append(name)
    return "; ".join(f"{len(names)} × {why} ({abbreviated(names, most=2)})" for why, names in groups.items())


__all__ = ["IncompatibleWeights", "backbone_mismatch", "of_backbone", "official_tensors"]
