"""Text and metadata bytes to str and dict."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from typing import Any

from trichord.samples.config import TextConfig
from trichord.shards.quarantine import BadSample

_KIND_NAMES = {"prompt": "text", "group": "text or an integer"}


def check_chars(chars: int, config: TextConfig) -> None:
    """Raises BadSample when a text is over the cap."""
    if chars > config.max_chars:
        raise BadSample(f"the text has {chars} characters; samples.text.max_chars allows {config.max_chars}")


def decode_text(data: bytes, config: TextConfig) -> str | None:
    """UTF-8 to str, normalised as configured; None where nothing is left: an empty text is no text.

    Raises:
        BadSample: not UTF-8, or over `max_chars`.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample(f"the text is not UTF-8: {error.reason} at byte {error.start}") from error
    check_chars(len(text), config)
    text = text.removeprefix("\ufeff")  # the byte-order mark of Windows editors
    return clean_text(text, config, strip=config.strip) or None


def clean_text(text: str, config: TextConfig, strip: bool) -> str:
    """Unicode form and white space as configured. strip: also drop white space at both ends.

    Raises:
        BadSample: normalised, the text is over `max_chars` (NFKC can make a text 18 times as long).
    """
    if config.normalize != "none":
        text = unicodedata.normalize("NFC" if config.normalize == "nfc" else "NFKC", text)
        check_chars(len(text), config)
    if config.collapse_spaces:
        ends = (text[:1].isspace(), text[-1:].isspace())
        text = " ".join(text.split())
        text = (" " if ends[0] else "") + text + (" " if ends[1] and text else "")
    return text.strip() if strip else text


def decode_meta(data: bytes) -> dict[str, Any]:
    """A JSON object to a dict. `prompt` (text before the caption) and `group` (which samples are the same item) are
    read here; `messages` by `samples.interleaved`.

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
        if isinstance(value, str) and has_half_surrogate(value):
            raise BadSample(f"`{key}` in the metadata holds half a surrogate pair, which is no text")
    return meta


def has_half_surrogate(text: str) -> bool:
    """JSON can write `"\\ud83d"` alone, which no tokenizer takes."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def value_at(meta: Mapping[str, Any], path: str) -> Any:
    """The value under a dotted path of a JSON object, or None where there is none."""
    value: Any = meta
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            return None
        value = value[name]
    return value
