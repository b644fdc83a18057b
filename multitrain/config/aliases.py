"""Option names of other projects (PySlowFast, timm, Hugging Face, PyTorch Lightning), with the option to use instead."""

from __future__ import annotations

_BATCH = "effective_batch=N (videos an update, over all GPUs) or micro_batch=N (videos a GPU holds at once)"
_FOLDER = "runs=FOLDER and name=NAME"
_DATA = "data.root=FOLDER"
_PRECISION = "precision=bf16, fp16 or fp32"
_WORKERS = "data.workers=N (loader processes a GPU)"
_START = "init_from=WEIGHTS for a new run; a run is resumed by its name: python launch/submit.py NAME"
_MIXUP = "augment.mixup_alpha, augment.cutmix_alpha and augment.mix_probability"
_CLASSES = "data.datasets.NAME.classes=N or data.datasets.NAME.class_names=FILE"
_VIEWS = "data.datasets.NAME.temporal_views and data.datasets.NAME.spatial_views"

HINTS: dict[str, str] = {
    **dict.fromkeys(
        ("batch", "batchsize", "batch_size", "bs", "global_batch_size", "train_batch_size", "total_batch_size",
         "per_device_train_batch_size", "per_gpu_batch_size", "train_micro_batch_size_per_gpu", "ims_per_batch",
         "videos_per_gpu", "samples_per_gpu"), _BATCH),
    **dict.fromkeys(("eval_batch_size", "per_device_eval_batch_size", "validation_batch_size", "test_batch_size"),
                    "eval.videos_per_batch=N"),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "grad_accum_steps", "accumulate_grad_batches", "accumulation", "accum_iter",
         "update_freq", "grad_accum"), "effective_batch=N; accumulation follows from it, micro_batch and the GPUs"),
    **dict.fromkeys(("learning_rate", "learningrate", "base_lr", "max_lr", "peak_lr", "blr"), "optim.lr=X"),
    **dict.fromkeys(("min_lr", "cosine_end_lr", "lr_end", "final_lr"), "optim.end_lr=X"),
    **dict.fromkeys(("warmup_lr", "warmup_start_lr", "lr_start"), "optim.start_lr=X"),
    **dict.fromkeys(("warmup", "num_warmup_steps", "warmup_steps", "warmup_iters", "warmup_ratio"),
                    "optim.warmup_updates=N or optim.warmup_epochs=X"),
    **dict.fromkeys(("wd", "decay"), "optim.weight_decay=X"),
    **dict.fromkeys(("layer_decay", "layerwise_lr_decay", "layer_lr_decay", "lr_layer_decay", "llrd"), "optim.layer_decay=X"),
    **dict.fromkeys(("freeze", "frozen", "frozen_stages", "freeze_layers", "freeze_backbone", "frozen_layers"),
                    "optim.freeze=[PATTERN] (of names of tensors)"),
    **dict.fromkeys(("beta1", "beta2", "adam_beta1", "adam_beta2", "opt_betas"), "optim.betas=[0.9,0.999]"),
    **dict.fromkeys(("adam_epsilon", "opt_eps", "epsilon"), "optim.eps=X"),
    **dict.fromkeys(("max_grad_norm", "clip_grad", "grad_clip", "clip_grad_l2norm", "gradient_clip_val", "gradient_clipping"),
                    "optim.clip_norm=X"),
    **dict.fromkeys(("lr_policy", "lr_scheduler", "lr_scheduler_type", "scheduler", "sched"), "optim.schedule=cosine"),
    **dict.fromkeys(("opt", "optimizer", "optimizing_method", "solver"), "optim=adamw"),
    **dict.fromkeys(
        ("workers", "num_workers", "dataloader_num_workers", "n_workers", "loader_workers", "preprocessing_num_workers"),
        _WORKERS),
    **dict.fromkeys(("prefetch_factor",), "data.prefetch=N"),
    **dict.fromkeys(("num_epochs", "epochs_num", "max_epoch", "max_epochs", "num_train_epochs", "n_epochs", "epoch"),
                    "epochs=X (passes over the union of the datasets)"),
    **dict.fromkeys(("max_steps", "steps", "num_steps", "iterations", "max_iter", "max_iters", "iters", "total_steps",
                     "num_updates", "max_updates"), "updates=N"),
    **dict.fromkeys(
        ("num_gpus", "ngpus", "n_gpus", "gpu", "gpus_per_node", "nproc_per_node", "devices", "num_gpu", "ntasks_per_node",
         "gpu_num", "nproc", "world_size"), "gpus=N (a node) and nodes=N"),
    **dict.fromkeys(("num_nodes", "nnodes", "num_shards", "n_nodes", "num_machines"), "nodes=N"),
    **dict.fromkeys(("amp", "bf16", "mixed_precision", "use_amp", "dtype", "torch_dtype", "half", "enable_bf16", "fp32",
                     "autocast"), _PRECISION),
    **dict.fromkeys(("fp16",), "precision=fp16"),
    **dict.fromkeys(("gradient_checkpointing", "grad_checkpointing", "act_checkpoint", "checkpoint_activations",
                     "use_checkpoint"), "activation_checkpointing=selective"),
    **dict.fromkeys(("rng_seed", "random_seed", "manual_seed", "data_seed"), "seed=N"),
    **dict.fromkeys(("output", "output_dir", "out_dir", "out", "work_dir", "save_dir", "logdir", "log_dir", "default_root_dir"),
                    _FOLDER),
    **dict.fromkeys(("run_name", "exp_name", "job_name", "jobname"), "name=NAME"),
    **dict.fromkeys(("data_dir", "dataset_dir", "datadir", "data_path", "path_to_data_dir", "path_prefix", "train_dir",
                     "dataset_root", "root", "dataroot"), _DATA),
    **dict.fromkeys(("dataset", "datasets", "dataset_name", "train_dataset"), "data=NAME, e.g. data=k400"),
    **dict.fromkeys(
        ("resume", "resume_from", "resume_from_checkpoint", "auto_resume", "pretrained", "checkpoint_file_path", "finetune",
         "finetune_from", "initial_checkpoint", "load_from", "ckpt_path", "weights", "model_name_or_path", "checkpoint_path"),
        _START),
    **dict.fromkeys(("save_steps", "save_freq", "checkpoint_period", "save_interval", "checkpoint_every", "save_every",
                     "checkpoint_interval", "ckpt_every"), "checkpoint.every=N (updates)"),
    **dict.fromkeys(("save_total_limit", "checkpoint_hist", "max_keep_ckpts", "save_top_k"), "checkpoint.keep=N"),
    **dict.fromkeys(("eval_steps", "eval_period", "eval_interval", "val_interval", "eval_freq", "eval_every",
                     "check_val_every_n_epoch", "evaluation_strategy", "eval_strategy"), "eval.every=N (updates)"),
    **dict.fromkeys(("logging_steps", "log_period", "log_interval", "print_freq", "log_freq"), "monitor.log_every=N"),
    **dict.fromkeys(("report_to", "use_wandb", "wandb_project", "log_wandb"), "monitor.wandb=PROJECT"),
    **dict.fromkeys(("num_frames", "clip_len", "n_frames", "num_segments", "frames_per_clip"), "model.frames=N"),
    **dict.fromkeys(("train_crop_size", "test_crop_size", "crop_size", "img_size", "input_size", "image_size", "resolution"),
                    "model.crop=N"),
    **dict.fromkeys(("frame_rate", "frame_interval", "stride", "sampling"), "data.sampling_rate=N"),
    **dict.fromkeys(("fps",), "data.target_fps=X"),
    **dict.fromkeys(("num_classes", "nb_classes", "n_classes", "num_labels"), _CLASSES),
    **dict.fromkeys(("num_ensemble_views", "num_spatial_crops", "num_clips", "num_crops", "views"), _VIEWS),
    **dict.fromkeys(("droppath", "droppath_rate", "drop_path_rate", "stochastic_depth"), "model.drop_path=X"),
    **dict.fromkeys(("dropout", "drop", "dropout_rate"), "model.head_dropout=X"),
    **dict.fromkeys(("aa", "auto_augment", "rand_augment", "aa_type"), "augment.randaugment=rand-m7-n4-mstd0.5-inc1"),
    **dict.fromkeys(("reprob", "re_prob", "random_erase", "erasing"), "augment.erase_probability=X"),
    **dict.fromkeys(("mixup", "cutmix", "mixup_alpha", "mixup_prob", "mix_prob", "cutmix_minmax"), _MIXUP),
    **dict.fromkeys(("smoothing", "label_smooth_value", "label_smoothing_factor"), "augment.label_smoothing=X"),
    **dict.fromkeys(("num_sample", "repeated_aug", "num_aug", "repeated_augmentation"), "augment.copies=N"),
    **dict.fromkeys(("hflip", "horizontal_flip", "random_flip"), "augment.flip_probability=X"),
    **dict.fromkeys(("time", "timeout", "walltime", "timeout_min", "max_time"), "cluster.time_limit=MINUTES"),
    **dict.fromkeys(("queue", "slurm_partition"), "cluster.partition=NAME"),
    **dict.fromkeys(("mem", "memory", "mem_gb"), "cluster.memory_per_node=480G"),
    **dict.fromkeys(("cpus_per_task", "cpus", "num_cpus"), "cluster.cpus_per_gpu=N"),
    **dict.fromkeys(("arch", "backbone", "model_name", "net"), "model=NAME, e.g. model=mvit_b24_32x3"),
    **dict.fromkeys(("config", "cfg", "config_file", "config_path"), "experiment=NAME, and --config-dir DIR for files of your own"),
}  # fmt: skip
"""Option name of another project, in lower case with ``_``, and what to type here."""


def suggestion(name: str) -> str | None:
    """What to type here for an option of another project; None if unknown. `name` may be dotted, upper case, or a flag."""
    last = name.rpartition(".")[2].lstrip("-").partition("=")[0]
    return HINTS.get(last.lower().replace("-", "_"))
