"""What a torch archive (`.pyth`) holds: opened without running code in it, bounded, its weights found under any usual name.

Training codes keep weights under ``model_state``, ``state_dict`` or ``model``, put ``module.``, ``_orig_mod.``, ``model.``
or ``backbone.`` before every name, in any order, and lay a moving average beside them (``ema``, ``model_ema``,
``ema_state_dict``), or before the names (``model_ema.``, ``ema_model.module.``). All of these are read, in `.safetensors` files
too; which of several sets of weights was taken is said.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from multitrain.config import ConfigError, nearest
from multitrain.config.boundary import understood
from multitrain.interop.matching import listed

if TYPE_CHECKING:
    import torch

HOLDERS = ("model_state", "state_dict", "model", "model_state_dict", "module")
"""Keys under which training codes keep the trained weights, in the order of preference."""
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
"""What DDP, torch.compile and wrapping modules put before the name of every tensor."""

_AVERAGE = re.compile(r"(^|[_.])(ema|swa|averaged?)([_.]|$)", re.I)
_COUNTERS = ("n_averaged", "num_updates", "decay", "steps", "step", "initted")
"""Single numbers that averaging adds and no network has."""
_NESTED = 3
"""Dictionaries inside one another at most, around weights."""
_MOST_PICKLE = 16 << 20
"""Bytes of the description of an archive's tensors; that of the largest published file has 0.2 MB."""


class Archive(NamedTuple):
    """An archive's weights and what lies beside them."""

    state: dict[str, torch.Tensor]
    """Tensors by name, without prefixes."""
    content: dict[str, Any]
    """The file's other parts, e.g. ``epoch``, ``cfg``, ``optimizer_state``, an average of the weights."""
    notes: tuple[str, ...]
    """Which of several sets of weights was taken."""


def open_archive(path: Path, copy: str | None = None) -> Archive:
    """The weights of a `.pyth` file, and its other parts.

    Args:
        path: the file.
        copy: name of the set of weights to take, e.g. ``model_ema``; the trained ones when not given.

    Raises:
        ConfigError: no such file, damaged, holding code, without weights, without `copy`, or with tensors that claim
            more numbers than the file has.
    """
    content = _loaded(path)
    found = dict(_weights(content))
    if not found:
        raise ConfigError(
            f"{path}: has no 'model_state' with tensors, nor weights under another usual name ({', '.join(HOLDERS[1:3])}), "
            "so it is not a checkpoint of a model"
        )
    taken, notes = _chosen(path, found, copy)
    _require_sound(path, found[taken])
    beside = {} if _is_state(content) else {k: v for k, v in content.items() if k not in (*HOLDERS, taken)}
    return Archive(_without_prefixes(path, found[taken]), beside, notes)


