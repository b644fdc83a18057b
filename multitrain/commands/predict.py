"""``multitrain predict``: which action is in a video file?"""

from __future__ import annotations

import json
import sys

from multitrain.commands.common import MODEL, device
from multitrain.config.arguments import MISTAKE, Arguments, Parser, pair, whole_number


def main(arguments: Arguments) -> int:
    """``multitrain predict``; returns the exit status."""
    parser = Parser(
        "predict",
        "Which action is in a video file?",
        "multitrain predict clip.mp4 --checkpoint multitrain_release.v1.pyth",
    )
    parser.add_argument("--checkpoint", required=True, metavar="MODEL", help=MODEL)
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="video files")
    parser.add_argument("--top", type=whole_number, default=5, metavar="N", help="classes for each dataset (default 5)")
    parser.add_argument(
        "--views", default="centre", choices=("centre", "test"), help="one clip, or all of the multi-view test"
    )
    parser.add_argument(
        "--classes", action="append", default=[], metavar="DATASET=FILE", help="class names, one a line"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, else the CPU)")
    parser.add_argument("--json", action="store_true", help="one JSON object a video")
    given = parser.parse_args(arguments)
    from multitrain.data.decode import VideoError
    from multitrain.evaluation.predictor import load

    names = dict(pair(text, "--classes") for text in given.classes)
    model = load(given.checkpoint, class_names=names).to(device(given.device))
    status = 0
    for video in given.videos:
        try:
            found = model.predict(video, given.top, views=given.views)
        except VideoError as error:
            print(f"multitrain: {error}", file=sys.stderr, flush=True)
            status = MISTAKE
            continue
        if given.json:
            print(json.dumps({"video": video, "predictions": found}, ensure_ascii=False), flush=True)
        else:
            print(_predictions(video, found), flush=True)
    return status


def _predictions(video: str, found: dict[str, list[tuple[str, float]]]) -> str:
    width = max(len(name) for name in found)
    rows = [
        f"  {name:<{width}}  " + ", ".join(f"{label} {100 * p:.1f}%" for label, p in best)
        for name, best in found.items()
    ]
    return "\n".join([video, *rows])
