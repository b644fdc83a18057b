"""Entry point of every rank: ``python -m multitrain.train RUN``. Load the configuration, build, resume, train, shut down.

With ``-m`` it is Hydra's multirun: see `multitrain.sweep`.

Exit status (`multitrain.cluster.exit_status.Exit`): 0 the run is complete; 75 it was interrupted and can be resumed; 1 it failed;
2 a setting or file is wrong; 3 it gave up, and another start would not help; 4 another start holds the run. Under SLURM an
interrupted run requeues itself as its last action, unless it was cancelled.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from multitrain import lease
from multitrain.cluster import requeue, restarts, slurm
from multitrain.cluster.exit_status import Exit
from multitrain.cluster.requeue import Action, Decision, Ended
from multitrain.config import ConfigError, RunConfig, load
from multitrain.engine.interruption import Interruption, Request
from multitrain.engine.watchdog import Watchdog
from multitrain.lease import Guard, Lease, LeaseHeld, LeaseLost, LeaseUnusable
from multitrain.records.events import Events, read, starts_before
from multitrain.text import counted

if TYPE_CHECKING:
    from multitrain.engine.distributed import World
    from multitrain.engine.trainer import Trainer

WAIT_FOR_END = 120.0
"""Seconds that a rank waits for SLURM to end it after the job was put back into the queue."""


def main(arguments: list[str] | None = None) -> int:
    """Train the run whose folder is the one argument; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(a in ("-m", "--multirun") for a in arguments):
        return subprocess.run([sys.executable, "-m", "multitrain.sweep", *arguments], check=False).returncode
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return Exit.FINISHED
    if len(arguments) != 1:
        print(
            "error: give one argument, the folder of a run; python launch/submit.py key=value … starts runs, --help says more",
            file=sys.stderr,
        )
        return Exit.MISTAKE
    run = Path(arguments[0]).resolve()
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    world: World | None = None
    interruption = Interruption(run, lambda value: world.max(value) if world else value, watches_files=rank == 0)
    interruption.install()  # before torch is imported: a signal may come at any moment
    guard = Guard(run, lease.start_name(slurm.job_id(), slurm.restart_count()))
    lease.guarded(guard)
    try:
        config = load(run)
        _refuse_other_code(run)
        if rank == 0:
            guard = _acquire(run, interruption)
            _begin(config, run)
        watchdog = Watchdog(run, rank, config.engine.hang_limit)
        _make_deterministic(config)
        from multitrain.engine.distributed import join

        world = join(
            config.world_size,
            config.engine.collective_timeout,
            config.engine.threads,
            config.engine.collective_limit,
            config.precision,
        )
        guard.follow(*world.broadcast((guard.generation, guard.start)))
        from multitrain.engine.build import (
            build,  # imported here, because it takes seconds, which all ranks spend in parallel
        )

        trainer = build(config, run, world, interruption, watchdog)
        _start(config, run, trainer)
        request = trainer.train()
        return _leave(config, run, trainer, request, interruption)
    except BaseException as error:
        _die(run, rank, error)


def _refuse_other_code(run: Path) -> None:
    """A run is trained by the code in its folder; if that is missing, Python imports the checkout's.

    Raises:
        ConfigError: this is not the run's code.
    """
    code, this = run / "code", Path(__file__).resolve().parent
    if code.is_dir() and this != (code / this.name).resolve():
        raise ConfigError(
            f"the run has its own code, {code}, and this is {this.parent}: set PYTHONPATH={shlex.quote(str(code))}; if the run's is "
            f"gone (a purge?): python launch/submit.py {shlex.quote(str(run))} update_code=true"
        )


def _acquire(run: Path, interruption: Interruption) -> Lease:
    """The run's lease: from now on this start is the only one that writes to it.

    Raises:
        LeaseHeld: another start holds it.
        SystemExit: a signal has come while this start waited for the lease.
    """
    job = slurm.job_id()

    def pause(seconds: float) -> None:
        time.sleep(seconds)
        if interruption.signals:
            print(
                f"{run.name}: {signal.Signals(interruption.signals[0]).name} came while it waited for the lease; it ends"
            )
            raise SystemExit(int(Exit.INTERRUPTED))

    held = lease.acquire(
        run,
        job=job,
        restart=slurm.restart_count(),
        alive=lambda holder: slurm.job_lives(str(holder.job), holder.restart, holder.cluster),
        patience=lease.PATIENCE if job else 10.0,
        pause=pause,
    )
    lease.guarded(held)
    return held


