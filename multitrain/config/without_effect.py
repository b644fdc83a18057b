"""Options that have no effect beside certain values of others: a word typed for one of them changes nothing, and the user is told so."""

from __future__ import annotations

import re
from collections.abc import Callable

from multitrain.config.run import RunConfig

Unused = Callable[[RunConfig], bool]


def _rows(options: str, unused: Unused, why: str) -> dict[str, tuple[Unused, str]]:
    return dict.fromkeys(options.split(), (unused, why))


def _one_dataset(c: RunConfig) -> bool:
    return len(c.data.datasets) == 1


def _mixes(c: RunConfig) -> bool:
    """Whether a clip can have another one as its partner."""
    return c.mixes and c.augment.mix_group * c.augment.copies > 1


def _flips(c: RunConfig) -> bool:
    return any(dataset.flip for dataset in c.data.datasets.values())


def _warms_up(c: RunConfig) -> bool:
    return (c.optim.warmup_epochs if c.optim.warmup_updates is None else c.optim.warmup_updates) > 0


SLURM_ONLY = (
    "partition account qos constraint reservation nodelist exclude time_limit memory_per_node setup "
    "srun_args sbatch requeue"
)
"""Options of `cluster` that only a job of SLURM has."""

BUILT_IN_ONLY = "depth width heads stages kv_stride mlp_ratio pool_q_everywhere residual_q drop_path"
"""Options of `model` that only the networks of this project have."""

NO_PARTNER = (
    "a clip is mixed with no other under augment.mix_probability={0.augment.mix_probability:g}, augment.mixup_alpha="
    "{0.augment.mixup_alpha:g}, augment.cutmix_alpha={0.augment.cutmix_alpha:g}, augment.mix_group={0.augment.mix_group} and "
    "augment.copies={0.augment.copies}; set these too, or leave it out"
)

