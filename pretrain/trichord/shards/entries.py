"""What is known of one sample without opening it: its members, by field and as siblings, and how large each is."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

from trichord.shards.config import FieldsConfig
from trichord.shards.members import MemberRef, is_unsafe, split_name
from trichord.shards.probes import Kind, Measure

KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_REASON_CHARS = 1000
NOT_MEASURED = "not measured when the shard was indexed"


class Sibling(NamedTuple):
    """A member that is an image, an audio clip or a text; `measure` as in `probes`, a string where it has none."""

    kind: Kind
    ref: MemberRef
    measure: Measure


@dataclass(frozen=True)
class SampleEntry:
    """What is known of one sample without opening it.

    key: webdataset's key; shard: URL of the tar. members: by field (`image`, `audio`, `text`, `meta`), those present.
    text_chars: characters of the text. image_size: (width, height) in pixels after EXIF rotation.
    audio_frames, audio_rate: frames at audio_rate Hz. problem: why the sample cannot be used, or None.
    siblings: every image, audio clip and text of the sample by its extension (`jpg`, `0.jpg`, `left.flac`), the fields'
    own members among them; what chats and documents refer to.
    """

    key: str
    shard: str
    members: dict[str, MemberRef] = field(default_factory=dict)
    text_chars: int | None = None
    image_size: tuple[int, int] | None = None
    audio_frames: int | None = None
    audio_rate: int | None = None
    problem: str | None = None
    siblings: dict[str, Sibling] = field(default_factory=dict)


class FieldMap:
    """A FieldsConfig made ready for look-ups: extensions in lower case, those of pickled code left out."""

    def __init__(self, fields: FieldsConfig):
        self.fields = {
            name: tuple(ext.lower() for ext in getattr(fields, name) if not is_unsafe(ext)) for name in (*KINDS, "meta")
        }
        self._kinds: dict[str, Kind] = {}
        for kind in KINDS:
            for ext in self.fields[kind]:
                self._kinds.setdefault(ext, kind)

    def kind(self, ext: str) -> Kind | None:
        """Kind of a member by its extension in lower case, else by the last dotted part of it (`0.jpg`)."""
        kind = self._kinds.get(ext)
        if kind is None and (dot := ext.rfind(".")) >= 0:
            kind = self._kinds.get(ext[dot + 1 :])
        return kind


class Measures:
    """The measures of one sample: the columns of its `.len` line, and the `numbered` ones (`0.jpg`) behind them."""

    def __init__(self, columns: dict[tuple[str, str], int], values: list[Any], numbered: dict[str, dict[str, Any]]):
        self._columns, self._values, self._numbered = columns, values, numbered

    def get(self, kind: str, ext: str) -> Measure:
        """Raises ValueError or TypeError for what no measure of this kind can be: sidecars are files like any other."""
        column = self._columns.get((kind, ext))
        value: Any = self._numbered.get(ext, {}).get(kind) if column is None else self._values[column]
        if value.__class__ is str:
            return value[:MAX_REASON_CHARS]
        if value is None:
            return NOT_MEASURED
        if kind == "text":
            if value.__class__ is not int or value < 0:
                raise ValueError(f"{value!r} characters")
        else:
            first, second = value
            if first.__class__ is not int or second.__class__ is not int or first <= 0 or second <= 0:
                raise ValueError(f"{kind} of {value!r}")
        return value


def make_entry(
    url: str,
    members: list[MemberRef],
    measures: Measures,
    problem: str | None,
    fields: FieldMap,
    max_members: int | None,
) -> SampleEntry:
    """The entry of one sample. `problem` is what the walk over its shard found, or None."""
    if max_members is not None and len(members) > max_members:
        problem = problem or f"{len(members)} members, more than shards.max_members_per_sample {max_members}"
        siblings: dict[str, Sibling] = {}
    else:
        siblings = _siblings(members, measures, fields)
    by_ext = {ref.ext: ref for ref in members}
    mapped: dict[str, MemberRef] = {}
    known: dict[str, Any] = {}
    for name, exts in fields.fields.items():
        for ext in exts:
            if ext in by_ext:
                mapped[name] = by_ext[ext]
                if name != "meta":
                    known[name] = _measure_of(name, ext, siblings, measures)
                break
    for name, measure in known.items():
        if measure.__class__ is str:
            problem = problem or f"{name}: {measure}"
    if not mapped:
        problem = problem or f"no member with a mapped extension; found {sorted(by_ext)}"
    key = (split_name(members[0].name) or ("", ""))[0]
    if problem is not None:
        return SampleEntry(key, url, mapped, problem=problem, siblings=siblings)
    size, (frames, rate) = known.get("image"), known.get("audio") or (None, None)
    size = None if size is None else (size[0], size[1])
    return SampleEntry(key, url, mapped, known.get("text"), size, frames, rate, None, siblings)


def _measure_of(kind: str, ext: str, siblings: dict[str, Sibling], measures: Measures) -> Measure:
    sibling = siblings.get(ext)
    return sibling.measure if sibling is not None and sibling.kind == kind else measures.get(kind, ext)


def _siblings(members: list[MemberRef], measures: Measures, fields: FieldMap) -> dict[str, Sibling]:
    siblings = {}
    for ref in members:
        kind = fields.kind(ref.ext)
        if kind is not None:
            siblings[ref.ext] = Sibling(kind, ref, measures.get(kind, ref.ext))
    return siblings
