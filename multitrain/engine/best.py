"""The best validation of a run by the measure of `checkpoint.best`, and the validations since: the rule of early stopping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from multitrain.config import RunConfig
from multitrain.config.engine import measure_of

Results = Mapping[str, Mapping[str, float]]
"""By dataset: the measures of a validation (:func:`multitrain.evaluation.validation.validate`)."""


class Best:
    """The best validation so far. Its state is a function of the updates, and stored in checkpoints.

    Args:
        config: uses `checkpoint.best` and `eval.patience`.
    """

    def __init__(self, config: RunConfig) -> None:
        self.measure = config.checkpoint.best
        self._patience = config.eval.patience
        self.update: int | None = None
        """Completed updates at the best validation; None before the first one, and without a measure."""
        self.value: float | None = None
        """Its value, in percent."""
        self.since = 0
        """Number of validations since."""

    def add(self, completed: int, results: Results) -> bool:
        """Take a validation after `completed` updates into account; whether it is better than all before."""
        if self.measure is None:
            return False
        dataset, name = measure_of(self.measure)
        values = [results[d][name] for d in ([dataset] if dataset in results else results)]
        value = sum(values) / len(values)
        if self.value is not None and not value > self.value:
            self.since += 1
            return False
        self.update, self.value, self.since = completed, value, 0
        return True

    @property
    def patience_is_over(self) -> bool:
        """Whether the run ends early."""
        return self._patience is not None and self.since >= self._patience

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"measure": self.measure, "update": self.update, "value": self.value, "since": self.since}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """From a checkpoint; another measure begins anew."""
        if state and state["measure"] == self.measure:
            self.update, self.value, self.since = state["update"], state["value"], state["since"]
