"""What is known of one sample without opening it: its members, by field and as siblings, and how large each is."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

from trichord.shards.config import FieldsConfig
from trichord.shards.members import MemberRef, is_unsafe, split_name
from trichord.shards.probes import Kind, Measure

KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_REASON_CHARS = 1000
_KEPT_LAYOUTS = 64
_KEPT_MEMBERS = 64
NOT_MEASURED = "not measured when the shard was indexed"


class Sibling(NamedTuple):
    """A member that is an image, an audio clip or a text; `measure` as in `probes`, a string where it has none."""

    kind: Kind
    ref: MemberRef
    measure: Measure


class SampleEntry(NamedTuple):
    """What is known of one sample without opening it.

    key: webdataset's key; shard: URL of the tar. members: by field (`image`, `audio`, `text`, `meta`), those present.
    text_chars: characters of the text. image_size: (width, height) in pixels after EXIF rotation.
    audio_frames, audio_rate: frames at audio_rate Hz. problem: why the sample cannot be used, or None.
    siblings: every image, audio clip and text of the sample by its extension (`jpg`, `0.jpg`, `left.flac`), the fields'
    own members among them; what chats and documents refer to.
    """

    key: str
    shard: str
    members: Mapping[str, MemberRef] = MappingProxyType({})
    text_chars: int | None = None
    image_size: tuple[int, int] | None = None
    audio_frames: int | None = None
    audio_rate: int | None = None
    problem: str | None = None
    siblings: Mapping[str, Sibling] = MappingProxyType({})


class Layout(NamedTuple):
    """What the extensions of a sample's members say. kinds: of each member. fields: (name, number of its member)."""

    kinds: tuple[Kind | None, ...]
    fields: tuple[tuple[str, int], ...]


class FieldMap:
    """A FieldsConfig made ready for look-ups: extensions in lower case, those of pickled code left out."""

    def __init__(self, fields: FieldsConfig):
        self.fields = {
            name: tuple(ext.lower() for ext in getattr(fields, name) if not is_unsafe(ext)) for name in (*KINDS, "meta")
        }
        self._layouts: dict[tuple[str, ...], Layout] = {}
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

    def layout(self, exts: tuple[str, ...]) -> Layout:
        """Of members with these extensions. Most samples of a source have the same ones: the first layouts are kept."""
        layout = self._layouts.get(exts)
        if layout is None:
            numbers = {ext: number for number, ext in enumerate(exts)}
            found = {
                name: next((ext for ext in mapped if ext in numbers), None) for name, mapped in self.fields.items()
            }
            fields = tuple((name, numbers[ext]) for name, ext in found.items() if ext is not None)
            layout = Layout(tuple([self.kind(ext) for ext in exts]), fields)
            if len(self._layouts) < _KEPT_LAYOUTS and len(exts) <= _KEPT_MEMBERS:
                self._layouts[exts] = layout
        return layout


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
    exts = tuple([ref.ext for ref in members])
    layout = fields.layout(exts)
    siblings: dict[str, Sibling] = {}
    if max_members is not None and len(members) > max_members:
        problem = problem or f"{len(members)} members, more than shards.max_members_per_sample {max_members}"
    else:
        for kind, ref in zip(layout.kinds, members):
            if kind is not None:
                siblings[ref.ext] = Sibling(kind, ref, measures.get(kind, ref.ext))
    mapped = {name: members[number] for name, number in layout.fields}
    known: dict[str, Any] = {}
    for name, ref in mapped.items():
        if name != "meta":
            known[name] = measure = _measure_of(name, ref.ext, siblings, measures)
            if measure.__class__ is str:
                problem = problem or f"{name}: {measure}"
    if not mapped:
        problem = problem or f"no member with a mapped extension; found {sorted(set(exts))}"
    key = (split_name(members[0].name) or ("", ""))[0]
    if problem is not None:
        return SampleEntry(key, url, mapped, problem=problem, siblings=siblings)
    size, (frames, rate) = known.get("image"), known.get("audio") or (None, None)
    size = None if size is None else (size[0], size[1])
    return SampleEntry(key, url, mapped, known.get("text"), size, frames, rate, None, siblings)


def _measure_of(kind: str, ext: str, siblings: dict[str, Sibling], measures: Measures) -> Measure:
    sibling = siblings.get(ext)
    return sibling.measure if sibling is not None and sibling.kind == kind else measures.get(kind, ext)
