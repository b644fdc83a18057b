"""A typed word has an effect, or the user is told that it has none, with the remedy: for every option of the schema."""

from __future__ import annotations

import re

import pytest

from multitrain.config import ConfigError, RunConfig, compose
from multitrain.config.schema import fields
from multitrain.config.typed import idle_words, refuse_typed
from multitrain.config.without_effect import REPLACED, WITHOUT_EFFECT, idle

MANY = ("experiment=k400_mit_ssv2",)
ONE = ("experiment=k400",)
NO_MIXING = ("augment.mix_probability=0",)
LOCAL, SLURM = ("cluster=local", "nodes=1"), ("cluster=slurm",)
OWN = ("model.backbone=mynet:build",)
HOSTS = ("cluster=hosts", "cluster.rendezvous=10.0.0.1:29500", "cluster.node=0")

Words = tuple[str, ...]
CASES: dict[str, tuple[str, Words, Words]] = {
    "epochs=3": ("epochs", ("updates=5",), ("updates=null",)),
    "interpolate_positions=true": ("interpolate_positions", (), ("init_from=x.pyth",)),
    "preflight=true": ("preflight", HOSTS, LOCAL),
    "cluster.partition=gpu": ("cluster.partition", LOCAL, SLURM),
    "cluster.account=lab": ("cluster.account", HOSTS, SLURM),
    "cluster.qos=low": ("cluster.qos", LOCAL, SLURM),
    "cluster.constraint=a100": ("cluster.constraint", LOCAL, SLURM),
    "cluster.reservation=r": ("cluster.reservation", LOCAL, SLURM),
    "cluster.nodelist=n1": ("cluster.nodelist", HOSTS, SLURM),
    "cluster.exclude=n1": ("cluster.exclude", LOCAL, SLURM),
    "cluster.time_limit=60": ("cluster.time_limit", LOCAL, SLURM),
    "cluster.memory_per_node=8G": ("cluster.memory_per_node", LOCAL, SLURM),
    "cluster.gpu_type=a100": ("cluster.gpu_type", ("cluster.gpu_request=none",), SLURM),
    "cluster.setup=[ls]": ("cluster.setup", LOCAL, SLURM),
    "cluster.srun_args=[--label]": ("cluster.srun_args", LOCAL, SLURM),
    "cluster.sbatch.exclusive=true": ("cluster.sbatch", LOCAL, SLURM),
    "cluster.requeue=resubmit": ("cluster.requeue", LOCAL, SLURM),
    "cluster.rendezvous=10.0.0.1:29500": ("cluster.rendezvous", SLURM, HOSTS),
    "cluster.node=0": ("cluster.node", LOCAL, HOSTS),
    "cluster.hosts=[a]": ("cluster.hosts", SLURM, ("cluster=hosts", "nodes=1")),
    "data.temperature=2": ("data.temperature", MANY, ("data.proportions=temperature",)),
    "data.proportions=temperature": ("data.proportions", ONE, MANY),
    "data.datasets.kinetics.weight=2": ("data.datasets.*.weight", ONE, (*ONE, "data.proportions=weights")),
    "data.datasets.kinetics.flip=true": ("data.datasets.*.flip", ("augment.flip_probability=0",), ()),
    "data.stage_limit=9G": ("data.stage_limit", (), ("data.stage=/tmp",)),
    "data.shard_videos=9": ("data.shard_videos", (), ("data.shuffle_window=4",)),
    "data.sampling_rate=5": ("data.sampling_rate", ("experiment=ssv2",), MANY),
    "data.target_fps=5": ("data.target_fps", ("experiment=ssv2",), MANY),
    "model.depth=30": ("model.depth", OWN, ()),
    "model.width=192": ("model.width", OWN, ()),
    "model.heads=2": ("model.heads", OWN, ()),
    "model.stages=[1,3]": ("model.stages", OWN, ("model.backbone=mvitv2",)),
    "model.kv_stride=4": ("model.kv_stride", OWN, ()),
    "model.mlp_ratio=2": ("model.mlp_ratio", OWN, ()),
    "model.pool_q_everywhere=true": ("model.pool_q_everywhere", OWN, ()),
    "model.residual_q=true": ("model.residual_q", OWN, ()),
    "model.drop_path=0.2": ("model.drop_path", OWN, ()),
    "model.head_hidden=64": ("model.head_hidden", ONE, MANY),
    "model.dropout_logits=true": ("model.dropout_logits", ("model.head_dropout=0",), MANY),
    "model.expander_hidden=64": ("model.expander_hidden", ONE, MANY),
    "model.projections=true": ("model.projections", ONE, MANY),
    "loss.projection_weight=2": ("loss.projection_weight", ONE, MANY),
    "loss.std_weight=2": ("loss.std_weight", ONE, MANY),
    "loss.covariance_weight=2": ("loss.covariance_weight", ("loss.informative_weight=0",), MANY),
    "loss.scope=micro": ("loss.scope", ONE, MANY),
    "optim.warmup_epochs=0": ("optim.warmup_epochs", ("optim.warmup_updates=5",), ()),
    "optim.start_lr=0": ("optim.start_lr", ("optim.warmup_epochs=0",), ("optim.warmup_updates=5",)),
    "optim.decay_fraction=0.2": ("optim.decay_fraction", (), ("optim.schedule=wsd",)),
    "optim.milestones=[0.2]": ("optim.milestones", ("optim.schedule=wsd",), ("optim.schedule=step",)),
    "optim.gamma=0.5": ("optim.gamma", (), ("optim.schedule=step",)),
    "optim.end_lr=0": ("optim.end_lr", ("optim.schedule=constant",), ("optim.schedule=wsd",)),
    "engine.loss_scale_start=0": ("engine.loss_scale_start", ("precision=bf16",), ("precision=fp16",)),
    "engine.collective_timeout=1000": ("engine.collective_timeout", (), ("engine.hang_limit=null",)),
    "augment.flip_probability=0.2": ("augment.flip_probability", ("experiment=ssv2",), MANY),
    "augment.mix_probability=0.5": ("augment.mix_probability", ("augment.mix_group=1", "augment.copies=1"), ()),
    "augment.mixup_alpha=2": ("augment.mixup_alpha", NO_MIXING, ()),
    "augment.cutmix_alpha=2": ("augment.cutmix_alpha", NO_MIXING, ()),
    "augment.cutmix_probability=0": ("augment.cutmix_probability", ("augment.cutmix_alpha=0",), ()),
    "augment.mix_group=4": ("augment.mix_group", NO_MIXING, ()),
    "augment.mix_across_datasets=true": ("augment.mix_across_datasets", ONE, MANY),
    "augment.label_smoothing=0.2": ("augment.label_smoothing", (*ONE, "data.datasets.kinetics.multi_label=true"), MANY),
    "augment.smoothing_classes=700": ("augment.smoothing_classes", ("augment.label_smoothing=0",), ()),
    "eval.val_stride=5": ("eval.val_stride", ("eval.every=null",), ("eval.every=9",)),
    "monitor.pictures=true": ("monitor.pictures", ("eval.every=9", "monitor.tensorboard=false"), ("eval.every=9",)),
}
"""A word, its option, what makes it idle, and what makes it count."""

