"""Export a trained model as a folder to share: weights, description, class names, and a model card."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from multitrain.config import ConfigError, RunConfig
from multitrain.config.arguments import Parser
from multitrain.config.boundary import writing_to
from multitrain.config.reading import read_yaml
from multitrain.files import OutputFolder, refuse_run
from multitrain.interop.convert import describe_model, write_model
from multitrain.interop.model_path import MODEL_FILE, belongs_to_run, resolve_model_file
from multitrain.interop.outputs import output_folder
from multitrain.interop.sharing import shareable, shareable_overrides
from multitrain.interop.state_dict_report import abbreviated
from multitrain.interop.weights import Weights, read_model
from multitrain.records.checkpoints import sha256
from multitrain.records.results import read_results
from multitrain.text import markdown, printable

FILES = ("model.safetensors", "config.json", "class_names.json", "README.md")
"""The files of an export; only these are written and uploaded."""


@dataclass(frozen=True)
class Exported:
    """Summary of an export."""

    folder: Path
    files: tuple[str, ...]
    datasets: Mapping[str, int]
    results: Mapping[str, Mapping[str, Any]]
    """Test metrics by dataset; empty if the model was not tested."""
    others: tuple[str, ...] = ()
    """Other entries of the folder; not part of the export, and never uploaded."""


def export(
    source: str | Path, target: str | Path, *, evaluation: str | Path | None = None, force: bool = False
) -> Exported:
    """Write ``model.safetensors``, ``config.json``, ``class_names.json`` and ``README.md`` (the model card) to a new folder.

    The export holds no optimizer state and does not name machines, accounts, users or folders: its configuration comes from
    :func:`multitrain.interop.sharing.shareable`.

    Args:
        source: a run, a checkpoint folder, a `.pyth` or a `.safetensors` file.
        target: the folder; ``multitrain.load(target / "model.safetensors")`` reads it.
        evaluation: folder with the ``metrics.json`` of a test of these weights (default: the run's own test of
            the checkpoint, if it exists).
        force: replace the files of an earlier export, if they were not changed since.

    Raises:
        ConfigError: `source` has no model; `target` holds other files of these names, belongs to a run, or cannot be written.
    """
    source, target = Path(source), Path(target)
    _check_target(source, target, force)
    weights, run = read_model(source)
    results = _results(source, Path(evaluation) if evaluation else None)
    with writing_to(target):
        target.mkdir(parents=True, exist_ok=True)
        out, inside = _outputs(target)
        description = describe_model(weights, shareable(run, weights.datasets))
        write_model(out, inside / MODEL_FILE, weights.state, description, inside / "config.json")
        known = {name: weights.class_names[name] for name in weights.datasets if name in weights.class_names}
        out.write_text(inside / "class_names.json", json.dumps(known, indent=1, ensure_ascii=False) + "\n")
        out.write_text(inside / "README.md", _card(source, target, run, weights, results, known))
        others = sorted(p.name for p in target.iterdir() if p.name not in FILES)
    return Exported(target, FILES, weights.datasets, results, tuple(others))


def _check_target(source: Path, target: Path, force: bool) -> None:
    """Raise ConfigError if `target` belongs to a run or a checkpoint, or has files of these names that may not be replaced."""
    with writing_to(target):
        if target.exists() and not target.is_dir():
            raise ConfigError(f"{target}: is a file; give a new folder")
        refuse_run(target)
        if belongs_to_run(target) or (source.exists() and target.exists() and target.samefile(source)):
            raise ConfigError(
                f"{target}: is a run's or a checkpoint's folder, which is never written into; give another"
            )
        if target.is_dir() and source.is_file() and target.samefile(source.absolute().parent) and source.name in FILES:
            raise ConfigError(f"{target}: holds the weights that are read; give another folder")
        taken = [n for n in FILES if (target / n).exists() or (target / n).is_symlink()]
    odd = [n for n in taken if (target / n).is_symlink() or not (target / n).is_file()]
    if odd:
        raise ConfigError(f"{target / odd[0]}: is a folder or a link, which is not replaced; move it away")
    if taken and not force:
        raise ConfigError(
            f"{target}: has {', '.join(taken)} already; choose another folder, or add --force to replace them"
        )
    _outputs(target)


def _outputs(target: Path) -> tuple[OutputFolder, Path]:
    """(the parent folder, limited to the export's files; the export's folder in it). The record in the parent is not published."""
    real = Path(os.path.realpath(target))
    return output_folder(real.parent, "export", [f"{real.name}/{name}" for name in FILES]), Path(real.name)


def upload(folder: Path, repository: str, *, private: bool = True) -> str:
    """Upload the files of an export, and no other file of the folder, to the Hugging Face Hub; return the URL.

    Args:
        folder: see :func:`export`.
        repository: ``OWNER/NAME``.
        private: whether a new repository is private.

    Raises:
        ConfigError: huggingface_hub is not installed, or the upload failed (the message quotes the hub's error).
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ConfigError("uploading needs huggingface_hub; pip install 'multitrain[hub]'") from None
    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=str(folder), allow_patterns=list(FILES)))
    except Exception as error:  # raised by many libraries: network, credentials, quota
        said = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{repository}: the hub refused ({type(error).__name__}: {said}); `hf auth login` first? The folder {folder} is complete"
        ) from None


