"""What a file or folder of weights is: its format, its network, its heads, and whether this project reads it. Runs no code in it."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multitrain.config import ConfigError, ModelConfig, compose, config_folder
from multitrain.config.automatic import AUTO
from multitrain.config.boundary import understood
from multitrain.config.mvitv2 import MVITV2
from multitrain.config.paths import find_run
from multitrain.config.reading import LARGEST_JSON, parse_json, read_bytes
from multitrain.interop import pyslowfast
from multitrain.interop.archive import Archive, open_archive, removed_prefixes, select_weights
from multitrain.interop.incompatible_checkpoints import official_tensors
from multitrain.interop.model_path import resolve_model_file
from multitrain.interop.state_dict_report import LoadReport, Shape, abbreviated
from multitrain.interop.weights import read_description, read_model
from multitrain.records.checkpoints import BEST, LATEST
from multitrain.text import byte_size, counted

if TYPE_CHECKING:
    import torch

_OWN_BACKBONE = "bring its network as a backbone of your own (docs/backbones.md) and load the file there"
_FAMILIES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("MViT of torchvision", (r"conv_proj\.weight", r"pos_encoding\..*"), _OWN_BACKBONE),
    ("MViT of pytorchvideo", (r".*cls_positional_encoding\..*",), _OWN_BACKBONE),
    ("VideoMAE of transformers", (r"(videomae\.)?encoder\.layer\.0\..*", r"(videomae\.)?embeddings\.patch_embeddings\..*"), _OWN_BACKBONE),
    ("TimeSformer", (r".*blocks\.0\.temporal_fc\..*",), _OWN_BACKBONE),
    ("Hiera", (r"blocks\.0\.attn\.qkv\.weight", r"blocks\.\d+\.proj\.weight", r"pos_embed(_spatial)?", r"encoder_norm\..*"), _OWN_BACKBONE),
    ("MViT or MViTv2 of PySlowFast", (r"blocks\.0\.attn\.(pool|norm)_k\.weight", r"patch_embed\.proj\.weight"), ""),
    ("Swin transformer", (r".*layers\.0\.blocks\.0\.attn\.relative_position_bias_table",), _OWN_BACKBONE),
    ("vision transformer (timm, VideoMAE, V-JEPA)", (r"(encoder\.)?blocks\.0\.attn\.qkv\.weight", r".*patch_embed\.proj.*"), _OWN_BACKBONE),
    ("SlowFast or ResNet of PySlowFast", (r"s1\.pathway0_stem\..*",), _OWN_BACKBONE),
    ("ResNet", (r"(.*\.)?layer1\.0\.conv1.*",), _OWN_BACKBONE),
    ("network of the transformers library", (r"([a-z]\w*\.)?encoder\.layers?\.0\..*",), _OWN_BACKBONE),
)  # fmt: skip
"""Networks by patterns of which each must match a tensor's name; and what to do with a file of it. The first that fits counts."""
_HEAD = re.compile(r"(heads\..+?|(head\.heads\.[^.]+|(cls_)?head(\.projection)?|fc|classifier)(\.fc2|\.\d+)?)\.weight")
_LONGEST_NAME = 300
"""Characters of a tensor's name beyond which it is not compared with patterns."""
_FORMATS = {
    b"\x89HDF": ("an HDF5 file (Keras)", _OWN_BACKBONE),
    b"\x93NUMPY": ("an array of numpy", _OWN_BACKBONE),
    b"\x1f\x8b": ("a gzip file", "unpack it"),
    b"BZh": ("a bzip2 file", "unpack it"),
    b"\xfd7zXZ": ("an xz file", "unpack it"),
    b"<!DO": ("a web page", "download the weights again"),
    b"<htm": ("a web page", "download the weights again"),
    b"version https://git-lfs": ("a pointer of Git LFS", "fetch the file itself: git lfs pull"),
}
"""By the first bytes of a file without weights that are read here: what it is, and what to do."""


