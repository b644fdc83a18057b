"""Submit a run: compose its configuration, check it, write the run's folder, submit the job, return.

python launch/submit.py nodes=2 gpus=8 experiment=k400_mit_ssv2
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

if not __package__:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while it imports is no traceback
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import os
import shlex
import subprocess
from types import FrameType

import yaml

from launch import checks, dependent_jobs, memory_estimate, resume, run_folder
from launch.rank import python_path
from launch.run_folder import Run
from launch.snapshot import is_own_code
from multitrain.cluster.slurm import STOP_SIGNALS
from multitrain.config import ConfigError, dump, machine
from multitrain.config.arguments import OneLineParser, answered, piped, typed_words
from multitrain.config.overrides import tidy
from multitrain.text import counted

EXAMPLES = """\
examples:
  python launch/submit.py nodes=2 gpus=8                        the recommended run on 16 GPUs
  python launch/submit.py nodes=4 name=first dry_run=true       print the sbatch script, submit nothing
  python launch/submit.py name=first cluster.partition=gpu cluster.account=lab cluster.time_limit=720
  python launch/submit.py experiment=ssv2 cluster=local gpus=2  on this machine, in the foreground
  python launch/submit.py name=first then=eval                  and test it on every dataset when it has finished
  python launch/submit.py first                                 resume it, as it was submitted
  python launch/submit.py first nodes=8                         resume it on more nodes

An option is key=value; every one is described in multitrain/config/, their defaults are in configs/.
The same name again resumes a run: it keeps its earlier options, and the last value of each option counts.
"""


CFG_MODES = ("job", "all")
"""Values of `--cfg`: print the configuration, or also the values derived from it."""


def main(arguments: list[str] | None = None) -> int:
    """Submit a run; the exit code: 0 submitted or finished, 2 refused; for a local run also 75 (interrupted) or a failed rank's code."""
    options, words = _parser().parse_known_args(arguments)
    _command_line[:] = sys.argv[1:] if arguments is None else arguments
    return answered(lambda: _main(words, options))


def _main(words: list[str], options: argparse.Namespace) -> int:
    words = typed_words(words)
    if options.cfg not in (None, *CFG_MODES):  # the word after a bare --cfg
        words, options.cfg = [tidy(options.cfg), *words], CFG_MODES[0]
    if options.cfg:
        return _show_config(words, options)
    return _prepare(words, options.config_dir) if options.prepare else _submit(words, options.config_dir)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        "python launch/submit.py",
        "Submit a training run to SLURM, or run it here with cluster=local. Returns at once.",
        usage="python launch/submit.py [RUN] [key=value …]",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--config-dir", action="append", default=[], metavar="DIR", help="folder with your own config groups"
    )
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="write the run's folder, submit nothing, print its path (for sbatch scripts)",
    )
    parser.add_argument(
        "--cfg",
        nargs="?",
        const=CFG_MODES[0],
        metavar="job|all",
        help="print the composed configuration as YAML, submit nothing: `job` as RUN/config.yaml will have it, "
        "`all` also with the values derived from it (folder, ranks, micro-batch, parameters)",
    )
    return parser


def _submit(words: list[str], config_dirs: list[str]) -> int:
    if (code := _resume_by_its_own_code(words, config_dirs)) is not None:
        return code
    run = run_folder.compose_run(words, config_dirs=config_dirs)
    run_folder.tell_idle([run])
    if run.config.cluster.kind == "slurm":
        from launch import slurm

        slurm.check(run.config)
        if hidden := slurm.foreign_variables():
            print(f"note: these variables of the shell are ignored: {', '.join(hidden)}", file=sys.stderr)
    if run.config.dry_run:
        return _dry_run(run)
    if run.config.cluster.kind == "hosts" and run.config.cluster.node:
        run_folder.wait_for_first_host(run)
        return _run_here(run)
    with contextlib.ExitStack() as claim:
        resumed = run.exists
        _write_claimed(run, claim)
        if run.config.cluster.kind == "slurm":
            return _to_slurm(run, resumed)
        run_folder.record(run, cluster=run.config.cluster.kind)
    return _run_here(run)  # its ranks hold the lease


def _write_claimed(run: Run, claim: contextlib.ExitStack, job: str | None = None) -> None:
    """Check the run and write its folder; hold the run's lease until `claim` is closed."""
    resumed = run.exists
    if resumed:
        claim.enter_context(run_folder.claimed(run.path))
        _refuse_active_job(run.path, but=job)
    checks.refuse_unstartable([run], keep_index=True)
    run_folder.write(run)
    if not resumed:
        claim.enter_context(run_folder.claimed(run.path))
        _refuse_active_job(run.path, but=job)  # another submission may have found the folder before it was claimed


