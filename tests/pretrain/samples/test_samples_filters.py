"""Filters: what passes, what does not, and under which name it is counted."""

import json

import pytest

from trichord.core.errors import ConfigError
from trichord.samples.filters import FilteredSample, SampleFilter
from trichord.shards.config import FiltersConfig, MetaFilter
from trichord.shards.index import SampleEntry


def reason(config, entry=None, meta=None):
    """The filter that leaves the sample out, or None."""
    keep = SampleFilter(config)
    try:
        keep.check_entry(entry or SampleEntry("k", "a/x.tar"))
        keep.check_meta(meta or {})
    except FilteredSample as filtered:
        return filtered.reason
    return None


@pytest.mark.parametrize(
    ("rule", "value", "passes"),
    [
        ({"min": 0.3}, 0.3, True),
        ({"min": 0.3}, 0.29, False),
        ({"max": 5}, 5, True),
        ({"max": 5}, 6, False),
        ({"min": 0}, "7", False),
        ({"min": 0}, True, False),
        ({"min": 0}, float("nan"), False),
        ({"one_of": ("en", "de")}, "de", True),
        ({"one_of": ("en", "de")}, "fr", False),
        ({"one_of": ("en",)}, ["fr", "en"], True),
        ({"one_of": (1,)}, True, False),
        ({"none_of": ("nsfw",)}, "nsfw", False),
        ({"none_of": ("nsfw",)}, "fine", True),
        ({"none_of": ("nsfw",)}, {"nsfw": 1}, True),
        ({"min": 1, "none_of": (3,)}, 3, False),
        ({"min": 1}, None, False),
        ({"min": 1, "missing": "keep"}, None, True),
    ],
)
def test_meta_rules(rule, value, passes):
    config = FiltersConfig(meta=(MetaFilter(key="facts.score", **rule),))
    found = reason(config, meta={} if value is None else {"facts": {"score": value}})
    assert found is None if passes else found.startswith("meta facts.score")


def test_what_the_user_may_not_have_meant_has_a_reason_of_its_own():
    config = FiltersConfig(meta=(MetaFilter(key="score", min=0),))
    assert reason(config, meta={"score": "0.7"}) == "meta score (text, not a number)"
    assert reason(config, meta={"scores": 0.7}) == "meta score (not there)"
    assert reason(config, meta={"score": -0.7}) == "meta score"


def test_a_path_through_something_else_is_missing():
    config = FiltersConfig(meta=(MetaFilter(key="a.b", min=0),))
    assert reason(config, meta={"a": 7}) == "meta a.b (not there)"


@pytest.mark.parametrize(
    ("config", "entry", "name"),
    [
        ({"min_image_side": 64}, {"image_size": (100, 63)}, "min_image_side"),
        ({"min_image_side": 64}, {"image_size": (100, 64)}, None),
        ({"min_image_side": 64}, {}, None),
        ({"max_image_aspect": 2}, {"image_size": (100, 49)}, "max_image_aspect"),
        ({"max_image_aspect": 2}, {"image_size": (50, 100)}, None),
        ({"min_audio_seconds": 1}, {"audio_frames": 7999, "audio_rate": 8000}, "min_audio_seconds"),
        ({"max_audio_seconds": 1}, {"audio_frames": 8001, "audio_rate": 8000}, "max_audio_seconds"),
        ({"max_audio_seconds": 1}, {"audio_frames": 8000, "audio_rate": 8000}, None),
        ({"min_text_chars": 3}, {"text_chars": 2}, "min_text_chars"),
        ({"max_text_chars": 3}, {"text_chars": 4}, "max_text_chars"),
        ({"max_text_chars": 3}, {"text_chars": 3}, None),
    ],
)
def test_filters_on_the_index(config, entry, name):
    assert reason(FiltersConfig(**config), SampleEntry("k", "x.tar", **entry)) == name


def test_exclude_goes_by_base_name_and_key(tmp_path):
    lists = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    lists[0].write_text(json.dumps({"shard": "s3://old/x.tar", "key": "k1", "reason": "bad"}) + "\n\n")
    lists[1].write_text(
        json.dumps({"shard": "y.tar", "key": "k2"}) + "\n" + json.dumps({"shard": "y.tar", "key": None})
    )
    config = FiltersConfig(exclude=tuple(map(str, lists)))
    assert reason(config, SampleEntry("k1", "/new/x.tar")) == "exclude"
    assert reason(config, SampleEntry("k2", "/new/x.tar")) is None
    assert reason(config, SampleEntry("k2", "/new/y.tar")) == "exclude"


def test_digest_follows_what_is_left_out_and_not_where_the_list_lies(tmp_path):
    def digest(name, lines, **config):
        (tmp_path / name).write_text("\n".join(json.dumps({"shard": s, "key": k}) for s, k in lines))
        return SampleFilter(FiltersConfig(exclude=(str(tmp_path / name),), **config)).digest

    first = digest("a", [("x.tar", "1"), ("x.tar", "2")])
    assert digest("b", [("old/x.tar", "2"), ("x.tar", "1"), ("x.tar", "1")]) == first
    assert digest("c", [("x.tar", "1")]) != first
    assert digest("d", [("x.tar", "1"), ("x.tar", "2")], min_image_side=3) != first


@pytest.mark.parametrize("line", ["{", "[]", '{"shard": "x.tar"}', '{"shard": 7, "key": "k"}'])
def test_wrong_exclude_list_is_named(tmp_path, line):
    (tmp_path / "list.jsonl").write_text('{"shard": "x.tar", "key": "k"}\n' + line)
    with pytest.raises(ConfigError, match=r"list.jsonl, line 2: expected a JSON object with `shard` and `key`"):
        SampleFilter(FiltersConfig(exclude=(str(tmp_path / "list.jsonl"),)))


def test_missing_exclude_list_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl cannot be read"):
        SampleFilter(FiltersConfig(exclude=(str(tmp_path / "nowhere.jsonl"),)))


def test_a_rule_that_keeps_everything_is_refused():
    with pytest.raises(ValueError, match="keeps everything"):
        MetaFilter(key="score")