@dataclass(frozen=True)
class Inspection:
    """What was found at a path."""

    path: Path
    kind: str
    """The format and its origin, in words."""
    bytes: int = 0
    tensors: int = 0
    parameters: int = 0
    dtypes: Mapping[str, int] = field(default_factory=dict)
    """Numbers of tensors by type."""
    taken: str = ""
    """Key or prefix of the weights in the file."""
    network: str = ""
    """The architecture and its sizes."""
    model: str = ""
    """The override that chooses its network, e.g. ``model=mvitv2_s``."""
    heads: Mapping[str, int] = field(default_factory=dict)
    """Classes by head."""
    beside: tuple[str, ...] = ()
    """What the file holds besides the weights."""
    notes: tuple[str, ...] = ()
    problem: str | None = None
    """Why this project does not load it as it is, with a remedy; None if it does."""
    loads: str = "with multitrain.load and init_from"
    """How it is loaded, if there is no problem."""

    def lines(self) -> list[str]:
        """The result as text, one fact a line."""
        types = ", ".join(f"{n} {dtype}" if len(self.dtypes) > 1 else dtype for dtype, n in self.dtypes.items())
        weights = f"{counted(self.tensors, 'tensor')}, {self.parameters:,} numbers, {types}" if self.tensors else ""
        facts = {
            "weights": weights + (f" (from {self.taken})" if weights and self.taken else ""),
            "network": self.network + (f" ({self.model})" if self.model else ""),
            "heads": ", ".join(f"{name} ({classes})" for name, classes in self.heads.items()),
            "beside": ", ".join(self.beside),
        }
        size = f", {byte_size(self.bytes)}" if self.bytes else ""
        lines = [f"{self.path}: {self.kind}{size}", *(f"{key:<8} {text}" for key, text in facts.items() if text)]
        lines += [f"note     {note.removeprefix('note: ')}" for note in self.notes]
        return [*lines, f"problem  {self.problem}" if self.problem else f"loads    {self.loads}"]


def inspect(path: str | Path) -> Inspection:
    """Say what the weights at `path` are: a file, a folder, or the name of a run.

    Raises:
        ConfigError: there is nothing at `path`.
    """
    path = find_run(Path(path))
    if not path.exists():  # perhaps RUN/ema
        return _described(path, resolve_model_file(path))
    try:
        if path.is_dir():
            return _foreign_folder(path) or _described(path, resolve_model_file(path))
        return _described(path, resolve_model_file(path)) if path.name in (BEST, LATEST) else _file(path)
    except ConfigError as error:
        size = path.stat().st_size if path.is_file() else 0
        return Inspection(
            path, f"a {'folder' if path.is_dir() else 'file'} that cannot be read as weights", size, problem=str(error)
        )


def _file(path: Path) -> Inspection:
    if not path.is_file():
        raise ConfigError(f"{path}: neither a file nor a folder; give the weights' path")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return Inspection(path, "an empty file", problem="copy or download it again")
    for magic, (what, remedy) in _FORMATS.items():
        if start.startswith(magic):
            return Inspection(path, what, path.stat().st_size, problem=f"no weights that are read here; {remedy}")
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return _safetensors(path)
    return _archive(path)


def _foreign_folder(path: Path) -> Inspection | None:
    """A folder of another program's checkpoint; None for a run, a checkpoint, or an export of this project."""
    states = sorted([*path.glob("*mp_rank_*_states.pt"), *path.glob("global_step*/*mp_rank_*_states.pt")])[:2]
    if states:
        script = f"{shlex.quote(f'{path}/zero_to_fp32.py')} {shlex.quote(str(path))}"
        return Inspection(
            path,
            f"a checkpoint of DeepSpeed ({states[0].relative_to(path)}, …), whose parts are pickles",
            problem=f"pickles are not read, since they may run code; where you trust them: python {script} FOLDER "
            f"--safe_serialization; then {_OWN_BACKBONE}",
        )
    if (path / ".metadata").is_file() and next(path.glob("*.distcp"), None):
        return Inspection(
            path,
            "a distributed checkpoint of torch",
            problem="make one file of it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pyth",
        )
    return _of_transformers(path)


