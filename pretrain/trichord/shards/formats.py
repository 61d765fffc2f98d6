"""Which member formats a field can hold, by their extensions: what no decoder here reads is refused in a config."""

_READABLE = {
    "image": ("jpg", "jpeg", "jpe", "jfif", "png", "webp"),
    "audio": ("flac", "wav", "mp3", "ogg", "oga", "opus", "aif", "aiff", "aifc", "rf64", "w64", "au", "caf"),
    "text": ("txt",),
    "meta": ("json",),
}
_UNREADABLE = {
    "image": ("gif", "tif", "tiff", "bmp", "avif", "heic", "heif", "jxl", "jp2", "ico", "svg", "psd", "exr", "ppm"),
    "audio": ("m4a", "aac", "wma", "amr", "mka", "ac3"),
    "video": ("mp4", "m4v", "webm", "mkv", "avi", "mov", "mpg", "mpeg"),
}
_INSTEAD = {"image": "JPEG, PNG or WebP", "audio": "FLAC, WAV, Ogg or MP3", "video": "pictures and clips"}
_HOLDS = {"image": "pictures", "audio": "sound", "text": "text", "meta": "metadata"}
_HELD = {ext: kind for kind, exts in _READABLE.items() for ext in exts}
_NOT_READ = {ext: kind for kind, exts in _UNREADABLE.items() for ext in exts}


def last_part(ext: str) -> str:
    """`jpg` of `input.jpg`, in lower case."""
    return ext.rpartition(".")[2].lower()


def instead(ext: str) -> str | None:
    """What to convert a format to that nothing here decodes; None for any other extension."""
    kind = _NOT_READ.get(last_part(ext))
    return None if kind is None else _INSTEAD[kind]


def looks_like_media(ext: str) -> bool:
    """Whether members of this extension are pictures, clips or films by all that is usual."""
    return instead(ext) is not None or _HELD.get(last_part(ext)) in ("image", "audio")


def refusal(field: str, ext: str) -> str | None:
    """Why no member of this extension can ever be this field, or None."""
    possible = ", ".join(_READABLE[field])
    if ext.startswith("."):
        return f"{ext!r} can match no member: write it without the dot, {ext.lstrip('.')!r}"
    if not ext or ext.endswith(".") or "/" in ext or any(letter.isspace() for letter in ext):
        return f"{ext!r} is no extension of a member; expected such as {possible}"
    if field in ("image", "audio") and (wanted := instead(ext)) is not None:
        return f"{ext!r} cannot be decoded: {field} takes {possible}; convert the members to {wanted}"
    held = _HELD.get(last_part(ext))
    if field in ("image", "audio") and held not in (None, field):
        return f"{ext!r} holds {_HOLDS[held]}, never {field}; {field} takes {possible}"
    return None
