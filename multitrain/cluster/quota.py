"""How many files and bytes a file system and the user's quota still allow, one line per file system. Standard library only."""

from __future__ import annotations

import contextlib
import getpass
import grp
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from multitrain.text import byte_size

_SECONDS = 10.0


class Quota(NamedTuple):
    """A quota of Lustre; a limit of 0 is none."""

    whose: str
    bytes: int
    bytes_limit: int
    files: int
    files_limit: int


def lines(places: Iterable[Path | str]) -> list[str]:
    """One line for each file system that holds one of these folders: free inodes, and the quota where `lfs` reports one.

    A folder that does not exist or cannot be looked at gives no line.
    """
    found: dict[int, str] = {}
    for place in places:
        try:
            device, disk = os.stat(place).st_dev, os.statvfs(place)
        except (OSError, ValueError):
            continue
        if device in found:
            continue
        inodes = f"{disk.f_favail:,} of {disk.f_files:,} inodes free" if disk.f_files else "no limit of inodes"
        said = [f"{inodes}, {byte_size(disk.f_bavail * disk.f_frsize)} free"]
        said += [_in_words(quota) for quota in lustre_quotas(Path(place))]
        found[device] = f"{place}: {'; '.join(said)}"
    return list(found.values())


def lustre_quotas(place: Path) -> list[Quota]:
    """The quotas of this user, and of the folder's group, that have a limit; none outside Lustre or without its command `lfs`."""
    names = []
    with contextlib.suppress(OSError, KeyError):  # a number without a name
        names.append(("-u", getpass.getuser()))
        names.append(("-g", grp.getgrgid(os.stat(place).st_gid).gr_name))
    quotas = []
    for option, name in names:
        try:
            done = subprocess.run(
                ["lfs", "quota", "-q", option, name, str(place)],
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            break
        quota = _parsed(f"{'user' if option == '-u' else 'group'} {name}", done.stdout)
        if quota is not None and (quota.bytes_limit or quota.files_limit):
            quotas.append(quota)
    return quotas


def _parsed(whose: str, text: str) -> Quota | None:
    """``FILESYSTEM kbytes quota limit grace files quota limit grace``; the name of the file system may be on a line of its own."""
    words = [word.strip("*[]") for word in text.split()]
    for at in range(len(words) - 6):
        numbers = words[at : at + 3] + words[at + 4 : at + 7]
        if all(word.isdigit() for word in numbers):
            used, soft, hard, files, files_soft, files_hard = map(int, numbers)
            return Quota(whose, 1024 * used, 1024 * (soft or hard), files, files_soft or files_hard)
    return None


def _in_words(quota: Quota) -> str:
    parts = []
    if quota.files_limit:
        parts.append(f"{quota.files:,} of {quota.files_limit:,} files")
    if quota.bytes_limit:
        parts.append(f"{byte_size(quota.bytes)} of {byte_size(quota.bytes_limit)}")
    return f"quota of {quota.whose}: {', '.join(parts)} used"


__all__ = ["Quota", "lines", "lustre_quotas"]
