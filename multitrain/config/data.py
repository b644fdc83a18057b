"""Options of the data: the datasets, their proportions, and how videos are read."""

from __future__ import annotations

from typing import Literal

from pydantic import ByteSize, Field, field_validator, model_validator

from multitrain.config.base import Settings
from multitrain.config.paths import check_address, is_remote


class DatasetConfig(Settings):
    """One labelled set of videos. A new dataset is these few lines of YAML, never a new class."""

    annotations: str
    """Folder with `train.csv`, `val.csv` and `test.csv`; each line is `path label` (or `path start end label`: see `segments`)."""
    videos: str
    """Folder to which the paths in the annotation files are relative: of files, or a pack. A pack may also be at an address
    (`s3://`, `gs://`, `https://`); see docs/million.md."""
    classes: int | None = Field(None, ge=1, le=10**7)
    """Number of classes. Not needed if `class_names` is given."""
    class_names: str | None = None
    """File with one class name per line; line n (from 0) is label n. `name,label` lines and JSON are accepted too. By default, names
    for display come from a file in the annotation folder: see `multitrain/config/class_names.py`."""
    sampling: Literal["stride", "segment"] = "stride"
    """`stride`: frames at a fixed rate from a random window (Kinetics); `segment`: one frame from each of equal segments
    (Something-Something)."""
    flip: bool = True
    """Whether a mirrored video keeps its label; false if left and right matter (Something-Something)."""
    replicas: int = Field(1, ge=1, le=10**6)
    """How often the dataset counts in one pass over the union of the datasets."""
    weight: float | None = Field(None, gt=0)
    """Share in the mixture with `data.proportions=weights`; any positive scale."""
    multi_label: bool = False
    """Several labels per line, separated by commas; trained with binary cross-entropy, measured by mAP."""
    separator: str = " "
    """Separator between path and label; the label follows its last occurrence, so paths may contain it."""
    segments: bool = False
    """Whether lines may be `path start end label`: a part of the video, times in seconds. A line whose path is followed by two numbers is
    then such a line; others are complete videos. See docs/data.md."""
    temporal_views: int = Field(1, ge=1, le=1000)
    """Clips per video at test time (K400 5, MiT 2, SSv2 1)."""
    spatial_views: Literal[1, 3] = 1
    """Crops per clip at test time: 1 centre, or 3 (left, centre, right, or top, centre, bottom)."""
    test_short_side: int | None = Field(None, ge=16)
    """Short side in pixels before the test crop. If not given: 8/7 of the crop with one spatial view of a `stride` dataset, else
    the crop itself (the published rule: 256 and 224)."""

    @field_validator("annotations")
    @classmethod
    def _annotations_are_files(cls, annotations: str) -> str:
        if is_remote(annotations):
            raise ValueError(
                "annotation files are read from a folder, and only videos from an address; copy them to a folder"
            )
        return annotations

    @field_validator("videos")
    @classmethod
    def _videos_without_credentials(cls, videos: str) -> str:
        return check_address(videos) if is_remote(videos) else videos

    @model_validator(mode="after")
    def _has_classes(self) -> DatasetConfig:
        if self.classes is None and self.class_names is None:
            raise ValueError("needs 'classes' (a number) or 'class_names' (a file with one name per line)")
        return self

    def short_side(self, crop: int) -> int:
        """Short side in pixels to which test frames are resized before a crop of `crop`²: see `test_short_side`."""
        if self.test_short_side is not None:
            return self.test_short_side
        return round(crop * 256 / 224) if self.sampling == "stride" and self.spatial_views == 1 else crop


class DataConfig(Settings):
    """The datasets, their mixture, and how clips are read from files."""

    root: str = "datasets"
    """Folder to which the paths of the shipped datasets are relative."""
    datasets: dict[str, DatasetConfig]
    """Datasets by name, in the order of the heads. A name may hold any character that a file name may."""
    mixture: Literal["interleave", "concat"] = "interleave"
    """`interleave`: exact proportions in every update; `concat`: one permutation over the union, as published."""
    proportions: Literal["size", "weights", "temperature"] = "size"
    """Shares of the datasets under `interleave`: by number of videos × replicas, by `weight`, or by size to the power 1/temperature."""
    temperature: float = Field(1.0, ge=0.01)
    """1 makes the shares proportional to size; larger values even them out. Used with `proportions=temperature`."""
    shuffle_window: int | None = Field(None, ge=1, le=10**6)
    """Limit of packed shards (or one more) that an update reads of a dataset, so that reads are local; null permutes all videos of
    a pass at once. The order of a run depends on it. See docs/million.md."""
    shard_videos: int = Field(1000, ge=1, le=10**9)
    """Videos per shard, as given to `multitrain data pack --shard-videos`; used with `shuffle_window` only."""
    sampling_rate: int = Field(3, ge=1)
    """Frames of the video, at `target_fps`, from one frame of the clip to the next (the 3 in 32×3)."""
    target_fps: float = Field(30.0, gt=0)
    """Frame rate to which `sampling_rate` refers, in frames per second."""
    decoder: Literal["pyav", "decord"] = "pyav"
    """Video reader. The published code used decord, which returns wrong frames with edit lists and MPEG-4 AVI, cannot read AV1, and
    runs on x86-64 only."""
    workers: int = Field(8, ge=0)
    """Loader processes per rank; 0 decodes in the training process."""
    prefetch: int = Field(2, ge=1)
    """Micro-batches that each worker prepares ahead."""
    skip_cap: float = Field(0.01, ge=0, le=1)
    """Fraction of a dataset's videos that may be unreadable before the run stops."""
    decode_timeout: float = Field(60.0, gt=0)
    """Seconds after which a stalled decode counts as a bad video."""
    stage: str | None = None
    """Folder on each node's own disk for copies of the shards that the next updates need, e.g. `$SLURM_TMPDIR`; expanded on the
    node, so quote it on a command line. Never part of the result. See docs/million.md."""
    stage_limit: ByteSize = Field(ByteSize(200 * 10**9), ge=1)
    """Limit of the bytes in that folder, e.g. `200G`; 5 % of the disk stay free in any case."""
    index: str | None = None
    """Folder for the memory-mapped index of the annotation files; default: `RUNS/.index`."""

    @field_validator("stage")
    @classmethod
    def _absolute(cls, stage: str | None) -> str | None:
        if stage is not None and not stage.startswith(("/", "$", "~")):
            shown = "is empty" if not stage else "is relative"
            raise ValueError(
                f"{shown}; give an absolute path or a variable of the node, quoted: 'data.stage=$SLURM_TMPDIR'"
            )
        return stage

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if not self.datasets:
            raise ValueError("needs at least one dataset under 'datasets'")
        seen: dict[tuple[str, str], str] = {}
        for name, d in self.datasets.items():
            if not name or "/" in name or "\0" in name or name in (".", ".."):
                raise ValueError(
                    f"dataset name {name!r} cannot be a file name; use letters, digits, or any character but '/'"
                )
            twin = seen.setdefault((d.annotations, d.videos), name)
            if twin != name:
                raise ValueError(
                    f"datasets {twin!r} and {name!r} are the same folder {d.annotations!r}; "
                    "remove one, or set 'replicas' to count it more than once"
                )
            if self.proportions == "weights" and d.weight is None:
                raise ValueError(
                    f"dataset {name!r} has no 'weight', which proportions=weights needs; give it one or use proportions=size"
                )
        if self.mixture == "concat" and self.proportions != "size":
            raise ValueError(
                f"mixture=concat takes proportions=size only (got {self.proportions}); use mixture=interleave, or 'replicas'"
            )
        return self
