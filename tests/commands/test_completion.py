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
    assert completed("launch/submit.py cluster.parti", tmp_path) == ["cluster.partition="]
    assert completed("launch/submit.py experiment=k400_mit", tmp_path) == ["k400_mit_ssv2", "k400_mit_ssv2_reference"]
    assert completed("launch/submit.py precision=f", tmp_path) == ["fp16", "fp32"]


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