def _resume_by_its_own_code(words: list[str], config_dirs: list[str]) -> int | None:
    """Call the run's own `submit.py` if the command line resumes a run that has one; its exit status, else None."""
    path = run_folder.folder(words, config_dirs)
    if path is None or is_own_code(path) or any(w.partition("=")[0] == "update_code" for w in words):
        return None
    if not (path / "code" / "launch" / "job.sh").is_file():
        print(
            f"note: run {path.name!r} is from an older version; it resumes with the code of this one", file=sys.stderr
        )
        return None
    for note in resume.changed_since(path, [w for w in words if "=" in w], config_dirs):
        print(f"note: {note}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, str(path / "code" / "launch" / "submit.py"), *_command_line]
    return _run_replacement(command, {**os.environ, "PYTHONPATH": python_path(path / "code")})


_command_line: list[str] = []
"""The command line of this process, for the run's own `submit.py`."""


def _run_replacement(command: list[str], environment: dict[str, str]) -> int:
    """Run a command in place of this process: pass signals on to it, and return its exit status."""
    process = subprocess.Popen(command, env=environment)

    def pass_on(number: int, _: FrameType | None) -> None:
        if number != signal.SIGINT:  # a terminal sends it to both
            process.send_signal(number)

    before = {n: signal.signal(n, pass_on) for n in (*STOP_SIGNALS, signal.SIGINT, signal.SIGHUP)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code


def _dry_run(run: Run) -> int:
    print(f"# run    {run.path}{' (resumed)' if run.exists else ''}")
    print(f"# batch  {_batch(run)}")
    for line in run.chosen:
        print(f"# auto   {line}")
    network = checks.count_network(run)
    print("\n".join(memory_estimate.summary_lines(run.config, run.shape, network)))
    if tensors := (network or {}).get("tensors"):
        print("\n".join(f"# {line}" for line in tensors))
        print("# for one line a tensor: multitrain flops --tensors with the same options")
    if run.config.cluster.kind == "local":
        print(f"# ranks  {run.config.gpus} on this machine, one process each")
    else:
        from launch import slurm

        print(slurm.script(run.path, run.config))
        if run.config.then == "eval":
            print(f"# then   tests of {', '.join(run.config.data.datasets)}, one job each, after training has finished")
    sys.stdout.flush()
    checks.refuse_unstartable([run], keep_index=False)
    return 0


def _show_config(words: list[str], options: argparse.Namespace) -> int:
    """Print the configuration that the command line describes, and nothing else."""
    run = run_folder.compose_run(words, config_dirs=options.config_dir)
    print(dump(run.config), end="")
    if options.cfg == "all":
        shape, classes = run.shape, [d.classes for d in run.config.data.datasets.values()]
        known = [count for count in classes if count is not None]
        follows = {
            "run": str(run.path),
            "resumes": run.exists,
            "index": str(run.index),
            "ranks": shape.world_size,
            "micro_batch": shape.micro_batch,
            "accumulation": shape.accumulation,
            "clips_an_update": shape.effective_batch * run.config.augment.copies,
            "parameters": _parameters(run) if len(known) == len(classes) else None,
        }
        print(yaml.safe_dump({"resolved": follows}, sort_keys=False), end="")
    return 0


def _parameters(run: Run) -> int:
    counted = checks.count_network(run)
    classes = [d.classes for d in run.config.data.datasets.values() if d.classes is not None]
    return counted["parameters"] if counted else memory_estimate.parameters(run.config.model, classes)


def _to_slurm(run: Run, resumed: bool) -> int:
    from launch import slurm

    try:
        slurm.write_script(run.path, run.config)
        job = slurm.submit(run.path, run.config)
    except ConfigError:
        if not resumed:
            run_folder.remove(run)
        raise
    run_folder.record(run, cluster="slurm", job=job)
    log = slurm.rank_log(run.path, job)
    print(f"job     {job}{f'  (resumes {run.name})' if resumed else ''}")
    print(f"run     {run.path}")
    print(f"batch   {_batch(run)}")
    _print_chosen(run)
    print(f"log     {log}")
    print(f"follow  tail -F {log}")
    print(f"status  squeue -j {job};  multitrain status {run.path}")
    print(f"cancel  scancel {job}")
    print(f"resume  {_resume_command(run)}")
    return _submit_tests(run, job)


def _submit_tests(run: Run, job: str) -> int:
    """Submit the tests that follow the training; if SLURM refuses them, the training stays in the queue. The exit code."""
    if run.config.then != "eval":
        return 0
    try:
        for dataset, test in dependent_jobs.submit(run.path, run.config, job).items():
            print(f"then    {test}  tests {dataset}", flush=True)
    except ConfigError as error:
        print(f"error: training is job {job}; its tests were refused: {error}", file=sys.stderr)
        return 2
    return 0


def _run_here(run: Run) -> int:
    from launch import hosts, local
    from launch.rank import training

    on_hosts = run.config.cluster.kind == "hosts"
    log = (
        hosts.rank_log(run.path, (run.config.cluster.node or 0) * run.config.gpus)
        if on_hosts
        else local.rank_log(run.path)
    )
    print(f"run     {run.path}")
    print(f"batch   {_batch(run)}")
    _print_chosen(run)
    print(f"log     {log}", flush=True)
    if run.config.preflight and not on_hosts:
        code = local.run(run.path, run.config, ("-m", "launch.preflight", "--dir", str(run.path)))
        if code:
            return code
    code = hosts.run(run.path, run.config) if on_hosts else local.run(run.path, run.config, training(run.path))
    if code == local.INTERRUPTED:
        print(f"resume  {_resume_command(run)}")
    if code == 0 and run.config.then == "eval" and not run.config.cluster.node:
        code = dependent_jobs.run_here(run.path, run.config)
    if code == 0 and not run.config.cluster.node:
        print(f"report  {shlex.join([*machine.own_command(), 'report', str(run.path)])}", flush=True)
    return code


def _prepare(words: list[str], config_dirs: list[str]) -> int:
    """For `sbatch slurm/train.sh`: prepare the run's folder and print its path; after a requeue, the same folder again."""
    from launch import slurm
    from multitrain.cluster.slurm import job_id

    job = job_id()
    words = [*words, *_allocated(words)]
    if (code := _resume_by_its_own_code(words, config_dirs)) is not None:
        return code
    run = run_folder.compose_run(words, config_dirs=config_dirs, default_name=f"job{job}" if job else None)
    run_folder.tell_idle([run])
    if not (job and run.exists and job in run_folder.jobs(run.path)):  # otherwise requeued: the folder is complete
        with contextlib.ExitStack() as claim:
            _write_claimed(run, claim, job)
            slurm.write_script(run.path, run.config)
            run_folder.record(run, cluster="slurm", job=job)
            if job:
                run_folder.record_job(run.path, job)
    print(run.path)
    return 0


def _allocated(words: list[str]) -> list[str]:
    """The overrides `nodes` and `gpus` of the allocation that `sbatch` made.

    Raises:
        ConfigError: they were also typed, with other values.
    """
    found = []
    for option, variable, flag in (
        ("nodes", "SLURM_JOB_NUM_NODES", "--nodes"),
        ("gpus", "SLURM_NTASKS_PER_NODE", "--ntasks-per-node"),
    ):
        value = os.environ.get(variable)
        typed = [w.partition("=")[2] for w in words if w.partition("=")[0] == option]
        if value and typed and typed[-1] != value:
            raise ConfigError(f"{option}={typed[-1]}, but this job has {value}; use sbatch {flag}={typed[-1]} …")
        if value:
            found.append(f"{option}={value}")
    return found


def _refuse_active_job(path: Path, but: str | None = None) -> None:
    """Refuse a run that another job trains or waits to train, since both would write to the same files.

    Raises:
        ConfigError: names the other job.
    """
    from launch import slurm

    earlier = [job for job in run_folder.jobs(path) if job != but]
    for job, state in slurm.active(path, earlier[-20:]).items():
        raise ConfigError(
            f"run {path.name!r} is job {job} ({state.lower()}); cancel that first (scancel {job}), "
            f"or choose another name: name=…"
        )


def _batch(run: Run) -> str:
    s, c = run.shape, run.config
    where = (f"{c.nodes} × " if c.nodes > 1 else "") + counted(c.gpus, "rank")
    videos = counted(s.micro_batch, "video")
    return f"{counted(s.effective_batch, 'video')} an update = {where} × {videos} × {s.accumulation} accumulated"


def _print_chosen(run: Run) -> None:
    """Print what was chosen for ``auto``, and what this machine lacks for the run."""
    for line in run.chosen:
        print(f"auto    {line}")
    for line in [] if run.config.cluster.node else memory_estimate.local_notes(run.config):
        print(line.removeprefix("# "))


def _resume_command(run: Run) -> str:
    """The command that resumes the run, from any folder."""
    return shlex.join(["python", f"{run.path}/code/launch/submit.py", str(run.path)])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(piped(main))
