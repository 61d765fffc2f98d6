"""Every shipped config loads, says how it is run, and the big ones have the size they claim."""

import re
from pathlib import Path

import pytest

from trichord.cli import main
from trichord.config.load import (
    check_config,
    config_folders,
    load_cluster,
    load_run_config,
    load_suite,
    resolved_yaml,
    shipped_configs,
)
from trichord.config.run import RunConfig
from trichord.config.yaml_text import parse_yaml

LOADERS = {"runs": load_run_config, "debug": load_run_config, "suites": load_suite, "clusters": load_cluster}
RUN_CONFIGS = [name for name in shipped_configs() if LOADERS[name.split("/")[0]] is load_run_config]


def text_of(name: str) -> str:
    return (config_folders()[0] / name).read_text()


def comment_of(name: str) -> str:
    """The comment a config opens with."""
    lines = text_of(name).splitlines()
    return "\n".join(line for line in lines[: next(i for i, x in enumerate(lines) if not x.startswith("#"))])


def test_there_are_configs_of_every_kind():
    assert {name.split("/")[0] for name in shipped_configs()} == set(LOADERS)


@pytest.mark.parametrize("name", shipped_configs())
def test_every_config_loads_and_checks(name):
    config = LOADERS[name.split("/")[0]](name)
    assert "valid" in check_config(name)
    assert type(config).model_validate(parse_yaml(resolved_yaml(config), name).data) == config


@pytest.mark.parametrize("name", [n for n in shipped_configs() if n.startswith("runs/")])
def test_every_run_opens_with_command_hardware_hours_and_metric(name):
    for heading in ("Command:", "Hardware:", "Hours:", "Metric:"):
        assert f"# {heading} " in comment_of(name), f"{name} does not say its {heading}"


@pytest.mark.parametrize("name", shipped_configs())
def test_files_named_in_comments_exist(name):
    for other in re.findall(r"(?:runs|suites|clusters|debug)/[\w.-]+\.yaml", text_of(name)):
        assert other in shipped_configs(), f"{name} names {other}"


def commands() -> list[tuple[str, str]]:
    """(config, command) for each `trichord ...` line of the opening comments."""
    found = []
    for name in shipped_configs():
        for command in re.findall(r"^#\s+(?:Command:\s+)?(trichord [^(\n]+)", comment_of(name), re.MULTILINE):
            found.append((name, command.strip()))
    return found


@pytest.mark.parametrize(("name", "command"), commands())
def test_commands_in_comments_are_verbs(name, command, capsys):
    words = command.split()[1:]
    verb = words[: 2 if words[0] in ("data", "config", "track", "bench", "selftest") else 1]
    assert main([*verb, "--help"]) == 0
    help_text = capsys.readouterr().out
    for option in (word for word in words if word.startswith("--")):
        assert option in help_text, f"{name}: `{command}` has no option {option}"


@pytest.mark.parametrize(("name", "gpus"), [("runs/one-billion-8gpu.yaml", 8), ("runs/nine-billion-512gpu.yaml", 512)])
def test_big_runs_fill_their_cluster_evenly(name, gpus):
    config = load_run_config(name)
    cluster = next(
        load_cluster(c) for c in shipped_configs() if c.startswith("clusters/") and c[9:] in comment_of(name)
    )
    assert cluster.num_gpus == gpus
    assert config.batches.rows_per_step % (gpus * config.batches.micro_rows) == 0


# Rows of the released tokenizers' embeddings; the trunk's share of the parameters depends on it.
QWEN3_VOCAB_SIZE = 151_936
SIZES = [
    ("runs/one-billion-8gpu.yaml", {"vision": 0.30, "audio": 0.088, "trunk": 0.596}, 0.99),
    ("runs/nine-billion-512gpu.yaml", {"vision": 0.41, "audio": 0.637, "trunk": 8.19}, 9.28),
]


def count_billions(config: RunConfig, vocab_size: int) -> dict[str, float]:
    """Parameters by the model's top-level part, built on the meta device."""
    import torch

    from trichord.fusion.model import build_model

    special = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "image_id": 3, "audio_id": 4}
    with torch.device("meta"):
        model = build_model(
            config.encoders, config.fusion, config.objectives, config.samples, config.layers, vocab_size, special
        )
    counts: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel() / 1e9
    return counts


@pytest.mark.parametrize(("name", "parts", "total"), SIZES)
def test_big_models_have_the_size_they_claim(name, parts, total):
    counts = count_billions(load_run_config(name), QWEN3_VOCAB_SIZE)
    for part, billions in parts.items():
        assert counts[part] == pytest.approx(billions, rel=0.03), (part, counts)
    assert sum(counts.values()) == pytest.approx(total, rel=0.02), counts


@pytest.mark.parametrize("name", [n for n in RUN_CONFIGS if "billion" not in n])
def test_small_models_build(name):
    assert 0 < sum(count_billions(load_run_config(name), 300).values()) < 0.005


def test_configs_travel_in_the_package_or_the_repository():
    assert all(Path(folder).name == "configs" for folder in config_folders())
