"""Every verb does its work once, on a tiny run."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
from cli_world import in_a_fork, png, wav

from trichord.cli import main

SUITE = """\
name: tiny
sources:
  - {name: things, shards: shards/*.tar}
tasks:
  - {kind: retrieval, source: things, pair: image-text}
"""


@pytest.fixture
def world(tiny_world, tmp_path, monkeypatch):
    """A copy of the tiny world, and the place to be."""
    folder = tmp_path / "world"
    shutil.copytree(tiny_world, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def finished(finished_world, tmp_path):
    folder = tmp_path / "world"
    shutil.copytree(finished_world, folder)
    return folder


def run(folder, *arguments: str) -> str:
    ended = in_a_fork(list(arguments), folder)
    assert ended.code == 0, ended.stderr
    return ended.stdout


def test_config_verbs(world, capsys):
    assert main(["config", "show", "c.yaml", "engine.lr=2e-5", "run.name=x"]) == 0
    (world / "shown.yaml").write_text(capsys.readouterr().out)
    assert main(["config", "check", "shown.yaml", "c.yam"]) == 2  # neither an override nor an overlay
    assert main(["config", "check", "shown.yaml"]) == 0
    assert "valid config of run 'x'" in capsys.readouterr().out
    for kind in ("run", "suite", "cluster"):
        assert main(["config", "schema", "--of", kind]) == 0
        assert json.loads(capsys.readouterr().out)["type"] == "object"


def test_a_new_config_keeps_the_comments_and_takes_the_name(world, capsys):
    assert main(["config", "new", "mine.yaml", "--like", "runs/one-billion-8gpu.yaml"]) == 0
    assert capsys.readouterr().out == "mine.yaml\n"
    text = (world / "mine.yaml").read_text()
    assert 'name: "mine"' in text
    assert text.startswith("# ")
    assert main(["config", "check", "mine.yaml"]) == 0


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.count(".") == 2
    assert main(["data", "build", "--help"]) == 0
    assert "--samples-per-shard" in capsys.readouterr().out


def test_data_verbs_go_from_files_to_shards_to_a_tokenizer(world, capsys):
    (world / "pairs").mkdir()
    for i in range(3):
        (world / "pairs" / f"{i}.png").write_bytes(png(i))
        (world / "pairs" / f"{i}.wav").write_bytes(wav())
        (world / "pairs" / f"{i}.txt").write_text(f"word{i} again")
    assert main(["data", "build", "pairs", "--out", "mine", "--samples-per-shard", "2"]) == 0
    assert capsys.readouterr().out.split() == ["mine/shard-000000.tar", "mine/shard-000001.tar"]
    (world / "mine" / "shard-000000.len").unlink()
    assert main(["data", "index", "mine/*.tar", "--workers", "1"]) == 0
    assert "2 shards, 3 samples, 0 damaged" in capsys.readouterr().out
    assert (world / "mine" / "shard-000000.len").is_file()
    source = "shards.sources.things={name: things, shards: mine, fields: {text: [txt, label]}}"
    assert main(["data", "index", "c.yaml", source, "shards.storage.cache_dir=kept", "--workers", "1"]) == 0
    assert "2 shards, 3 samples, 0 damaged" in capsys.readouterr().out
    assert '["text","label"]' in (world / "mine" / "shard-000000.len").read_text().splitlines()[0]
    for name in ("a", "b"):
        (world / "mine" / f"{name}.tar").write_bytes(name.encode() * 999)
    (world / "mine" / "shard-000001.len").unlink()
    assert main(["data", "index", "mine", "--workers", "1"]) == 3
    printed = capsys.readouterr()
    assert "2 shards, 3 samples" in printed.out
    assert (world / "mine" / "shard-000001.len").is_file()
    assert "2 of 4 shards are not indexed; the others are\n  shard mine/a.tar is no tar file" in printed.err
    assert "\n  shard mine/b.tar is no tar file" in printed.err
    for name in ("a", "b"):
        (world / "mine" / f"{name}.tar").unlink()
    assert main(["data", "tokenizer", "mine", "--out", "words", "--kind", "word", "--vocab-size", "32"]) == 0
    assert set(json.loads((world / "words" / "tokenizer.json").read_text())["model"]["vocab"]) > {"word0", "again"}


def test_a_vocabulary_that_came_out_smaller_says_why(world, capsys):
    (world / "t.txt").write_text("aa ab aa ab\n" * 9)
    for kind, why in (("bpe", "nothing is left to merge"), ("word", "no more different words"), ("unigram", "pieces")):
        assert main(["data", "tokenizer", "t.txt", "--out", kind, "--kind", kind, "--vocab-size", "300"]) == 0
        printed = capsys.readouterr().out
        assert "fewer than the 300 asked for: " in printed
        assert why in printed
    assert main(["data", "tokenizer", "t.txt", "--out", "fits", "--kind", "word", "--vocab-size", "8"]) == 0
    assert "fewer" not in capsys.readouterr().out


def test_a_table_becomes_shards(world, capsys):
    (world / "a.png").write_bytes(png(1))
    (world / "t.jsonl").write_text('{"image": "a.png", "text": "one", "score": 3}\n{"text": "two"}\n')
    assert main(["data", "build", "t.jsonl", "--out", "mine", "--prefix", "t"]) == 0
    assert capsys.readouterr().out == "mine/t-000000.tar\n"


def test_training_goes_on_with_the_same_command(finished):
    run(finished, "train", "c.yaml", "run.max_steps=3")
    steps = [json.loads(line)["step"] for line in (finished / "runs/demo/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    assert json.loads((finished / "runs/demo/status.json").read_text())["outcome"] == "finished"


def test_rank_0_looks_at_the_run_folder_before_torch_is_loaded(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    monkeypatch.setitem(sys.modules, "trichord.train", None)
    assert main(["train", "c.yaml", "run.seed=9"]) == 4
    assert "run.seed: 0 in the run, 9 now" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")  # may come when rank 0 has begun to write there: it must not judge
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ModuleNotFoundError):
        main(["train", "c.yaml", "run.seed=9"])


def test_evaluate_prints_a_table_and_writes_json(finished):
    (finished / "s.yaml").write_text(SUITE)
    printed = run(finished, "evaluate", "runs/demo", "s.yaml", "--json", "out.json")
    assert "image-text" in printed
    metrics = json.loads((finished / "out.json").read_text())["metrics"]
    assert all(0 <= row["value"] <= 1 for row in metrics.values())


def test_export_writes_a_folder_that_a_new_run_starts_from(finished):
    assert run(finished, "export", "runs/demo", "out") == "out\n"
    assert (finished / "out" / "model.safetensors").is_file()
    run(finished, "train", "c.yaml", "run.name=tuned", "run.init_from=out", "run.max_steps=1")


def test_the_average_of_the_weights_is_evaluated_and_exported(finished):
    run(finished, "train", "c.yaml", "run.name=average", "engine.ema_decay=0.9")
    assert run(finished, "export", "runs/average", "plain", "--no-ema") == "plain\n"
    assert run(finished, "export", "runs/average", "average", "--ema") == "average\n"
    assert "moving average (decay 0.9)" in (finished / "average/README.md").read_text()
    weights = [(finished / name / "model.safetensors").read_bytes() for name in ("plain", "average")]
    assert weights[0] != weights[1]
    (finished / "s.yaml").write_text(SUITE)
    assert "image-text" in run(finished, "evaluate", "runs/average", "s.yaml", "--ema")


def test_report_writes_one_page(finished):
    assert run(finished, "report", "runs/demo") == "runs/demo/report.html\n"
    assert "<html" in (finished / "runs/demo/report.html").read_text()


def test_plan_shows_memory_and_writes_json_and_no_overlay_where_nothing_fits(imported, world):
    (world / "plan.overlay.yaml").write_text("engine: {zero_stage: 3}\n")
    printed = run(world, "plan", "c.yaml", "--gpus", "4", "--host-gib", "2", "--save", "plan.json")
    assert "PREDICTION" in printed
    assert json.loads((world / "plan.json").read_text())["gpus"] == 4
    assert printed.endswith("plan.json\nno overlay: nothing fits\n")
    assert not (world / "plan.overlay.yaml").exists()


@pytest.mark.slow
def test_track_sync_rebuilds_an_offline_run(finished):
    assert "2 steps" in run(finished, "track", "sync", "runs/demo")
    assert list((finished / "runs/demo/wandb").glob("offline-run-*"))


@pytest.mark.slow
def test_bench_kernels_prints_rows(imported, world):
    assert "log_mel" in run(world, "bench", "kernels", "--op", "log_mel", "--json", "rows.json")
    assert json.loads((world / "rows.json").read_text())


def test_bench_kernels_adds_its_figures_to_a_log(world):
    (world / "log.md").write_text("# Log\n\n## Before\n")
    run(world, "bench", "kernels", "--op", "merge_embeddings", "--log", "log.md")
    lines = (world / "log.md").read_text().splitlines()
    assert lines[:3] == ["# Log", "", "## Before"]
    assert lines[4].endswith("Kernels on CPU")
    assert [line.split(" | ")[0] for line in lines if line.startswith("| merge_embeddings_fwd ")]


def test_bench_static_judges_the_named_architectures_and_fails_with_a_failed_bar(world, monkeypatch, capsys):
    from trichord_kernels.static import judge
    from trichord_kernels.static.cases import static_cases

    case = next(case for case in static_cases("sm_90") if case.name == "rms_norm_fwd.64.bf16")
    monkeypatch.setattr(judge, "op_cases", lambda op, arch: [case])
    command = ["bench", "kernels", "--static", "--op", "rms_norm", "--jobs=1", "--arch", "sm_90", "--json", "rows.json"]
    assert main([*command, "--arch", "sm_80"]) == 0
    assert [row["arch"] for row in json.loads((world / "rows.json").read_text())] == ["sm_90", "sm_80"]
    assert "2/2 rms_norm_fwd.64.bf16 on sm_80: done" in capsys.readouterr().err
    monkeypatch.setattr(judge, "op_cases", lambda op, arch: [case, replace(case, row_bytes=case.row_bytes // 2)])
    assert main(command) == 1
    assert "2 rows, 1 failed bars" in capsys.readouterr().out
    assert [len(row["failures"]) for row in json.loads((world / "rows.json").read_text())] == [0, 1]
