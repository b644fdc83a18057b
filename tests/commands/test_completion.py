"""Completion offers what the commands take, as bash itself sees it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from multitrain.cli import VERBS
from multitrain.commands.completion import options, script, values
from multitrain.config import ConfigError, compose


def completed(line: str, folder: Path) -> list[str]:
    """What bash offers at the end of `line`."""
    program = folder / "multitrain"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m multitrain "$@"\n')
    program.chmod(0o755)
    code = f"""
{script("bash")}
compopt() {{ :; }}
COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}
read -ra COMP_WORDS <<< "$COMP_LINE"
[[ $COMP_LINE == *' ' ]] && COMP_WORDS+=('')
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_multitrain
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    return done.stdout.split()


def test_bash_completes_verbs_flags_options_and_values(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").touch()
    name = str(tmp_path / "multitrain")
    assert completed(f"{name} ", tmp_path) == list(VERBS)
    assert completed(f"{name} ev", tmp_path) == ["evaluate"]
    assert {"--watch", "--json", "--runs"} <= set(completed(f"{name} status --", tmp_path))
    assert completed("multitrain data clip", tmp_path) == ["clip.mp4"]
    assert completed(f"{name} data sh", tmp_path) == ["show"]
    assert {"--config-dir", "--min-frames", "--write-clean"} <= set(completed(f"{name} data check --", tmp_path))
    (tmp_path / "runs/first").mkdir(parents=True)
    assert completed(f"{name} report fir", tmp_path) == ["first"]
    (tmp_path / "runs/first$(touch hit)").mkdir()
    assert completed(f"{name} report fir", tmp_path) == ["first"]
    assert not (tmp_path / "hit").exists()
    assert completed("launch/submit.py cluster.parti", tmp_path) == ["cluster.partition="]
    assert completed("launch/submit.py experiment=k400_mit", tmp_path) == ["k400_mit_ssv2", "k400_mit_ssv2_reference"]
    assert completed("launch/submit.py precision=f", tmp_path) == ["fp16", "fp32"]


def test_bash_completes_the_script_behind_python(tmp_path: Path, root: Path) -> None:
    submit = f"{sys.executable} {root}/launch/submit.py"
    assert completed(f"{submit} dry_", tmp_path) == ["dry_run="]
    assert {"--cfg", "--config-dir"} <= set(completed(f"{submit} --c", tmp_path))
    assert completed("python launch/submit.py nodes=2 precision=f", tmp_path) == ["fp16", "fp32"]


def test_groups_of_the_users_own_are_offered(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine.yaml").touch()
    (tmp_path / "data/a $(b).yaml").touch()
    assert "data=mine" in values([str(tmp_path)])
    assert "$(b)" not in script("bash", [str(tmp_path)])


def test_every_value_that_is_offered_is_accepted() -> None:
    offered = [v for v in values() if v.partition("=")[0] in ("precision", "activation_checkpointing", "deterministic")]
    assert len(offered) == 9
    for value in offered:
        compose([value])
    assert {"nodes", "cluster.time_limit", "experiment", "model"} <= set(options())


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_can_read_their_script(shell: str) -> None:
    program = shutil.which(shell)
    text = script(shell)
    assert "cluster.partition=" in text
    if program:
        assert subprocess.run([program, "-n"], input=text, text=True, check=False).returncode == 0


def test_an_unknown_shell_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="fish"):
        script("fsh")
