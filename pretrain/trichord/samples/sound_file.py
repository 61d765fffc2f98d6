"""Everything that libsndfile reads: 24-bit and float WAV, AIFF, FLAC, Ogg Vorbis and Opus, MP3."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from trichord.samples.member import MemberReader
from trichord.shards.quarantine import BadSample

if TYPE_CHECKING:
    from soundfile import SoundFile

Choose = Callable[[int, int, int], tuple[int, int]]
"""(frames, rate, channels) of a clip -> first frame and number of frames to decode; raises BadSample."""

_SEEKABLE = (b"RIFF", b"RF64", b"FORM", b"fLaC", b"OggS")
"""Containers in which a place is found by looking at little of the file; none of them is MP3."""
_COUNTED_FORMATS = ("MP3", "MPEG")
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
    file = _BlockFile(member) if crop and magic in _SEEKABLE else io.BytesIO(member.read(0, member.size))
    try:
        with contextlib.nullcontext() if magic in _SEEKABLE else _quiet_libraries(), soundfile.SoundFile(file) as clip:  # pyright: ignore[reportArgumentType]
            frames = _count_frames(clip) if indexed_frames is None else indexed_frames
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


def _count_frames(clip: SoundFile) -> int:
    """What the header says, or where it only estimates, by decoding; the clip is at its beginning again."""
    if clip.format not in _COUNTED_FORMATS and 0 <= clip.frames < _MAX_HEADER_FRAMES:
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


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Let the MP3 decoder's notes on damage go nowhere, in worker processes: these have one thread, so nothing else is
    lost with them. In a process of several threads standard error is left as it is."""
    if multiprocessing.parent_process() is None:
        yield
        return
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
