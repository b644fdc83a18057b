"""Options whose value is ``auto``: chosen when a run is composed, from its training videos and this machine, and then frozen.

A typed value, or one of the user's own YAML, is never ``auto`` and so always wins. What determines a run's result (batch, length,
learning rate, augmentation, loss) depends on the data; what determines its speed (ranks, workers, threads) on the machine. The
network and the precision depend on whether there is a GPU. A resumed run keeps the values of its first submission.
"""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from multitrain.config import machine
from multitrain.config.errors import ConfigError
from multitrain.config.reading import parse_json, read_bytes, read_yaml, shown
from multitrain.config.schema import fields
from multitrain.text import counted

AUTO = "auto"
CHOOSE = "choose"
"""In a file of a config group, ``choose: auto`` stands for the options of another file of the group."""

SMALL_DATA = 2000
"""Training videos below which mixing and RandAugment are left out."""
TINY_WIDTH = 64
"""Channels of the first stage up to which a network is far smaller than the published ones."""
ONE_GPU_VIDEOS = 20_000
"""Training videos up to which a job of SLURM asks for one GPU."""


class Choice(NamedTuple):
    """A value that was chosen."""

    option: str
    value: Any
    why: str
    """The reason; empty: not worth a line."""


Chosen = tuple[Any, str]


class Facts:
    """The values of a composed mapping, in which ``auto`` is replaced when it is asked for."""

    def __init__(self, mapping: dict[str, Any], configs: Path) -> None:
        self.mapping, self.configs = mapping, configs
        self.choices: dict[str, Choice] = {}
        self.network: Mapping[str, Any] | None = None
        """The network of the initial weights, if it was read."""

    def raw(self, option: str) -> Any:
        """The value as composed, which may be ``auto``; the schema's default for an option that is not set."""
        node: Any = self.mapping
        for part in option.split("."):
            if not isinstance(node, dict) or part not in node:
                return fields()[option].get_default(call_default_factory=True)
            node = node[part]
        return node

    def __getitem__(self, option: str) -> Any:
        value = self.raw(option)
        if value == AUTO and option in SOLVERS:
            value, why = SOLVERS[option](self)
            *groups, last = option.split(".")
            node = self.mapping
            for group in groups:
                node = node.setdefault(group, {})
            node[last] = value
            self.choices[option] = Choice(option, value, why)
        return value

    def number(self, option: str) -> float:
        """The value of an option that is a number. Raises ConfigError: a text that is none."""
        value = self[option]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ConfigError(f"{option}={shown(value, 80)}: a number above 0 is needed")
        return value

    @property
    def datasets(self) -> dict[str, Mapping[str, Any]]:
        """The datasets by name."""
        data = self.mapping.get("data")
        found = data.get("datasets") if isinstance(data, dict) else None
        if not isinstance(found, dict) or not found or not all(isinstance(d, dict) for d in found.values()):
            raise ConfigError("data.datasets: none is set; choose your data: --config-dir DIR data=NAME")
        return found

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Training videos of each dataset, as often as they count."""
        return {
            name: _lines(name, Path(str(d.get("annotations"))) / "train.csv") * int(d.get("replicas") or 1)
            for name, d in self.datasets.items()
        }

    @property
    def videos(self) -> int:
        """Training videos of all datasets."""
        return sum(self.sizes.values())

    @property
    def on_cpus(self) -> bool:
        """Whether the ranks will compute on CPU cores, as far as this machine shows."""
        if self["cluster.kind"] == "local":
            return machine.gpu_count() == 0
        return bool(self["cluster.gpu_request"] == "none")

    @property
    def group(self) -> int:
        """Videos that have to stay together, as `RunConfig.group`."""
        mixes = self["augment.mix_probability"] and (self["augment.mixup_alpha"] or self["augment.cutmix_alpha"])
        return int(self["augment.mix_group"]) if mixes else 1

    @property
    def updates(self) -> int:
        """Length of the run in updates."""
        if self["updates"] is not None:
            return int(self.number("updates"))
        return max(1, math.ceil(self.number("epochs") * self.videos / self.number("effective_batch")))

    @property
    def is_tiny(self) -> bool:
        """Whether the network is far smaller than the published ones."""
        return self["model.backbone"] is None and self.number("model.width") <= TINY_WIDTH

    def all_have(self, split: str) -> bool:
        """Whether every dataset has this annotation file."""
        return all((Path(str(d.get("annotations"))) / f"{split}.csv").is_file() for d in self.datasets.values())


def resolve(mapping: dict[str, Any], configs: Path) -> list[Choice]:
    """Replace every ``auto`` in a composed configuration, in place; returns what was chosen, in a sensible order.

    Args:
        configs: the shipped folder of config groups.

    Raises:
        ConfigError: the training videos, or the initial weights, that a choice depends on cannot be read.
    """
    facts = Facts(mapping, configs)
    chosen = [c for group in GROUPS if (c := _choose_file(facts, group)) is not None]
    for option in SOLVERS:
        facts[option]
    return [*chosen, *(facts.choices[o] for o in SOLVERS if o in facts.choices)]


def restore(mapping: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Replace every ``auto`` in the composed configuration of a run by the value that the run was submitted with, in place."""
    for group in GROUPS:
        own = mapping.get(group)
        if isinstance(own, dict) and own.get(CHOOSE) == AUTO:
            del own[CHOOSE]
            mapping[group] = {**saved[group], **own}
    for option in SOLVERS:
        *groups, last = option.split(".")
        node, before = mapping, saved
        for group in groups:
            node, before = node.get(group) or {}, before[group]
        if node.get(last) == AUTO:
            node[last] = before[last]


