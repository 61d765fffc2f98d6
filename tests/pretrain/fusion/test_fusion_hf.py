"""The transformers form: same logits as in training, and generation that does not depend on padding or caching."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_trichord import (
    ENCODERS,
    FUSION,
    OBJECTIVES,
    SAMPLES,
    SPECIAL,
    VISION,
    VOCAB_SIZE,
    Item,
    tiny_batch,
    tiny_model,
)
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from trichord.fusion.config import FusionConfig
from trichord.fusion.hf import TrichordForConditionalGeneration, TrichordModel, wrap_model
from trichord.fusion.hf_config import TrichordConfig
from trichord.fusion.prompt import pad_left, pad_waveforms
from trichord.objectives.config import ContrastiveConfig, ObjectivesConfig

ITEMS = [
    Item(True, 3000, 3, prompt=2, seed=1),
    Item(False, 1200, 3, seed=2),
    Item(True, None, 4, seed=3),
    Item(text=5, seed=4),
]


def describe(model, fusion=FUSION, objectives=OBJECTIVES, encoders=ENCODERS) -> TrichordConfig:
    trunk = model.trunk.config if model.trunk is not None else None
    return TrichordConfig.from_leaves(encoders, fusion, objectives, SAMPLES, trunk, VOCAB_SIZE, SPECIAL)


@pytest.fixture(scope="module")
def wrapped() -> TrichordForConditionalGeneration:
    model = tiny_model()
    return wrap_model(model, describe(model)).eval()


@pytest.fixture(scope="module")
def saved(wrapped, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    wrapped.save_pretrained(folder)
    return folder


def prompts(model, items) -> dict[str, torch.Tensor]:
    return model.prepare_prompts(
        [item.pixels() if item.image else None for item in items],
        [item.waveform() if item.audio is not None else None for item in items],
        [item.tokens(item.prompt, 3).tolist() for item in items],
    )


def continuations(model, items, **options) -> list[list[int]]:
    inputs = prompts(model, items)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


def test_wrapping_changes_no_weight():
    model, untouched = tiny_model(), tiny_model()
    wrap_model(model, describe(model))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untouched.parameters()))


@torch.no_grad()
def test_logits_are_those_of_training(wrapped):
    """Whole rows, padded on either side, against the packed stream. Measured worst 1.4e-6 of size 2.9."""
    packed = wrapped.model.logits(tiny_batch(ITEMS))
    rows = [tiny_batch([item], num_tokens=1).input_ids for item in ITEMS]
    items = prompts(wrapped, ITEMS)
    longest = max(len(row) for row in rows)
    for side in ("left", "right"):
        ids, mask = torch.zeros(len(rows), longest, dtype=torch.int64), torch.zeros(len(rows), longest)
        for number, row in enumerate(rows):
            place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
            ids[number, place], mask[number, place] = row, 1
        logits = wrapped(**{**items, "input_ids": ids, "attention_mask": mask}).logits
        torch.testing.assert_close(logits[mask.bool()], packed[: sum(map(len, rows))], rtol=0, atol=6e-6)


def test_loss_is_the_mean_over_labels(wrapped):
    batch = tiny_batch([ITEMS[0]], num_tokens=1)
    labels = torch.full_like(batch.input_ids, -100)
    labels[batch.label_index + 1] = batch.labels[batch.label_index]
    inputs = prompts(wrapped, ITEMS[:1])
    inputs["input_ids"] = batch.input_ids[None]
    inputs.pop("attention_mask")
    out = wrapped(**inputs, labels=labels[None])
    expected = wrapped.model(batch).next_token_loss_sum / batch.num_labels
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=0)
    wrapped.train()
    in_training = wrapped(**inputs, labels=labels[None])
    wrapped.eval()
    torch.testing.assert_close(in_training.loss, out.loss, rtol=1e-6, atol=0)
    assert out.logits.shape[:2] == inputs["input_ids"].shape
    assert in_training.logits is None, "nobody reads them, and they are most of the memory of a step"


@pytest.mark.parametrize("use_cache", [True, False])
def test_left_padded_generation_equals_one_by_one(wrapped, use_cache):
    together = continuations(wrapped, ITEMS, use_cache=use_cache)
    assert together == [continuations(wrapped, [item])[0] for item in ITEMS]
    assert len({tuple(row) for row in together}) == len(ITEMS), "the rows should differ, or this test proves little"


@torch.no_grad()
def test_generation_follows_the_training_model(wrapped):
    """Greedy by hand with the packed forward, one whole stream per token."""
    item = ITEMS[2]
    got = continuations(wrapped, [item])[0]
    from dataclasses import replace

    tokens: list[int] = []
    allowed = torch.full((wrapped.model.trunk.config.vocab_size,), 0.0)
    allowed[wrapped.generation_config.suppress_tokens] = -torch.inf
    for count in range(len(got)):
        batch = tiny_batch([replace(item, text=count)], num_tokens=1)
        start, end = batch.text_spans[0].tolist()
        ids = batch.input_ids.clone()
        ids[start:end] = torch.tensor(tokens, dtype=torch.int64)
        logits = wrapped.model.logits(replace(batch, input_ids=ids))
        tokens.append(int((logits[end - 1] + allowed).argmax()))
    assert tokens == got


def test_beams_take_their_items_along(wrapped):
    together = continuations(wrapped, ITEMS, num_beams=3)
    assert together == [continuations(wrapped, [item], num_beams=3)[0] for item in ITEMS]


def test_beams_of_rows_with_several_items(wrapped):
    """Two images and two clips in the first row, none in the second, one image in the third; each row twice."""
    image = [4] * 9
    rows = [[1, *image, 9, *image, 5, 5, 9, 5, 5], [1, 9], [1, *image, 9]]
    ids, _ = pad_left(rows, 0)
    waveforms, lengths = pad_waveforms([torch.full((1200,), 7), torch.full((1100,), 8)])
    expanded, items = wrapped._expand_inputs_for_generation(
        expand_size=2,
        input_ids=ids,
        pixel_values=torch.tensor([10, 11, 12]),
        waveforms=waveforms,
        waveform_lengths=lengths,
    )
    assert expanded.tolist() == [row for row in ids.tolist() for _ in range(2)]
    assert items["pixel_values"].tolist() == [10, 11, 10, 11, 12, 12]
    assert items["waveforms"][:, 0].tolist() == [7, 8, 7, 8]
    assert items["waveform_lengths"].tolist() == [1200, 1100, 1200, 1100]


def test_never_generates_marks_or_unused_rows(wrapped):
    never = set(wrapped.generation_config.suppress_tokens)
    assert never == {0, 1, 4, 5} | set(range(50, 56))
    assert not never & {token for row in continuations(wrapped, ITEMS) for token in row}


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageTextToText])
@torch.no_grad()
def test_loads_through_the_auto_classes(wrapped, saved, auto):
    loaded = auto.from_pretrained(saved)
    assert type(loaded) is TrichordForConditionalGeneration
    assert not loaded.training
    weights, expected = loaded.state_dict(), wrapped.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert loaded.model.trunk.lm_head.weight is loaded.model.trunk.model.embed_tokens.weight
    assert torch.equal(loaded.model.logits(tiny_batch(ITEMS)), wrapped.model.logits(tiny_batch(ITEMS)))
    assert continuations(loaded, ITEMS) == continuations(wrapped, ITEMS)


@pytest.mark.parametrize("stored", [None, "float32"])
@torch.no_grad()
def test_loads_in_bf16_throughout(saved, stored, tmp_path):
    """Also where the trunk's config brings a dtype of its own, as one from a released checkpoint does."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["dtype"] = stored
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert len(continuations(loaded, ITEMS)) == len(ITEMS)


