"""Commands run by other users of the machine, for tests that root runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import forked
from tests.support import ROOT

ALICE, BOB, LAB = 61001, 61002, 61000
"""Numbers of two users and of their group; the system need not know them."""


@contextmanager
def meeting_place() -> Iterator[Path]:
    """A new folder that every user may look into (pytest closes its own again and again); skips the test without root."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be two users")
    folder = Path(tempfile.mkdtemp(prefix="two-users-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


_AS = """
import importlib, json, os, sys
user, group, umask = map(int, sys.argv[1:4])
for name in sys.argv[4].split(","):  # the interpreter's own files may be closed to the user
    importlib.import_module(name)
from multitrain.cli import main
from multitrain.data.tools import parallel_map
os.umask(umask); os.setgroups([]); os.setgid(group); os.setuid(user)
parallel_map.map_resumable = lambda items, work, **_: ((item, work(item)) for item in items)  # nor can it be started again
for words in json.loads(sys.argv[5]):
    print("#", *words, file=sys.stderr, flush=True)
    status = main(words)
    print("=", status, file=sys.stderr, flush=True)
    if status and sys.argv[6] == "all":
        sys.exit(status)
"""
_LIGHT = [
    "pwd",
    "encodings.idna",
    "encodings.unicode_escape",
    "encodings.utf_8_sig",
    "encodings.cp437",
    "encodings.latin_1",
    "encodings.utf_16",
    "multitrain.report.status",
    "multitrain.report.compare",
]
_HEAVY = [
    "torch",
    "torch._dynamo",
    "safetensors.torch",
    "numpy.lib.format",
    "zipfile",
    "av",
    "cv2",
    "zoneinfo",
    "unittest.mock",
    "PIL.PngImagePlugin",
    "multiprocessing.synchronize",
    "matplotlib.backends.backend_agg",
    "hydra.compose",
    "hydra.core.global_hydra",
    "hydra.core.override_parser.overrides_parser",
    "hydra._internal.core_plugins.file_config_source",
    "hydra._internal.core_plugins.importlib_resources_config_source",
    "hydra._internal.core_plugins.structured_config_source",
    "hydra._internal.core_plugins.basic_launcher",
    "hydra._internal.core_plugins.basic_sweeper",
    "hydra._internal.core_plugins.zsh_completion",
    "multitrain.commands.evaluate",
    "multitrain.commands.convert",
    "multitrain.data.decode.pyav",
    "multitrain.data.loader",
    "multitrain.engine.checkpoint",
    "multitrain.evaluation.evaluator",
    "multitrain.evaluation.predictor",
    "multitrain.report.run_report",
    "multitrain.interop.convert",
    "multitrain.interop.export",
]
"""What has to be imported before the interpreter's own files are closed to the user."""


def run_as(
    user: int,
    commands: list[list[str]],
    folder: Path,
    umask: int = 0o022,
    heavy: bool = False,
    each: bool = False,
) -> subprocess.CompletedProcess[str]:
    """``multitrain WORDS`` for each of `commands`, until one fails, by `user` of the group :data:`LAB`, in `folder`.

    Args:
        heavy: a verb needs torch.
        each: go on after a failure; :func:`ends` tells the commands apart.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "HOME", "XDG_"))}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "MPLCONFIGDIR": "/tmp",
    }
    modules = ",".join([*_LIGHT, *(_HEAVY if heavy else [])])
    words = [str(user), str(LAB), str(umask), modules, json.dumps(commands), "each" if each else "all"]
    if heavy:
        return _forked(words, environment, folder)
    done = subprocess.run(
        [sys.executable, "-c", _AS, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


def _forked(words: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The same from a process that has imported it all already; what is written to stdout is not kept."""
    quiet = "import os; os.dup2(os.open(os.devnull, os.O_WRONLY), 1)"
    process = forked.start(["-c", f"{quiet}\n{_AS}", *words], environment, None, folder, (*_LIGHT, *_HEAVY))
    assert process.stdout is not None
    said = process.stdout.read().decode()
    assert "Traceback" not in said, said[-3000:]
    return subprocess.CompletedProcess(words, process.wait(), "", said)


def ends(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[int, list[str]]]:
    """Exit status and lines of errors of each command of :func:`run_as`, by its words."""
    found = {}
    for part in ("\n" + done.stderr).split("\n# ")[1:]:
        words, *lines, status = part.strip().splitlines()
        found[words] = (int(status.removeprefix("= ")), lines)
    return found