def lines(choices: Sequence[Choice]) -> list[str]:
    """What was chosen and why, one line per reason."""
    by_reason: dict[str, list[str]] = {}
    for choice in choices:
        if choice.why:
            word = choice.option if choice.value == "" else f"{choice.option}={_typed(choice.value)}"
            by_reason.setdefault(choice.why, []).append(word)
    return [f"{' '.join(words)}: {why}" for why, words in by_reason.items()]


def _typed(value: Any) -> str:
    """A value as it is typed in an override."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------------------- groups


def _choose_file(facts: Facts, group: str) -> Choice | None:
    """Put the options of the chosen file of a group below those that are set; None if the group is not ``choose: auto``."""
    own = facts.mapping.get(group)
    if not isinstance(own, dict) or own.get(CHOOSE) != AUTO:
        return None
    del own[CHOOSE]
    name, why, base = GROUPS[group](facts)
    if base is None:
        base = read_yaml(facts.configs / group / f"{name}.yaml") or {}
    facts.mapping[group] = {**base, **own}
    return Choice(group, name, why)


FileChoice = tuple[str, str, "Mapping[str, Any] | None"]


def _cluster(_: Facts) -> FileChoice:
    if machine.has_slurm():
        return "slurm", "this machine submits to SLURM", None
    return "local", "no SLURM on this machine, so the run stays here", None


def _augment(facts: Facts) -> FileChoice:
    if facts.videos < SMALL_DATA:
        return "light", f"{facts.videos} training videos, fewer than {SMALL_DATA}", None
    return "recommended", f"{facts.videos} training videos, {SMALL_DATA} or more", None


def _model(facts: Facts) -> FileChoice:
    start = facts["init_from"]
    if start:
        facts.network = network_of(str(start))
        slow = facts.on_cpus and int(facts.network["width"]) > TINY_WIDTH
        return "", "the network of init_from" + ("; without a GPU an update takes long" if slow else ""), facts.network
    if facts.on_cpus:
        return "tiny", "no GPU, and no init_from: a network that a CPU trains in minutes", None
    return "mvit_b16_16x4", "no init_from: random weights, which need many videos; see docs/weights.md", None


GROUPS: dict[str, Callable[[Facts], FileChoice]] = {"cluster": _cluster, "augment": _augment, "model": _model}


@functools.lru_cache(maxsize=8)
def network_of(weights: str) -> Mapping[str, Any]:
    """The options of the network of initial weights, read in a separate process, since composing does not import torch.

    Raises:
        ConfigError: the weights do not say what their network is.
    """
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "multitrain.commands.network_of", weights]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["the check ended without a word"])[-1]
        raise ConfigError(
            f"init_from={shown(said.removeprefix('error: '), 600)}; or say the network yourself: model=NAME"
        )
    found = parse_json(done.stdout, f"{weights}: its network")
    return dict(found)


# ------------------------------------------------------------------------------------------------------------- options


def _one(facts: Facts) -> bool:
    return len(facts.datasets) == 1


def _batch(facts: Facts) -> Chosen:
    videos = facts.videos
    size = 1 << int(math.log2(max(1, min(videos, max(8, min(256, videos // 16))))))
    unit = facts.group * (1 if facts.raw("gpus") == AUTO else int(facts.number("nodes") * facts.number("gpus")))
    size = max(unit, size // unit * unit)
    return size, f"{videos} training videos, {_about(videos / size)} updates a pass"


def _about(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def _gpus(facts: Facts) -> Chosen:
    batch, nodes, group = int(facts.number("effective_batch")), int(facts.number("nodes")), facts.group
    most, why = _possible_ranks(facts)
    fits = [g for g in range(1, most + 1) if batch % (g * nodes * group) == 0 and (g == 1 or batch >= 4 * g * nodes)]
    return max(fits, default=1), why


def _possible_ranks(facts: Facts) -> tuple[int, str]:
    if facts["cluster.kind"] != "local":
        few = facts.videos <= ONE_GPU_VIDEOS
        return (
            (1, f"{facts.videos} training videos; more GPUs: gpus=N") if few else (8, f"{facts.videos} training videos")
        )
    if facts.on_cpus:
        cores = machine.cores()
        return max(1, cores // 2), f"no GPU on this machine: ranks compute on its {counted(cores, 'core')}"
    here = machine.gpu_count()
    return here, f"{counted(here, 'GPU')} on this machine, and 4 videos or more for each"


def _workers(facts: Facts) -> Chosen:
    if facts["cluster.kind"] != "local":
        cores = int(facts.number("cluster.cpus_per_gpu"))
        return max(1, min(8, cores - 1)), f"cluster.cpus_per_gpu={cores}"
    cores, ranks = machine.cores(), int(facts.number("gpus"))
    fits = max(0, min(8, (cores - ranks) // ranks))
    return min(
        fits, 1
    ) if facts.is_tiny and facts.on_cpus else fits, f"{counted(cores, 'core')} for {counted(ranks, 'rank')}"


def _threads(facts: Facts) -> Chosen:
    if not (facts.on_cpus and facts["cluster.kind"] == "local"):
        return 1, ""
    cores, ranks = machine.cores(), int(facts.number("gpus"))
    each = (cores - ranks * int(facts["data.workers"])) // ranks
    return max(1, min(8, each)), f"{counted(cores, 'core')} for {counted(ranks, 'rank')}"


def _precision(facts: Facts) -> Chosen:
    return ("fp32", "no GPU, and bf16 is slow on most CPUs") if facts.on_cpus else ("bf16", "for GPUs")


def _skip_cap(facts: Facts) -> Chosen:
    usual = 0.01
    fewest = min(facts.sizes.values())
    if fewest * usual >= 1:
        return usual, ""
    return math.ceil(1000 / fewest) / 1000, f"one unreadable video of {fewest} does not stop the run"


def _epochs(facts: Facts) -> Chosen:
    if facts["updates"] is not None:
        return fields()["epochs"].default, ""
    fresh = not facts["init_from"]
    updates, fewest = (800, 60) if fresh else (400, 30)
    passes = min(200, max(fewest, math.ceil(updates * facts.number("effective_batch") / facts.videos)))
    what = "random weights" if fresh else "weights of init_from"
    return float(passes), f"{what}: {updates} updates or {fewest} passes, whichever is more, and at most 200 passes"


def _warmup(facts: Facts) -> Chosen:
    passes = facts.updates * facts.number("effective_batch") / facts.videos
    return round(passes / 10, 2), "a tenth of the run"


def _lr(facts: Facts) -> Chosen:
    if facts.is_tiny:
        return (5e-4, "a small network") if facts["init_from"] else (2e-3, "a small network with random weights")
    batch = facts.number("effective_batch")
    return float(f"{4e-4 * math.sqrt(batch / 512):.2g}"), f"4e-4 for 512 videos, by the square root for {batch:g}"


def _low_lr(facts: Facts) -> Chosen:
    return float(f"{facts.number('optim.lr') / 100:.2g}"), ""


def _clip_norm(facts: Facts) -> Chosen:
    if facts.is_tiny and not facts["init_from"]:
        return 20.0, "a small network with random weights"
    return fields()["optim.clip_norm"].default, ""


def _head(facts: Facts) -> Chosen:
    if facts.network is not None:
        return facts.network["head"], ""
    return ("linear", "one dataset") if _one(facts) else ("mlp", f"{len(facts.datasets)} datasets")


def _projection_weight(facts: Facts) -> Chosen:
    return (0.0, "one dataset") if _one(facts) else (1.0, f"{len(facts.datasets)} datasets")


def _informative_weight(facts: Facts) -> Chosen:
    if _one(facts):
        return 0.0, "one dataset"
    clips = facts.number("effective_batch") * facts["augment.copies"]
    weight = float(f"{min(0.1, clips / 800):.2g}")
    return weight, f"{clips:g} clips an update; 0.1 from 80 on, since few say little of variances and covariances"


def _projections(facts: Facts) -> Chosen:
    used = not _one(facts) and facts["loss.projection_weight"] > 0
    return used, "one dataset" if _one(facts) else f"loss.projection_weight={facts['loss.projection_weight']:g}"


def _expander(facts: Facts) -> Chosen:
    weight = facts["loss.informative_weight"]
    return weight > 0, "one dataset" if _one(facts) and not weight else f"loss.informative_weight={weight:g}"


def _validation(facts: Facts) -> Chosen:
    if not facts.all_have("val"):
        return None, "there is no val.csv of every dataset"
    return max(1, facts.updates // 10), f"10 times in {counted(facts.updates, 'update')}"


def _checkpoints(facts: Facts) -> Chosen:
    return max(1, facts.updates // 10), f"10 times in {counted(facts.updates, 'update')}"


def _best(facts: Facts) -> Chosen:
    several = {bool(d.get("multi_label")) for d in facts.datasets.values()}
    if facts["eval.every"] is None or len(several) > 1:
        return None, ""
    name = next(iter(facts.datasets)) if _one(facts) else "mean"
    return (
        f"val/{name}/{'map' if True in several else 'top1'}",
        "the best checkpoint is kept, tested and exported as RUN/best",
    )


def _then(facts: Facts) -> Chosen:
    return (
        ("eval", "tested after training") if facts.all_have("test") else (None, "there is no test.csv of every dataset")
    )


SOLVERS: dict[str, Callable[[Facts], Chosen]] = {
    "effective_batch": _batch,
    "gpus": _gpus,
    "precision": _precision,
    "data.workers": _workers,
    "engine.threads": _threads,
    "data.skip_cap": _skip_cap,
    "epochs": _epochs,
    "optim.lr": _lr,
    "optim.start_lr": _low_lr,
    "optim.end_lr": _low_lr,
    "optim.clip_norm": _clip_norm,
    "optim.warmup_epochs": _warmup,
    "loss.projection_weight": _projection_weight,
    "loss.informative_weight": _informative_weight,
    "model.head": _head,
    "model.projections": _projections,
    "model.expander": _expander,
    "eval.every": _validation,
    "checkpoint.every": _checkpoints,
    "checkpoint.best": _best,
    "then": _then,
}
"""By option that may be ``auto``: its value and the reason."""


def _lines(dataset: str, file: Path) -> int:
    """Number of lines with a video."""
    if not file.is_file():
        raise ConfigError(
            f"{file}: no such file, and the defaults of experiment=finetune depend on the number of training videos of {dataset!r}; "
            "choose your data (--config-dir DIR data=NAME, written by `multitrain data import folder`)"
        )
    count = sum(1 for line in read_bytes(file).splitlines() if line.strip())
    if not count:
        raise ConfigError(f"{file}: no line in it; write 'path label' lines")
    return count
