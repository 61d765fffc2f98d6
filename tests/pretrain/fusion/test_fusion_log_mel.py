"""A model fed with the workers' log-mel learns what one fed with waveforms learns."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_fusion_model import BATCHES, total_loss
from tiny_trichord import AUDIO, SAMPLES, tiny_batch, tiny_model

from trichord.batches.packed_batch import PackedBatch
from trichord.encoders.log_mel import clip_log_mel


def with_log_mels(batch: PackedBatch) -> PackedBatch:
    """The batch as a loader with `samples.audio.mel: worker` gives it."""
    make = clip_log_mel(AUDIO, SAMPLES.audio.sample_rate)
    clips = [batch.waveforms[start:end].numpy() for start, end in itertools.pairwise(batch.audio_offsets)]
    log_mels = [make(clip) for clip in clips]
    changed = replace(
        batch,
        waveforms=torch.zeros(0, dtype=torch.int16),
        log_mels=torch.from_numpy(np.concatenate([*log_mels, np.zeros((0, AUDIO.mel.n_mels), np.float32)])),
        mel_offsets=(0, *itertools.accumulate(len(mel) for mel in log_mels)),
    )
    changed.check()
    return changed


@pytest.mark.parametrize("name", BATCHES)
def test_losses_and_gradients_are_the_same(name):
    """Measured worst difference of a gradient 2e-6."""
    model = tiny_model()
    results = []
    for batch in (tiny_batch(BATCHES[name]), with_log_mels(tiny_batch(BATCHES[name]))):
        model.zero_grad()
        loss = total_loss(model(batch))
        loss.backward()
        results.append((loss.detach(), {key: p.grad.clone() for key, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    for key, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][key], rtol=1e-4, atol=1e-5, msg=key)
