"""Clips per second of whole updates, the fraction of the GPU's peak, and the peak memory against the forecast."""

from __future__ import annotations

import torch

from benchmarks.gpu_check import stored
from benchmarks.gpu_check.setting import Report, Setting
from benchmarks.gpu_check.updates import Updates, case_of, updates
from launch import memory_estimate
from multitrain.config import ModelConfig

PEAKS = {
    "H200": 989,
    "H100": 989,
    "GH200": 989,
    "B200": 2250,
    "A100": 312,
    "A6000": 155,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
}
"""TFLOP/s of dense bf16 products, by the maker; the longest name that a GPU's name contains counts."""
CLIPS = (4, 8, 16, 32, 64)
FORECAST = 0.75, 1.10
"""The measured peak ÷ the forecast: more than forecast ends runs, much less wastes the GPU."""


def run(setting: Setting, report: Report) -> None:
    """Updates of more and more clips, each in one micro-batch, until memory says that they do not fit."""
    peak, operations = _peak(setting), stored.load(case_of(setting).name)["multiply_adds_per_clip"]
    made = updates(setting, CLIPS[0] // 2, CLIPS[0] // 2, "bf16", deepspeed=not setting.tiny)
    for clips in CLIPS[:1] if setting.tiny else CLIPS:
        try:
            _measure(made.resized(clips // 2, clips // 2), report, peak, operations)
        except torch.cuda.OutOfMemoryError as error:
            report.row(f"{clips} clips", "out of memory", note=str(error).split("\n")[0][:200])
            break
    if not setting.cuda:
        _counted(setting, report)


def _measure(made: Updates, report: Report, peak: float | None, operations: float) -> None:
    setting, clips = made.setting, made.shape.micro_batch * made.config.augment.copies
    if setting.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    spent = setting.seconds(made.update, *((1, 0) if setting.tiny else (4, 2)))
    speed = clips / spent
    share = "" if peak is None else f"{6 * operations * speed / peak / 1e10:.1f} % of {peak:g} TFLOP/s (MFU)"
    report.row(f"{clips} clips", speed, "clips/s", note=share)
    if setting.cuda:
        expected = memory_estimate.forecast(made.config, made.shape).bytes
        context = memory_estimate.CUDA_CONTEXT_BYTES
        used, (low, high) = torch.cuda.max_memory_allocated() + context, FORECAST
        note = f"{used / 1e9:.2f} GB with {context / 1e9:g} GB for CUDA, forecast {expected / 1e9:.2f} GB; {low} to {high} hold"
        note += f"; reserved {torch.cuda.max_memory_reserved() / 1e9:.2f} GB, free {torch.cuda.mem_get_info()[0] / 1e9:.1f} GB"
        report.row(f"{clips} clips, peak ÷ forecast", used / expected, "", low <= used / expected <= high, note)


def _peak(setting: Setting) -> float | None:
    if not setting.cuda:
        return None
    name = torch.cuda.get_device_name(setting.device)
    return next((float(PEAKS[n]) for n in sorted(PEAKS, key=len, reverse=True) if n in name), None)


def _counted(setting: Setting, report: Report) -> None:
    """Without a GPU: the bytes of a clip, counted on fake tensors, against the forecast's."""
    from benchmarks.counting import counts_of_ours

    case, name = case_of(setting), "bytes of a clip, counted ÷ forecast"
    config = case.config if setting.tiny else ModelConfig()
    counted = counts_of_ours(config, case.datasets, "none", 8).peak / 8
    ratio = counted / memory_estimate.clip_bytes(config, "none")
    note = f"{counted / 1e6:.2f} MB, on fake tensors, because there is no GPU; 0.7 to 1.3 hold"
    report.row(name, ratio, "", 0.7 <= ratio <= 1.3, note)
