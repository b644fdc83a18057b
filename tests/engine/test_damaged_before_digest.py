"""A checkpoint whose weights were damaged before their digest was taken: one line, no traceback."""

from __future__ import annotations

import json

import pytest

from multitrain.config import ConfigError
from multitrain.engine import checkpoint
from multitrain.engine.checkpoint import CheckpointError


def test_weights_that_match_their_digest_and_are_no_safetensors_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "verify", lambda folder: None)
    (tmp_path / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b'{"a":1}')
    (tmp_path / "state.json").write_text(json.dumps({"format": checkpoint.FORMAT}))
    with pytest.raises((CheckpointError, ConfigError), match="older checkpoint"):
        checkpoint.read(tmp_path)
