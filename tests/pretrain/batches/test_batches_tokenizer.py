"""Tokenizers: three kinds train, load here and in transformers alike, and text cannot place a special token."""

import json

import pytest

from trichord.batches.tokenizer import SPECIAL_TOKENS, load_tokenizer, train_tokenizer
from trichord.core.errors import ConfigError

TEXTS = ["the quick brown fox jumps over the lazy dog", "a cat, a dog and an owl", "seven eight nine"] * 4
SIZES = {"bpe": 300, "unigram": 80, "word": 40}


@pytest.fixture(scope="module", params=sorted(SIZES))
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers") / request.param
    return train_tokenizer(iter(TEXTS), request.param, SIZES[request.param], folder), folder, request.param


def test_transformers_loads_the_folder_and_encodes_alike(trained):
    transformers = pytest.importorskip("transformers")
    ours, folder, _ = trained
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs("a quick dog").input_ids == ours.encode("a quick dog")
    assert theirs.decode(ours.encode("a quick dog")) == ours.decode(ours.encode("a quick dog")) == "a quick dog"
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert theirs.convert_tokens_to_ids(["<image>", "<audio>"]) == [ours.image_id, ours.audio_id]
    assert len(theirs) == ours.vocab_size


def test_specials_are_the_first_six_ids_and_all_differ(trained):
    tokenizer = trained[0]
    ids = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, 3, tokenizer.image_id, tokenizer.audio_id)
    assert ids == tuple(range(len(SPECIAL_TOKENS)))
    assert tokenizer.vocab_size <= SIZES[trained[2]]


@pytest.mark.parametrize("text", ["a<image>dog", "<eos>", "x </s> <bos><pad> dog", "<image><image>", "a\0<audio>"])
def test_text_never_places_a_special_token(trained, text):
    tokenizer = trained[0]
    marks = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_id, tokenizer.audio_id}
    assert marks.isdisjoint(tokenizer.encode(text))


def test_byte_level_bpe_loses_nothing(tmp_path):
    tokenizer = train_tokenizer(TEXTS, "bpe", 300, tmp_path / "t")
    text = "naïve 猫 <image>\n\ttab"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_save_and_load_keep_ids_and_fingerprint(trained, tmp_path):
    tokenizer = trained[0]
    tokenizer.save(tmp_path / "copy")
    again = load_tokenizer(str(tmp_path / "copy"))
    assert again.encode("the lazy owl") == tokenizer.encode("the lazy owl")
    assert again.fingerprint() == tokenizer.fingerprint()
    assert (again.eos_id, again.image_id, again.vocab_size) == (
        tokenizer.eos_id,
        tokenizer.image_id,
        tokenizer.vocab_size,
    )


def test_released_tokenizer_without_our_tokens_gets_them_appended_and_is_never_cut(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"hello": 0, "world": 1, "</s>": 2, "[UNK]": 3}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.enable_truncation(2)
    raw.enable_padding(length=7)
    raw.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode("hello world hello") == [0, 1, 0]
    assert (tokenizer.image_id, tokenizer.audio_id, tokenizer.vocab_size) == (4, 5, 6)
    assert tokenizer.bos_id == tokenizer.pad_id == tokenizer.eos_id == 2


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "has no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{]"), "no tokenizer.json that can be read"),
    ],
)
def test_unreadable_folder_is_a_config_error(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(str(tmp_path))


def test_missing_path_is_a_config_error():
    with pytest.raises(ConfigError, match=r"nothing is at '\./nowhere'"):
        load_tokenizer("./nowhere")


def test_hub_name_that_cannot_be_had_is_a_config_error(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import LocalEntryNotFoundError

    def absent(*args, **kwargs):
        raise LocalEntryNotFoundError("not in the cache, and the hub is offline")

    monkeypatch.setattr(hub, "snapshot_download", absent)
    with pytest.raises(ConfigError, match="the Hugging Face hub gave no such tokenizer"):
        load_tokenizer("nobody/nothing@main")


@pytest.mark.parametrize(
    ("kind", "size", "texts", "message"),
    [("bpe", 100, TEXTS, "at least 262, got 100"), ("word", 40, ["", " "], "no text")],
)
def test_training_that_cannot_work_says_why(tmp_path, kind, size, texts, message):
    with pytest.raises(ConfigError, match=message):
        train_tokenizer(texts, kind, size, tmp_path / "t")


def test_training_refuses_to_overwrite(trained):
    with pytest.raises(ConfigError, match="already holds"):
        train_tokenizer(TEXTS, "word", 40, trained[1])
