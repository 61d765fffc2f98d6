"""Which entry of a tile table a GPU takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from trichord_kernels.errors import KernelError

# Their multiprocessors offer one program 99 KiB of shared memory although their numbers are above sm_80's.
SMALL_ARCHS = ("sm_86", "sm_89", "sm_120", "sm_121")
SMALL = "small"

Choice = TypeVar("Choice")


def choose(table: Mapping[tuple, Choice], arch: str, *key: object) -> Choice:
    """The entry (arch, *key) of a table, or what stands in for it.

    Parts with little shared memory take the `small` entry of the key where the table has one. Any other architecture
    takes the nearest older one of its maker and generation scheme (sm_103: sm_100; sm_87: sm_80). Raises KernelError
    where the table has nothing for the key on this architecture or an older one.
    """
    if (arch, *key) in table:
        return table[(arch, *key)]
    if arch in SMALL_ARCHS and (SMALL, *key) in table:
        return table[(SMALL, *key)]
    listed = [entry[0] for entry in table if entry[1:] == key]
    older = [name for name in listed if _family(name) == _family(arch) and _age(name) <= _age(arch)]
    if not older:
        raise KernelError(
            f"tile table: expected an entry {key} for {arch} or an older architecture, got entries for "
            f"{', '.join(sorted(set(listed))) or 'none'}; add one to tables/, or set TRICHORD_KERNELS=reference"
        )
    return table[(max(older, key=_age), *key)]


def _family(arch: str) -> str:
    """`sm` of sm_90; `gfx9` of gfx942 and gfx90a, which is another design than gfx11's; other words as they are."""
    if arch.startswith("sm_"):
        return "sm"
    return arch[:-2] if arch.startswith("gfx") else arch


def _age(arch: str) -> int:
    """Larger is newer within a family: sm_100 as 100, gfx942 as hexadecimal 42."""
    if found := re.fullmatch(r"sm_(\d+)[a-z]?", arch):
        return int(found.group(1))
    return int(arch[-2:], 16) if arch.startswith("gfx") else 0
