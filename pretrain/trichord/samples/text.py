"""Text and metadata bytes to str and dict."""

from __future__ import annotations

import json
from typing import Any

from trichord.samples.config import TextConfig
from trichord.shards.quarantine import BadSample

_KIND_NAMES = {"prompt": "text", "group": "text or an integer"}


def check_chars(chars: int, config: TextConfig) -> None:
    """Raises BadSample when a text is over the cap."""
    if chars > config.max_chars:
        raise BadSample(f"the text has {chars} characters; samples.text.max_chars allows {config.max_chars}")


def decode_text(data: bytes, config: TextConfig) -> str | None:
    """UTF-8 to str, stripped if configured; None where nothing is left: an empty text is no text.

    Raises:
        BadSample: not UTF-8, or over `max_chars`.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample(f"the text is not UTF-8: {error.reason} at byte {error.start}") from error
    check_chars(len(text), config)
    text = text.removeprefix("\ufeff")  # the byte-order mark of Windows editors
    if config.strip:
        text = text.strip()
    return text or None


def decode_meta(data: bytes) -> dict[str, Any]:
    """A JSON object to a dict. `prompt` (text before the caption) and `group` (which samples are the same item) are
    the keys that batches reads.

    Raises:
        BadSample: not JSON, not an object, or one of those keys has another type.
    """
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError) as error:
        fault = "nested too deeply" if isinstance(error, RecursionError) else error
        raise BadSample(f"the metadata is not JSON: {fault}") from error
    if not isinstance(meta, dict):
        raise BadSample(f"the metadata must be a JSON object, got {type(meta).__name__}")
    for key, kinds in (("prompt", str), ("group", (str, int))):
        value = meta.get(key)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise BadSample(f"`{key}` in the metadata must be {_KIND_NAMES[key]}, got {type(value).__name__}")
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise BadSample(f"`{key}` in the metadata holds half a surrogate pair, which is no text")
    return meta
