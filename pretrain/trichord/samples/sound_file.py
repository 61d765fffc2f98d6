"""Everything that libsndfile reads: 24-bit and float WAV, AIFF, FLAC, Ogg Vorbis and Opus, MP3."""

from __future__ import annotations

import contextlib
import io
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from trichord.core.silence import decoders_silenced
from trichord.samples.ends import OGG_TAIL_BYTES, mp3_is_cut, ogg_is_ended
from trichord.samples.member import MemberReader
from trichord.shards.probes import COUNTED_FORMATS, SEEKABLE
from trichord.shards.quarantine import BadSample

if TYPE_CHECKING:
    from soundfile import SoundFile

Choose = Callable[[int, int, int], tuple[int, int]]
"""(frames, rate, channels) of a clip -> first frame and number of frames to decode; raises BadSample."""

_COUNTED_FRAMES = 1 << 16
_MAX_HEADER_FRAMES = 2**40  # libsndfile says SF_COUNT_MAX where a stream does not know its length


def read_sound_file(
    member: MemberReader, choose: Choose, indexed_frames: int | None = None, crop: bool = False
) -> tuple[np.ndarray, int]:
    """int16 where the file holds 16-bit PCM, else float32 in [-1, 1]: (frames, channels), and the rate.

    Args:
        indexed_frames: what the index says; where it is None the header is believed.
        crop: only a part will be wanted, so the member is read in blocks.

    Raises:
        BadSample: from `choose`, or the clip is shorter or longer than promised.
        RuntimeError: libsndfile cannot read it. DataError: from `member.read`.
    """
    import soundfile

    magic = member.read(0, 4)
    data = None if crop and magic in SEEKABLE else member.read(0, member.size)
    file = _BlockFile(member) if data is None else io.BytesIO(data)
    try:
        if magic == b"OggS":
            _require_end(file, member.size)
        with contextlib.nullcontext() if magic in SEEKABLE else decoders_silenced(), soundfile.SoundFile(file) as clip:  # pyright: ignore[reportArgumentType]
            frames = _count_frames(clip) if indexed_frames is None else indexed_frames
            if data is not None and clip.format in COUNTED_FORMATS and mp3_is_cut(data, frames):
                raise BadSample(f"the audio is cut: its header promises more than the {frames} frames that are there")
            start, count = choose(frames, clip.samplerate, clip.channels)
            if start:
                clip.seek(start)
            # Asked for integers, libsndfile neither scales float files nor clips its lossy decoders' overshoot.
            dtype = "int16" if clip.subtype == "PCM_16" else "float32"
            whole = count == frames
            samples = clip.read(frames=count + whole, dtype=dtype, always_2d=True)
            rate = clip.samplerate
    finally:
        if isinstance(file, _BlockFile) and file.fault is not None:
            raise file.fault
    if len(samples) != count and (indexed_frames is not None or not whole):
        found = "more" if len(samples) > count else len(samples)  # only one frame more was asked for
        raise BadSample(f"length differs from index: {count} frames are wanted, the decoder gave {found}")
    return samples, rate


def _require_end(file: _BlockFile | io.BytesIO, size: int) -> None:
    file.seek(max(0, size - OGG_TAIL_BYTES))
    ended = ogg_is_ended(file.read(OGG_TAIL_BYTES))
    file.seek(0)
    if not ended:
        raise BadSample("the audio is cut: its last Ogg page is not whole, or does not end the stream")


def _count_frames(clip: SoundFile) -> int:
    """What the header says, or where it only estimates, by decoding; the clip is at its beginning again."""
    if clip.format not in COUNTED_FORMATS and 0 <= clip.frames < _MAX_HEADER_FRAMES:
        return clip.frames
    frames = sum(iter(lambda: len(clip.read(_COUNTED_FRAMES, dtype="int16")), 0))
    clip.seek(0)
    return frames


class _BlockFile:
    """A member as a file of which only the blocks that are asked for are read, a few of them kept.

    libsndfile calls it from C, where an exception would be printed and forgotten: the first one is kept in `fault`, and
    the file looks cut from there on.
    """

    _BLOCK_BYTES = 32_768
    _MAX_BLOCKS = 8

    def __init__(self, member: MemberReader) -> None:
        self._member = member
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self.fault: Exception | None = None

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._member.size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        end = self._member.size if size < 0 else min(self._position + size, self._member.size)
        parts = []
        while self._position < end:
            number, inside = divmod(self._position, self._BLOCK_BYTES)
            part = self._block(number)[inside : inside + end - self._position]
            if not part:
                break
            parts.append(part)
            self._position += len(part)
        return b"".join(parts)

    def readinto(self, buffer) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            if self.fault is not None:
                return b""
            try:
                self._blocks[number] = self._member.read(number * self._BLOCK_BYTES, self._BLOCK_BYTES)
            except Exception as error:
                self.fault = error
                return b""
            if len(self._blocks) > self._MAX_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[number]
