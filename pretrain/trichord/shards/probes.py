"""How large a member is for the model: pixels, audio frames, characters; read from headers where these are exact.

What cannot be measured gets a reason, the same words on every machine: it quarantines the sample before it is planned.
"""

import io
import warnings
from contextlib import nullcontext
from typing import IO, Literal

from trichord.core.silence import decoders_silenced

Kind = Literal["image", "audio", "text"]
Measure = list[int] | int | str
"""image: [width, height] after EXIF rotation; audio: [frames, rate]; text: characters; a str: why it has no size."""

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PROBED_BYTES = 2**30
"""Members above this are not opened. The run's own cap, shards.max_member_bytes, is lower."""
_EXIF_ORIENTATION = 0x0112
_TRANSPOSED = (5, 6, 7, 8)
_PNG_EXIF_MARKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
SEEKABLE = (b"RIFF", b"RF64", b"FORM", b"fLaC", b"OggS")
"""Sound containers in which a place is found by looking at little of the file; none of them is MP3."""
COUNTED_FORMATS = ("MP3", "MPEG")
"""libsndfile's names of those whose length it estimates."""
_MAX_HEADER_FRAMES = 2**40  # libsndfile says SF_COUNT_MAX where a stream does not know its length
_BLOCK_FRAMES = 1 << 16


def measure(kind: Kind, file: IO[bytes], size: int) -> Measure:
    """Size of one member, or the reason why it has none.

    Args:
        kind: what the member's extension is mapped to.
        file: the member, at its beginning; size: its length in bytes.

    Raises:
        OSError: the storage failed (not the content).
    """
    if size == 0 and kind != "text":
        return "the member is empty"
    if size > MAX_PROBED_BYTES:
        return f"the member has {size} bytes; at most {MAX_PROBED_BYTES} are read"
    if kind == "image":
        return _measure_image(file)
    # Decoders report failed reads as bad content, so reading is done before they start.
    return _measure_audio(file.read()) if kind == "audio" else _measure_text(file.read())


def _measure_image(file: IO[bytes]) -> Measure:
    import PIL
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the cap is samples.image.max_pixels
        try:
            image = Image.open(file, formats=IMAGE_FORMATS)
            orientation = 1
            if image.format != "PNG" or _png_may_hold_exif(file):
                orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        except PIL.UnidentifiedImageError:
            return f"not an image in {', '.join(IMAGE_FORMATS)}"
        except Image.DecompressionBombError:
            return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels"
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the storage failed; Pillow's own have no errno
            return f"broken image: {error}"
    width, height = image.size
    return [height, width] if orientation in _TRANSPOSED else [width, height]


def _png_may_hold_exif(file: IO[bytes]) -> bool:
    """Exif of a PNG may stand behind the pixels, and Pillow decodes all of them to find it. Most hold none."""
    position = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(position)
    return any(mark in data for mark in _PNG_EXIF_MARKS)


def _measure_audio(data: bytes) -> Measure:
    import soundfile

    try:
        silence = nullcontext() if data[:4] in SEEKABLE else decoders_silenced()
        with silence, soundfile.SoundFile(io.BytesIO(data)) as audio:
            frames = len(audio)
            if audio.format in COUNTED_FORMATS or not 0 < frames < _MAX_HEADER_FRAMES:
                # not audio.blocks(): it believes the header and fills up what is missing
                frames = sum(iter(lambda: len(audio.read(_BLOCK_FRAMES, dtype="int16")), 0))
            return [frames, audio.samplerate] if frames else "audio without a single frame"
    except (soundfile.LibsndfileError, RuntimeError) as error:
        return f"broken audio: {getattr(error, 'error_string', error)}"


def _measure_text(data: bytes) -> Measure:
    try:
        return len(data.decode())
    except UnicodeDecodeError as error:
        return f"text is not UTF-8: {error.reason} at byte {error.start}"
