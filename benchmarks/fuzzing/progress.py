"""Counts of a fuzz in progress, in a file from which the same command resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.fuzzing.judge import BAD, GOOD, Outcome
from multitrain.files import replace_text

FAULTS_KEPT = 5
"""Faults kept per reader and kind."""


@dataclass
class Progress:
    """Outcomes so far."""

    readers: list[str]
    first: int
    """Number of each reader's first case; with the names of the readers it determines all inputs."""
    done: int = 0
    """Number of cases so far."""
    outcomes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Number of cases by reader and kind of outcome."""
    faults: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def resumed(cls, file: Path, readers: list[str], first: int) -> Progress:
        """The progress in `file` if it is of the same cases, else a new one."""
        with contextlib.suppress(FileNotFoundError):
            found = cls.read(file)
            if (found.readers, found.first) == (readers, first):
                return found
        return cls(readers, first)

    @classmethod
    def read(cls, file: Path) -> Progress:
        """Read the counts from a file; other keys are ignored. Raises FileNotFoundError."""
        content = json.loads(file.read_text(encoding="utf-8"))
        return cls(**{f.name: content[f.name] for f in dataclasses.fields(cls)})

    def save(self, file: Path) -> None:
        """Replace the file atomically."""
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    def add(self, reader: str, number: int, outcome: Outcome) -> bool:
        """Count a case; return whether it is a fault to print."""
        counts = self.outcomes.setdefault(reader, {})
        counts[outcome.kind] = counts.get(outcome.kind, 0) + 1
        self.done += 1
        shown = outcome.kind in BAD and counts[outcome.kind] <= FAULTS_KEPT
        if shown:
            self.faults.append({"case": f"{reader}/{number}", "kind": outcome.kind, "text": outcome.text})
        return shown

    def total(self) -> Counter[str]:
        """Number of cases by kind of outcome."""
        return sum(map(Counter, self.outcomes.values()), Counter[str]())

    def table(self) -> str:
        """Readers × outcomes as Markdown, with the kinds of faults that occurred."""
        total = self.total()
        kinds = [*GOOD, *(kind for kind in BAD if total[kind] or kind in ("traceback", "hang"))]
        lines = ["| reader | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
        for name, counts in [*((r, self.outcomes.get(r, {})) for r in self.readers), ("**all**", total)]:
            lines.append("| " + " | ".join([name, *(str(counts.get(kind, 0)) for kind in kinds)]) + " |")
        return "\n".join(lines)
