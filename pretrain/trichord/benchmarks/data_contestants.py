"""The pipelines that the data benchmark compares, each as an endless iterator over batches of 32.

`webdataset` is its documentation's pipeline, with the documentation's decoders. The bare loops decode bytes that lie in
memory and do nothing else, so that what a loader costs can be told from what decoding costs.
"""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from trichord.benchmarks.data_corpus import Corpus

BATCH = 32
IMAGE_SIZE = 224
RATE, N_FFT, HOP, N_MELS = 16_000, 400, 160, 80
_SHUFFLED = 100
_CONSTANT_IDS = list(range(6, 70))
Mel = Literal["device", "worker"]


class DocumentedDecoders:
    """As the documentation of webdataset, torchvision, soundfile, torch and transformers shows it."""

    def __init__(self, corpus: Corpus) -> None:
        from torchvision import transforms
        from transformers import PreTrainedTokenizerFast

        from trichord_kernels.mel import mel_filterbank

        self.image_transform = transforms.Compose(
            [transforms.RandomResizedCrop(IMAGE_SIZE, scale=(0.9, 1.0)), transforms.PILToTensor()]
        )
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{corpus.tokenizer}/tokenizer.json")
        self.window, self.bank = torch.hann_window(N_FFT), mel_filterbank(RATE, N_FFT, N_MELS)

    def image(self, data: bytes) -> torch.Tensor:
        from PIL import Image

        return self.image_transform(Image.open(io.BytesIO(data)).convert("RGB"))  # pyright: ignore[reportReturnType]

    def audio(self, data: bytes) -> torch.Tensor:
        """Log-mel (n_mels, frames)."""
        import soundfile

        samples, _ = soundfile.read(io.BytesIO(data), dtype="float32")
        spectrum = torch.stft(torch.from_numpy(samples), N_FFT, HOP, window=self.window, return_complex=True)
        log_power = (self.bank @ spectrum[:, :-1].abs() ** 2).clamp(min=1e-10).log10()
        return (torch.maximum(log_power, log_power.max() - 8.0) + 4.0) / 4.0

    def text(self, data: bytes) -> list[int]:
        return self.tokenizer(data.decode())["input_ids"]


def _documented(corpus: Corpus, workers: int) -> Iterator[Any]:
    import webdataset as wds

    decoders = DocumentedDecoders(corpus)
    dataset = (
        wds.WebDataset(list(corpus.flac_shards), shardshuffle=len(corpus.flac_shards))
        .shuffle(_SHUFFLED)
        .to_tuple("jpg", "flac", "txt")
        .map_tuple(decoders.image, decoders.audio, decoders.text)
        .repeat()
        .batched(BATCH, collation_fn=_stack)
    )
    return iter(wds.WebLoader(dataset, batch_size=None, num_workers=workers))


def _stack(samples: list[tuple]) -> tuple:
    images, mels, texts = zip(*samples)
    return torch.stack(images), torch.stack(mels), texts


def _raw_webdataset(corpus: Corpus, workers: int) -> Iterator[Any]:
    """Members are read, batches of what decoding would give are stacked and travel."""
    import webdataset as wds

    pixels, mel = torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8), torch.zeros(N_MELS, 500)
    dataset = (
        wds.WebDataset(list(corpus.flac_shards), shardshuffle=len(corpus.flac_shards))
        .shuffle(_SHUFFLED)
        .to_tuple("jpg", "flac", "txt")
        .map_tuple(lambda data: pixels, lambda data: mel, lambda data: _CONSTANT_IDS)
        .repeat()
        .batched(BATCH, collation_fn=_stack)
    )
    return iter(wds.WebLoader(dataset, batch_size=None, num_workers=workers))


def _bare_documented(corpus: Corpus, workers: int) -> Iterator[Any]:
    decoders = DocumentedDecoders(corpus)
    for batch in _members_in_memory(corpus):
        yield [(decoders.image(jpg), decoders.audio(flac), decoders.text(txt)) for jpg, flac, txt in batch]