WITHOUT_EFFECT: dict[str, tuple[Unused, str]] = {
    **_rows(
        "epochs",
        lambda c: c.updates is not None,
        "the run's length is updates={0.updates}; add updates=null, or leave it out",
    ),
    **_rows(
        "interpolate_positions",
        lambda c: c.init_from is None,
        "there are no initial weights; add init_from=WEIGHTS, or leave it out",
    ),
    **_rows(
        "preflight",
        lambda c: c.cluster.kind == "hosts",
        "cluster.kind is hosts; type multitrain preflight on every machine, and leave it out",
    ),
    **_rows(
        " ".join(f"cluster.{name}" for name in SLURM_ONLY.split()),
        lambda c: c.cluster.kind != "slurm",
        "cluster.kind is {0.cluster.kind}, which asks SLURM for nothing; add cluster=slurm, or leave it out",
    ),
    **_rows(
        "cluster.gpu_type",
        lambda c: c.cluster.kind != "slurm" or c.cluster.gpu_request == "none",
        "cluster.kind is {0.cluster.kind} with cluster.gpu_request={0.cluster.gpu_request}, so no GPU is asked for; "
        "add cluster=slurm cluster.gpu_request=gres, or leave it out",
    ),
    **_rows(
        "cluster.rendezvous cluster.node cluster.hosts",
        lambda c: c.cluster.kind != "hosts",
        "cluster.kind is {0.cluster.kind}; add cluster=hosts, or leave it out",
    ),
    **_rows(
        "data.temperature",
        lambda c: c.data.proportions != "temperature" and c.data.temperature != 1,
        "data.proportions is {0.data.proportions}; add data.proportions=temperature, or leave it out",
    ),
    **_rows(
        "data.proportions",
        lambda c: _one_dataset(c) and c.data.proportions != "size",
        "there is one dataset; choose data with several, or leave it out",
    ),
    **_rows(
        "data.datasets.*.weight",
        lambda c: c.data.proportions != "weights",
        "data.proportions is {0.data.proportions}; add data.proportions=weights, or leave it out",
    ),
    **_rows(
        "data.datasets.*.flip",
        lambda c: c.augment.flip_probability == 0,
        "augment.flip_probability is 0; set that too, or leave it out",
    ),
    **_rows(
        "data.shard_videos",
        lambda c: c.data.shuffle_window is None,
        "data.shuffle_window is not set; add data.shuffle_window=N, or leave it out",
    ),
    **_rows(
        "data.stage_limit",
        lambda c: c.data.stage is None,
        "data.stage is not set; add data.stage=FOLDER, or leave it out",
    ),
    **_rows(
        "data.sampling_rate data.target_fps",
        lambda c: all(dataset.sampling == "segment" for dataset in c.data.datasets.values()),
        "every dataset has sampling=segment, which takes a frame of each segment; change that, or leave it out",
    ),
    **_rows(
        " ".join(f"model.{name}" for name in BUILT_IN_ONLY.split()),
        lambda c: c.model.own_backbone,
        "model.backbone={0.model.backbone} is a network of your own; give it model.backbone_args, or leave it out",
    ),
    **_rows(
        "model.head_hidden",
        lambda c: c.model.head == "linear",
        "model.head is linear; add model.head=mlp, or leave it out",
    ),
    **_rows(
        "model.dropout_logits",
        lambda c: c.model.head == "linear" or c.model.head_dropout == 0,
        "model.head is {0.model.head} with model.head_dropout={0.model.head_dropout:g}; it needs model.head=mlp with a dropout "
        "above 0; set these too, or leave it out",
    ),
    **_rows(
        "model.expander_hidden",
        lambda c: not c.model.expander,
        "model.expander is false; add model.expander=true, or leave it out",
    ),
    **_rows(
        "model.projections",
        _one_dataset,
        "there is one dataset, and projections are between two; choose data with several, or leave it out",
    ),
    **_rows(
        "loss.projection_weight",
        lambda c: _one_dataset(c) and c.loss.projection_weight > 0,
        "there is one dataset, and projections are between two; choose data with several, or leave it out",
    ),
    **_rows(
        "loss.std_weight loss.covariance_weight loss.scope",
        lambda c: c.loss.informative_weight == 0,
        "loss.informative_weight is 0; set that too, or leave it out",
    ),
    **_rows(
        "optim.warmup_epochs",
        lambda c: c.optim.warmup_updates is not None,
        "the warm-up is optim.warmup_updates={0.optim.warmup_updates}; add optim.warmup_updates=null, or leave it out",
    ),
    **_rows(
        "optim.decay_fraction",
        lambda c: c.optim.schedule != "wsd",
        "optim.schedule is {0.optim.schedule}; add optim.schedule=wsd, or leave it out",
    ),
    **_rows(
        "optim.milestones optim.gamma",
        lambda c: c.optim.schedule != "step",
        "optim.schedule is {0.optim.schedule}; add optim.schedule=step, or leave it out",
    ),
    **_rows(
        "optim.end_lr",
        lambda c: c.optim.schedule in ("constant", "step"),
        "optim.schedule is {0.optim.schedule}, which has no end rate; add optim.schedule=cosine or wsd, or leave it out",
    ),
    **_rows(
        "optim.start_lr",
        lambda c: not _warms_up(c),
        "there is no warm-up; add optim.warmup_updates=N, or leave it out",
    ),
    **_rows(
        "engine.loss_scale_start",
        lambda c: c.precision != "fp16",
        "precision is {0.precision}; add precision=fp16, or leave it out",
    ),
    **_rows(
        "engine.collective_timeout",
        lambda c: c.engine.collective_limit != c.engine.collective_timeout,
        "engine.hang_limit={0.engine.hang_limit} ends ranks before; add engine.hang_limit=null, or leave it out",
    ),
    **_rows(
        "augment.flip_probability",
        lambda c: not _flips(c) and c.augment.flip_probability > 0,
        "every dataset has flip=false; change that for one, or leave it out",
    ),
    **_rows("augment.mix_probability", lambda c: c.augment.mix_probability > 0 and not _mixes(c), NO_PARTNER),
    **_rows("augment.mixup_alpha", lambda c: c.augment.mixup_alpha > 0 and not _mixes(c), NO_PARTNER),
    **_rows("augment.cutmix_alpha", lambda c: c.augment.cutmix_alpha > 0 and not _mixes(c), NO_PARTNER),
    **_rows("augment.mix_group", lambda c: c.augment.mix_group > 1 and not c.mixes, NO_PARTNER),
    **_rows(
        "augment.cutmix_probability",
        lambda c: not _mixes(c) or not (c.augment.mixup_alpha and c.augment.cutmix_alpha),
        "it takes both kinds of mixing, and augment.mix_probability={0.augment.mix_probability:g}, augment.mixup_alpha="
        "{0.augment.mixup_alpha:g}, augment.cutmix_alpha={0.augment.cutmix_alpha:g}; set these too, or leave it out",
    ),
    **_rows(
        "augment.mix_across_datasets",
        lambda c: not c.mixes or c.augment.mix_group == 1 or _one_dataset(c),
        "partners are of one dataset always with one dataset, augment.mix_group=1 or mixing off; set these too, or leave it out",
    ),
    **_rows(
        "augment.label_smoothing",
        lambda c: c.augment.label_smoothing > 0 and all(d.multi_label for d in c.data.datasets.values()),
        "every dataset is multi_label, whose labels are not smoothed; leave it out",
    ),
    **_rows(
        "augment.smoothing_classes",
        lambda c: c.augment.label_smoothing == 0 or all(d.multi_label for d in c.data.datasets.values()),
        "labels are not smoothed (augment.label_smoothing={0.augment.label_smoothing:g}); set that too, or leave it out",
    ),
    **_rows(
        "eval.val_stride",
        lambda c: c.eval.every is None,
        "eval.every is not set, so nothing is validated during training; add eval.every=N, or leave it out",
    ),
    **_rows(
        "monitor.pictures",
        lambda c: not c.monitor.tensorboard or c.eval.every is None,
        "monitor.tensorboard={0.monitor.tensorboard} with eval.every={0.eval.every} draws none; set these too, or leave it out",
    ),
}
"""Options that other ones make idle: when, and what to do. ``*`` stands for a dataset's name."""


REPLACED = ("epochs", "optim.warmup_epochs", "data.temperature")
"""Options whose meaning another option has taken over: typing both contradicts itself, and is refused. The others are noted."""


def idle(option: str) -> tuple[Unused, str] | None:
    """When the option of this dotted name, or the mapping that it is an entry of, has no effect, and why; None if it always has."""
    for name, row in WITHOUT_EFFECT.items():
        if re.fullmatch(re.escape(name).replace(r"\*", ".+") + r"(\..+)?", option):
            return row
    return None
