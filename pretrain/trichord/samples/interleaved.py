"""Documents and chats: the `messages` of a json member, in the Hugging Face chat form, that name sibling members.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "0.jpg"}, {"type": "text", "text": "Who?"}]},
                  {"role": "assistant", "content": "A heron."}]}

A document is one message of the role `document`: text and items in the order they are read, all text learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from trichord.samples.config import TextConfig
from trichord.samples.text import check_chars, clean_text, has_half_surrogate
from trichord.shards.index import Sibling
from trichord.shards.members import MemberRef
from trichord.shards.quarantine import BadSample

ROLES = ("system", "user", "assistant", "tool", "document")
MAX_PARTS = 1024


class Item(NamedTuple):
    """An image or clip of a sample. size: (width, height) in pixels upright, or (frames, rate in Hz), by the index."""

    kind: Literal["image", "audio"]
    ref: MemberRef
    size: tuple[int, int]


@dataclass(frozen=True)
class Turn:
    """One message: its role, and its texts and items in reading order."""

    role: str
    content: tuple[str | Item, ...]


def parse_messages(messages: Any, key: str, siblings: Mapping[str, Sibling], config: TextConfig) -> tuple[Turn, ...]:
    """The turns of a chat or document; texts are normalised as configured, blank ones dropped.

    Args:
        messages: the json value. key: of the sample; siblings: its members by extension (`0.jpg`), see `SampleEntry`.
            An item is named by extension, by file name (`KEY.0.jpg`), or not at all: then it is the next one of its
            kind in the tar's order.

    Raises:
        BadSample: not of the chat form, an unknown role, a member that is not there or not measured, too much text.
    """
    if not isinstance(messages, list) or not messages:
        raise BadSample(f"`messages` in the metadata must be a list of turns, got {_described(messages)}")
    finder = _Siblings(key, siblings)
    turns, chars, parts = [], 0, 0
    for number, message in enumerate(messages):
        turn = _parse_turn(message, f"messages[{number}]", finder, config)
        chars += sum(len(part) for part in turn.content if isinstance(part, str))
        parts += max(1, len(turn.content))
        if parts > MAX_PARTS:
            raise BadSample(f"`messages` has more than {MAX_PARTS} parts")
        check_chars(chars, config)
        turns.append(turn)
    if not any(turn.content for turn in turns):
        raise BadSample("`messages` holds neither text nor items")
    return tuple(turns)


def _parse_turn(message: Any, where: str, finder: _Siblings, config: TextConfig) -> Turn:
    if not isinstance(message, dict):
        raise BadSample(f"{where} must be an object with role and content, got {_described(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise BadSample(f"{where}: role must be one of {', '.join(ROLES)}; got {_described(role)}")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadSample(f"{where}: content must be text or a list of parts, got {_described(content)}")
    if len(content) > MAX_PARTS:
        raise BadSample(f"{where}: content has {len(content)} parts, at most {MAX_PARTS} are read")
    parts = [_parse_part(part, f"{where}.content[{place}]", finder, config) for place, part in enumerate(content)]
    return Turn(role, tuple(part for part in parts if part != ""))


def _parse_part(part: Any, where: str, finder: _Siblings, config: TextConfig) -> str | Item:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str) or has_half_surrogate(text):
            raise BadSample(f"{where}: text must be text, got {_described(text)}")
        check_chars(len(text), config)
        return clean_text(text, config, strip=False)
    if kind in ("image", "audio"):
        return finder.find(kind, part.get(kind, part.get("path")), where)
    raise BadSample(f"{where}: type must be text, image or audio; got {_described(kind if kind else part)}")


class _Siblings:
    """Finds the members that a chat names."""

    def __init__(self, key: str, siblings: Mapping[str, Sibling]) -> None:
        self._base = key.rsplit("/", 1)[-1] + "."
        self._by_ext = siblings
        self._unnamed = {kind: iter([s for s in siblings.values() if s.kind == kind]) for kind in ("image", "audio")}

    def find(self, kind: Literal["image", "audio"], name: Any, where: str) -> Item:
        if name is None:
            sibling = next(self._unnamed[kind], None)
            if sibling is None:
                raise BadSample(f"{where}: the sample has no further {kind}; it has {self._known()}")
        elif isinstance(name, str):
            ext = name.removeprefix("./").removeprefix(self._base).lower()
            sibling = self._by_ext.get(ext)
            if sibling is None or sibling.kind != kind:
                raise BadSample(f"{where}: the sample has no {kind} {_described(name)}; it has {self._known()}")
        else:
            raise BadSample(f"{where}: {kind} must name a member, got {_described(name)}")
        return item_of(sibling)

    def _known(self) -> str:
        return ", ".join(sorted(self._by_ext)[:8]) or "none"


def item_of(sibling: Sibling) -> Item:
    """The item of a measured sibling. Raises BadSample where the index says why it has no size."""
    kind, measure = sibling.kind, sibling.measure
    if kind == "text" or not isinstance(measure, list):
        raise BadSample(f"{kind}: {measure or 'the index has no size of it'}", sibling.ref.name)
    first, second = measure
    return Item(kind, sibling.ref, (first, second))


def _described(value: Any) -> str:
    """A value in few characters, the same on every attempt."""
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:40] + "...")
    return "nothing" if value is None else type(value).__name__
