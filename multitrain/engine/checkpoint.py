"""Verified checkpoints: a folder is complete and matches its manifest, or it is not a checkpoint.

A checkpoint is ``checkpoints/update-00001234/`` with ``model.safetensors`` and ``optimizer.safetensors`` (tensors by
parameter name, fp32, independent of the world size), ``state.json``, ``config.yaml`` and, written last,
``manifest.json`` with the size and SHA-256 of each. It is written under a temporary name, synced, read back against its
manifest, renamed, and only then named by the pointer ``checkpoints/latest``. At whatever instant the process or the node
dies, the newest folder that matches its manifest is the state of the run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from multitrain import lease
from multitrain.config import ConfigError
from multitrain.config.reading import parse_json
from multitrain.records.checkpoints import (
    AVERAGE,
    BEST,
    LATEST,
    MANIFEST,
    listed,
    pointed_to,
    update_of,
    verify,
)

FORMAT = 1
_CHUNK = 1 << 24


class CheckpointError(ConfigError):
    """A checkpoint that cannot be read or written; the message names the folder, the reason and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint.

    `weights`: fp32 by parameter name. `moments`: fp32 as ``exp_avg.NAME`` and ``exp_avg_sq.NAME``. Both on the CPU;
    a mapping may assemble its tensors on access. `state`: the update, the plan's fingerprint, the loss-scale state and
    the model's description, as JSON. `average`: the averaged weights, fp32 by parameter name; empty without `ema.decay`.
    """

    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    state: dict[str, Any]
    average: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def update(self) -> int:
        """Completed updates."""
        return int(self.state["update"])


def folder_of(checkpoints: Path, update: int) -> Path:
    """The folder of the checkpoint after `update` updates."""
    return checkpoints / f"update-{update:08d}"


def newest_verified(checkpoints: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest valid checkpoint, and the reason why each newer one is not valid.

    Raises:
        CheckpointError: when there are checkpoints but none is valid: starting over would lose the run.
    """
    refused: dict[Path, str] = {}
    for folder in listed(checkpoints):
        reason = verify(folder)
        if reason is None:
            return folder, refused
        refused[folder] = reason
    if refused:
        worst = "; ".join(f"{f.name}: {r}" for f, r in refused.items())
        raise CheckpointError(
            f"{checkpoints}: no checkpoint is whole ({worst}); restore one from a backup, or move the folder away and start over "
            "with from_scratch=true"
        )
    return None, {}


def read(folder: Path) -> Checkpoint:
    """The content of a checkpoint folder that :func:`verify` accepts."""
    reason = verify(folder)
    if reason is not None:
        raise CheckpointError(f"{folder}: {reason}; use an older checkpoint of the run")
    state = _read_state(folder)
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: format {state.get('format')!r}, this version reads format {FORMAT}; use the version that wrote it"
        )
    average = _tensors(folder / AVERAGE) if (folder / AVERAGE).is_file() else {}
    return Checkpoint(
        _tensors(folder / "model.safetensors"), _tensors(folder / "optimizer.safetensors"), state, average
    )


def _read_state(folder: Path) -> dict[str, Any]:
    state = parse_json((folder / "state.json").read_bytes(), folder / "state.json")
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder / 'state.json'}: no object; use an older checkpoint of the run")
    return state


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:  # damaged before its digest was taken
        raise CheckpointError(f"{file.parent}: {file.name}: {error}; use an older checkpoint of the run") from None


def write(checkpoints: Path, checkpoint: Checkpoint, config_text: str) -> Path:
    """Write one checkpoint atomically. One process calls this.

    Raises:
        OSError: the disk is full or the folder cannot be written; existing checkpoints are unchanged.
        LeaseLost: another start of the run has taken over.
    """
    lease.verify(checkpoints)
    final = folder_of(checkpoints, checkpoint.update)
    if final.is_dir() and verify(final) is None:
        _point_to(checkpoints, final.name)
        return final
    checkpoints.mkdir(parents=True, exist_ok=True)
    temporary = checkpoints / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        manifest = {
            "model.safetensors": _write_tensors(temporary / "model.safetensors", checkpoint.weights),
            "optimizer.safetensors": _write_tensors(temporary / "optimizer.safetensors", checkpoint.moments),
            **({AVERAGE: _write_tensors(temporary / AVERAGE, checkpoint.average)} if checkpoint.average else {}),
            "state.json": _write_synced(temporary / "state.json", _json({"format": FORMAT, **checkpoint.state})),
            "config.yaml": _write_synced(temporary / "config.yaml", config_text.encode()),
        }
        _write_synced(temporary / MANIFEST, _json({"update": checkpoint.update, "files": manifest}))
        _sync_folder(temporary)
        reason = verify(temporary)
        if reason is not None:
            raise OSError(f"{temporary}: read back differently from what was written: {reason}")
        lease.verify(checkpoints)  # writing may have taken long
        if final.exists():  # a damaged one of the same update
            _delete(final)
        os.rename(temporary, final)
        _sync_folder(checkpoints)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _point_to(checkpoints, final.name)
    return final


