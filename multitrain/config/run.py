"""The complete configuration of a run."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from multitrain.config.augment import AugmentConfig
from multitrain.config.base import Settings
from multitrain.config.cluster import ClusterConfig
from multitrain.config.data import DataConfig
from multitrain.config.engine import MEAN, CheckpointConfig, EngineConfig, MonitorConfig, measure_of
from multitrain.config.evaluation import EvalConfig
from multitrain.config.loss import LossConfig
from multitrain.config.model import ModelConfig
from multitrain.config.optim import EmaConfig, OptimConfig
from multitrain.config.reading import shown

LONGEST_NAME = 255
"""Limit of a file name, in bytes."""


def check_run_name(name: str, overhead: int = 0) -> str:
    """`name`, if it is a valid name of a run.

    Args:
        name: the name without a path.
        overhead: bytes by which names of temporary folders beside the run's folder are longer.

    Raises:
        ValueError: it cannot be a folder name, or is too long.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+=,@-]*", name):
        raise ValueError(f"{shown(repr(name), 80)} cannot be a folder name; use letters, digits and . _ + = , @ -")
    if len(name) > LONGEST_NAME - overhead:
        raise ValueError(
            f"{shown(name, 40)} has {len(name)} characters, the limit is {LONGEST_NAME - overhead}; give a shorter name"
        )
    return name