def _begin(config: RunConfig, run: Path) -> None:
    """Log a `begin` event, unless the run was restarted too often without progress. Runs before torch is imported.

    Raises:
        GaveUp: with the reason.
    """
    in_place = int(os.environ.get(restarts.IN_PLACE, "0"))
    told = read(run / "events.jsonl")
    if slurm.job_id() or in_place:  # else a person has started it
        cluster = config.cluster
        limits = (cluster.max_restarts, cluster.max_stalled_restarts, in_place)
        reason = restarts.refusal(restarts.starts(told), *limits, went_well=restarts.progressed(told))
        if reason is not None:
            raise GaveUp(f"{reason}; see {run}/logs, mend the cause, and submit the run again")
    restart = slurm.restart_count() if slurm.job_id() else starts_before(told)
    Events(run / "events.jsonl", restart=restart).write("begin", in_place=in_place)
    restarts.refuse_lost_checkpoints(run, told)


def _start(config: RunConfig, run: Path, trainer: Trainer) -> None:
    """Resume from the newest checkpoint, and log it."""
    refused = trainer.resume()
    models = Counter(trainer.world.gather(trainer.world.hardware["device"]))
    if not trainer.world.is_main:
        return
    for folder, reason in refused.items():
        trainer.recorder.event("checkpoint_refused", checkpoint=folder.name, reason=reason)
        print(f"checkpoint {folder.name} is not whole ({reason}); falling back to an older one", flush=True)
    trainer.recorder.event(
        "resume" if trainer.completed else "start",
        world_size=trainer.world.size,
        micro_batch=trainer.shape.micro_batch,
        accumulation=trainer.shape.accumulation,
        plan=trainer.plan.fingerprint,
        **trainer.world.hardware,
    )
    if len(models) > 1:
        listed = ", ".join(f"{count} × {model}" for model, count in models.items())
        print(
            f"warning: the ranks have different devices ({listed}): an update takes as long as the slowest one",
            flush=True,
        )
    verb = f"resuming after update {trainer.completed}" if trainer.completed else "starting"
    print(
        f"{run.name}: {verb} of {trainer.updates}; {counted(trainer.world.size, 'rank')} × "
        f"{counted(trainer.shape.micro_batch, 'video')} × {trainer.shape.accumulation} accumulation = "
        f"{counted(config.effective_batch, 'video')} an update; on {trainer.world.hardware['device']}, {trainer.world.hardware['backend']}",
        flush=True,
    )


def _leave(config: RunConfig, run: Path, trainer: Trainer, request: Request, interruption: Interruption) -> int:
    """End this start: log the reason, close all files, and requeue the job if SLURM takes the nodes away."""
    world, recorder = trainer.world, trainer.recorder
    job = slurm.job_id()
    signals = [s for rank in world.gather(interruption.signals) for s in rank]
    decision: Decision = world.broadcast(_decide(config, run, request, job, signals) if world.is_main else None)
    comes_back = decision.action == Action.REQUEUE
    if request == Request.NONE:
        recorder.event("end", update=trainer.completed, status="finished")
        recorder.write(f"finished after {trainer.completed} updates")
    else:
        if not comes_back:
            recorder.event(decision.event, update=trainer.completed, status=decision.status)
        then = "the job comes back by itself" if decision.event == "requeue" else "submit the same name to resume"
        recorder.write(f"{decision.status} after {trainer.completed} of {trainer.updates} updates; {then}")
        interruption.stopped(request)
    recorder.close()
    sys.stdout.flush()
    world.max(0)  # a barrier: all ranks have saved and closed
    if comes_back and job is not None:
        return _requeue(config, run, job, decision, trainer, interruption)
    _release()
    return Exit.FINISHED if request == Request.NONE else Exit.INTERRUPTED


