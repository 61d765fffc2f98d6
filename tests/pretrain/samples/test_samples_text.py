"""Text and metadata: caps, encodings, types."""

import pytest

from trichord.samples.config import TextConfig
from trichord.samples.text import decode_meta, decode_text
from trichord.shards.quarantine import BadSample

CONFIG = TextConfig(max_chars=8)


def test_text_is_stripped_and_blank_is_none():
    assert decode_text("\ufeff  naïve \n".encode(), TextConfig()) == "naïve"
    assert decode_text(b" \n\t", CONFIG) is None
    assert decode_text(b" a ", TextConfig(strip=False)) == " a "


@pytest.mark.parametrize(
    ("data", "message"), [(b"caf\xe9", "not UTF-8: .* at byte 3"), (b"123456789", "9 characters; .* allows 8")]
)
def test_bad_text(data, message):
    with pytest.raises(BadSample, match=message):
        decode_text(data, CONFIG)


def test_meta_keeps_what_it_holds():
    assert decode_meta(b'{"prompt": null, "group": 3, "x": [1]}') == {"prompt": None, "group": 3, "x": [1]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "must be a JSON object, got list"),
        (b'{"prompt": 3}', "`prompt` in the metadata must be text, got int"),
        (b'{"group": true}', "`group` in the metadata must be text or an integer, got bool"),
    ],
)
def test_bad_meta(data, message):
    with pytest.raises(BadSample, match=message):
        decode_meta(data)


def test_half_a_surrogate_pair_in_the_metadata_is_a_bad_sample():
    for key in ("prompt", "group"):
        with pytest.raises(BadSample, match=f"`{key}` in the metadata holds half a surrogate pair"):
            decode_meta(b'{"%s": "hi \\ud800"}' % key.encode())