def point_to_best(checkpoints: Path, update: int | None) -> None:
    """Make ``checkpoints/best`` name the checkpoint after `update` updates, if there is one; otherwise it stays.

    Raises:
        OSError: it could not be written, and names the one that it named before.
    """
    if update is None or not (folder_of(checkpoints, update) / MANIFEST).is_file():
        return
    name = folder_of(checkpoints, update).name
    if pointed_to(checkpoints, BEST) != name:
        lease.verify(checkpoints)
        _point_to(checkpoints, name, BEST)


def prune(checkpoints: Path, keep: int, keep_every: int | None) -> list[Path]:
    """Delete checkpoints that retention does not cover, never one of the newest `keep` valid ones, nor the one that
    ``checkpoints/best`` names; returns the deleted folders.

    A checkpoint is deleted only after `keep` newer ones were read and verified. The manifest is deleted first, so that an
    interrupted deletion leaves no folder that looks valid. Links and their targets were put there by another program and stay.

    Raises:
        OSError: a checkpoint could not be deleted; those to be kept are unchanged.
    """
    removed = []
    folders = listed(checkpoints)
    kept = 0
    while folders and kept < keep and len(folders) > keep - kept:
        kept += verify(folders.pop(0)) is None
    if kept < keep:
        return []
    best = pointed_to(checkpoints, BEST)
    for folder in folders:
        if folder.name == best:
            continue
        if keep_every is not None and update_of(folder) % keep_every == 0 and (folder / MANIFEST).is_file():
            continue
        if folder.is_symlink():
            continue
        lease.verify(folder)
        _delete(folder)
        removed.append(folder)
    return removed


def _delete(folder: Path) -> None:
    """Delete a checkpoint; of a link, only the link."""
    if folder.is_symlink():
        folder.unlink()
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def clear_temporary(checkpoints: Path) -> None:
    """Delete temporary folders of writers that died; rank 0 calls this before it resumes."""
    lease.verify(checkpoints)
    if checkpoints.is_dir():
        for leftover in checkpoints.glob(".update-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)  # it does not follow a link
        for pointer in (LATEST, BEST):
            for leftover in checkpoints.glob(f".{pointer}.*.tmp"):
                leftover.unlink(missing_ok=True)


def _point_to(checkpoints: Path, name: str, pointer: str = LATEST) -> None:
    temporary = checkpoints / f".{pointer}.{os.getpid()}.tmp"
    try:
        _write_synced(temporary, (name + "\n").encode())
        os.replace(temporary, checkpoints / pointer)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(checkpoints)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a file in safetensors' format (8 bytes of length, a JSON header, the tensors' bytes) in chunks.

    The library's writer assembles the whole file in memory first and holds the interpreter lock meanwhile.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with _Writer(path) as writer:
        writer.write(memoryview(len(text).to_bytes(8, "little") + text))
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                raise TypeError(f"{name} is {tensor.dtype} on {tensor.device}; checkpoints hold float32 of the CPU")
            writer.write(tensor.detach().contiguous().view(-1).numpy().view(np.uint8).data)
    return writer.entry


def _write_synced(path: Path, content: bytes) -> dict[str, Any]:
    """Write a file and sync it; returns its entry in the manifest."""
    with _Writer(path) as writer:
        writer.write(memoryview(content))
    return writer.entry


class _Writer:
    """A new file, hashed while it is written, and synced when the context ends without an error."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
        self._digest = hashlib.sha256()
        self._bytes = 0

    def write(self, view: memoryview) -> None:
        self._bytes += len(view)
        while view:
            written = os.write(self._descriptor, view[:_CHUNK])
            self._digest.update(view[:written])
            view = view[written:]

    @property
    def entry(self) -> dict[str, Any]:
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # file systems that do not sync folders
            raise
    finally:
        os.close(descriptor)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
