"""What users get wrong: each mistake ends in one clear message, the right exit code, and no traceback."""

import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cli_world import in_a_fork, png

USAGE, DATA, CHECKPOINT = 2, 3, 4


@dataclass(frozen=True)
class Mistake:
    """arguments of `trichord`; code: exit code; words: in the message; spoil: makes the mistake in the folder."""

    name: str
    arguments: str
    code: int
    words: str
    spoil: Callable[[Path], None] = lambda world: None
    environment: tuple[tuple[str, str], ...] = ()


def edit(old: str, new: str) -> Callable[[Path], None]:
    """Replace text in c.yaml."""

    def change(world: Path) -> None:
        text = (world / "c.yaml").read_text()
        assert old in text
        (world / "c.yaml").write_text(text.replace(old, new, 1))

    return change


def shard_of(members: dict[str, bytes]) -> Callable[[Path], None]:
    """Make shards/ hold one tar of these members, without sidecars."""

    def write(world: Path) -> None:
        shutil.rmtree(world / "shards")
        (world / "shards").mkdir()
        with tarfile.open(world / "shards" / "a.tar", "w") as tar:
            for name, content in members.items():
                (world / "member").write_bytes(content)
                tar.add(world / "member", name)

    return write


def put(name: str, content: str | bytes) -> Callable[[Path], None]:
    def write(world: Path) -> None:
        file = world / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def spoil_checkpoint(world: Path) -> None:
    """Cut the file of weights of every checkpoint in half."""
    for file in (world / "runs" / "demo" / "checkpoints").glob("step-*/rank-*.safetensors"):
        os.truncate(file, file.stat().st_size // 2)


def drop_checkpoints(world: Path) -> None:
    shutil.rmtree(world / "runs" / "demo" / "checkpoints")


OVERLAY = "engine:\n  rl: 3\n"
NO_SHARDS = "train c.yaml shards.sources.0.shards=none/*.tar"  # a mistake that is told before shards are looked for

COMMAND_LINE = [
    Mistake("no verb", "", USAGE, "Usage: trichord"),
    Mistake("unknown verb", "trian c.yaml", USAGE, "No such command 'trian'"),
    Mistake("unknown option", "train c.yaml --gpus 3", USAGE, "No such option: --gpus"),
    Mistake("config left out", "train", USAGE, "Missing argument"),
    Mistake("option of a wrong type", "plan c.yaml --gpus many", USAGE, "should be a valid integer"),
    Mistake("option out of range", "plan c.yaml --gpus 0", USAGE, "greater than or equal to 1"),
    Mistake("unknown architecture", "bench kernels --static --arch sm_9", USAGE, "sm_100, gfx942, got sm_9"),
    Mistake("architecture of no compilation", "bench kernels --arch sm_90", USAGE, "--jobs are for --static"),
    Mistake("log of no timings", "bench kernels --static --log l.md", USAGE, "--log is for timings"),
    Mistake("log that cannot be", "bench kernels --op merge_embeddings --log no/l.md", USAGE, "No such file"),
    Mistake("unknown op", "bench kernels --op atention", USAGE, "got atention"),
    Mistake("unknown op to judge", "bench kernels --static --op atention", USAGE, "got atention"),
    Mistake("device of no choice", "bench kernels --device tpu", USAGE, "'tpu' is not one of 'cpu', 'cuda'"),
    Mistake("unknown choice", "data tokenizer x.txt --out t --kind bert", USAGE, "'bert' is not one of 'bpe'"),
]
CONFIG = [
    Mistake("no such config", "train d.yaml", USAGE, "d.yaml: no such file, and no shipped config of that name"),
    Mistake("folder as config", "train runs", USAGE, "expected a YAML file, got a folder", put("runs/x", "")),
    Mistake("bad YAML", "train c.yaml", USAGE, "c.yaml:2: not valid YAML", edit("run: {", "run: {{")),
    Mistake("tab in YAML", "train c.yaml", USAGE, "c.yaml:3: not valid YAML", edit("  window", "\twindow")),
    Mistake("empty config", "train c.yaml", USAGE, "the file is empty", put("c.yaml", "")),
    Mistake("binary config", "train c.yaml", USAGE, "expected UTF-8 text", put("c.yaml", b"\xff\xfe\x00")),
    Mistake("unknown key", "train c.yaml", USAGE, "c.yaml:17: engine.zerostage: unknown key", edit("zero_s", "zeros")),
    Mistake("wrong type", "train c.yaml", USAGE, "c.yaml:1: run.max_steps: expected a valid", edit("s: 2", "s: two")),
    Mistake("wrong value", "train c.yaml engine.precision=fp8", USAGE, "expected 'fp32', 'bf16', 'fp16' or"),
    Mistake("key twice", "train c.yaml", USAGE, "c.yaml:1: run.name: key given twice", edit("{name", "{name: x, name")),
    Mistake("key missing", "train c.yaml", USAGE, "batches.tokenizer: required key", edit("tokenizer: tok, ", "")),
    Mistake("override without a value", "train c.yaml engine.lr", USAGE, "expected KEY.PATH=VALUE"),
    Mistake("overlay that is not there", "train c.yaml o.yaml", USAGE, "o.yaml: no such file"),
    Mistake("overlay of a list", "train c.yaml o.yaml", USAGE, "expected an overlay with keys", put("o.yaml", "- 1")),
    Mistake("overlay with a bad key", "train c.yaml o.yaml", USAGE, "o.yaml:2: engine.rl", put("o.yaml", OVERLAY)),
    Mistake("override of an unknown key", "train c.yaml engine.rl=1", USAGE, "nearest valid key: engine.lr"),
    Mistake("pipe URL", "train c.yaml", USAGE, "runs a shell command and is refused", edit("shards/*.tar", "pipe:ls")),
    Mistake("pair without its tower", "train c.yaml encoders.text=null", USAGE, "set encoders.text"),
    Mistake("stage 0 with bf16", "train c.yaml engine.precision=bf16", USAGE, "use zero_stage 1"),
    Mistake("remote run root", "train c.yaml run.root=s3://b/r", USAGE, "must be a folder on a mounted"),
    Mistake("run root is a file", "train c.yaml run.root=file", USAGE, "cannot be written", put("file", "")),
    Mistake("overlay that is checked", "config check c.yaml engine.deepspeed.bf61=1", USAGE, "nearest: bf16"),
    Mistake("no such example", "config new a --like runs/none.yaml", USAGE, "no shipped config of that name"),
    Mistake("bad run name", "config new a/b", USAGE, "run.name: expected text matching"),
    Mistake("config exists", "config new c", USAGE, "c.yaml exists"),
    Mistake("bad rank", "train c.yaml", USAGE, "RANK must be an integer", environment=(("RANK", "first"),)),
]
MODEL = [
    Mistake("no tokenizer", f"{NO_SHARDS} batches.tokenizer=tk", USAGE, "tk"),
    Mistake("unknown model name", "train c.yaml encoders.vision.name=vit_tini", USAGE, "'vit_tini' is no timm model"),
    Mistake("pictures of no whole patches", "train c.yaml samples.image.size=20", USAGE, "set it to 16 or 24"),
    Mistake("bad model option", "train c.yaml encoders.vision.options.num_heads=3", USAGE, "timm cannot build"),
    Mistake(
        "DeepSpeed overlay conflict", f"{NO_SHARDS} engine.deepspeed.gradient_clipping=7", USAGE, "engine.max_grad_norm"
    ),
    Mistake(
        "DeepSpeed key that is none",
        f"{NO_SHARDS} engine.deepspeed.zero_optimization.overlap_com=true",
        USAGE,
        "nearest: overlap_comm",
    ),
    Mistake(
        "DeepSpeed key that it fails at",
        "train c.yaml engine.zero_stage=1 engine.deepspeed.zero_optimization.legacy_stage1=true",
        USAGE,
        "DeepSpeed does not take engine.deepspeed (zero_optimization): Exception: The deprecated",
    ),
    Mistake(
        "no fp16 on a CPU",
        f"{NO_SHARDS} engine.zero_stage=1 engine.precision=fp16",
        USAGE,
        "fp16 does not run on this device",
        environment=(("CUDA_VISIBLE_DEVICES", ""), ("DS_ACCELERATOR", "cpu")),
    ),
    Mistake(
        "GPU that is not there",
        "bench kernels --device cuda",
        USAGE,
        "no GPU here",
        environment=(("CUDA_VISIBLE_DEVICES", ""),),
    ),
    Mistake("init_from nowhere", f"{NO_SHARDS} run.init_from=nowhere", USAGE, "nothing is at 'nowhere'"),
    Mistake("mirror nowhere", f"{NO_SHARDS} checkpoints.mirror=foo://x", USAGE, "checkpoints.mirror: checkpoints at"),
]
DATASET = [
    Mistake("no such shards", "train c.yaml shards.sources.0.shards=s/*.tar", DATA, "no shard matches 's/*.tar'"),
    Mistake("a named shard is missing", "train c.yaml shards.sources.0.shards=s.tar", DATA, "s.tar"),
    Mistake("empty shard file", "train c.yaml", DATA, "shards", put("shards/shard-000000.tar", b"")),
    Mistake("shard without samples", "train c.yaml", DATA, "no sample", shard_of({})),
    Mistake(
        "shard that is no tar", "train c.yaml", DATA, "shard-000000.tar", put("shards/shard-000000.tar", b"x" * 2000)
    ),
    Mistake(
        "samples lack a field", "train c.yaml shards.sources.0.require=[audio]", DATA, "the sample has no audio, which"
    ),
    Mistake(
        "images that are none",
        "train c.yaml",
        DATA,
        "bad",
        shard_of({f"{i}.png": b"GIF" for i in range(9)}),
    ),
    Mistake(
        "compressed shard", "train c.yaml shards.sources.0.shards=a.tar.xz", DATA, "compressed", put("a.tar.xz", "")
    ),
    Mistake(
        "unknown file system",
        "train c.yaml shards.sources.0.shards=zz://a.tar",
        USAGE,
        "'zz://a.tar': Protocol not known: zz; expected a path, file://, s3://",
    ),
    Mistake("index of nothing", "data index none/*.tar", DATA, "no shard matches"),
    Mistake("index of a lost shard", "data index gone.tar", DATA, "error: gone.tar: no such file"),
    Mistake("index of a pipe", "data index pipe:ls", USAGE, "pipes are never run"),
    Mistake("split of a pipe", "data split pipe:ls --by a --out out", USAGE, "pipes are never run"),
    Mistake("lint of a pipe", "data lint pipe:ls", USAGE, "pipes are never run"),
    Mistake("stats of a pipe", "data stats pipe:a.tar", USAGE, "pipes are never run"),
    Mistake("tokenizer of a pipe", "data tokenizer pipe:ls --out t", USAGE, "pipes are never run"),
    Mistake("build from nothing", "data build none --out out", DATA, "no file or folder none"),
    Mistake("build from a bare folder", "data build bare --out out", USAGE, "--from folder (", put("bare/x.exe", "")),
    Mistake("build over shards", "data build pics --out shards", USAGE, "is there already", put("pics/1.png", png(1))),
    Mistake(
        "table names a lost file",
        "data build t.csv --out out",
        DATA,
        "gone.png",
        put("t.csv", "image,text\ngone.png,x\n"),
    ),
    Mistake("lint of no config", "data lint d.yaml", USAGE, "d.yaml: no such file"),
    Mistake(
        "index of a bare folder", "data index bare", DATA, "bare: expected a folder that holds .tar", put("bare/x", "")
    ),
    Mistake("stats of no shards", "data stats none/*.tar --workers 1", DATA, "no shard matches"),
    Mistake("balance of one class", "data stats shards --balance-by kind --workers 1", USAGE, "at least two classes"),
    Mistake(
        "beta out of range", "data stats shards --balance-by source --beta 2 --workers 1", USAGE, "less than 1, got 2"
    ),
    Mistake("preview of a shard", "data preview shards/shard-000000.tar", USAGE, "takes a config, since rows"),
    Mistake(
        "preview of no rank", "data preview c.yaml --rank 3 --world-size 2", USAGE, "less than --world-size 2, got 3"
    ),
    Mistake("tokenizer exists", "data tokenizer c.yaml --out tok", USAGE, "already holds a tokenizer.json"),
    Mistake("vocabulary too small", "data tokenizer c.yaml --out t --vocab-size 9", USAGE, "at least"),
    Mistake("no such text", "data tokenizer gone.txt --out t", DATA, "gone.txt: no such file"),
    Mistake("text file is empty", "data tokenizer none.txt --out t", USAGE, "no text", put("none.txt", "")),
]
FINISHED = [
    Mistake(
        "another model", "train c.yaml encoders.text.hidden_size=32", CHECKPOINT, "hidden_size: 16 in the run, 32 now"
    ),
    Mistake("a key that may not change", "train c.yaml run.seed=9", CHECKPOINT, "run.seed: 0 in the run, 9 now"),
    Mistake("resume is never", "train c.yaml run.resume=never", USAGE, "exists and run.resume is never"),
    Mistake("branch of no run", "train c.yaml run.name=b run.resume=x@1", CHECKPOINT, "no run folder at x"),
    Mistake("branch at no step", "train c.yaml run.name=b run.resume=demo@7", CHECKPOINT, "7"),
    Mistake("branch onto itself", "train c.yaml run.resume=demo@1", USAGE, "needs a run.name of its own"),
    Mistake("malformed branch", "train c.yaml run.resume=demo@last", USAGE, "run.resume: expected text matching"),
    Mistake("two starting points", "train c.yaml run.name=b run.resume=demo@1 run.init_from=x", USAGE, "both starting"),
    Mistake(
        "every checkpoint is cut",
        "train c.yaml run.max_steps=3",
        CHECKPOINT,
        "none of the 2 checkpoints there is complete, so the run cannot go on",
        spoil_checkpoint,
    ),
    Mistake("evaluate no run", "evaluate none suites/quickstart.yaml", CHECKPOINT, "none"),
    Mistake("evaluate with no suite", "evaluate runs/demo s.yaml", USAGE, "s.yaml: no such file"),
    Mistake(
        "evaluate without a checkpoint", "evaluate runs/demo suites/quickstart.yaml", CHECKPOINT, "", drop_checkpoints
    ),
    Mistake("export from no run", "export none out", CHECKPOINT, "none"),
    Mistake("export without a checkpoint", "export runs/demo out", CHECKPOINT, "checkpoint", drop_checkpoints),
    Mistake("export an average there is none of", "export runs/demo out --ema", CHECKPOINT, "no engine.ema_decay"),
    Mistake("export folder exists", "export runs/demo out", USAGE, "out", put("out/config.json", "{}")),
    Mistake("report on no run", "report none", USAGE, "none"),
    Mistake("sync of no run", "track sync none", USAGE, "none"),
]


def check(mistake: Mistake, world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    mistake.spoil(folder)
    ended = in_a_fork(mistake.arguments.split(), folder, dict(mistake.environment), limit_s=30)
    assert "Traceback" not in ended.stderr, ended.stderr
    assert "leaving without saving" not in ended.stderr, "the same is told twice"
    assert mistake.words in ended.stderr
    assert ended.code == mistake.code, ended.stderr
    if not ended.stderr.startswith("Usage:"):
        assert ended.stderr.count("error: ") == 1, ended.stderr


def named(mistakes: list[Mistake]):
    return pytest.mark.parametrize("mistake", mistakes, ids=[mistake.name for mistake in mistakes])


@named(COMMAND_LINE + CONFIG)
def test_mistakes_on_the_command_line_and_in_configs(mistake, tiny_world, tmp_path):
    check(mistake, tiny_world, tmp_path)


@named(MODEL + DATASET)
def test_mistakes_in_models_and_data(mistake, imported, tiny_world, tmp_path):
    check(mistake, tiny_world, tmp_path)


@named(FINISHED)
def test_mistakes_with_a_run_that_stands(mistake, finished_world, tmp_path):
    check(mistake, finished_world, tmp_path)