ALWAYS = """
name runs experiment_name nodes gpus updates effective_batch micro_batch precision activation_checkpointing seed deterministic
init_from branch_from from_scratch update_code dry_run then
cluster cluster.kind cluster.lead_time cluster.cpus_per_gpu cluster.gpu_request cluster.gpu_memory cluster.gpu_clips
cluster.python cluster.max_restarts cluster.max_stalled_restarts cluster.restarts_in_place cluster.check_data
data data.root data.mixture data.shuffle_window data.decoder data.workers data.prefetch data.skip_cap data.stage data.decode_timeout
data.index data.datasets data.datasets.<name>.annotations data.datasets.<name>.videos data.datasets.<name>.classes
data.datasets.<name>.class_names data.datasets.<name>.sampling data.datasets.<name>.replicas data.datasets.<name>.multi_label
data.datasets.<name>.separator data.datasets.<name>.temporal_views data.datasets.<name>.spatial_views
data.datasets.<name>.test_short_side data.datasets.<name>.segments
model model.backbone model.backbone_args model.channels model.mean model.std model.frames model.crop model.head model.head_dropout
model.expander
loss loss.informative_weight loss.dataset_weights
optim optim.lr optim.layer_decay optim.freeze optim.warmup_updates optim.weight_decay optim.betas optim.eps optim.clip_norm optim.schedule
engine engine.zero_stage engine.bucket_elements engine.hang_limit engine.threads
augment augment.copies augment.randaugment augment.crop_area augment.crop_aspect augment.erase_probability augment.backend
eval eval.every eval.patience eval.videos_per_batch eval.precision eval.workers
ema ema.decay
checkpoint checkpoint.every checkpoint.keep checkpoint.keep_every checkpoint.best
monitor monitor.log_every monitor.tensorboard monitor.wandb
"""
"""Options that have an effect in every run, or later, when it is tested."""


@pytest.mark.parametrize("word", ["gpus=true", "updates=true", "optim.lr=true", "data.workers=true"])
def test_a_boolean_is_no_number(word: str) -> None:
    with pytest.raises(ConfigError, match=f"^{word}: a number is needed"):
        refuse_typed([word], compose([*MANY, word]))


def composed(word: str, others: Words) -> RunConfig:
    return compose([*MANY, *others, *([] if word in others else [word])])


def test_every_option_always_counts_or_is_in_the_table_and_tried_here() -> None:
    assert {name for name in fields() if idle(name) is None} == set(ALWAYS.split())
    assert {option for option, _, _ in CASES.values()} == set(WITHOUT_EFFECT)


@pytest.mark.parametrize("word", CASES)
def test_a_word_that_other_options_make_idle_is_named_with_a_remedy_and_no_other_is(word: str) -> None:
    option, idle_with, counts_with = CASES[word]
    config = composed(word, idle_with)
    (line,) = idle_words([word], config)
    assert re.fullmatch(rf"{re.escape(word)}: changes nothing, since .*; .*leave it out", line)
    assert line.isprintable()
    if option in REPLACED:
        with pytest.raises(ConfigError, match=re.escape(line)):
            refuse_typed([word], config)
    else:
        refuse_typed([word], config)
    config = composed(word, counts_with)
    assert idle_words([word], config) == []
    refuse_typed([word], config)


@pytest.mark.parametrize(
    "words",
    [
        ("augment.mix_probability=0", "augment.mixup_alpha=0", "augment.cutmix_alpha=0", "augment.mix_group=1"),
        (*ONE, "model.projections=false", "loss.projection_weight=0", "augment.mix_across_datasets=false"),
        (*LOCAL, "cluster.partition=null", "cluster.setup=[]", "cluster.hosts=[]", "cluster.sbatch={}"),
    ],
)
def test_what_switches_something_off_is_taken(words: Words) -> None:
    config = compose(words)
    assert idle_words(words, config) == []
    refuse_typed(words, config)