def _of_transformers(path: Path) -> Inspection | None:
    """A folder of the transformers library (Hugging Face)."""
    config = path / "config.json"
    if not config.is_file():
        return None
    with understood(f"{config}: cannot be read", "copy it again"):
        content = parse_json(read_bytes(config, LARGEST_JSON), str(config))
    if (
        not isinstance(content, dict)
        or "model" in content
        or not ("model_type" in content or "architectures" in content)
    ):
        return None
    names = ", ".join(map(str, content.get("architectures") or [content.get("model_type")]))
    kind = f"a model folder of the transformers library ({names[:200]})"
    file = path / "model.safetensors"
    if not file.is_file():
        parts = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".bin"))
        return Inspection(path, kind, beside=tuple(parts[:8]), problem=_OWN_BACKBONE)
    return replace(_safetensors(file), path=path, kind=kind, problem=_OWN_BACKBONE)


def _described(path: Path, model_file: Path) -> Inspection:
    """Weights of this project: a run, a checkpoint, a converted file."""
    weights, _ = read_model(model_file, strict=False)
    file = model_file.relative_to(path) if model_file.is_relative_to(path) else model_file
    where = "" if model_file == path else f" ({file})"
    known = tuple(name for name in weights.datasets if name in weights.class_names)
    found = Inspection(path, f"weights of MultiTrain{where}", model_file.stat().st_size, notes=weights.report.notes)
    found = replace(found, beside=(f"class names of {', '.join(known)}",) if known else ())
    return _with_network(found, weights.config, weights.datasets, weights.report, weights.state)


def _safetensors(path: Path) -> Inspection:
    """A `.safetensors` file, with or without a description of its model."""
    import torch
    from safetensors import safe_open

    try:
        read_description(path)
    except ConfigError as error:
        no_description = str(error)
    else:
        return _described(path, path)
    with (
        understood(f"{path}: not a whole .safetensors file", "copy or download it again"),
        safe_open(path, "pt") as file,
    ):
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
        state = {
            n: torch.empty(part.get_shape(), dtype=types.get(part.get_dtype(), torch.int64), device="meta")
            for n, part in parts.items()
        }
        beside = tuple(f"{key} in its header" for key in list(file.metadata() or {})[:8])
    taken, notes = select_weights(path, state)
    found = _foreign(path, taken, "a .safetensors file")
    problem, prefixes = found.problem or no_description, ", ".join(f"without {p}" for p in removed_prefixes(state))
    return replace(found, taken=prefixes, beside=beside, notes=notes, problem=problem)


def _archive(path: Path) -> Inspection:
    """A torch archive (`.pyth`, `.pt`, `.pth`, `.bin`, `.ckpt`)."""
    archive = open_archive(path)
    taken = " ".join(filter(None, (archive.taken, *(f"without {prefix}" for prefix in archive.prefixes))))
    cfg = archive.content.get("cfg")
    found = replace(
        _of_cfg(path, archive) if isinstance(cfg, str) else _foreign(path, archive.state, "a torch archive"),
        taken=taken,
        beside=tuple(_beside(name, value) for name, value in archive.content.items()),
        notes=archive.notes,
    )
    if found.problem is None and path.suffix != ".pyth":
        return replace(found, problem=f"only files called .pyth are loaded; rename it to {path.stem}.pyth")
    return found


def _of_cfg(path: Path, archive: Archive) -> Inspection:
    """A checkpoint of PySlowFast, with the text of its configuration."""
    cfg = archive.content["cfg"]
    try:
        if not pyslowfast.has_published_cfg(path):
            return _foreign(path, archive.state, "a checkpoint of PySlowFast")
        file = pyslowfast.read_published(path, strict=False)
    except ConfigError as error:
        return replace(_foreign(path, archive.state, "a checkpoint of PySlowFast"), problem=str(error))
    official = file.config.backbone == MVITV2 or bool(official_tensors(archive.state))
    made = (
        "an official MViT or MViTv2 of PySlowFast" if official else "a checkpoint of the published code of MultiTrain"
    )
    kind = f"{made}, with its configuration ({len(cfg.splitlines())} lines)"
    found = Inspection(path, kind, path.stat().st_size)
    return _with_network(found, file.config, file.datasets, file.report, archive.state)


