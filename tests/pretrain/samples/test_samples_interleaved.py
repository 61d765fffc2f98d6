"""Chats and documents: what they may look like, and that each wrong form is named."""

import pytest

from trichord.samples.config import TextConfig
from trichord.samples.interleaved import MAX_PARTS, Item, Turn, parse_messages
from trichord.shards.index import Sibling
from trichord.shards.members import MemberRef
from trichord.shards.quarantine import BadSample


def sibling(kind, ext, measure):
    return Sibling(kind, MemberRef(ext, f"train/k7.{ext}", 512, 9), measure)


SIBLINGS = {
    "0.jpg": sibling("image", "0.jpg", [32, 24]),
    "1.png": sibling("image", "1.png", [8, 8]),
    "0.flac": sibling("audio", "0.flac", [1600, 16000]),
    "broken.jpg": sibling("image", "broken.jpg", "not an image"),
    "txt": sibling("text", "txt", 5),
}
JPG = Item("image", SIBLINGS["0.jpg"].ref, (32, 24))
PNG = Item("image", SIBLINGS["1.png"].ref, (8, 8))
CLIP = Item("audio", SIBLINGS["0.flac"].ref, (1600, 16000))


def parse(*messages, **text):
    return parse_messages(list(messages), "train/k7", SIBLINGS, TextConfig(**text))


def user(*content):
    return {"role": "user", "content": list(content)}


def test_chat_with_items_between_texts():
    turns = parse(
        {"role": "system", "content": "Be brief."},
        user(
            {"type": "image", "image": "0.jpg"}, {"type": "text", "text": "And "}, {"type": "audio", "audio": "0.flac"}
        ),
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    )
    assert turns == (Turn("system", ("Be brief.",)), Turn("user", (JPG, "And ", CLIP)), Turn("assistant", ("Yes.",)))


@pytest.mark.parametrize("name", ["1.png", "k7.1.png", "./1.png", "1.PNG"])
def test_items_by_extension_or_file_name(name):
    assert parse(user({"type": "image", "image": name})) == (Turn("user", (PNG,)),)


def test_unnamed_items_are_taken_in_the_tars_order():
    assert parse(user({"type": "image"}, {"type": "image"}))[0].content == (JPG, PNG)


def test_blank_texts_are_dropped_and_texts_normalised():
    turns = parse(user({"type": "text", "text": ""}, {"type": "text", "text": " a  b\n"}), collapse_spaces=True)
    assert turns[0].content == (" a b ",)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "must be a list of turns, got 'hello'"),
        ([], "must be a list of turns"),
        (["hello"], r"messages\[0\] must be an object"),
        ([{"role": "gpt", "content": "x"}], r"messages\[0\]: role must be one of .* got 'gpt'"),
        ([{"role": ["user"], "content": "x"}], "role must be one of"),
        ([{"role": "user"}], "content must be text or a list of parts, got nothing"),
        ([{"role": "user", "content": [7]}], r"content\[0\]: type must be text, image or audio; got int"),
        ([{"role": "user", "content": [{"type": "video"}]}], "got 'video'"),
        ([{"role": "user", "content": [{"type": ["text"]}]}], "type must be"),
        ([{"role": "user", "content": [{"type": "text", "text": 7}]}], "text must be text, got int"),
        ([{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}], "text must be text"),
        (
            [{"role": "user", "content": [{"type": "image", "image": "2.jpg"}]}],
            "no image '2.jpg'; it has 0.flac, 0.jpg",
        ),
        ([{"role": "user", "content": [{"type": "image", "image": "0.flac"}]}], "no image '0.flac'"),
        ([{"role": "user", "content": [{"type": "image", "image": "../0.jpg"}]}], "no image '../0.jpg'"),
        ([{"role": "user", "content": [{"type": "image", "image": {}}]}], "image must name a member, got dict"),
        ([{"role": "user", "content": [{"type": "image", "image": "broken.jpg"}]}], "not an image"),
        ([{"role": "user", "content": [{"type": "audio"}, {"type": "audio"}]}], "no further audio"),
        ([{"role": "user", "content": ""}], "neither text nor items"),
        ([{"role": "user", "content": "x" * 3000}, {"role": "user", "content": "x" * 3000}], "6000 characters"),
        ([{"role": "user", "content": "x"}] * (MAX_PARTS + 1), "more than 1024 parts"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}] * (MAX_PARTS + 1)}], "1025 parts"),
    ],
)
def test_wrong_forms_are_named(messages, words):
    with pytest.raises(BadSample, match=words):
        parse_messages(messages, "train/k7", SIBLINGS, TextConfig(max_chars=5000))
