"""From a run's configuration to its trainer: catalogs, order, batch shape, model, initial weights, writers, validation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from multitrain.cluster import slurm
from multitrain.config import ConfigError, RunConfig, flat
from multitrain.data.catalog import Catalog, open_catalogs, plan_of
from multitrain.data.loader import TrainLoader
from multitrain.engine.checkpoint import listed
from multitrain.engine.distributed import World
from multitrain.engine.interruption import Interruption, Request
from multitrain.engine.leadtime import LeadTime
from multitrain.engine.parameters import freeze, summary_table, treatments
from multitrain.engine.trainer import Parts, Trainer
from multitrain.engine.unreadable import UnreadableTracker
from multitrain.engine.watchdog import Watchdog
from multitrain.evaluation.validation import Validation
from multitrain.model.multitrain import MultiTrain
from multitrain.order import solve
from multitrain.records.diagnosis import diagnose
from multitrain.records.events import Events
from multitrain.records.recorder import Recorder


def build(
    config: RunConfig, run: Path, world: World, interruption: Interruption, watchdog: Watchdog | None = None
) -> Trainer:
    """The trainer of the run in folder `run`. All ranks call it.

    Raises:
        ConfigError: annotations, initial weights or the batch do not fit; one line.
    """
    watchdog = watchdog or Watchdog(run, world.rank, None)
    index = Path(config.data.index or run.parent / ".index")
    if world.is_main:
        open_catalogs(config.data, "train", index)
    world.max(0)  # a barrier: the other ranks map the index that rank 0 wrote
    catalogs = open_catalogs(config.data, "train", index)
    plan = plan_of(config, catalogs)
    shape = solve(
        config.effective_batch, nodes=config.nodes, gpus=config.gpus, micro_batch=config.micro_batch, group=config.group
    )
    updates = config.updates or plan.updates(config.epochs)
    skips = UnreadableTracker({name: len(catalog) for name, catalog in catalogs.items()}, config.data.skip_cap)
    skips.add_file(run / "skipped.jsonl")

    def open_loader(start: int, stop: int) -> TrainLoader:
        return TrainLoader(catalogs, plan, shape, world.rank, config, start, stop)

    def open_recorder(start: int) -> Recorder:
        return Recorder(
            run,
            total_updates=updates,
            start_update=start,
            rank=world.rank,
            log_every=config.monitor.log_every,
            tensorboard=config.monitor.tensorboard,
            wandb=config.monitor.wandb,
            settings=flat(config),
            measures=[f"val/{name}/top1" for name in catalogs] if config.eval.every else (),
            diagnose=lambda records, results: diagnose(records, config, updates, results),
        )

    parts = Parts(
        model=_model(config, run, world, catalogs),
        plan=plan,
        shape=shape,
        updates=updates,
        open_loader=open_loader,
        open_recorder=open_recorder,
        lead_time=LeadTime(_warnings(config) if world.is_main else {}),
        skips=skips,
        validation=_validation(config, index, world, interruption, watchdog),
    )
    return Trainer(config, run, world, parts, interruption=interruption, watchdog=watchdog)


def _model(config: RunConfig, run: Path, world: World, catalogs: Mapping[str, Catalog]) -> MultiTrain:
    """The network with its initial weights."""
    model = MultiTrain(
        config.model,
        {name: catalog.classes for name, catalog in catalogs.items()},
        activation_checkpointing=config.activation_checkpointing,
        multi_label=[n for n, d in config.data.datasets.items() if d.multi_label],
    )
    if (problem := model.untrainable()) is not None:
        raise ConfigError(problem)
    model.initialise(config.seed)
    _initialise_from(config, run, model, world)
    freeze(model, config.optim.freeze, config.loss)
    if world.is_main and not config.optim.equal:
        print(
            "\n".join(["the tensors and how they are trained:", *summary_table(treatments(model, config.optim))]),
            flush=True,
        )
    return model


def _initialise_from(config: RunConfig, run: Path, model: MultiTrain, world: World) -> None:
    """Load the weights of `init_from`, if the run has no checkpoint of its own."""
    fresh = world.broadcast(not listed(run / "checkpoints"))
    if config.init_from is None:
        return
    if not fresh:
        if world.is_main:
            print(f"resuming: init_from={config.init_from} was for the run's first start and is not read", flush=True)
        return
    from multitrain.interop.start import initialise_from

    report = initialise_from(model, config.init_from, interpolate_positions=config.interpolate_positions)
    if world.is_main:
        print(f"initial weights from {config.init_from}: {report}", flush=True)
        for line in report.lines():
            print(line, flush=True)
        Events(run / "events.jsonl").write(
            "init_from",
            path=config.init_from,
            matched=len(report.matched),
            fresh=list(report.fresh),
            unexpected=list(report.unexpected),
            notes=list(report.notes),
        )


def _warnings(config: RunConfig) -> dict[str, float]:
    """Seconds between the cluster's warnings and the end of a job, by the setting that determines them."""
    if slurm.job_id() is None:
        return {}
    found = {"cluster.lead_time": float(config.cluster.lead_time)}
    grace = slurm.grace()
    if grace is not None:
        found["the partition's GraceTime with KillWait"] = grace
    return found


def _validation(
    config: RunConfig, index: Path, world: World, interruption: Interruption, watchdog: Watchdog
) -> Validation | None:
    """The validation, which a request to stop interrupts; None without `eval.every`."""
    if config.eval.every is None:
        return None

    def stop() -> bool:
        watchdog.heartbeat()
        return interruption.pending >= Request.STOP

    return Validation(config, index, rank=world.rank, world_size=world.size, reduce=world.sum, stop=stop)