def _beside(name: str, value: Any) -> str:
    """A part of an archive in words."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{name} {value:g}"
    return f"{name} ({len(value)} entries)" if isinstance(value, dict) else str(name)


def _foreign(path: Path, state: Mapping[str, torch.Tensor], kind: str) -> Inspection:
    """Tensors without a description of their network: what their names and shapes say."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if len(name) <= _LONGEST_NAME}
    family, remedy = family_of(shapes)
    heads = {m[1]: shape[0] for name, shape in shapes.items() if len(shape) == 2 and (m := _HEAD.fullmatch(name))}
    is_mvit = not remedy and bool(family)
    return _with_tensors(
        Inspection(
            path,
            f"{kind} ({family})" if family else kind,
            path.stat().st_size,
            network=_sizes(shapes) if is_mvit else "",
            heads=heads,
            problem=None if is_mvit else (remedy or _OWN_BACKBONE) if state else "there is no tensor in it",
            loads="with init_from, in the network that model=… chooses, e.g. model=mvitv2_b",
        ),
        state,
    )


def family_of(shapes: Mapping[str, Shape]) -> tuple[str, str]:
    """The network that has tensors of these names, and what to do with its weights; both empty if it is not known."""
    for family, patterns, remedy in _FAMILIES:
        if all(any(re.fullmatch(pattern, name) for name in shapes) for pattern in patterns):
            return family, remedy
    return "", ""


def _sizes(shapes: Mapping[str, Shape]) -> str:
    """Depth and width of an MViT, from its tensors."""
    blocks = {int(name.split(".")[1]) for name in shapes if re.match(r"blocks\.\d{1,4}\.", name)}
    width = shapes["patch_embed.proj.weight"][:1]
    last = shapes.get("norm.weight", width)[:1]
    kernel = shapes["patch_embed.proj.weight"][2:]
    frames = "images" if len(kernel) == 2 else "clips"
    return f"{len(blocks)} blocks of {width[0]} to {last[0]} channels, for {frames}"


def _with_network(
    found: Inspection,
    config: ModelConfig,
    heads: Mapping[str, int],
    report: LoadReport,
    state: Mapping[str, torch.Tensor],
) -> Inspection:
    """`found` with the network that the file describes."""
    network, model = outline(config), preset(config)
    found = replace(found, network=network, model=model, heads=heads, problem=_unmatched(report))
    return _with_tensors(found, state)


def _with_tensors(found: Inspection, state: Mapping[str, torch.Tensor]) -> Inspection:
    types = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values())
    return replace(found, tensors=len(state), parameters=sum(t.numel() for t in state.values()), dtypes=dict(types))


def _unmatched(report: LoadReport) -> str | None:
    """Why tensors do not fit the network that their own file describes; None if all fit."""
    parts = {
        "missing": report.missing,
        "not known": report.unexpected,
        "of another shape": [n for n, *_ in report.reshaped],
    }
    said = [f"{len(names)} tensors {what} ({abbreviated(names, 2)})" for what, names in parts.items() if names]
    return f"{'; '.join(said)}: they are not those of the network that the file describes" if said else None


def outline(config: ModelConfig) -> str:
    """A network in words."""
    clips = f"clips of {config.frames} × {config.crop}²"
    if config.own_backbone:
        return f"{config.backbone}, {clips}"
    name = "MViTv2" if config.backbone == MVITV2 else "MViT"
    last = config.width * 2 ** len(config.stages)
    return f"{name}, {config.depth} blocks of {config.width} to {last} channels, {clips}"


def preset(config: ModelConfig) -> str:
    """The shipped ``model=NAME`` with the backbone of `config`; empty if none has it."""
    heads = {
        "head",
        "head_hidden",
        "head_dropout",
        "dropout_logits",
        "projections",
        "expander",
        "expander_hidden",
        "drop_path",
    }
    for file in sorted((config_folder() / "model").glob("*.yaml")):
        if file.stem == AUTO:
            continue
        found = compose([f"model={file.stem}"]).model
        if found.backbone == config.backbone and _backbone(found, heads) == _backbone(config, heads):
            return f"model={file.stem}"
    return ""


def _backbone(config: ModelConfig, heads: set[str]) -> str:
    """The options of the backbone, as text."""
    options = config.model_dump(mode="json", exclude={*heads, "channels"})
    if config.backbone == MVITV2:
        options["backbone_args"] = config.mvitv2.model_dump(mode="json")
    return json.dumps(options)


__all__ = ["Inspection", "family_of", "inspect", "outline", "preset"]
