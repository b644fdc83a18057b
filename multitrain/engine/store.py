"""Torch's key-value store with authentication: values written by another user of the node are refused.

Torch's TCPStore does not authenticate its clients, and ranks connect to the addresses that it holds. Here every key has a secret
prefix, and every value carries an authentication code (HMAC) over its key and itself.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from multitrain.cluster.supervised import STORE_FD, STORE_KEY, listen

CODE = hashlib.sha256().digest_size


class StoreError(RuntimeError):
    """A value of the store was not written by a rank of this run."""


class AuthenticatedStore(dist.Store):
    """Wraps a store; ranks accept only values whose writer knows `key`.

    Counters (:meth:`add`) carry no code; a wrong counter can only make ranks wait, or continue too early.

    Args:
        store: holds the values.
        key: secret that all ranks know.
    """

    def __init__(self, store: dist.Store, key: bytes) -> None:
        super().__init__()
        self._store: Any = store  # torch's stubs know no bytes
        self._key = key
        self._prefix = hmac.new(key, b"prefix", hashlib.sha256).hexdigest() + "/"
        self._clones: list[AuthenticatedStore] = []  # C++ keeps no reference to the Python half

    def set(self, key: str, value: str | bytes) -> None:
        """Store a value."""
        self._store.set(self._prefix + key, self._sealed(key, value))

    def get(self, key: str) -> bytes:
        """Wait for the value and return it.

        Raises:
            StoreError: no rank of this run has written it.
        """
        return self._opened(key, self._store.get(self._prefix + key))

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """Store `desired` if the value is `expected`, or if there is none and `expected` is empty; return the value after that."""
        before = self._sealed(key, expected) if expected else b""
        found = self._store.compare_set(self._prefix + key, before, self._sealed(key, desired))
        return self._opened(key, found) if found else b""

    def add(self, key: str, amount: int) -> int:
        """Count."""
        return int(self._store.add(self._prefix + key, amount))

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there."""
        return bool(self._store.check([self._prefix + key for key in keys]))

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys are there."""
        prefixed = [self._prefix + key for key in keys]
        if timeout is None:
            self._store.wait(prefixed)
        else:
            self._store.wait(prefixed, timeout)

    def delete_key(self, key: str) -> bool:
        """Delete; whether it was there."""
        return bool(self._store.delete_key(self._prefix + key))

    def num_keys(self) -> int:
        """Keys of the store below."""
        return int(self._store.num_keys())

    def set_timeout(self, timeout: timedelta) -> None:
        """For :meth:`get` and :meth:`wait`."""
        self._store.set_timeout(timeout)

    def has_extended_api(self) -> bool:
        """Whether there is more than the calls above."""
        return False

    def clone(self) -> AuthenticatedStore:
        """Another connection to the same."""
        self._clones.append(AuthenticatedStore(self._store.clone(), self._key))
        return self._clones[-1]

    def _code(self, key: str, value: bytes) -> bytes:
        return hmac.new(self._key, key.encode() + b"\0" + value, hashlib.sha256).digest()

    def _sealed(self, key: str, value: str | bytes) -> bytes:
        content = value.encode() if isinstance(value, str) else bytes(value)
        return self._code(key, content) + content

    def _opened(self, key: str, found: bytes) -> bytes:
        content = bytes(found)[CODE:]
        if not hmac.compare_digest(bytes(found)[:CODE], self._code(key, content)):
            raise StoreError(
                f"torch's store: no rank of this run has written {key!r}; another user of the node may have"
            )
        return content


_kept: list[Any] = []


def listens_here_only(size: int) -> bool:
    """Whether all `size` ranks are on this machine; then gloo, too, listens to no network."""
    here = os.environ.get("LOCAL_WORLD_SIZE") == str(size)
    if here and os.path.exists("/sys/class/net/lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return here


def rendezvous(rank: int, size: int, here: bool, timeout: float) -> dist.Store | None:
    """The store of this start, served by rank 0; None where no launcher has given the ranks a key (``torchrun``).

    Args:
        here: whether all ranks are on this machine: then nothing listens to the network.
        timeout: seconds that a rank waits for another.
    """
    key = os.environ.pop(STORE_KEY, None)
    if key is None:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listening = _listening(here, port) if rank == 0 else None
    store = dist.TCPStore(
        "127.0.0.1" if here or rank == 0 else address,
        port,
        size,
        is_master=rank == 0,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        master_listen_fd=listening,
    )
    _kept.append(AuthenticatedStore(store, bytes.fromhex(key)))
    found: dist.Store = _kept[-1]
    return found


def _listening(here: bool, port: int) -> int:
    """The descriptor of a socket that listens at `port`: the launcher's, which has kept the port, or one of our own."""
    given = os.environ.pop(STORE_FD, None)
    if given is not None:
        return int(given)
    return listen(here, port).detach()
