"""``multitrain predict``: classify the action in a video file."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from multitrain.cluster.exit_status import Exit
from multitrain.commands.common import MODEL, device
from multitrain.config import ConfigError
from multitrain.config.arguments import Arguments, Parser, pair, whole_number
from multitrain.files import refuse_run
from multitrain.text import printable


def _parser() -> Parser:
    parser = Parser(
        "predict",
        "Classify the action in video files.",
        "multitrain predict multitrain_release.v1.pyth clip.mp4",
    )
    parser.add_model(MODEL)
    parser.add_argument("videos", nargs="*", metavar="VIDEO", help="video files")
    parser.add_argument("--top", type=whole_number, default=5, metavar="N", help="classes for each dataset (default 5)")
    parser.add_argument(
        "--views",
        default="centre",
        choices=("centre", "test"),
        help="one centre clip, or all views of the multi-view test",
    )
    parser.add_argument(
        "--classes", action="append", default=[], metavar="DATASET=FILE", help="class names, one a line"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, else the CPU)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per video")
    parser.add_argument(
        "--overlay",
        type=Path,
        metavar="OUT.mp4",
        help="write the video with its classes drawn in; a folder for several videos",
    )
    parser.add_overrides("data.root=/datasets, where class names are looked for")
    return parser


def main(arguments: Arguments) -> int:
    """``multitrain predict``; returns the exit status."""
    parser = _parser()
    given = parser.parse_with_overrides(arguments)
    given.checkpoint, given.videos = parser.model_and_words(given, given.videos, needs="VIDEO")
    from multitrain.data.decode import VideoError
    from multitrain.evaluation.overlay import write_overlay
    from multitrain.evaluation.predictor import load
    from multitrain.evaluation.settings import with_overrides

    names = dict(pair(text, "--classes") for text in given.classes)
    model = load(given.checkpoint, class_names=names).to(device(given.device))
    model.reconfigure(with_overrides(model.run, given.overrides, config_dirs=given.config_dir))
    overlays = _overlays(given.overlay, given.videos)
    status = Exit.FINISHED
    for video in given.videos:
        try:
            found = model.predict(video, given.top, views=given.views)
            if video in overlays:
                write_overlay(video, overlays[video], found, model.run.data.decoder)
        except VideoError as error:
            print(printable(f"multitrain: {error}"), file=sys.stderr, flush=True)
            status = Exit.MISTAKE
            continue
        if given.json:
            print(json.dumps({"video": video, "predictions": found}, ensure_ascii=False), flush=True)
        else:
            print(_predictions(video, found), flush=True)
    return status


def _overlays(target: Path | None, videos: Sequence[str]) -> dict[str, Path]:
    """The output file of each video's overlay; empty if none is requested.

    Raises:
        ConfigError: one file for several videos, an output that is the video itself, or a missing folder.
    """
    if target is None:
        return {}
    refuse_run(target, whole=False)
    if target.is_dir() or (len(videos) > 1 and not target.suffix):
        target.mkdir(parents=True, exist_ok=True)
        found = {video: target / f"{Path(video).stem}.mp4" for video in videos}
    elif len(videos) == 1:
        found = {videos[0]: target}
    else:
        raise ConfigError(f"--overlay {target}: one file for {len(videos)} videos; give a folder")
    if len(set(found.values())) < len(found):
        raise ConfigError(f"--overlay {target}: several of the videos have one name; give them one by one")
    for video, file in found.items():
        if file.exists() and Path(video).exists() and file.samefile(video):
            raise ConfigError(f"--overlay {file}: is the video itself; choose another name")
        if not file.absolute().parent.is_dir():
            raise ConfigError(f"--overlay {file}: there is no folder {file.parent}; create it first")
    return found


def _predictions(video: str, found: dict[str, list[tuple[str, float]]]) -> str:
    names = {name: printable(name) for name in found}
    width = max(len(name) for name in names.values())
    rows = [
        f"  {names[name]:<{width}}  " + ", ".join(f"{printable(label)} {100 * p:.1f}%" for label, p in best)
        for name, best in found.items()
    ]
    return "\n".join([printable(video), *rows])