class RunConfig(Settings):
    """Everything that determines a run. A run is a pure function of this and the update number."""

    name: str | None = None
    """Name of the run and of its folder under `runs`. Submitting the same name again resumes the run. If not given: experiment and time."""
    runs: str = "runs"
    """Folder of runs."""
    experiment_name: str = "run"
    """Beginning of `name` if it is not given; the experiment file sets it."""
    nodes: int = Field(1, ge=1, le=100_000)
    """Number of nodes."""
    gpus: int = Field(8, ge=1, le=1024)
    """GPUs per node; one rank each. Without GPUs: ranks per node."""
    updates: int | None = Field(None, ge=1, le=10**12)
    """Length of the run in updates of the weights; takes precedence over `epochs`."""
    epochs: float = Field(50.0, gt=0, le=10**9)
    """Length of the run in passes over the union of the datasets."""
    effective_batch: int = Field(512, ge=1, le=10**8)
    """Videos per update, over all ranks and accumulation steps."""
    micro_batch: int | None = Field(None, ge=1, le=10**8)
    """Videos that a rank processes at once; computed if not given."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Arithmetic of training."""
    activation_checkpointing: Literal["none", "mlp", "selective", "full"] = "none"
    """Activations that are recomputed in the backward pass to save memory; the results are the same."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of all random numbers."""
    deterministic: bool = False
    """Use deterministic kernels only: on GPUs, too, an interrupted run then ends with bit-identical weights."""
    init_from: str | None = None
    """Initial weights: a `.pyth`, `.safetensors`, run or checkpoint folder. Not for resuming: the run starts at update 0."""
    branch_from: str | None = None
    """`RUN@UPDATE`: a new run that begins with this checkpoint of another one, to extend it or to cool it down. It has the other run's
    options, except for those that are typed; its videos, their order and the network stay as they are."""
    interpolate_positions: bool = False
    """Resize the position embeddings of `init_from` if they are for clips of another size; otherwise such weights are refused."""
    from_scratch: bool = False
    """Start a run whose checkpoints are gone from the beginning. Applies to one submission."""
    update_code: bool = False
    """Resume with the code of this checkout instead of the run's own snapshot. Applies to one submission."""
    dry_run: bool = False
    """Print what would be submitted, and submit nothing."""
    then: Literal["eval"] | None = None
    """What follows successful training: `eval` submits the multi-view test of each dataset, to start after it."""
    preflight: bool = False
    """Check the nodes before the run starts."""

    cluster: ClusterConfig
    data: DataConfig
    model: ModelConfig
    loss: LossConfig
    optim: OptimConfig
    engine: EngineConfig
    augment: AugmentConfig
    eval: EvalConfig
    ema: EmaConfig = EmaConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.gpus

    @field_validator("name")
    @classmethod
    def _is_folder_name(cls, value: str | None) -> str | None:
        return None if value is None else check_run_name(value)

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        datasets = self.data.datasets
        if self.cluster.kind == "local" and self.nodes != 1:
            raise ValueError(
                f"nodes={self.nodes} with cluster=local, which is this machine only; use nodes=1, or cluster=slurm or hosts"
            )
        self._consistent_hosts()
        if self.loss.informative_weight > 0 and not self.model.expander:
            raise ValueError(
                "loss.informative_weight is positive but model.expander=false; set model.expander=true or loss.informative_weight=0"
            )
        if len(datasets) > 1 and self.loss.projection_weight > 0 and not self.model.projections:
            raise ValueError(
                "loss.projection_weight is positive but model.projections=false; set model.projections=true or loss.projection_weight=0"
            )
        if self.loss.informative_weight > 0 and self.effective_batch * self.augment.copies < 2:
            raise ValueError(
                "loss.informative_weight is positive but an update has one clip, which has no variance; use effective_batch=2 or "
                "more, augment.copies=2 or loss.informative_weight=0"
            )
        for name in self.loss.dataset_weights:
            if name not in datasets:
                raise ValueError(
                    f"loss.dataset_weights names {name!r}, which is not a dataset of this run: {', '.join(datasets)}"
                )
        self._consistent_best()
        if self.micro_batch is not None and self.mixes and self.micro_batch % self.augment.mix_group:
            raise ValueError(
                f"micro_batch={self.micro_batch} does not hold whole mix groups of {self.augment.mix_group} videos; "
                f"use micro_batch={self.augment.mix_group * max(1, self.micro_batch // self.augment.mix_group)} or augment.mix_group=1"
            )
        group = self.group
        if self.effective_batch % group:
            raise ValueError(
                f"effective_batch={self.effective_batch} is not a multiple of augment.mix_group={group}; "
                f"use effective_batch={group * (self.effective_batch // group + 1)} or augment.mix_group=1"
            )
        if self.mixes and any(d.multi_label for d in datasets.values()) and self.augment.mix_across_datasets:
            raise ValueError("augment.mix_across_datasets=true cannot mix multi-label datasets; set it to false")
        return self

    def _consistent_best(self) -> None:
        best, datasets = self.checkpoint.best, self.data.datasets
        if best is None:
            if self.eval.patience is not None:
                raise ValueError(
                    f"eval.patience={self.eval.patience} needs a measure; set checkpoint.best=val/{next(iter(datasets))}/top1"
                )
            return
        if self.eval.every is None:
            raise ValueError(f"checkpoint.best={best} needs validations; set eval.every=UPDATES")
        name, measure = measure_of(best)
        if name not in datasets and name != MEAN:
            raise ValueError(
                f"checkpoint.best={best} names {name!r}, which is not a dataset of this run: {', '.join(datasets)} (or mean)"
            )
        measured = [name] if name in datasets else list(datasets)
        if measure == "map" and not all(datasets[n].multi_label for n in measured):
            raise ValueError(f"checkpoint.best={best}: map is measured on multi_label datasets only; use top1")

    def _consistent_hosts(self) -> None:
        cluster = self.cluster
        if cluster.kind != "hosts":
            return
        if cluster.hosts and len(cluster.hosts) != self.nodes:
            raise ValueError(
                f"cluster.hosts names {len(cluster.hosts)} machines and nodes={self.nodes}; make them equal"
            )
        if not cluster.hosts and cluster.rendezvous is None:
            raise ValueError(
                "cluster=hosts needs cluster.rendezvous=ADDRESS:PORT of machine 0 and cluster.node, or cluster.hosts"
            )
        if not cluster.hosts and cluster.node is None:
            raise ValueError(f"cluster=hosts needs cluster.node, the number of this machine: 0 to {self.nodes - 1}")
        if cluster.node is not None and cluster.node >= self.nodes:
            raise ValueError(
                f"cluster.node={cluster.node} of nodes={self.nodes}; they count from 0 to {self.nodes - 1}"
            )

    @property
    def mixes(self) -> bool:
        """Whether mixup or CutMix is enabled."""
        a = self.augment
        return a.mix_probability > 0 and (a.mixup_alpha > 0 or a.cutmix_alpha > 0)

    @property
    def group(self) -> int:
        """Videos that must stay together on one rank and in one micro-batch (the mix group; 1 without mixing)."""
        return self.augment.mix_group if self.mixes else 1
