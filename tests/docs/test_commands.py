"""Every command line in README and docs works as far as this machine can tell, and is not just text.

Submissions are dry runs; verbs that only look run on a small run; of the others every verb, flag and option is checked, and
what they do has tests of its own. A line that needs something says so in its comment: `# needs a cluster`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from launch import submit
from multitrain import cli
from multitrain.config import compose, dump
from multitrain.engine import checkpoint as checkpoints
from multitrain.model import MultiTrain
from tests import support

ROOT = Path(__file__).resolve().parents[2]
RUN = {"status", "completion", "export", "report"}
"""Verbs that are really run; the others are long, need data, or have tests of their own."""

OUTSIDE = {
    "conda",
    "apptainer",
    "docker",
    "enroot",
    "tensorboard",
    "pre-commit",
    "squeue",
    "scancel",
    "scontrol",
    "tail",
    "touch",
    "export",
}
"""Programs of others; only that files they are given exist is checked."""


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every line in a bash block."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            lines = re.sub(r"\\\n\s*", " ", block).splitlines()
            found += [(page.name, line) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return found


def settings_files() -> Iterator[tuple[str, str]]:
    """(path, content) of every block of YAML or Python whose first line names its file."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in re.findall(r"^```(?:yaml|python)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            name = re.match(r"# (\S+\.(?:yaml|py))", block)
            if name:
                yield name.group(1), block


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the documented commands make sense: a run `first` with a checkpoint, weights, settings of one's own."""
    folder = tmp_path_factory.mktemp("docs")
    support.write_dataset(folder / "data/stride", 5, 5, seed=1)
    for name in ("segment", "with.dot"):
        support.write_dataset(folder / "data" / name, 4, 3 if name == "segment" else 4, seed=2)
    for name in ("first", "my_run", "k400_mit_ssv2"):
        run, config = support.write_run(
            folder / "runs",
            support.settings(folder / "data", name=name, effective_batch=512, micro_batch=None, cluster__kind="slurm"),
        )
        (run / "overrides.yaml").write_text(
            "- time: '2026-01-01'\n  directory: /\n  overrides: [gpus=1]\n  config_dirs: []\n"
        )
    names = {"stride": 5, "segment": 3, "with.dot": 4}
    state = {"update": 5, "datasets": names, "model": config.model.model_dump(mode="json"), "multi_label": []}
    weights = {k: v.detach() for k, v in MultiTrain(config.model, names).state_dict().items()}
    checkpoints.write(folder / "runs/first/checkpoints", checkpoints.Checkpoint(weights, {}, state), dump(config))
    torch.save({"model_state": {}}, folder / "k400.pyth")
    for clip in (folder / "clips" / label / f"{i}.mp4" for label in ("jump", "run") for i in range(20)):
        clip.parent.mkdir(parents=True, exist_ok=True)
        clip.write_bytes(b"video")
    assert cli.main(["data", "import", "folder", str(folder / "clips"), "--out", str(folder / "mine")]) == 0
    for name, text in settings_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(("page", "line"), commands())
def test_the_command_works(page: str, line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    command, _, comment = line.partition(" #")
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    problem = check(words, run="needs" not in comment)
    assert problem is None, f"{page}: {line}\n{problem}"


def check(words: list[str], *, run: bool) -> str | None:
    """What is wrong with a command, or None."""
    program, rest = words[0], words[1:]
    inner = re.fullmatch(r"\$\((.*)\)", rest[0]) if program == "eval" else None
    if inner:
        return check(shlex.split(inner.group(1)), run=run)
    if program == "multitrain" and rest[0] == "submit":
        return dry_run(rest[1:])
    if program == "multitrain":
        return verb(rest, run=run)
    if program == "python" and rest[0] == "launch/submit.py":
        return dry_run(rest[1:])
    if program in ("python", "python3") and rest[0] == "-m":
        return None if importlib.util.find_spec(rest[1]) else f"no module {rest[1]}"
    if program in ("python", "python3") or "/" in program:
        script = rest[0] if program.startswith("python") else program
        return None if (ROOT / script).is_file() else f"no file {script}"
    if program == "make":
        targets = [w for w in rest if "=" not in w]
        return next((f"no target {t}" for t in targets if f"\n{t}:" not in (ROOT / "Makefile").read_text()), None)
    if program == "pip":
        named = {e for w in rest for group in re.findall(r"\[(.*?)\]", w) for e in group.split(",")}
        text = (ROOT / "pyproject.toml").read_text()
        return next((f"no extra {e}" for e in named if not re.search(rf"^{e} = \[", text, re.MULTILINE)), None)
    if program == "sbatch" or program in OUTSIDE:
        files = [
            w
            for w in rest
            if re.match(r"(slurm|containers)/\S+\.(sh|def)$|containers/Dockerfile$|environment\.yml$", w)
        ]
        if program == "sbatch" and not files:
            return "sbatch without a script of ours"
        return next((f"no file {f}" for f in files if not (ROOT / f).is_file()), None)
    return f"nobody knows {program!r}; teach tests/docs/test_commands.py, or correct the page"


def dry_run(words: list[str]) -> str | None:
    out, err = io.StringIO(), io.StringIO()
    words = [w for w in words if w != "…"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = submit.main([*words, "dry_run=true", "cluster.check_data=false"])
    return None if status == 0 and "# batch" in out.getvalue() else err.getvalue() or out.getvalue()


def verb(words: list[str], *, run: bool) -> str | None:
    path = words[:2] if words[0] == "data" and len(words) > 1 and "=" not in words[1] else words[:1]
    known = help_of(*path)
    flags = [w.partition("=")[0] for w in words if w.startswith("-")]
    unknown = [f for f in flags if f not in known]
    if unknown:
        return f"{' '.join(path)} has no {unknown}; it has {known}"
    compose([w for w in words if re.match(r"[a-z_.]+=", w) and w.partition("=")[0] not in ("data.root",)])
    if not run or path[0] not in RUN or "--watch" in words or "--upload" in words:
        return None
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([*words, *(["--force"] if path[0] == "export" else [])])
    return None if status == 0 and out.getvalue() else err.getvalue()


@cache
def help_of(*path: str) -> tuple[str, ...]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as left:
        cli.main([*path, "--help"])
    assert left.value.code == 0
    assert "example" in out.getvalue(), f"multitrain {' '.join(path)} --help has no example"
    return tuple(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", out.getvalue()))


@pytest.mark.parametrize(
    "line",
    [
        "multitrain status --jsn",
        "multitrain flops model.frmes=3",
        "python launch/submit.py nods=2",
        "make lunch",
        "pip install 'multitrain[slrum]'",
        "frobnicate x",
        "sbatch slurm/eval_k600.sh x",
    ],
)
def test_a_wrong_command_is_noticed(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    try:
        assert check(shlex.split(line), run=True) is not None
    except Exception as error:
        assert "did you mean" in str(error)  # noqa: PT017 (compose refuses an option)


def test_every_verb_has_an_example() -> None:
    for name in cli.VERBS:
        if name not in ("data", "preflight", "submit", "sweep"):  # a family of verbs; programs of launch/, see above
            help_of(name)
