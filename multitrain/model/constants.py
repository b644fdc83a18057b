"""Small tensors that depend on shapes only: made once a device, as each copy to a GPU waits for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import Tensor

KEPT: dict[Hashable, Tensor] = {}
"""By what they depend on, the device among it. Counts with tensors that hold no data begin with an empty one."""


def kept(key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """The tensor of `key`; `make` is called once for it."""
    found = KEPT.get(key)
    if found is None:
        found = make()
        if type(found) is Tensor:  # not a stand-in without data
            KEPT[key] = found
    return found