def _results(source: Path, evaluation: Path | None) -> dict[str, dict[str, Any]]:
    """Test metrics by dataset, for datasets that were scored by their own head."""
    folder = evaluation or _own_test(source)
    found = read_results(folder) if folder else {}
    return {name: r for name, r in found.items() if r.get("head") == r.get("dataset")}


def _own_test(source: Path) -> Path | None:
    """The test folder of the exported checkpoint; None if it was not tested, or the file is not a run's."""
    if source.suffix == ".pyth":
        return None
    checkpoint = resolve_model_file(source).parent
    folder = checkpoint.parent.parent / "evaluation" / checkpoint.name / "test"
    return folder if (folder / "metrics.json").is_file() else None


def _command(source: Path) -> str | None:
    """The command that submitted the run of these weights; None if it is not recorded."""
    if source.suffix == ".pyth":
        return None
    run = resolve_model_file(source).parent.parent.parent
    try:
        typed = [entry for entry in read_yaml(run / "overrides.yaml") if isinstance(entry, dict)]
        words = [str(word) for entry in typed for word in entry["overrides"]]
        folders = [str(folder) for entry in typed for folder in entry.get("config_dirs") or ()]
    except (ConfigError, KeyError, TypeError):
        return None
    last = {word.partition("=")[0]: word for word in words}
    own = [word for f in dict.fromkeys(folders) for word in ("--config-dir", PurePosixPath(f).name)]
    return printable(
        shlex.join(["python", "launch/submit.py", f"name={run.name}", *shareable_overrides(last.values()), *own])
    )


def _card(
    source: Path,
    folder: Path,
    run: RunConfig,
    weights: Weights,
    results: Mapping[str, Mapping[str, Any]],
    known: Mapping[str, Sequence[str]],
) -> str:
    model, classes = weights.config, sum(weights.datasets.values())
    heads = ", ".join(f"{markdown(name)} ({count})" for name, count in weights.datasets.items())
    parameters = sum(t.numel() for t in weights.state.values())
    command = _command(source)
    unnamed = [markdown(name) for name in weights.datasets if name not in known]
    lines = [
        "---",
        "library_name: multitrain",
        "pipeline_tag: video-classification",
        "tags: [video, action-recognition, multi-dataset]",
        "---",
        "",
        f"# {markdown(folder.resolve().name)}",
        "",
        f"One video transformer with {len(weights.datasets)} head{'s' if len(weights.datasets) != 1 else ''}: {heads}; "
        f"{classes} classes together. {parameters:,} parameters, {model.depth} blocks, clips of {model.frames} frames "
        f"(every {run.data.sampling_rate} at {run.data.target_fps:g} frames a second) of {model.crop}×{model.crop} pixels.",
        "",
        "## Results",
        "",
        *_table(results),
        "",
        "## Use",
        "",
        "```python",
        "import multitrain",
        "",
        'model = multitrain.load("model.safetensors")',
        'model.predict("clip.mp4", top=5)  # {dataset: [(label, probability), ...]}',
        "```",
        "",
        "## How it was made",
        "",
        *(["```bash", command, "```", ""] if command else ["The command is not recorded with these weights.", ""]),
        f"The whole configuration is in `config.json` under `run`. Seed {run.seed}, {run.effective_batch} videos an update, "
        f"{run.precision}.",
        "",
        "## Files",
        "",
        f"* `model.safetensors`: {len(weights.state)} tensors, SHA-256 `{sha256(folder / 'model.safetensors')}`",
        "* `config.json`: network, datasets and the configuration of the run",
        "* `class_names.json`: names by label"
        + (f" (not known for {', '.join(unnamed)}: their classes are numbers)" if unnamed else ""),
        "",
        "The datasets' own terms say what a model trained on them may be used for; they are not part of this folder.",
    ]
    return "\n".join(lines) + "\n"


