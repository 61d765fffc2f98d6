"""Conversations and interleaved documents: from the forms they are published in to the `messages` of a json member.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "0.jpg"}, {"type": "text", "text": "Who?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "A heron."}]}]}

`0.jpg` is the member KEY.0.jpg; images and clips are counted apart, in the order they are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trichord.building.media import is_empty, shown
from trichord.building.rows import Content
from trichord.shards.quarantine import BadSample

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function"), "tool"),
    "system": "system",
}
CHAT_KEYS = ("messages", "conversations")
_PLACEHOLDER = re.compile(r"(<image>|<audio>)")
Media = tuple[str, Content]
"""(extension, content) of an image or clip."""


class ChatMembers:
    """Collects the members of one sample while its messages are made."""

    def __init__(self, images: Sequence[Media] = (), clips: Sequence[Media] = ()):
        self._waiting = {"image": list(images)[::-1], "audio": list(clips)[::-1]}
        self._counts = {"image": 0, "audio": 0}
        self.members: dict[str, Content] = {}

    def next(self, kind: str) -> dict[str, str]:
        """The content part of the next image or clip. Raises BadSample where there is none left."""
        if not self._waiting[kind]:
            raise BadSample(f"more <{kind}> placeholders than files: there are {self._counts[kind]}")
        ext, content = self._waiting[kind].pop()
        name = f"{self._counts[kind]}.{ext}"
        self._counts[kind] += 1
        self.members[name] = content
        return {"type": kind, kind: name}

    def rest(self) -> list[dict[str, str]]:
        """The parts of all that are left, images first."""
        return [self.next(kind) for kind in ("image", "audio") for _ in list(self._waiting[kind])]


def chat_messages(turns: Any, members: ChatMembers, system: Any = None) -> list[dict[str, Any]]:
    """`messages` of a conversation. Where no turn has a placeholder, all files open the first turn of the user.

    Args:
        turns: objects with from and value, or role and content (text, or parts with a type), or user and assistant.

    Raises:
        BadSample: no turns, an unknown role, a turn without text, or another number of placeholders than of files.
    """
    if not isinstance(turns, list) or not turns:
        raise BadSample(f"expected a list of turns, got {shown(turns)}")
    messages = [{"role": "system", "content": [_text(system)]}] if isinstance(system, str) and system else []
    for number, turn in enumerate(turns):
        messages += [
            {"role": _role(role, number), "content": list(_parts(value, members, number))}
            for role, value in _said(turn, number)
        ]
    rest = members.rest()
    if rest:
        if any(part["type"] != "text" for message in messages for part in message["content"]):
            raise BadSample(f"{len(rest)} files more than <image> and <audio> placeholders")
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise BadSample(f"{len(rest)} files, and neither a placeholder nor a turn of the user for them")
        first["content"] = rest + first["content"]
    return messages


def document_messages(texts: Sequence[Any], images: Sequence[Any], members: ChatMembers) -> list[dict[str, Any]]:
    """`messages` of an interleaved document: at each place of the two lists is either a text or an image.

    Raises:
        BadSample: the lists differ in length, or a place has both.
    """
    if len(texts) != len(images):
        raise BadSample(
            f"{len(texts)} texts and {len(images)} images; in a document both lists have one place per part, null "
            "where the other has something"
        )
    content = []
    for place, (text, image) in enumerate(zip(texts, images)):
        if not is_empty(text) and not is_empty(image):
            raise BadSample(f"place {place} has a text and an image; expected one of them, null in the other list")
        if not is_empty(image):
            content.append(members.next("image"))
        elif isinstance(text, str) and text:
            content.append(_text(text))
        elif not is_empty(text):
            raise BadSample(f"place {place}: expected text, got {shown(text)}")
    return [{"role": "document", "content": content}]


def _said(turn: Any, number: int) -> Iterator[tuple[Any, Any]]:
    """(role, what is said) of one element of a conversation."""
    if not isinstance(turn, Mapping):
        raise BadSample(f"turn {number}: expected an object, got {shown(turn)}")
    if "from" in turn or "role" in turn:
        yield turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    elif {"user", "assistant"} <= {*turn}:
        yield "user", turn["user"]
        yield "assistant", turn["assistant"]
    else:
        raise BadSample(f"turn {number}: expected from and value, or role and content; got {', '.join(map(str, turn))}")


def _role(role: Any, number: int) -> str:
    if not isinstance(role, str) or role not in ROLES:
        raise BadSample(f"turn {number}: role {shown(role)} is none of {', '.join(ROLES)}")
    return ROLES[role]


def _parts(value: Any, members: ChatMembers, number: int) -> Iterator[dict[str, Any]]:
    if isinstance(value, list):
        for part in value:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind in ("image", "audio"):
                yield members.next(kind)
            elif kind == "text" and isinstance(part.get("text"), str):
                yield from _parts(part["text"], members, number)
            else:
                raise BadSample(f"turn {number}: expected parts of type text, image or audio; got {shown(part)}")
        return
    if not isinstance(value, str):
        raise BadSample(f"turn {number}: expected text, got {shown(value)}")
    pieces = _PLACEHOLDER.split(value)
    for place, piece in enumerate(pieces):
        if place % 2:
            yield members.next(piece[1:-1])
            continue
        # `<image>\nWhat is this?`: the line break belongs to the placeholder
        piece = piece.removeprefix("\n") if place else piece
        piece = piece.removesuffix("\n") if place < len(pieces) - 1 else piece
        if piece:
            yield _text(piece)


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
