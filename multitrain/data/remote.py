"""Packs in object storage and on web servers (``s3://``, ``gs://``, ``https://``), read by ranges through fsspec.

The index of a pack is fetched once, into the folder of index files, and opened there as that of any pack. Its shards stay where they
are: a video is one range request. A request that fails or stalls is repeated until `patience` ends; what is missing or forbidden is an
error at once. Credentials come from the environment (variables, configuration files of the provider's tools, ``.netrc``).

fsspec is imported for such addresses only, and no connection is opened before worker processes are forked.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from multitrain.config.paths import is_remote
from multitrain.errors import ConfigError
from multitrain.files import replacing
from multitrain.text import printable

INDEX = "pack.index"
CHUNK = 8 << 20
"""Bytes of one request while the index is fetched."""
_TAGS = ("ETag", "etag", "Content-MD5", "md5Hash", "Last-Modified", "LastModified", "mtime", "updated")
_MISSING, _FORBIDDEN, _NO_RANGE = (404, 410), (401, 403), 416
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0

_patience = 48.0
_log = logging.getLogger(__name__)


def set_patience(decode_timeout: float) -> None:
    """Set how long this process repeats a request: most of `data.decode_timeout`, so that the video can be decoded afterwards."""
    global _patience
    _patience = 0.8 * decode_timeout


def preload(address: str) -> None:
    """Import the libraries for an address.

    Raises:
        ConfigError: they are not installed.
    """
    scheme = address.partition("://")[0]
    try:
        import fsspec

        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise ConfigError(f"{address}: needs another library ({error}); pip install 'multitrain[remote]'") from None


def read(address: str, offset: int, size: int) -> bytes:
    """Bytes of a file at an address, fewer at its end.

    Raises:
        FileNotFoundError, PermissionError: there is no such file, or it may not be read.
        OSError: the server did not answer in time.
        ConfigError: the library is not installed, or the server ignores ranges.
    """
    if size <= 0:
        return b""
    system, path = _opened(os.getpid(), *_split(address))
    content = _repeated(address, lambda: system._cat_file(path, start=offset, end=offset + size), system.loop)
    if len(content) > size:
        raise ConfigError(f"{address}: its server ignores ranges, so single videos cannot be read; use another server")
    return bytes(content)


def mirror(address: str, folder: Path) -> Path:
    """A folder below `folder` with the index of the pack at `address`; fetched if it is missing or was changed there.

    If the server does not answer, the index that was fetched last is used, so that a run can start during an outage.

    Raises:
        ConfigError: there is no pack, or it cannot be read.
    """
    index = f"{address}/{INDEX}"
    here = f"remote-{_digest(address)}"
    try:
        system, path = _opened(os.getpid(), *_split(index))
        about = _repeated(index, lambda: system._info(path), system.loop)
        tags = {tag: str(about[tag]) for tag in _TAGS if about.get(tag)}
        place = folder / f"{here}-{_digest(about.get('size'), tags)}"
        if not tags or not (place / INDEX).is_file():
            place.mkdir(parents=True, exist_ok=True)
            with replacing(place / INDEX) as temporary:
                _fetch(index, temporary)
        return place
    except FileNotFoundError:
        raise ConfigError(
            f"{address}: no {INDEX} there; give the address of a folder that `multitrain data pack` wrote"
        ) from None
    except OSError as error:
        said = f"{printable(str(error.filename or index))}: {error.strerror or error}"
        earlier = sorted(folder.glob(f"{here}-*/{INDEX}"), key=lambda file: file.stat().st_mtime)
        if earlier and not isinstance(error, PermissionError):
            _log.warning("%s; the index that was fetched earlier is used", said)
            return earlier[-1].parent
        raise ConfigError(f"{said}; check the address, and the credentials in the environment") from None


def _fetch(address: str, file: Path) -> None:
    with open(file, "wb") as out:
        while content := read(address, out.tell(), CHUNK):
            out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


def _split(address: str) -> tuple[str, str]:
    assert is_remote(address)
    scheme, _, rest = address.partition("://")
    return scheme, address if scheme.startswith("http") else rest


@lru_cache(maxsize=64)
def _file_system(process: int, scheme: str) -> Any:
    """The file system of this process. A fork needs another one, since its threads are not copied."""
    preload(f"{scheme}://")
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme.startswith("http"):
        options |= {"headers": {"Accept-Encoding": "identity"}, "client_kwargs": {"trust_env": True}}
    return fsspec.filesystem(scheme, **options)


def _opened(process: int, scheme: str, path: str) -> tuple[Any, str]:
    return _file_system(process, scheme), path


def _repeated(address: str, request: Callable[[], Any], loop: Any) -> Any:
    """The result of a request, repeated until it succeeds or the time is up. Raises OSError."""
    from fsspec.asyn import sync

    end, pause = time.monotonic() + _patience, _FIRST_PAUSE
    each = _patience / 5
    while True:
        try:
            return sync(loop, request, timeout=each)
        except Exception as error:  # the libraries raise errors of many kinds
            failed = _as_os_error(error, address)
        if isinstance(failed, (FileNotFoundError, PermissionError)):
            raise failed
        if failed.errno == errno.ERANGE:
            return b""
        if time.monotonic() + pause + each > end:
            raise failed
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _as_os_error(error: Exception, address: str) -> OSError:
    """The error as one of the operating system: missing, forbidden, behind the end (ERANGE), or temporary (EIO)."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) and not hasattr(cause, "response"):
        error = cause  # fsspec's HTTP client calls every failure "not found"; the causes in others have a response
    status = getattr(error, "status", None)
    kind, said = type(error).__name__, " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, FileNotFoundError) or status in _MISSING:
        return FileNotFoundError(errno.ENOENT, "No such file", address)
    if (
        isinstance(error, PermissionError)
        or status in _FORBIDDEN
        or kind in ("NoCredentialsError", "PartialCredentialsError")
    ):
        return PermissionError(errno.EACCES, f"may not be read ({said})", address)
    if status == _NO_RANGE or "InvalidRange" in said or "Requested Range Not Satisfiable" in said:
        return OSError(errno.ERANGE, said, address)
    return OSError(errno.EIO, f"the server did not answer in time ({said})", address)


__all__ = ["mirror", "preload", "read", "set_patience"]
