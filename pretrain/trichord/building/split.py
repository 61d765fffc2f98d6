"""Shards from shards: one set per class, or training and held-out sets by a hash. Members are copied byte for byte."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trichord.building.build import BuildResult, Layout, build
from trichord.building.media import shown
from trichord.building.rows import BadRow, BuildRow, RangePart
from trichord.core.errors import ConfigError, DataError
from trichord.core.log import get_logger
from trichord.core.status import write_atomically
from trichord.core.words import some
from trichord.shards.config import FieldsConfig
from trichord.shards.index import load_header
from trichord.shards.members import FoundMember, WalkReport, is_unsafe, walk_members
from trichord.shards.quarantine import BadSample
from trichord.shards.sources import is_remote, local_path
from trichord.shards.storage import open_shard, shard_identity

_log = get_logger(__name__)
SOURCES_FILE = "sources.yaml"
MAX_GROUPS = 10_000
_MAX_NAMED = 20
_MAX_JSON_BYTES = 64 * 2**20
GroupOf = Callable[[str, Mapping[str, Any]], str]
"""(key, json member) -> name of the group. Raises BadSample where it has none."""


def by_value(key: str) -> GroupOf:
    """A group per value of a dotted key of the json member."""

    def group_of(sample_key: str, meta: Mapping[str, Any]) -> str:
        value = _looked_up(meta, key)
        name = "" if isinstance(value, (list, dict, float)) else group_name(str(value))
        if not name:
            raise BadSample(f"json key {key} is {shown(value)}; expected a name or a whole number to split by")
        return name

    return group_of


def group_name(value: str) -> str:
    """A value as the name of a folder and a source; empty where nothing of it can stand in one."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", value).strip(".")


def by_fractions(fractions: Mapping[str, float], key: str | None = None) -> GroupOf:
    """Groups of about these shares, by a hash of the sample's key, or of a json value: equal ones stay together.

    Raises:
        ConfigError: the fractions are not of (0, 1) or do not add up to 1, or a name is not one.
    """
    if len(fractions) < 2 or abs(sum(fractions.values()) - 1) > 1e-6 or any(not 0 < x < 1 for x in fractions.values()):
        raise ConfigError(f"expected fractions that add up to 1, such as train=0.98,val=0.02; got {dict(fractions)}")
    wrong = [name for name in fractions if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name)]
    if wrong:
        raise ConfigError(f"{wrong[0]!r} names a folder and a source: use letters, digits, - and _")

    def group_of(sample_key: str, meta: Mapping[str, Any]) -> str:
        value = sample_key if key is None else _looked_up(meta, key)
        digest = hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).digest()
        place = int.from_bytes(digest, "little") / 2**64
        for name, fraction in fractions.items():
            if place < fraction:
                return name
            place -= fraction
        return name

    return group_of


def split_shards(
    urls: Sequence[str],
    out_dir: str | Path,
    group_of: GroupOf,
    layout: Layout,
    *,
    of: Mapping[str, Any],
    fields: FieldsConfig | None = None,
    **options: Any,
) -> BuildResult:
    """Copy samples to `OUT/GROUP/PREFIX-000000.tar`, ..., and write `OUT/sources.yaml`, an overlay for run configs.

    Args:
        urls: the shards, in order. of: what `group_of` does, as JSON, to know the same split again when it was cut off.
        options: as of `build` (on_bad, workers, ray, on_progress).

    Raises:
        ConfigError, DataError: as `build`; a sample without its group is bad.
    """
    fields = fields or FieldsConfig()
    identity = {"split": dict(of), "shards": [[url, shard_identity(url)] for url in urls]}
    rows = _rows(urls, group_of, fields)
    result = build(rows, out_dir, layout, identity=identity, fields=fields, check_contents=False, **options)
    write_atomically(Path(out_dir) / SOURCES_FILE, _overlay(result, Path(out_dir), layout.prefix))
    return result


def _rows(urls: Sequence[str], group_of: GroupOf, fields: FieldsConfig) -> Iterator[BuildRow | BadRow]:
    groups: dict[str, str] = {}
    for url in urls:
        url = url if is_remote(url) else os.path.abspath(local_path(url))
        for key, members, meta in _samples(url, fields):
            origin = f"{url}, sample {key!r}"
            try:
                group = group_of(key, _parsed(meta))
            except BadSample as error:
                yield BadRow(origin, str(error))
                continue
            if groups.setdefault(group.lower(), group) != group:  # some file systems do not tell them apart
                raise DataError(f"the groups {groups[group.lower()]!r} and {group!r} differ in case only; rename one")
            if len(groups) > MAX_GROUPS:
                raise DataError(f"more than {MAX_GROUPS} groups; split by a key with fewer values")
            yield BuildRow(key, members, origin, group)


def _samples(url: str, fields: FieldsConfig) -> Iterator[tuple[str, dict[str, RangePart], bytes]]:
    """(key, members, json member or nothing) of each sample; neighbours with one key are a sample."""
    report = WalkReport()
    key, members, meta = None, {}, b""
    with open_shard(url) as file:
        for found in walk_members(file, int(shard_identity(url)["size"]), url, report):
            if found.key != key:
                if members:
                    yield str(key), members, meta
                key, members, meta = found.key, {}, b""
            if not is_unsafe(found.ref.ext):
                members[found.raw_ext] = RangePart(url, found.ref.offset, found.ref.size)
                if found.ref.ext in fields.meta:
                    meta = _read_meta(found)
    if report.damage is not None:
        raise DataError(f"shard {url} is damaged: {report.damage}; copy it again, or leave it out")
    if members:
        yield str(key), members, meta
    if report.unsafe_members:
        _log.warning("%d members of %s hold pickled code and are not copied", report.unsafe_members, url)


def _read_meta(found: FoundMember) -> bytes:
    if found.ref.size > _MAX_JSON_BYTES:
        return b""
    return found.file.read()


def _parsed(meta: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(meta) if meta else {}
    except (ValueError, RecursionError) as error:
        raise BadSample(f"its json cannot be read ({error})") from error
    return value if isinstance(value, dict) else {}


def _looked_up(meta: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key. Raises BadSample where there is none, with the keys that there are."""
    value: Any = meta
    path = ""
    for step in key.split("."):
        where = f"{path.rstrip('.')} of its json" if path else "its json"
        if not isinstance(value, Mapping) or not value:
            raise BadSample(f"no json key {key}: {where} holds no keys")
        if step not in value:
            raise BadSample(f"no json key {key}; the keys in {where} are {some(value, _MAX_NAMED)}")
        value, path = value[step], f"{path}{step}."
    if value is None:
        raise BadSample(f"json key {key} is null; expected a value")
    return value


def _overlay(result: BuildResult, out_dir: Path, prefix: str) -> str:
    lines = [
        "# Sources of a split; put this file behind a run config: trichord train run.yaml sources.yaml",
        "# It trains on all of them: take out what is held out.",
        "shards:",
        "  sources:",
    ]
    for group, paths in result.shards.items():
        samples = sum(load_header(path).num_samples for path in paths)
        pattern = json.dumps(str(out_dir / group / f"{prefix}-*.tar"))
        lines += [f"    - name: {json.dumps(group)} # {samples} samples", f"      shards: [{pattern}]"]
    return "\n".join(lines) + "\n"