def _decide(config: RunConfig, run: Path, request: Request, job: str | None, signals: list[int]) -> Decision:
    """Decide what happens to the job after everything is saved; rank 0 only. The batch script may have requeued it already."""
    if request == Request.NONE:
        return Decision(Action.END, "finished")
    if request == Request.STOP:
        return Decision(Action.END, restarts.STOPPED)
    if job is None:
        return Decision(Action.END, "interrupted")
    try:
        record = requeue.job_record(job)
    except slurm.SlurmError as error:
        print(f"SLURM does not answer ({error}); the batch script asks it again", flush=True)
        return Decision(Action.REQUEUE, slurm.STEP_ENDED)
    history = restarts.starts(read(run / "events.jsonl"))
    history.sort(key=lambda start: start.is_of(job, slurm.restart_count()))  # events of this start may not be the last
    ended = Ended(record or {"JobState": "CANCELLED"}, signals)
    return requeue.decide(ended, history, config.cluster, went_well=True)


def _requeue(
    config: RunConfig, run: Path, job: str, decision: Decision, trainer: Trainer, interruption: Interruption
) -> int:
    """Requeue the job as the last action: rank 0 requeues it, and all ranks wait until SLURM ends them.

    A rank that exited by itself would make SLURM count the job as completed (seen on 22.05), and the job would not start again.
    """
    seen = len(interruption.signals)
    events = Events(run / "events.jsonl")

    def write(name: str, **facts: Any) -> None:
        with contextlib.suppress(OSError):  # the log has it as well
            events.write(name, update=trainer.completed, **facts)

    if trainer.world.is_main and not requeue.carry_out(
        decision, run, job, config.cluster, write, dependents=restarts.dependents(read(events.path))
    ):
        print("the job could not put itself back into the queue; its batch script tries again", flush=True)
        _release()
        return Exit.FAILED
    _release()
    if config.cluster.requeue == "resubmit":  # SLURM does not end this job, and its successor waits for that
        return Exit.INTERRUPTED
    deadline = time.monotonic() + WAIT_FOR_END
    while time.monotonic() < deadline and len(interruption.signals) == seen:
        time.sleep(0.1)
    return Exit.INTERRUPTED


def _release() -> None:
    """Release the run's lease, if this rank holds it."""
    if isinstance(guard := lease.current(), Lease):
        guard.release()


def _make_deterministic(config: RunConfig) -> None:
    """Select deterministic kernels; must run before CUDA is initialised."""
    if not config.deterministic:
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


class GaveUp(RuntimeError):
    """Another start would not help; the message says why."""


def _die(run: Path, rank: int, error: BaseException) -> NoReturn:
    """Exit immediately after an error, without collectives or destructors, which could wait for other ranks."""
    if isinstance(error, SystemExit):
        sys.stdout.flush()
        os._exit(int(error.code or 0))
    if isinstance(error, (LeaseLost, LeaseHeld)):
        print(f"multitrain: rank {rank}: {error}", file=sys.stderr, flush=True)
        os._exit(Exit.HELD)
    mistake = isinstance(error, (ConfigError, LeaseUnusable))
    gave_up = type(error).__name__ in ("GaveUp", "TrainingError")  # the latter cannot be imported without torch
    status = Exit.MISTAKE if mistake else Exit.GAVE_UP if gave_up else Exit.FAILED
    try:
        _say_last(run, rank, error, status)
        _release()
    finally:  # even if the log cannot be written
        os._exit(status)


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def _line_of(run: Path, error: BaseException) -> str | None:
    """One line with the remedy for a failure that needs no traceback; None for other errors."""
    if type(error).__name__ == "SaveError":  # it cannot be imported without torch
        return str(error)
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return (
            f"cannot write {error.filename or run}: {error.strerror}; make room (or a quota, or a mount that can be written), "
            "and submit the same name to resume"
        )
    return None


def _say_last(run: Path, rank: int, error: BaseException, status: Exit) -> None:
    """Write the error to the events and to the log, with a traceback unless its message tells the user what to do."""
    final = status != Exit.FAILED
    line = str(error) if final else _line_of(run, error)
    text = f"{type(error).__name__}: {error}" if line is None else line
    try:
        if run.is_dir():
            events = Events(run / "events.jsonl")
            events.write("error", rank=rank, reason=text, final=final, exit_status=int(status))
    except (OSError, LeaseLost) as second:
        print(f"the error could not be written to {run}/events.jsonl: {second}", file=sys.stderr)
    if line is None:
        traceback.print_exception(error)
    for line in getattr(error, "details", ()) if rank == 0 else ():
        print(line, file=sys.stderr)
    print(f"multitrain: rank {rank}: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # skip interpreter shutdown: nothing is left to clean up
