"""The first check on a GPU, in twelve minutes: ``python -m benchmarks.gpu_check`` (docs/gpu.md).

A section is a module with a function ``run(setting, report)``. Every section runs in a process of its own, so that a crash, a hang or an
out-of-memory is one line of the report and does not end the others. Losses and gradients are compared with values that a CPU computed in
fp64 and that are stored in `stored/`, never with the device's own.
"""
