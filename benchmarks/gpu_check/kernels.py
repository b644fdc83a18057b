"""The kernels of an update that take the most time."""

from __future__ import annotations

from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_check.setting import Report, Setting
from benchmarks.gpu_check.updates import updates

TOP = 15


def run(setting: Setting, report: Report) -> None:
    """Profile one update in bf16 after a warm-up."""
    videos = 2 if setting.tiny else 4
    made = updates(setting, videos, videos, "bf16", deepspeed=not setting.tiny)
    for _ in range(0 if setting.tiny else 2):
        made.update()
    setting.synchronise()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.cuda else [])]
    with profile(activities=activities) as seen:
        made.update()
        setting.synchronise()
    wall = setting.seconds(made.update, 1, 0)
    found = [e for e in seen.key_averages() if _time(e, setting) > 0]
    found.sort(key=lambda e: -_time(e, setting))
    whole, launched = sum(_time(e, setting) for e in found), sum(e.count for e in found)
    note = f"{launched} of them; the update takes {wall * 1e3:.1f} ms without the profiler, their sum is {whole / wall / 1e4:.0f} % of it"
    report.row("all kernels" if setting.cuda else "all operations", whole / 1e3, "ms", whole > 0, note)
    for e in found[:TOP]:
        report.row(
            e.key[:100], _time(e, setting) / 1e3, "ms", note=f"{100 * _time(e, setting) / whole:.1f} %, {e.count} times"
        )


def _time(event: Any, setting: Setting) -> float:
    """Microseconds of this event itself: kernels on a GPU, operations on the CPU."""
    if not setting.cuda:
        return float(event.self_cpu_time_total)
    if str(event.device_type).endswith("CPU") or event.key.startswith("Optimizer."):
        return 0.0  # the launching side of the same time, and a mark around several kernels
    return float(getattr(event, "self_device_time_total", getattr(event, "self_cuda_time_total", 0)))
