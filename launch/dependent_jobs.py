"""Jobs that depend on a run: with ``then=eval`` the multi-view test of each of its datasets, after training has succeeded."""

from __future__ import annotations

from pathlib import Path

from multitrain.config import RunConfig
from multitrain.records.checkpoints import BEST
from multitrain.records.events import Events


def testing(run: Path, config: RunConfig, dataset: str) -> tuple[str, ...]:
    """The arguments of Python that test the run in folder `run` on one of its datasets: the weights that were validated, of its
    best checkpoint if it keeps one, else of the newest."""
    model = run / BEST if config.checkpoint.best else run / "ema" if config.ema.decay else run
    return ("-m", "multitrain.cli", "evaluate", str(model), "--dataset", dataset)


def submit(run: Path, config: RunConfig, job: str) -> dict[str, str]:
    """Submit one test job per dataset, to start when `job` has ended with exit status 0; returns their ids by dataset.

    A job that is requeued has not ended for SLURM. SLURM removes the tests of a run that fails or is cancelled.

    Raises:
        ConfigError: SLURM refused a job.
    """
    from launch import slurm

    jobs = {}
    for dataset in config.data.datasets:
        cluster = config.cluster.model_copy(update={"nodelist": None})  # lists more nodes than the one of a test
        changes = {"name": f"{config.name}-test-{dataset}", "nodes": 1, "preflight": False, "cluster": cluster}
        test = config.model_copy(update=changes)
        jobs[dataset] = slurm.submit(run, test, testing(run, config, dataset), after=job)
        Events(run / "events.jsonl", job=job, restart=0).write("then", dataset=dataset, test_job=jobs[dataset])
    return jobs


def run_here(run: Path, config: RunConfig) -> int:
    """Test the datasets on this machine, one after the other; the first exit status that is not 0, else 0."""
    from launch import local

    for dataset in config.data.datasets:
        code = local.run(run, config, testing(run, config, dataset))
        if code:
            return code
    return 0
