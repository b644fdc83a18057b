"""What is said of a process that a signal has ended."""

from __future__ import annotations

import pytest

from multitrain.cluster import exit_status


@pytest.mark.parametrize("code", [-9, 137])
def test_a_kill_names_the_signal_and_what_may_have_sent_it(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exit_status, "killed_for_memory", lambda: 5)
    said = exit_status.describe_exit(code, 5)
    assert said.startswith(
        f"was killed by SIGKILL (exit code {code}): by a user, by SLURM, or by the kernel when memory ran"
    )
    assert "dmesg" in said
    assert "data.workers" in said
    assert exit_status.describe_exit(code, 4).startswith(
        f"was killed by SIGKILL (exit code {code}): memory ran out, and the kernel"
    )


def test_other_ends() -> None:
    assert exit_status.describe_exit(7) == "failed with exit code 7"
    assert (
        exit_status.describe_exit(-11)
        == "was killed by SIGSEGV (exit code -11): a library has failed; its log has the stack"
    )
    assert exit_status.describe_exit(143) == "was killed by SIGTERM (exit code 143)"
    assert exit_status.describe_exit(255) == "failed with exit code 255"
