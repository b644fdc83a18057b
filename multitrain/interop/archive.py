"""Read a torch archive (`.pyth`) without running code in it, within limits, and find its weights under any usual name.

Training codes keep weights under ``model_state``, ``state_dict`` or ``model``, and prefix every name with ``module.``, ``_orig_mod.``,
``model.`` or ``backbone.``, in any order. They store a moving average under a key of its own (``ema``, ``model_ema``,
``ema_state_dict``) or under a name prefix (``model_ema.``, ``ema_model.module.``). This module reads all of these, in `.safetensors`
files too, and reports which of several sets of weights it took.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from multitrain.config import ConfigError, nearest
from multitrain.config.boundary import understood
from multitrain.interop.state_dict_report import abbreviated

if TYPE_CHECKING:
    import torch

STATE_KEYS = ("model_state", "state_dict", "model", "model_state_dict", "module")
"""Keys under which training codes keep the trained weights, in the order of preference."""
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
"""Prefixes that DDP, torch.compile and wrapping modules add to the name of every tensor."""

_AVERAGE = re.compile(r"(^|[_.])(ema|swa|averaged?)([_.]|$)", re.I)
_COUNTERS = ("n_averaged", "num_updates", "decay", "steps", "step", "initted")
"""Scalars that weight averaging adds to a state dict; no network has tensors of these names."""
_MAX_NESTING = 3
"""Maximum depth of dictionaries around the weights."""
_MAX_PICKLE_BYTES = 16 << 20
"""Maximum bytes of the pickle that describes an archive's tensors; the largest published file has 0.2 MB."""


class Archive(NamedTuple):
    """An archive's weights and its other content."""

    state: dict[str, torch.Tensor]
    """Tensors by name, without prefixes."""
    content: dict[str, Any]
    """The file's other parts, e.g. ``epoch``, ``cfg``, ``optimizer_state``, an average of the weights."""
    notes: tuple[str, ...]
    """A line about the set of weights taken, where the file holds several or an average."""
    taken: str = ""
    """The key of the weights in the file; empty where the file is the tensors."""
    prefixes: tuple[str, ...] = ()
    """The prefixes that were removed from names."""


def open_archive(path: Path, copy: str | None = None) -> Archive:
    """Read the weights of a `.pyth` file, and its other parts.

    Args:
        path: the file.
        copy: name of the set of weights to take, e.g. ``model_ema`` (default: the trained weights).

    Raises:
        ConfigError: the file is missing, damaged, contains code, has no weights or no set `copy`, or its tensors claim
            more numbers than the file holds.
    """
    content = _load_archive(path)
    found = dict(_weights(content))
    if not found:
        raise ConfigError(
            f"{path}: has no 'model_state' with tensors, nor weights under another usual name ({', '.join(STATE_KEYS[1:3])}), "
            "so it is not a checkpoint of a model"
        )
    taken, notes = _select(path, found, copy)
    _require_sound(path, found[taken])
    beside = {} if _is_state(content) else {k: v for k, v in content.items() if k not in (*STATE_KEYS, taken)}
    return Archive(_without_prefixes(path, found[taken]), beside, notes, taken, removed_prefixes(found[taken]))