def one_set(
    path: Path, tensors: Mapping[str, torch.Tensor], copy: str | None = None
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Of the tensors in a file without other parts, those of one set of weights, without prefixes; which one was taken.

    Args:
        path, copy: see :func:`open_archive`.
        tensors: by the names in the file.

    Raises:
        ConfigError: there is no `copy`, or two names become one.
    """
    found = _apart("", tensors) or {"": {}}
    taken, notes = _chosen(path, found, copy)
    return _without_prefixes(path, found[taken]), notes


def _without_prefixes(path: Path, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by their names without :data:`PREFIXES`. Raises ConfigError: two names become one."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        bare = _bare(name)
        if bare in out:
            raise ConfigError(
                f"{path}: holds {bare!r} twice, under other prefixes; keep one set of weights in the file"
            )
        out[bare] = tensor
    return out


def require_weights(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Raises ConfigError for tensors of a model that are no floating-point numbers of 16 bits or more, or hold NaN or an infinity:
    what such a network answers means nothing."""
    import torch

    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    other = [f"{name}: {str(t.dtype).removeprefix('torch.')}" for name, t in state.items() if t.dtype not in kinds]
    if other:
        raise ConfigError(
            f"{path}: {len(other)} of {len(state)} tensors are no weights, which are floating-point numbers of 16 bits or more "
            f"({listed(other, 2)}); save them as float32, float16 or bfloat16"
        )
    bad = [name for name, t in state.items() if not bool(torch.isfinite(t.sum()))]
    bad = [name for name in bad if not bool(torch.isfinite(state[name]).all())]  # a sum may overflow
    if bad:
        raise ConfigError(
            f"{path}: {len(bad)} of {len(state)} tensors hold NaN or infinite numbers ({listed(bad, 2)}): the training had "
            "diverged; use an older checkpoint"
        )


def _loaded(path: Path) -> dict[str, Any]:
    """The file's content. `weights_only` runs no code; whatever else a damaged file does to the reader is one line."""
    import pickle

    import torch

    if not path.is_file():
        raise ConfigError(
            f"{path}: {'is a folder, not a .pyth file' if path.is_dir() else 'no such file'}; give the checkpoint's path"
        )
    with understood(f"{path}: damaged or no torch file", "copy or download it again"):
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _require_plain(path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other versions' pickles
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError:
            raise ConfigError(
                f"{path}: holds Python objects beside tensors, which could run code, or is no torch file; "
                "re-save only its model_state and cfg with a trusted torch"
            ) from None
    return dict(content) if isinstance(content, dict) else {}


def _require_plain(path: Path) -> None:
    """Raises ConfigError for a zip that would unpack to more than its size: torch writes its archives uncompressed."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or (
        sum(part.file_size for part in parts) > path.stat().st_size
    ):
        raise ConfigError(f"{path}: is a compressed zip, which torch never writes; unpack it, or download it again")
    if any(part.filename.endswith(".pkl") and part.file_size > _MOST_PICKLE for part in parts):
        raise ConfigError(
            f"{path}: describes its tensors in more than {_MOST_PICKLE >> 20} MB, which no network of this kind needs"
        )


def _weights(content: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Every set of weights in a file, by the key that it lies under; averages that share a dictionary with others apart."""
    if _is_state(content):
        content = {"": content}
    for key, value in content.items():
        yield from _apart(str(key), _weights_of(value) or {}).items()


def _apart(key: str, state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """`state` by the names of the averages in it, and the rest by `key`."""
    sets: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        first, _, rest = _bare(name).partition(".")
        mine, inner = (first, rest) if rest and _AVERAGE.search(first) else (key, name)
        if inner not in _COUNTERS or tensor.numel() != 1:
            sets.setdefault(mine, {})[inner] = tensor
    return sets


def _weights_of(value: Any, depth: int = _NESTED) -> dict[str, torch.Tensor] | None:
    """The tensors by name in a part of a file, which may lie in a dictionary of their own; None where there are none."""
    if _is_state(value):
        return dict(value)
    if not isinstance(value, dict) or not depth:
        return None
    inner = (_weights_of(value[key], depth - 1) for key in value if key in HOLDERS or _AVERAGE.search(str(key)))
    return next((state for state in inner if state), None)


def _is_state(value: Any) -> bool:
    import torch

    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(t, torch.Tensor) for k, t in value.items())
    )


def _chosen(path: Path, found: Mapping[str, Any], copy: str | None) -> tuple[str, tuple[str, ...]]:
    """The key of the set of weights to take, and a line on it where another could be meant."""
    if copy is not None and copy not in found:
        raise ConfigError(f"{path}: holds no weights under {copy!r}; {nearest(copy, [key for key in found if key])}")
    trained = [key for key in (*HOLDERS, *found) if key in found and not _AVERAGE.search(key)]
    taken = copy if copy is not None else next(iter([*trained, *found]))
    others = [key for key in found if key != taken]
    if not others and not _AVERAGE.search(taken):
        return taken, ()
    what = "a moving average of the weights" if _AVERAGE.search(taken) else "the trained weights"
    called = ", ".join(map(_called, others))
    more = f"; the file holds {called} as well (convert with --copy to take that)" if others else ""
    return taken, (f"weights taken from {_called(taken)}, {what}{more}",)


def _called(key: str) -> str:
    return repr(key) if key else "the names without such a prefix"


def _bare(name: str) -> str:
    while prefix := next((p for p in PREFIXES if name.startswith(p)), ""):
        name = name[len(prefix) :]
    return name


def _require_sound(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Raises ConfigError for tensors that are no plain arrays, or that say they hold more numbers than the file has."""
    import torch

    size, total = path.stat().st_size, 0
    for name, tensor in state.items():
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain:
            raise ConfigError(f"{path}: {name} is no plain array (sparse, quantised or empty); save dense tensors")
        bytes_of = tensor.numel() * tensor.element_size()
        total += bytes_of
        if bytes_of > tensor.untyped_storage().nbytes() or total > 2 * size:
            raise ConfigError(
                f"{path}: {name} claims {list(tensor.shape)} numbers, more than the file holds; copy or download it again"
            )


__all__ = ["HOLDERS", "PREFIXES", "Archive", "one_set", "open_archive", "require_weights"]
