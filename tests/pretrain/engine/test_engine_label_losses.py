"""The next-token loss by source and by what samples hold: the parts are the whole."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "fusion"))  # the hand-made batches
from tiny_trichord import Item, tiny_batch, tiny_model

from trichord.engine.label_losses import KINDS, label_sums, loss_names
from trichord.tracking.metrics import MetricsWriter

ITEMS = [
    Item(text=6, seed=1),
    Item(image=True, text=3, seed=2),
    Item(audio=900, text=5, seed=3),
    Item(image=True, audio=1200, text=2, seed=4),
    Item(image=True, text=None),
]
SOURCES = [2, 0, 0, 2, 1]  # of each sample


def batch_of_sources():
    batch = tiny_batch(ITEMS)
    batch.sample_ids[:, 0] = torch.tensor(SOURCES)
    return batch


def test_the_parts_are_the_losses_of_their_labels():
    batch, model = batch_of_sources(), tiny_model()
    out = model(batch)
    losses = out.next_token_losses
    assert losses.shape == (batch.num_labels,)
    assert not losses.requires_grad
    assert torch.equal(losses.sum(), out.next_token_loss_sum.detach())
    found = label_sums(batch, losses, num_sources=3)
    expected = torch.zeros(3, len(KINDS), 2, dtype=torch.float64)
    for loss, position in zip(losses.tolist(), batch.label_index.tolist()):
        segment = int(batch.segment_ids[position])
        expected[SOURCES[segment], segment] += torch.tensor([loss, 1.0])  # one sample of each kind, in their order
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_names_say_what_had_labels(tmp_path):
    batch = batch_of_sources()
    sums = label_sums(batch, torch.ones(batch.num_labels) * 2.5, num_sources=3)
    line = loss_names(sums, ["photos", "chats", "talks"])
    assert line == {
        **{f"train/loss/next_token/source/{name}": 2.5 for name in ("photos", "talks")},
        **{f"train/loss/next_token/modality/{name}": 2.5 for name in KINDS},
    }
    MetricsWriter(tmp_path, resume_step=None).log(1, line)  # names of the record's form


def test_a_sample_with_several_images_is_one_with_images():
    batch = batch_of_sources()
    crowded = replace(batch, image_segments=batch.image_segments[:1].repeat(3), num_images=3)  # all in one sample
    sums = label_sums(crowded, torch.ones(batch.num_labels), num_sources=3)
    counts = sums[:, :, 1].sum(0)
    assert counts[KINDS.index("image")] > 0
    assert counts.sum() == batch.num_labels


def test_no_label_gives_no_losses():
    assert tiny_model()(tiny_batch([Item(image=True, text=None)])).next_token_losses is None
