"""A typical micro-batch of a run, made of nothing: real layout, sizes and indices, black images and silent clips.

Laid out by the loader's own code, so that what is traced over it is what training would see.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from trichord.batches.collate import collate
from trichord.batches.config import BatchesConfig
from trichord.batches.interleave import StreamPart
from trichord.batches.packed_batch import PackedBatch
from trichord.batches.rows import DecodedClip, RowArrays, RowFormat, build_row
from trichord.batches.windows import PlannedSample
from trichord.core.errors import ConfigError
from trichord.encoders.config import EncodersConfig
from trichord.encoders.lengths import audio_tokens, image_grid, mel_frames
from trichord.fusion.config import FusionConfig
from trichord.planning.workload import SourceLoad, Workload
from trichord.samples.config import SamplesConfig
from trichord.samples.targets import count_columns
from trichord.shards.lanes import SampleRef

_GOLDEN = (math.sqrt(5) - 1) / 2
_MAX_LEFT_OUT = 1000  # samples in a row that do not fit


@dataclasses.dataclass(frozen=True)
class RowMaker:
    """Rows of a run: `rows(workload)` goes on for ever. special: the tokenizer's ids by name."""

    batches: BatchesConfig
    samples: SamplesConfig
    encoders: EncodersConfig
    fusion: FusionConfig
    special: Mapping[str, int]

    def batch(self, workload: Workload, micro_rows: int) -> PackedBatch:
        """One micro-batch of `micro_rows` rows of the mixture.

        Raises:
            ConfigError: a sample is longer than a row.
        """
        rows = self.rows(workload)
        return collate([next(rows) for _ in range(micro_rows)])

    def rows(self, workload: Workload) -> Iterator[RowArrays]:
        """Samples in the order of the mixture, each into the current row while it fits. The text of the last one is cut
        to what is left, as rows that are planned from many samples end with little slack; for every sample's worth of
        tokens that was cut a sample is passed over, so that rows hold as many as they do on average."""
        waiting: list[tuple[tuple[StreamPart, ...], list]] = []
        free, cut_off = self.batches.row_tokens, 0
        for parts, items in self._samples(workload):
            if cut_off >= _length(parts):
                cut_off -= _length(parts)
                continue
            fitting = _cut(parts, _length(parts) - free)
            if not fitting or len(waiting) == self.batches.max_samples_per_row:
                yield self.row(waiting)
                waiting, free, fitting = [], self.batches.row_tokens, parts
            waiting.append((fitting, items))
            free -= _length(fitting)
            cut_off += _length(parts) - _length(fitting)

    def row(self, samples: list[tuple[tuple[StreamPart, ...], list]]) -> RowArrays:
        """A row of samples as `sample` makes them, in this order."""
        form = RowFormat(
            self.batches.row_tokens,
            self.samples.image.size,
            self.special["pad_id"],
            self.special["image_id"],
            self.special["audio_id"],
            self._num_mels,
            count_columns(self.samples.targets),
            len(self.samples.targets),
        )
        targets = (np.zeros(form.target_columns, np.float32), np.zeros(form.num_targets, bool))
        planned = [
            PlannedSample(SampleRef(0, 0, number), "key", "x.tar", parts, (), number, *targets)
            for number, (parts, _) in enumerate(samples)
        ]
        return build_row(planned, [items for _, items in samples], form)

    @property
    def _num_mels(self) -> int:
        audio = self.encoders.audio
        return audio.mel.n_mels if audio is not None and self.samples.audio.mel == "worker" else 0

    def _samples(self, workload: Workload) -> Iterator[tuple[tuple[StreamPart, ...], list]]:
        """Sources take turns by their shares; a sample's lengths come from all over its source's spreads. What is
        longer than a row is left out, as in training."""
        drawn = [0] * len(workload.sources)
        total = left_out = 0
        while left_out < _MAX_LEFT_OUT:
            total += 1
            number = max(range(len(drawn)), key=lambda i: workload.sources[i].share * total - drawn[i])
            sample = self.sample(workload.sources[number], drawn[number])
            drawn[number] += 1
            left_out = left_out + 1 if sample is None else 0
            if sample is not None:
                yield sample
        raise ConfigError(
            f"no sample of this run fits into a row: their images and clips alone are longer than batches.row_tokens = "
            f"{self.batches.row_tokens}; make rows longer"
        )

    def sample(
        self, source: SourceLoad, number: int, place: float | None = None
    ) -> tuple[tuple[StreamPart, ...], list] | None:
        """Sample `number` of a source: whole numbers of items, right on average over consecutive samples. None where
        its items do not leave a place for text.

        place: 0 to 1, where in the source's spreads its lengths lie; None: all over them as `number` rises.
        """
        if place is None:
            place = ((number + 1) * _GOLDEN) % 1.0
        images, clips = (
            math.floor((number + 1) * mean + 0.5) - math.floor(number * mean + 0.5)
            for mean in (source.images, source.clips)
        )
        size, streamed = self.samples.image.size, self.fusion.trunk is not None
        parts, items = [StreamPart.text([self.special["bos_id"]])], []
        if images and self.encoders.vision is not None:
            grid = image_grid(self.encoders.vision, size) if streamed else (0, 0)
            parts += [StreamPart.image(grid)] * images
            items += [np.zeros((3, size, size), dtype=np.uint8)] * images
        for clip in range(clips if self.encoders.audio is not None else 0):
            length, content = self._clip(source.clip_seconds.at((place + clip * _GOLDEN) % 1.0))
            parts.append(StreamPart.audio(length if streamed else 0))
            items.append(content)
        room = self.batches.row_tokens - _length(parts) - 1
        if room < 1:
            return None
        text = min(room, max(1, round(min(source.text_tokens.at(place), room))))
        parts.append(StreamPart.text([self.special["bos_id"]] * text, learned=True, caption=True))
        parts.append(StreamPart.text([self.special["eos_id"]], learned=True))
        return tuple(parts), items

    def _clip(self, seconds: float) -> tuple[int, DecodedClip]:
        """Tokens of a clip, and the clip."""
        audio = self.encoders.audio
        assert audio is not None
        count = max(1, round(seconds * self.samples.audio.sample_rate))
        if self._num_mels:
            frames = mel_frames(audio, count)
            return audio_tokens(audio, count), DecodedClip(
                count, log_mel=np.zeros((frames, self._num_mels), np.float32)
            )
        return audio_tokens(audio, count), DecodedClip(count, waveform=np.zeros(count, dtype=np.int16))


def _length(parts: Sequence[StreamPart]) -> int:
    return sum(part.length for part in parts)


def _cut(parts: tuple[StreamPart, ...], excess: int) -> tuple[StreamPart, ...]:
    """The same sample with `excess` tokens less of its text; () where the text is not that long."""
    if excess <= 0:
        return parts
    *front, text, end = parts
    if text.length <= excess:
        return ()
    return (*front, StreamPart.text((text.ids or ())[excess:], learned=text.learned, caption=text.caption), end)
