"""Weights & Biases (optional): the same scalars as TensorBoard. Its failures never affect a run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Wandb:
    """Sends scalars to a project. After the first failure of any kind it logs one line and sends nothing more in this start.

    Args:
        project: the project's name.
        run_dir: the run's folder, after which the W&B run is named; a resumed run continues the same W&B run.
        settings: shown as the run's configuration.
        say: called with the line about a failure; default: print to standard error.
    """

    def __init__(
        self, project: str, run_dir: Path, settings: Mapping[str, Any], say: Callable[[str], None] | None = None
    ) -> None:
        self._say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self._run: Any = None
        name = run_dir.resolve().name
        self._try(lambda: self._open(project, name, run_dir, settings))

    def scalars(self, values: Mapping[str, float], completed: int) -> None:
        """Log scalars after `completed` updates."""
        if self._run is not None:
            self._try(lambda: self._run.log({**values, "update": completed}))

    def close(self) -> None:
        """Send the remaining scalars and finish the W&B run."""
        if self._run is not None:
            self._try(lambda: self._run.finish())
        self._run = None

    def _open(self, project: str, name: str, run_dir: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=project, name=name, id=name, resume="allow", dir=str(run_dir), config=dict(settings)
        )
        self._run.define_metric(
            "*", step_metric="update"
        )  # repeated updates of a resumed run overwrite the earlier points

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # of the library, the login or the network: no reason to stop the run
            self._run = None
            remedy = "pip install 'multitrain[wandb]'" if isinstance(error, ImportError) else "wandb login"
            said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self._say(f"Weights & Biases gets no more data from this start ({said}); the run continues. {remedy}?")