def _bare_trichord(corpus: Corpus, workers: int) -> Iterator[Any]:
    from trichord.batches.tokenizer import load_tokenizer
    from trichord.samples.audio import decode_audio
    from trichord.samples.image import decode_image

    samples, lengths, tokenizer = _samples_config("worker"), _item_lengths("worker"), load_tokenizer(corpus.tokenizer)
    assert lengths.log_mel is not None
    for batch, number in zip(_members_in_memory(corpus), itertools.count()):
        rng = np.random.default_rng(number)
        decoded = []
        for jpg, flac, txt in batch:
            pixels = decode_image(jpg, samples.image, None, rng)
            decoded.append((pixels, lengths.log_mel(decode_audio(flac, samples.audio, None, rng)), txt.decode()))
        yield decoded, tokenizer.encode_batch([text for _, _, text in decoded])


def _members_in_memory(corpus: Corpus) -> Iterator[list[tuple[bytes, ...]]]:
    """Batches of (jpg, flac, txt), for ever."""
    members: list[bytes] = []
    for url in corpus.flac_shards:
        with tarfile.open(url) as tar:
            members += [file.read() for file in map(tar.extractfile, tar) if file is not None]
    samples = itertools.cycle(zip(*[iter(members)] * 3))
    return iter(lambda: list(itertools.islice(samples, BATCH)), [])


def _samples_config(mel: Mel) -> Any:
    from trichord.samples.config import AudioConfig, ImageConfig, SamplesConfig

    image = ImageConfig(size=IMAGE_SIZE, resize="random_resized_crop", min_crop_frac=0.9)
    return SamplesConfig(image=image, audio=AudioConfig(sample_rate=RATE, mel=mel))


def _item_lengths(mel: Mel) -> Any:
    """Towers only: no item takes a place in the stream."""
    from trichord.batches.loader import ItemLengths
    from trichord.encoders.config import AudioEncoderConfig, MelConfig
    from trichord.encoders.log_mel import clip_log_mel

    encoder = AudioEncoderConfig(mel=MelConfig(n_mels=N_MELS, n_fft=N_FFT, hop_length=HOP))
    log_mel = clip_log_mel(encoder, RATE) if mel == "worker" else None
    return ItemLengths(lambda *size: (0, 0), lambda samples: 0, log_mel=log_mel, num_mels=N_MELS if log_mel else 0)


def open_loader(corpus: Corpus, workers: int, kind: str, mel: Mel) -> Iterator[Any]:
    """Trichord's loader on one row of 32 samples per step."""
    from trichord.batches.config import BatchesConfig
    from trichord.batches.loader import Loader
    from trichord.shards.config import ShardsConfig, SourceConfig

    source = SourceConfig(name="bench", shards=(str(Path(corpus.tokenizer).parent / f"{kind}-*.tar"),))
    batches = BatchesConfig(
        tokenizer=corpus.tokenizer,
        rows_per_step=1,
        row_tokens=BATCH * 256,
        max_samples_per_row=BATCH,
        packing="count",
        num_workers=workers,
    )
    loader = Loader(
        ShardsConfig(sources=(source,), window_samples=512),
        _samples_config(mel),
        batches,
        seed=0,
        lengths=_item_lengths(mel),
    )
    return iter(loader)


def _raw_trichord(corpus: Corpus, workers: int) -> Iterator[Any]:
    """Everything but decoding and tokenising: members are read, rows of what these would give are built and travel."""
    from trichord.batches.tokenizer import TextTokenizer
    from trichord.samples import sample

    pixels = np.zeros((3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    sample.decode_image = lambda *_, **__: pixels
    waveform = np.zeros(5 * RATE, np.int16)
    sample.decode_audio = lambda *_, **__: waveform
    TextTokenizer.encode_batch = lambda self, texts: [_CONSTANT_IDS] * len(texts)
    return open_loader(corpus, workers, "flac", "device")


def _trichord(mel: Mel, kind: str = "flac") -> Callable[[Corpus, int], Iterator[Any]]:
    return lambda corpus, workers: open_loader(corpus, workers, kind, mel)


CONTESTANTS: dict[str, Callable[[Corpus, int], Iterator[Any]]] = {
    "bare docs": _bare_documented,
    "bare trichord": _bare_trichord,
    "webdataset": _documented,
    "trichord": _trichord("worker"),
    "trichord, mel on device": _trichord("device"),
    "trichord, mel on device, wav": _trichord("device", "wav"),
    "webdataset, raw": _raw_webdataset,
    "trichord, raw": _raw_trichord,
}
"""By name, as in the table: (corpus, workers) -> endless batches. `raw`: nothing is decoded."""
