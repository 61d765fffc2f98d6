"""What a sample puts into the stream, before its texts are token ids: fields, chats and documents alike."""

from __future__ import annotations

from typing import NamedTuple

from trichord.batches.config import BatchesConfig
from trichord.samples.interleaved import Item
from trichord.samples.sample import SampleContent


class DraftPart(NamedTuple):
    """A text or an item, in reading order. ends: [EOS] follows the text, and is learned."""

    text: str = ""
    item: Item | None = None
    learned: bool = False
    caption: bool = False
    ends: bool = False


def draft_parts(content: SampleContent, config: BatchesConfig) -> list[DraftPart]:
    """The parts of a sample's segment behind [BOS]."""
    if content.turns is not None:
        return _chat_parts(content, config)
    parts = [DraftPart(item=item) for item in content.items]
    if prompt := content.meta.get("prompt"):
        parts.append(DraftPart(prompt, learned=config.label_prompt))
    if content.text is not None:
        parts.append(DraftPart(content.text, learned=True, caption=True, ends=True))
    return parts


def _chat_parts(content: SampleContent, config: BatchesConfig) -> list[DraftPart]:
    """Each turn is its role's prefix and its content. What an assistant says, and a whole document, is learned."""
    parts: list[DraftPart] = []
    for turn in content.turns or ():
        learned = turn.role in ("assistant", "document")
        if turn.role != "document" and (prefix := getattr(config.chat, turn.role)):
            parts.append(DraftPart(prefix))
        for part in turn.content:
            parts.append(DraftPart(part, learned=learned) if isinstance(part, str) else DraftPart(item=part))
        if learned:
            parts.append(DraftPart(learned=True, ends=True))
    return parts