@torch.no_grad()
def test_the_towers_alone(wrapped, saved):
    towers = AutoModel.from_pretrained(saved)
    assert type(towers) is TrichordModel
    batch = tiny_batch(ITEMS)
    out = wrapped.model(batch)
    items = prompts(wrapped, ITEMS)
    torch.testing.assert_close(towers.embed_images(items["pixel_values"]), out.image_embeds, rtol=0, atol=1e-6)
    audio = towers.embed_audio(items["waveforms"], items["waveform_lengths"])
    torch.testing.assert_close(audio, out.audio_embeds, rtol=0, atol=1e-6)
    text = towers.embed_text([item.tokens(item.text, 4).tolist() for item in ITEMS])
    torch.testing.assert_close(text, out.text_embeds, rtol=0, atol=1e-6)


def test_a_model_without_a_trunk_loads_and_says_that_it_cannot_generate(tmp_path):
    fusion, objectives = FusionConfig(kind="none"), ObjectivesConfig(contrastive=ContrastiveConfig(embed_dim=8))
    model = tiny_model(fusion=fusion, objectives=objectives)
    TrichordModel(describe(model, fusion, objectives), model).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))
    with pytest.raises(ValueError, match="has no trunk"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_vision_towers_with_tables_that_no_checkpoint_holds(tmp_path, name):
    """Rotary tables and relative-position indices are buffers that transformers leaves empty."""
    vision = VISION.model_copy(update={"name": name})
    encoders = ENCODERS.model_copy(update={"vision": vision})
    model = tiny_model(encoders).eval()
    assert any(True for _ in model.buffers())
    wrap_model(model, describe(model, encoders=encoders)).save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    batch = tiny_batch(ITEMS)
    assert torch.equal(loaded.model.logits(batch), model.logits(batch))


def test_items_that_do_not_fit_their_places_name_both_numbers(wrapped):
    inputs = prompts(wrapped, ITEMS[:1])
    with pytest.raises(ValueError, match="9 image tokens, but the image items give 18 features"):
        wrapped(**{**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)})
    with pytest.raises(ValueError, match="without waveform_lengths"):
        wrapped(**{**inputs, "waveform_lengths": None})


def test_a_static_cache_with_images_is_refused(wrapped):
    with pytest.raises(ValueError, match="Static caches bring their own mask"):
        continuations(wrapped, ITEMS[2:3], cache_implementation="static")
