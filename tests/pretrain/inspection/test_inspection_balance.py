"""Weights against imbalance, and the file that lays them over a config."""

import json
import math

import pytest
import yaml
from inspection_corpus import pairs, write_tar

from trichord.cli import main
from trichord.config.load import load_run_config
from trichord.core.errors import ConfigError
from trichord.inspection.balance import balance, counts_of, overlay


def shares(rows, scheme) -> dict[str, float]:
    return {row.name: row.shares[scheme] for row in rows}


def test_shares_follow_their_formulas():
    rows = balance({"cat": 900, "dog": 100, "none": 0})
    assert shares(rows, "inverse") == {"cat": 0.5, "dog": 0.5}
    assert shares(rows, "sqrt") == pytest.approx({"cat": 0.75, "dog": 0.25})
    beta = 0.9999
    raw = {name: n * (1 - beta) / (1 - beta**n) for name, n in (("cat", 900), ("dog", 100))}
    expected = {name: value / sum(raw.values()) for name, value in raw.items()}
    assert shares(rows, "effective") == pytest.approx(expected)


def test_the_effective_number_goes_from_natural_to_inverse_frequency():
    counts = {"cat": 900, "dog": 100}
    assert shares(balance(counts, beta=0.0), "effective") == pytest.approx({"cat": 0.9, "dog": 0.1})
    assert shares(balance(counts, beta=1 - 1e-12), "effective") == pytest.approx({"cat": 0.5, "dog": 0.5}, abs=1e-3)


def test_loss_weights_have_mean_one_and_repeats_say_what_a_draw_costs():
    rows = balance({"cat": 900, "dog": 80, "cow": 20})
    for scheme in ("sqrt", "effective", "inverse"):
        assert sum(row.losses[scheme] * row.count for row in rows) == pytest.approx(1000)
    cow = rows[-1]
    assert cow.name == "cow"
    assert cow.repeats["inverse"] == pytest.approx(45)
    assert cow.repeats["sqrt"] == pytest.approx(math.sqrt(45))


@pytest.mark.parametrize(
    ("counts", "beta", "expected"),
    [
        ({"cat": 3}, 0.9, "at least two classes with samples, got cat"),
        ({"cat": 3, "dog": 0}, 0.9, "at least two"),
        ({"cat": 3, "dog": 4}, 1.0, "beta must be at least 0 and less than 1, got 1.0"),
    ],
)
def test_what_cannot_be_balanced_is_said(counts, beta, expected):
    with pytest.raises(ConfigError, match=expected):
        balance(counts, beta)


def test_labels_that_are_no_classes_are_refused():
    label = {"classes": {"a": 1, "b": 1}, "missing": 0, "other": 0}
    stats = {"sources": [], "total": {"labels": {"kind": label, "score": {**label, "numbers": {"count": 3}}}}}
    assert counts_of(stats, "kind") == {"a": 1, "b": 1}
    with pytest.raises(ConfigError, match="no classes"):
        counts_of(stats, "score")
    with pytest.raises(ConfigError, match=r"expected `source` or a key that --label counts \(kind, score\)"):
        counts_of(stats, "colour")
    with pytest.raises(ConfigError, match="name a source of its own: a_b, a_b"):
        overlay(balance({"a b": 1, "a/b": 2}), "kind", "sqrt")


def test_the_overlay_gives_a_run_its_weights(configured, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(configured)
    file, out = tmp_path / "s.json", tmp_path / "weights.yaml"
    command = ["data", "stats", "c.yaml", "--json", str(file), "--workers", "1", "--no-hashes"]
    assert main([*command, "--balance", str(out), "--scheme", "inverse"]) == 0
    assert "weights by source" in capsys.readouterr().out
    config = load_run_config("c.yaml", [str(out)])
    assert [(source.name, source.weight) for source in config.shards.sources] == [("cats", 1.0), ("dogs", 1.0)]
    assert [one["class"] for one in json.loads(file.read_text())["balance"]["classes"]] == ["cats", "dogs"]
    assert main([*command, "--balance", str(out)]) == 0
    config = load_run_config("c.yaml", [str(out)])
    assert config.shards.sources[1].weight == pytest.approx(0.5)  # sqrt(10 / 40)
    assert main([*command, "--balance", str(out), "--scheme", "inverse", "--balance-as", "loss"]) == 0
    written = yaml.safe_load(out.read_text())["shards"]["sources"]
    # 40 and 10 samples: drawn as often as there are samples, half of the emphasis each.
    assert written == {"cats": {"weight": 1.0, "loss_weight": 0.625}, "dogs": {"weight": 0.25, "loss_weight": 2.5}}
    with pytest.raises(ConfigError, match="cats, dogs: loss_weight counts in objectives"):
        load_run_config("c.yaml", [str(out)])


def test_classes_are_the_sources_that_split_makes(configured, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(configured)
    write_tar(tmp_path / "s-0.tar", [*pairs(9, 0, "big cat"), *pairs(4, 20, "dog")])
    out, folder = tmp_path / "weights.yaml", tmp_path / "split"
    command = ["data", "stats", str(tmp_path / "s-0.tar"), "--balance-by", "kind", "--balance", str(out)]
    assert main([*command, "--workers", "1"]) == 0
    assert main(["data", "split", str(tmp_path / "s-0.tar"), "--by", "kind", "--out", str(folder)]) == 0
    config = load_run_config("c.yaml", [str(folder / "sources.yaml"), str(out)])
    weights = {source.name: source.weight for source in config.shards.sources}
    assert weights == {"big_cat": 1.0, "dog": pytest.approx(2 / 3, rel=1e-4)}
    assert main(["config", "check", "c.yaml", str(out)]) == 2
    assert "shards.sources has no element 'big_cat'; expected one of cats, dogs" in capsys.readouterr().err
