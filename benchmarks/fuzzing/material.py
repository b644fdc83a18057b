"""Generate valid input of every kind: videos of five codecs, annotations, a run with a checkpoint and an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from multitrain import cli
from multitrain.config import RunConfig
from multitrain.engine import checkpoint as checkpoints
from multitrain.interop.convert import convert
from multitrain.model import MultiTrain
from multitrain.records.recorder import Recorder

CODECS = {
    "h264.mp4": ("libx264", "yuv420p"),
    "hevc.mkv": ("libx265", "yuv420p"),
    "vp9.webm": ("libvpx-vp9", "yuv420p"),
    "mpeg4.avi": ("mpeg4", "yuv420p"),
    "mjpeg.mov": ("mjpeg", "yuvj420p"),
}
CLASSES = {"stride": 5, "segment": 3, "with.dot": 4}

TEXTS: dict[str, list[str]] = {
    "csv": ["a b.mp4 0\nc.mp4 4\nd/e.mp4 1\n", '"a b.mp4",2\nc.mp4,1\n', "\ufeffa.mp4\t3\r\nc.mp4\t0\r\n"],
    "multi-label csv": ["a b.mp4 0,2\nc.mp4 1\n"],
    "class list": ["walk\nrun fast\nstand\n", "0,walk\n1,run\n2,stand\n", "walk,0\nrun,1\n"],
    "class list json": [
        '{"walk": 0, "run": 1}',
        '{"0": "walk", "1": "run"}',
        '{"id2label": {"0": "a", "1": "b"}}',
        '["a", "b"]',
    ],
    "segments": ["source,start,end,path\na.mp4,0.0,1.5,cut/a.mp4\nb.mp4,3,4,cut/b.mp4\n"],
    "yaml group": ["datasets:\n  mine: {annotations: /a, videos: /b, classes: 4}\nworkers: 2\n"],
    "kinetics": ['label,youtube_id,time_start,time_end,split\n"riding, a bike",abc,3,13,train\nrun,-x_,0,10,train\n'],
    "moments": ["flipping/a.mp4,flipping,3,0\nrun/b.mp4,run,2,1\n"],
    "something": [json.dumps([{"id": "7", "label": "x", "template": "Holding [something] next to [something]"}])],
    "activitynet": [
        json.dumps(
            {
                "database": {
                    "a": {"subset": "training", "duration": 9.0, "annotations": [{"segment": [1, 2.5], "label": "run"}]}
                },
                "taxonomy": [{"nodeName": "run", "nodeId": 1, "parentId": 0, "parentName": "Root"}],
            }
        )
    ],
    "overrides": [
        "nodes=2\ngpus=8\nname=first",
        "experiment=k400_mit_ssv2\ncluster.partition=low\noptim.lr=1e-4",
        "model.stages=[1,2]\ndata.root=/data/a b\nprecision=bf16\neffective_batch=256",
        "data=ssv2\ndata.workers=3\naugment.mixup_alpha=0.5\ncheckpoint.every=100\n+cluster.sbatch={exclusive: true}",
        "seed=3\nupdates=100\nloss=null\n~data.root\nname='a=b'",
    ],
}


def videos() -> list[str]:
    """The files of :data:`CODECS` that this machine's encoders can write."""
    import av

    return [name for name, (codec, _) in CODECS.items() if codec in av.codecs_available]


def write_video(path: Path, frames: int = 8) -> None:
    """A video of 8 frames of 64×48 in the codec of its name."""
    import av

    codec, pixels = CODECS[path.name]
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    options = {"x265-params": "log-level=none:pools=1"} if codec == "libx265" else {}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        for shift in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 2 * shift, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


class Material:
    """Files below `folder`."""

    def __init__(self, folder: Path) -> None:
        from tests import support

        self.folder = folder
        self.videos = folder / "videos"
        self.videos.mkdir(parents=True)
        for name in videos():
            write_video(self.videos / name)
        for name, classes in CLASSES.items():
            support.write_dataset(folder / "data" / name, classes, classes, seed=classes)
        self.run, self.config = support.write_run(folder / "runs", support.settings(folder / "data"))
        self._record()
        self.checkpoint = self._checkpoint()
        self.pyth, self.safetensors = folder / "model.pyth", folder / "model.safetensors"
        convert(self.run, self.pyth)
        convert(self.run, self.safetensors)
        self.evaluation = self._evaluation()
        self.pack = self._pack()

    def _record(self) -> None:
        with Recorder(self.run, total_updates=4, start_update=0, tensorboard=False) as recorder:
            recorder.event("start", update=0, world_size=1)
            for update in range(4):
                recorder.update(_update(update))
            recorder.event("end", update=4)
        (self.run / "overrides.yaml").write_text("- overrides: [name=tiny, 'data.root=/a b']\n  config_dirs: []\n")
        (self.run / "skipped.jsonl").write_text(
            '{"update": 1, "dataset": "stride", "path": "a.mp4", "reason": "cut"}\n'
        )

    def _checkpoint(self) -> Path:
        model = MultiTrain(self.config.model, CLASSES)
        state: dict[str, Any] = {"update": 4, "datasets": CLASSES, "multi_label": []}
        state["model"] = self.config.model.model_dump(mode="json")
        weights = {k: v.detach() for k, v in model.state_dict().items()}
        return checkpoints.write(
            self.run / "checkpoints", checkpoints.Checkpoint(weights, {}, state), (self.run / "config.yaml").read_text()
        )

    def _pack(self) -> Path:
        out = self.folder / "pack"
        if cli.main(["data", "pack", str(self.videos), str(out), "--workers", "1"]):
            raise RuntimeError("the videos cannot be packed")
        return out

    def _evaluation(self) -> Path:
        from multitrain.evaluation.evaluator import evaluate

        config: RunConfig = self.config
        out = self.run / "evaluation/update-00000004/test"
        evaluate(MultiTrain(config.model, CLASSES), config, list(CLASSES), out_dir=out)
        return out


def _update(update: int) -> dict[str, Any]:
    """The record of an update, as the trainer writes it."""
    return {
        "update": update,
        "loss": 1.5,
        "lr": 1e-3,
        "grad_norm": 2.0,
        "tickets": "0123456789abcdef",
        "world_size": 1,
        "seconds": 0.5,
        "loss_classification": 1.0,
    }
