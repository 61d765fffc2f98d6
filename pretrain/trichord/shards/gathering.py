"""A shard's members gathered to samples and measured, as the walk over it meets them: what its sidecars are made of."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trichord.shards import sidecars
from trichord.shards.config import FieldsConfig
from trichord.shards.entries import KINDS
from trichord.shards.members import FoundMember, MemberRef, WalkReport, is_unsafe, walk_members
from trichord.shards.probes import Kind, Measure, measure
from trichord.shards.storage import open_shard, with_retries


@dataclass
class GatheredSample:
    """One sample while its shard is walked: members with the extension as written, measures by (kind, ext).

    numbered: measures by extension and kind of members that only the last part of their extension maps (`0.jpg`): as
    columns they would be as many as the longest chat has pictures, and empty in most lines.
    """

    key: str
    members: list[tuple[str, MemberRef]] = field(default_factory=list)
    measures: dict[tuple[str, str], Measure] = field(default_factory=dict)
    numbered: dict[str, dict[Kind, Measure]] = field(default_factory=dict)
    problem: str | None = None

    def add(self, found: FoundMember, kinds: dict[str, list[Kind]]) -> None:
        ext = found.ref.ext
        if self.problem is None and any(ref.ext == ext for _, ref in self.members):
            self.problem = f"two members with extension {ext!r}, the second is {found.ref.name!r}"
        self.members.append((found.raw_ext, found.ref))
        exact = kinds.get(ext, ())
        for kind in () if is_unsafe(ext) else dict.fromkeys((*exact, *kinds.get(ext.rpartition(".")[2], ()))):
            found.file.seek(0)
            value = measure(kind, found.file, found.ref.size)
            if kind in exact:
                self.measures[kind, ext] = value
            else:
                self.numbered.setdefault(ext, {})[kind] = value

    def len_line(self, columns: Sequence[tuple[str, str]]) -> str:
        names = sidecars.exact_names([ref for _, ref in self.members])
        extra: dict[str, Any] = {} if self.problem is None else {"problem": self.problem}
        if self.numbered:
            extra["numbered"] = self.numbered
        if names is not None:
            extra["names"] = names
        return sidecars.len_line([self.measures.get(pair) for pair in columns], extra)


def gather_samples(
    walk: Iterable[FoundMember], kinds: dict[str, list[Kind]], report: WalkReport
) -> list[GatheredSample]:
    """Neighbouring members with one key are a sample (webdataset's rule)."""
    samples: list[GatheredSample] = []
    for found in walk:
        if not samples or samples[-1].key != found.key:
            samples.append(GatheredSample(found.key))
        samples[-1].add(found, kinds)
    if report.damage is not None and (samples or report.cut_key is not None):
        # Where the tar breaks off, its last sample is whole only if a member of another sample has begun after it.
        whole = report.cut_key is not None and (not samples or samples[-1].key != report.cut_key)
        dropped = report.cut_key if whole else samples.pop().key
        report.damage += f"; sample {dropped!r} is left out, the {len(samples)} whole samples before it are used"
    return samples


def kinds_by_ext(fields: FieldsConfig) -> dict[str, list[Kind]]:
    """What to measure of a member: the kinds its extension is mapped to, by `fields` or by default."""
    kinds: dict[str, list[Kind]] = {}
    for config in (fields, FieldsConfig()):
        for kind in KINDS:
            for ext in getattr(config, kind):
                if kind not in kinds.setdefault(ext.lower(), []):
                    kinds[ext.lower()].append(kind)
    return kinds


def walk_shard(url: str) -> tuple[int, str | None]:
    """(samples, why the walk ended early or None) of a shard: from header to header, nothing is measured or written.

    Raises:
        DataError: it cannot be read, or is no tar.
    """

    def walk() -> tuple[int, str | None]:
        report, samples, key = WalkReport(), 0, None
        with open_shard(url) as file:
            for found in walk_members(file, file.seek(0, os.SEEK_END), url, report):
                samples += found.key != key
                key = found.key
        return samples, report.damage

    return with_retries(walk, f"walking over shard {url}")