def _table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not results:
        return ["Not tested yet: `multitrain evaluate` first, then export again."]
    columns = {"top1": "top-1 %", "top5": "top-5 %", "map": "mAP %", "mean_class_accuracy": "mean class accuracy %"}
    kept = {k: title for k, title in columns.items() if any(r.get(k) is not None for r in results.values())}
    rows = [["dataset", "split", "views (time × space)", "videos scored", *kept.values()]]
    for name, r in results.items():
        views = " × ".join(str(v) for v in r.get("views") or ()) or "–"
        figures = ["–" if r.get(k) is None else f"{r[k]:.2f}" for k in kept]
        rows.append(
            [
                markdown(name),
                markdown(str(r.get("split", "–"))),
                views,
                f"{r.get('scored', '–')} of {r.get('videos', '–')}",
                *figures,
            ]
        )
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|" + " --- |" * len(rows[0]), *body]


def main(arguments: Sequence[str] | None = None) -> int:
    """``multitrain export MODEL FOLDER``; returns the exit status."""
    parser = Parser(
        "export",
        "A trained model as a folder to give away: model.safetensors, config.json, class_names.json and a model card with "
        "the table of results and the command that made it.",
        "multitrain export runs/first first-model",
        "multitrain export runs/first first-model --evaluation runs/evaluation/first-kinetics",
        "multitrain export runs/first first-model --upload lab/first-model",
    )
    parser.add_model("a run's folder or its name in runs, a checkpoint's folder, a .pyth or a .safetensors file")
    parser.add_argument("target", metavar="FOLDER", help="new folder")
    parser.add_argument("--evaluation", metavar="DIR", help="folder of a finished test (default: the checkpoint's own)")
    parser.add_argument("--force", action="store_true", help="replace the files of an earlier export")
    parser.add_argument("--upload", metavar="OWNER/NAME", help="put it on the Hugging Face Hub as well")
    parser.add_argument("--public", action="store_true", help="with --upload: a public repository")
    parser.add_argument("--private", action="store_true", help="with --upload: a private repository (the default)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    if given.public and given.private:
        parser.error("--public and --private; give one of them")
    given.source, _ = parser.model_and_words(given, [])
    done = export(given.source, given.target, evaluation=given.evaluation, force=given.force)
    address = upload(done.folder, given.upload, private=not given.public) if given.upload else None
    if given.json:
        said = {"folder": str(done.folder), "files": done.files, "datasets": dict(done.datasets), "address": address}
        print(json.dumps(said, ensure_ascii=False))
        return 0
    print(f"{done.folder}: {', '.join(done.files)}")
    if done.others:
        print(f"also there, but not part of the export and not uploaded: {printable(abbreviated(done.others))}")
    if not done.results:
        print("the card has no results: multitrain evaluate first, then export again with --force")
    if address:
        print(address)
    return 0


__all__ = ["FILES", "Exported", "export", "main", "upload"]
