"""A backbone of the user's own: ``model.backbone=package.module:function`` (docs/backbones.md).

The function gets `model.backbone_args`, and `frames` and `crop` if it has such parameters. It returns an ordinary module from clips
[N, 3, T, S, S] to features [N, D], or that module and the list of its layers, first to last.

A file of weights may come from a stranger and name any function, so only a function that a file of the user defines is called: no function
of the standard library, of an installed package, or of this project.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm

from multitrain.config import ConfigError, ModelConfig
from multitrain.model.backbone import Backbone
from multitrain.model.layers import Recompute
from multitrain.model.recompute import Recomputed

WANTED = "it takes clips [N, 3, T, S, S] and returns features [N, D] (docs/backbones.md)"
_PROBE_CLIPS = 2
_OWN_PACKAGES = ("multitrain", "launch")


class OwnBackbone(Backbone):
    """The module of the user's function, as `self.backbone`, behind the interface of every backbone.

    Raises:
        ConfigError: there is no such function, or it does not return a module from clips to features; one line says what came.
    """

    def __init__(self, config: ModelConfig, activation_checkpointing: Recompute = "none") -> None:
        super().__init__(config, activation_checkpointing)
        self.backbone, layers = build(config)
        self.dim = _width(self.backbone, config)
        self._layers = layers
        for layer in layers or [self.backbone]:
            Recomputed.wrap(layer, activation_checkpointing)

    @property
    def layers(self) -> list[nn.Module] | None:
        """The list of layers that the user's function returns; None if it returns the module alone."""
        return self._layers

    def untrainable(self) -> str | None:
        norms = [n for n, m in self.backbone.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self.backbone.train()
        live = [n or "the module" for n in norms if self.backbone.get_submodule(n).training]
        self.backbone.train(self.training)
        if not live:
            return None
        return (
            f"model.backbone={self.config.backbone}: {live[0]} is a batch norm ({len(live)} in all), whose statistics depend on ranks and "
            "micro-batches; use layer or group norm, or keep it in eval mode (override train)"
        )

    def reset_backbone(self, seed: int) -> None:
        """The values that the function gives its module under torch's `seed`."""
        if all(type(t.data) is Tensor and not t.is_meta for t in self.backbone.state_dict().values()):
            fresh, _ = build(self.config, seed)
            self.backbone.load_state_dict(fresh.state_dict())

    def _features(self, clips: Tensor, keys: Tensor | None) -> Tensor:
        with _seeded(keys if self.training else None):
            out = self.backbone(clips)
        return _checked(out, len(clips), self.config)


def build(config: ModelConfig, seed: int = 0) -> tuple[nn.Module, list[nn.Module] | None]:
    """The module that the function of `config` makes under torch's `seed`, and its layers, if it says them. Raises ConfigError."""
    name = str(config.backbone)
    function = find(name)
    arguments = {**config.backbone_args, **_sizes(function, config)}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = function(**arguments)
    except Exception as error:
        raise ConfigError(f"model.backbone={name} failed with {_one_line(error)}; called with {arguments}") from error
    module, layers = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise ConfigError(f"model.backbone={name} returned {_described(made)}; an nn.Module is wanted: {WANTED}")
    if layers is None:
        return module, None
    inside = set(module.modules())
    listed = list(layers) if isinstance(layers, (list, tuple, nn.ModuleList)) else None
    if listed is None or not all(isinstance(layer, nn.Module) and layer in inside for layer in listed):
        raise ConfigError(
            f"model.backbone={name} returned a module and {_described(layers)}; a list of layers of the module is wanted"
        )
    return module, listed


def find(name: str) -> Callable[..., Any]:
    """The function ``package.module:function`` of the user's own files. Raises ConfigError."""
    path, _, attribute = name.partition(":")
    where = (
        "put its folder on PYTHONPATH or give --config-dir FOLDER to submit (a run keeps a copy in its folder code/)"
    )
    try:
        _refuse_foreign(name, importlib.util.find_spec(path.partition(".")[0]))
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        missing = error.name or path
        if path == missing or path.startswith(f"{missing}."):
            raise ConfigError(f"model.backbone={name}: no module {missing!r} on the Python path; {where}") from None
        raise ConfigError(f"model.backbone={name}: {path} needs the module {missing!r}; install it") from None
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"model.backbone={name}: {path} cannot be imported: {_one_line(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == path]
        raise ConfigError(
            f"model.backbone={name}: {path} has no function {attribute!r}; it has {', '.join(known) or 'none'}"
        )
    if getattr(function, "__module__", None) != path:
        raise ConfigError(
            f"model.backbone={name}: {attribute} is not defined in {path}; define a function there that calls it"
        )
    return function  # type: ignore[no-any-return]


def _refuse_foreign(name: str, spec: Any) -> None:
    """Refuse a function that is in no file of the user."""
    if spec is None:
        return
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])
    installed = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    own = all(
        Path(place).is_absolute()
        and not any(
            p in installed or p.name in ("site-packages", "dist-packages") for p in Path(place).resolve().parents
        )
        for place in places
    )
    if not own or spec.name in _OWN_PACKAGES:
        raise ConfigError(
            f"model.backbone={name}: {spec.name} is no file of yours but an installed package; write a function in a file of your own "
            "that calls it"
        )


def _sizes(function: Callable[..., Any], config: ModelConfig) -> dict[str, int]:
    """`frames` and `crop`, as far as the function has parameters of these names."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    sizes = {"frames": config.frames, "crop": config.crop}
    return {n: v for n, v in sizes.items() if n in parameters and n not in config.backbone_args}


def _width(module: nn.Module, config: ModelConfig) -> int:
    """D, from a pass of two clips without data."""
    clips = (_PROBE_CLIPS, 3, config.frames, config.crop, config.crop)
    mode, was_training = FakeTensorMode(allow_non_fake_inputs=True), module.training
    devices = {p.device for p in module.parameters()} or {torch.device("cpu")}
    module.eval()
    try:
        with torch.no_grad(), mode:
            out = module(torch.empty(clips, device=next(iter(devices))))
    except Exception as error:
        raise ConfigError(
            f"model.backbone={config.backbone} fails on clips of shape {list(clips)}: {_one_line(error)}; {WANTED}"
        ) from error
    finally:
        module.train(was_training)
    return _checked(out, _PROBE_CLIPS, config).shape[1]


def _checked(out: object, clips: int, config: ModelConfig) -> Tensor:
    """The features, or ConfigError: what came and what is wanted."""
    if isinstance(out, Tensor) and out.dim() == 2 and len(out) == clips and out.is_floating_point():
        return out
    raise ConfigError(
        f"model.backbone={config.backbone} returned {_described(out)} for clips of shape "
        f"{[clips, 3, config.frames, config.crop, config.crop]}; features of shape [{clips}, D] are wanted"
    )


@contextlib.contextmanager
def _seeded(keys: Tensor | None) -> Iterator[None]:
    """Torch's random numbers from the key of the first clip of the micro-batch; the global generators keep their state."""
    if keys is None or not len(keys) or type(keys) is not Tensor or keys.is_meta:
        yield
        return
    devices = [keys.device] if keys.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(keys[0]))
        yield


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and type {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"an object of type {type(value).__name__}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
