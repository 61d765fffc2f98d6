"""An export is whole or absent, loads in transformers, and starts a new run exactly."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import tiny_trichord as tiny
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import trichord.fusion.hf  # noqa: F401 (registers the model type)
from trichord.batches.tokenizer import TextTokenizer, train_tokenizer
from trichord.core.errors import CheckpointError, ConfigError
from trichord.fusion.config import FusionConfig
from trichord.fusion.model import build_model
from trichord.layers.config import LayersConfig
from trichord.layers.stored import stored_buffers, stored_tensors
from trichord.objectives.config import ContrastiveConfig, ObjectivesConfig
from trichord.release import export
from trichord.release.export import export_checkpoint
from trichord.release.import_ import load_init_weights, load_initial_weights, parse_source

WORDS = "one two three four five six seven eight nine ten a picture of the digit spoken word"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TextTokenizer:
    return train_tokenizer([WORDS], "word", 40, tmp_path_factory.mktemp("tokenizer") / "t")


def leaves(fusion: FusionConfig = tiny.FUSION, objectives: ObjectivesConfig = tiny.OBJECTIVES) -> SimpleNamespace:
    return SimpleNamespace(encoders=tiny.ENCODERS, fusion=fusion, objectives=objectives, samples=tiny.SAMPLES)


def build(tokenizer: TextTokenizer, config: SimpleNamespace, seed: int = 0):
    torch.manual_seed(seed)
    return build_model(
        config.encoders,
        config.fusion,
        config.objectives,
        config.samples,
        LayersConfig(),
        tokenizer.vocab_size,
        tokenizer.special_ids,
    ).eval()


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def model(tokenizer):
    return build(tokenizer, leaves())


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "model"
    facts = {"run": "tiny", "step": 7}
    assert export_checkpoint(weights_of(model), leaves(), tokenizer, out, facts=facts) == out
    return out


def test_what_is_in_the_folder(folder):
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "trunk/config.json",
        "trunk/generation_config.json",
        "trunk/model.safetensors",
        "trunk/tokenizer.json",
        "trunk/tokenizer_config.json",
    }
    assert [path.name for path in folder.parent.iterdir()] == ["model"], "the temporary folder is gone"
    card = (folder / "README.md").read_text()
    assert "- step: 7\n" in card
    assert "vision: vit_tiny_patch16_224" in card
    facts = json.loads((folder / "preprocessor_config.json").read_text())
    assert facts["image"]["size"] == [24, 24]
    assert facts["audio"]["sample_rate_hz"] == 16000


def test_no_path_of_the_training_machine_is_in_the_export(model, tokenizer, tmp_path):
    encoders = tiny.ENCODERS.model_copy(
        update={"vision": tiny.VISION.model_copy(update={"weights": "/private/vision.safetensors"})}
    )
    config = SimpleNamespace(**{**vars(leaves()), "encoders": encoders})
    out = export_checkpoint(weights_of(model), config, tokenizer, tmp_path / "model")
    assert "/private" not in "".join(path.read_text() for path in out.rglob("*.json"))


@torch.no_grad()
def test_the_export_gives_the_logits_of_the_training_model(folder, model, tokenizer):
    """Images, audio and text in left-padded rows against the packed stream. Measured worst 6e-8 of size 0.6."""
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    items = [tiny.Item(True, 3000, 3, seed=1), tiny.Item(False, 900, 2, seed=2), tiny.Item(True, None, 4, seed=3)]
    batch = tiny.tiny_batch(items)
    ids = batch.input_ids.clamp(max=tokenizer.vocab_size - 1)
    from dataclasses import replace

    expected = model.logits(replace(batch, input_ids=ids))
    texts = [ids[start : end + 1].tolist() for start, end in batch.text_spans.tolist()]
    inputs = loaded.prepare_prompts(
        [item.pixels() if item.image else None for item in items],
        [item.waveform() if item.audio else None for item in items],
        texts,
    )
    logits = loaded(**inputs).logits[inputs["attention_mask"].bool()]
    torch.testing.assert_close(logits, expected[: len(logits)], rtol=0, atol=3e-7)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_the_trunk_alone_loads_in_plain_transformers(folder, model, tokenizer, implementation):
    """Text only, left-padded. Measured worst 6e-8 of size 0.7."""
    plain = AutoModelForCausalLM.from_pretrained(folder / "trunk", attn_implementation=implementation)
    assert "trichord" not in type(plain).__module__
    assert all("trichord" not in type(module).__module__ for module in plain.modules())
    ours = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(6, tokenizer.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    theirs = plain(input_ids=ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
    got = ours(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(got, theirs, rtol=0, atol=3e-7)


def test_the_tokenizer_loads_from_both_folders(folder, tokenizer):
    for place in (folder, folder / "trunk"):
        loaded = AutoTokenizer.from_pretrained(place)
        assert loaded("two of three", add_special_tokens=False)["input_ids"] == tokenizer.encode("two of three")
        assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_id, tokenizer.eos_id)


def test_starting_from_the_export_is_exact(folder, model, tokenizer, caplog):
    other = build(tokenizer, leaves(), seed=1)
    with caplog.at_level("INFO", logger="trichord"):
        report = load_initial_weights(other, str(folder))
    assert report.complete
    assert len(report.loaded) == len(weights_of(model))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters()))
    assert f"{len(report.loaded)} fit, 0 missing, 0 unexpected, 0 of another shape" in caplog.text
    assert other.trunk.lm_head.weight is other.trunk.model.embed_tokens.weight


def test_single_rooms(folder, model, tokenizer):
    objectives = tiny.OBJECTIVES.model_copy(update={"contrastive": ContrastiveConfig(embed_dim=24)})
    other = build(tokenizer, leaves(objectives=objectives), seed=1)
    before = weights_of(other)
    with pytest.raises(CheckpointError, match=r"0 missing, 0 unexpected, 3 of another shape \(heads.audio.proj.weight"):
        load_initial_weights(other, str(folder))
    load_initial_weights(other, f"{folder}#vision, trunk")
    for name, parameter in other.named_parameters():
        expected = weights_of(model) if name.startswith(("vision.", "trunk.")) else before
        assert torch.equal(parameter, expected[name]), name


def test_missing_and_unexpected_parameters_are_named(folder, tokenizer):
    fusion = FusionConfig(trunk=tiny.TRUNK, connector="linear")
    with pytest.raises(CheckpointError, match=r"4 unexpected \(connectors.audio.fc2.bias; "):
        load_initial_weights(build(tokenizer, leaves(fusion)), str(folder))
    deeper = FusionConfig(trunk=tiny.TRUNK.model_copy(update={"num_layers": 3}))
    with pytest.raises(CheckpointError, match=r"11 missing \(trunk.model.layers.2"):
        load_initial_weights(build(tokenizer, leaves(deeper)), str(folder))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{folder}#vison", "'vison' is no room; expected some of vision, audio"),
        ("{folder}/nothing", "nothing is at"),
        ("{folder}/trunk", "is a 'qwen3' model; a whole run starts from a Trichord export"),
    ],
)
def test_sources_that_cannot_be_used(folder, model, source, message):
    with pytest.raises(ConfigError, match=message):
        load_initial_weights(model, source.format(folder=folder))


def test_exports_with_a_part_missing(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_SHARD_SIZE", "20KB")
    out = export_checkpoint(weights_of(model), leaves(), tokenizer, tmp_path / "model")
    assert load_initial_weights(model, str(out)).complete
    index, part = out / "model.safetensors.index.json", min(out.glob("model-*.safetensors"))
    part.rename(out / "moved")
    with pytest.raises(ConfigError, match=f"lacks {part.name}: 1 of the .* copy them too"):
        load_init_weights(str(out))
    (out / "moved").rename(part)
    index.write_text("{}")
    with pytest.raises(ConfigError, match=r"index\.json is no index of weights .*; fetch it again"):
        load_init_weights(str(out))
    index.unlink()
    with pytest.raises(ConfigError, match=r"in parts \(model-00001-of-.*without model\.safetensors\.index\.json"):
        load_init_weights(str(out))
    (out / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json is no transformers config .*; export again"):
        load_init_weights(str(out))


def test_parsing():
    assert parse_source("org/name@v1#vision,heads") == ("org/name@v1", ("vision", "heads"))
    assert parse_source("runs/a") == ("runs/a", ())


def test_a_hub_id_without_internet_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="'org/name@v1' is no folder, and the Hugging Face hub gave no such model"):
        load_init_weights("org/name@v1")


def test_an_existing_folder_is_never_touched(model, tokenizer, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match="exists already; an export never overwrites"):
        export_checkpoint(weights_of(model), leaves(), tokenizer, tmp_path / "model")
    assert list((tmp_path / "model").iterdir()) == []


def test_a_failed_export_leaves_nothing(model, tokenizer, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "render_card", fail)
    with pytest.raises(ConfigError, match="No space left on device"):
        export_checkpoint(weights_of(model), leaves(), tokenizer, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_model_are_refused(model, tokenizer, tmp_path):
    weights = weights_of(model)
    weights.pop("trunk.model.norm.weight")
    with pytest.raises(CheckpointError, match=r"1 missing \(trunk.model.norm.weight\)"):
        export_checkpoint(weights, leaves(), tokenizer, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_untied_and_without_a_trunk(tokenizer, tmp_path):
    untied = FusionConfig(trunk=tiny.TRUNK.model_copy(update={"tie_word_embeddings": False, "family": "llama"}))
    towers = leaves(FusionConfig(kind="none"), ObjectivesConfig(contrastive=ContrastiveConfig()))
    for name, config in (("untied", leaves(untied)), ("towers", towers)):
        model = build(tokenizer, config)
        out = export_checkpoint(weights_of(model), config, tokenizer, tmp_path / name)
        other = build(tokenizer, config, seed=1)
        assert load_initial_weights(other, str(out)).complete
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters()))
        assert (out / "trunk").exists() == (name == "untied")


def test_half_precision_exports_are_half_the_size(model, tokenizer, folder, tmp_path):
    live = dict(model.named_parameters())
    out = export_checkpoint(live, leaves(), tokenizer, tmp_path / "m", dtype=torch.bfloat16)
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in live.values())
    assert (out / "model.safetensors").stat().st_size < 0.6 * (folder / "model.safetensors").stat().st_size
    loaded = AutoModelForImageTextToText.from_pretrained(out)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["next_token", "towers"])
def test_running_statistics_of_a_convolutional_tower_are_part_of_the_model(kind, tokenizer, tmp_path):
    small = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "output_stride": 8}
    config = (
        leaves()
        if kind == "next_token"
        else leaves(FusionConfig(kind="none"), ObjectivesConfig(contrastive=ContrastiveConfig()))
    )
    vision = tiny.VISION.model_copy(update={"name": "resnet18", "options": small})
    config.encoders = config.encoders.model_copy(update={"vision": vision})
    model = build(tokenizer, config)
    pixels = torch.randint(0, 256, (3, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE), dtype=torch.uint8)
    model.vision.train()(pixels)
    out = export_checkpoint(stored_tensors(model), config, tokenizer, tmp_path / "m", dtype=torch.bfloat16)
    statistics = stored_buffers(model)
    assert statistics
    stored = load_init_weights(str(out))
    assert [name for name, tensor in statistics.items() if not torch.equal(stored[name], tensor)] == []
    other = build(tokenizer, config, seed=1)
    assert load_initial_weights(other, f"{out}#vision").complete
    assert all(torch.equal(tensor, statistics[name]) for name, tensor in stored_buffers(other).items())
    if kind == "next_token":
        loaded = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
        want = other.vision.eval()(pixels)
        torch.testing.assert_close(loaded.get_image_features(pixels), want, rtol=1e-5, atol=1e-6)
    without = {name: tensor for name, tensor in stored_tensors(model).items() if name not in statistics}
    with pytest.raises(CheckpointError, match=r"24 missing .*running_mean"):
        export_checkpoint(without, config, tokenizer, tmp_path / "n")