def select_weights(
    path: Path, tensors: Mapping[str, torch.Tensor], copy: str | None = None
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """(one set of weights among `tensors`, by names without prefixes; notes as in :class:`Archive`), for a file of tensors only.

    Args:
        path, copy: see :func:`open_archive`.
        tensors: all tensors of the file, by the names in it.

    Raises:
        ConfigError: there is no set `copy`, or two names are equal without their prefixes.
    """
    found = _split_averages("", tensors) or {"": {}}
    taken, notes = _select(path, found, copy)
    return _without_prefixes(path, found[taken]), notes


def removed_prefixes(names: Iterable[str]) -> tuple[str, ...]:
    """The distinct prefixes that reading removes from these names, e.g. ``("module.",)``."""
    found = {name.removesuffix(_strip_prefixes(name)) for name in names}
    return tuple(sorted(found - {""}))


def _without_prefixes(path: Path, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by their names without :data:`PREFIXES`. Raises ConfigError if two names are then equal."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        bare = _strip_prefixes(name)
        if bare in out:
            raise ConfigError(
                f"{path}: holds {bare!r} twice, under other prefixes; keep one set of weights in the file"
            )
        out[bare] = tensor
    return out


def require_weights(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Raise ConfigError unless every tensor of a model is floating point of at least 16 bits and finite.

    A backbone of the user may have others, e.g. a buffer of positions.
    """
    import torch

    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    state = {n: t for n, t in state.items() if t.dtype in kinds or not n.startswith("backbone.")}
    other = [f"{name}: {str(t.dtype).removeprefix('torch.')}" for name, t in state.items() if t.dtype not in kinds]
    if other:
        raise ConfigError(
            f"{path}: {len(other)} of {len(state)} tensors are no weights, which are floating-point numbers of 16 bits or more "
            f"({abbreviated(other, 2)}); save them as float32, float16 or bfloat16"
        )
    bad = [name for name, t in state.items() if not bool(torch.isfinite(t.sum()))]
    bad = [name for name in bad if not bool(torch.isfinite(state[name]).all())]  # a sum may overflow
    if bad:
        raise ConfigError(
            f"{path}: {len(bad)} of {len(state)} tensors hold NaN or infinite numbers ({abbreviated(bad, 2)}): the training had "
            "diverged; use an older checkpoint"
        )


def _load_archive(path: Path) -> dict[str, Any]:
    """The file's content. `weights_only` prevents code from running; any other failure on a damaged file becomes a one-line ConfigError."""
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
    """Raise ConfigError for a compressed zip, which could unpack to any size; torch writes archives uncompressed."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or (
        sum(part.file_size for part in parts) > path.stat().st_size
    ):
        raise ConfigError(f"{path}: is a compressed zip, which torch never writes; unpack it, or download it again")
    if any(part.filename.endswith(".pkl") and part.file_size > _MAX_PICKLE_BYTES for part in parts):
        raise ConfigError(
            f"{path}: describes its tensors in more than {_MAX_PICKLE_BYTES >> 20} MB, which no network of this kind needs"
        )


def _weights(content: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Every set of weights in a file, by its key; averages that share a dictionary with other tensors become sets of their own."""
    if _is_state(content):
        content = {"": content}
    for key, value in content.items():
        yield from _split_averages(str(key), _weights_of(value) or {}).items()


def _split_averages(key: str, state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Split `state` into its averages, by their name prefix, and the rest, under `key`."""
    sets: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        first, _, rest = _strip_prefixes(name).partition(".")
        mine, inner = (first, rest) if rest and _AVERAGE.search(first) else (key, name)
        if inner not in _COUNTERS or tensor.numel() != 1:
            sets.setdefault(mine, {})[inner] = tensor
    return sets


def _weights_of(value: Any, depth: int = _MAX_NESTING) -> dict[str, torch.Tensor] | None:
    """The tensors by name in a part of a file, possibly inside nested dictionaries; None if there are none."""
    if _is_state(value):
        return dict(value)
    if not isinstance(value, dict) or not depth:
        return None
    inner = (_weights_of(value[key], depth - 1) for key in value if key in STATE_KEYS or _AVERAGE.search(str(key)))
    return next((state for state in inner if state), None)


def _is_state(value: Any) -> bool:
    import torch

    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(t, torch.Tensor) for k, t in value.items())
    )


def _select(path: Path, found: Mapping[str, Any], copy: str | None) -> tuple[str, tuple[str, ...]]:
    """(key of the set of weights to take, a note about it if the file holds other sets or it is an average)."""
    if copy is not None and copy not in found:
        raise ConfigError(f"{path}: holds no weights under {copy!r}; {nearest(copy, [key for key in found if key])}")
    trained = [key for key in (*STATE_KEYS, *found) if key in found and not _AVERAGE.search(key)]
    taken = copy if copy is not None else next(iter([*trained, *found]))
    others = [key for key in found if key != taken]
    if not others and not _AVERAGE.search(taken):
        return taken, ()
    what = "a moving average of the weights" if _AVERAGE.search(taken) else "the trained weights"
    called = ", ".join(map(_describe_key, others))
    more = f"; the file holds {called} as well (to take it, convert with --copy)" if others else ""
    return taken, (f"weights taken from {_describe_key(taken)}, {what}{more}",)


def _describe_key(key: str) -> str:
    return repr(key) if key else "the names without such a prefix"


def _strip_prefixes(name: str) -> str:
    while prefix := next((p for p in PREFIXES if name.startswith(p)), ""):
        name = name[len(prefix) :]
    return name


def _require_sound(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Raise ConfigError for tensors that are not plain arrays, or that claim more numbers than the file holds."""
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


__all__ = [
    "PREFIXES",
    "STATE_KEYS",
    "Archive",
    "open_archive",
    "removed_prefixes",
    "require_weights",
    "select_weights",
]
