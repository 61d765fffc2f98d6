"""From one row of any table (csv, JSON lines, parquet, arrow, a JSON list) to one sample."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trichord.building.chats import CHAT_KEYS, ChatMembers, Media, chat_messages, document_messages
from trichord.building.media import CellPlace, is_empty, json_bytes, media_member, shown, text_bytes
from trichord.building.rows import Content
from trichord.shards.config import FieldsConfig
from trichord.shards.quarantine import BadSample

FIELD_COLUMNS: dict[str, tuple[str, ...]] = {
    "image": ("image", "images"),
    "audio": ("audio", "audios"),
    "text": ("text", "texts"),
    "messages": CHAT_KEYS,
}
"""Columns that are taken for a field where the user names none."""


@dataclass(frozen=True)
class TableReading:
    """How the rows of a table are read.

    root: folder of the files that it names. columns: column of each field that the user (or the file) has
    named. inline: bytes in parquet cells are copied into the list of rows, for builds that read them in another order.
    """

    root: Path
    columns: Mapping[str, str] = field(default_factory=dict)
    fields: FieldsConfig = field(default_factory=FieldsConfig)
    inline: bool = False

    def column(self, name: str, present: Any) -> str | None:
        """Which of the columns `present` holds field `name`, if any."""
        if name in self.columns:
            return self.columns[name]
        return next((column for column in FIELD_COLUMNS[name] if column in present), None)


def row_members(
    row: Mapping[str, Any], reading: TableReading, place: Callable[[str], CellPlace] | None = None
) -> dict[str, Content]:
    """The members of a row's sample: a picture, a clip, a text; or a chat or document; the other columns in json.

    Args:
        place: for a column, where its bytes can be read again; None: bytes are kept as they are.

    Raises:
        BadSample: a column is wrong; the message names it.
    """
    rest = dict(row)
    values: dict[str, tuple[str, Any]] = {}
    for name in FIELD_COLUMNS:
        column = reading.column(name, row)
        value = rest.pop(column, None) if column else None
        if column and not is_empty(value):
            values[name] = (column, value)
    if not values:
        raise BadSample(f"neither image nor audio nor text{_absent(row, reading)}; fill one or delete the row")
    media = {kind: _media(kind, values[kind], reading, place) for kind in ("image", "audio") if kind in values}
    images, clips = media.get("image", []), media.get("audio", [])
    _, text = values.get("text", ("", None))
    if "messages" in values:
        chat = ChatMembers(_present(images), _present(clips))
        system = rest.pop("system", None)
        rest["messages"] = _named(values["messages"], lambda turns: chat_messages(turns, chat, system))
        if text is not None:
            rest["text"] = text
        return {**chat.members, reading.fields.meta[0]: json_bytes(rest)}
    if isinstance(text, list) and text and isinstance(text[0], Mapping):  # turns, as in The Cauldron
        chat = ChatMembers(_present(images), _present(clips))
        rest["messages"] = _named(values["text"], lambda turns: chat_messages(turns, chat))
        return {**chat.members, reading.fields.meta[0]: json_bytes(rest)}
    if isinstance(text, list) or len(images) > 1 or len(clips) > 1:
        return _document(text, images, clips, rest, reading)
    members: dict[str, Content] = dict(_present([*images, *clips]))
    if text is not None:
        if not isinstance(text, str):
            raise BadSample(f"column {values['text'][0]}: expected text, got {shown(text)}")
        members[reading.fields.text[0]] = text_bytes(text)
    if rest:
        members[reading.fields.meta[0]] = json_bytes(rest)
    return members


def _absent(row: Mapping[str, Any], reading: TableReading) -> str:
    """The columns that were named and the row has not."""
    absent = [column for column in reading.columns.values() if column not in row]
    return f": no column {', '.join(absent)} among {', '.join(map(str, row)) or 'none'}" if absent else ""


def _media(
    kind: str, cell: tuple[str, Any], reading: TableReading, place: Callable[[str], CellPlace] | None
) -> list[Media | None]:
    """The images or clips of a cell (its column, its value), None for null in a list."""
    column, value = cell
    many = isinstance(value, list)
    found: list[Media | None] = []
    for number, item in enumerate(value if many else [value]):
        if is_empty(item):
            found.append(None)
            continue
        where = place(column) if place else None
        if where and many:
            where = where._replace(steps=(*where.steps, number))
        make = functools.partial(media_member, kind=kind, root=reading.root, fields=reading.fields, place=where)
        found.append(_named((f"{column}[{number}]" if many else column, item), make))
    return found


def _document(
    text: Any, images: list[Media | None], clips: list[Media | None], rest: dict[str, Any], reading: TableReading
) -> dict[str, Content]:
    """Texts and images that alternate by null; else all images and clips first, then the text."""
    chat = ChatMembers(_present(images), _present(clips))
    if isinstance(text, list):
        if clips:
            raise BadSample("a document of two lists holds texts and images; put clips into messages")
        rest["messages"] = document_messages(text, images, chat)
    else:
        words = [{"type": "text", "text": text}] if isinstance(text, str) else []
        rest["messages"] = [{"role": "document", "content": chat.rest() + words}]
    return {**chat.members, reading.fields.meta[0]: json_bytes(rest)}


def _named(cell: tuple[str, Any], make: Callable[[Any], Any]) -> Any:
    """`make(value)`, with the column in front of what is wrong."""
    try:
        return make(cell[1])
    except BadSample as error:
        raise BadSample(f"column {cell[0]}: {error}") from error


def _present(media: list[Media | None]) -> list[Media]:
    return [item for item in media if item is not None]
