"""The command line: verbs only, nobody imports it. A verb imports what it needs when it is called, so `trichord --help`
needs neither torch nor the time to load it.

A mistake of the user ends in one message on stderr and the exit code of its error class; a bug keeps its traceback.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from trichord import __version__
from trichord.core.errors import EXIT_CONFIG, EXIT_DONE, EXIT_UNEXPECTED, ConfigError, DataError, TrichordError

MAX_TEXT_BYTES = 2**20
EXIT_INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended

_PLAIN = {"rich_markup_mode": None, "no_args_is_help": True, "add_completion": False, "pretty_exceptions_enable": False}
app = typer.Typer(
    name="trichord", help="Pretraining of vision-language-audio transformers, from tar shards up.", **_PLAIN
)
data_app = typer.Typer(help="Shards, their sidecars, tokenizers.", **_PLAIN)
config_app = typer.Typer(help="Show, check and start configs.", **_PLAIN)
track_app = typer.Typer(help="The Weights & Biases mirror.", **_PLAIN)
bench_app = typer.Typer(help="What this machine reaches, against a stated baseline.", **_PLAIN)
for _group, _name in ((data_app, "data"), (config_app, "config"), (track_app, "track"), (bench_app, "bench")):
    app.add_typer(_group, name=_name)

ConfigPath = Annotated[str, typer.Argument(help="YAML file, or the name of a shipped one (runs/quickstart.yaml).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Values on top of the file: engine.lr=3e-4", metavar="[A.B=C]...")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the result here, as JSON.")]
RunPath = Annotated[Path, typer.Argument(help="Run folder, such as runs/NAME.")]


class TokenizerKind(str, Enum):
    bpe = "bpe"
    unigram = "unigram"
    word = "word"


class ConfigKind(str, Enum):
    run = "run"
    suite = "suite"
    cluster = "cluster"


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def quickstart(
    prove: Annotated[bool, typer.Option(help="Also run undisturbed, and compare digests and losses.")] = False,
    voices: Annotated[bool, typer.Option(help="Add seven voices from Debian packages (Debian, Ubuntu).")] = False,
    data_only: Annotated[bool, typer.Option(help="Write the shards and stop.")] = False,
    steps: Annotated[int | None, typer.Option(min=4, help="Length of training; default: the config's.")] = None,
    root: Annotated[Path, typer.Option(help="Where run folders go.")] = Path("runs"),
    data: Annotated[Path, typer.Option(help="Where the shards go.")] = Path("data/quickstart"),
) -> None:
    """Real data -> shards -> train -> kill -> resume -> evaluate -> export -> report."""
    from trichord.quickstart.story import Quickstart

    walk = Quickstart(data=data, runs=root, steps=steps, voices=voices)
    if data_only:
        walk.build_data()
        print(data)
        return
    result = walk.walk(prove=prove)
    _print_metrics(result["metrics"])


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> int:
    """Train: one process, or one rank of many under torchrun or trichord-launch."""
    from trichord.config.identity import inspect_run_folder
    from trichord.config.load import load_run_config
    from trichord.core.dist import rank_facts

    run_config = load_run_config(config, overrides or [])
    if rank_facts().rank == 0:  # the others may come when rank 0 has already begun to write there
        inspect_run_folder(run_config)  # a run that cannot go on is told before torch is loaded
    from trichord.train import run

    return run(run_config)


@app.command()
def evaluate(
    path: Annotated[Path, typer.Argument(help="Run folder or checkpoint folder.")],
    suite: Annotated[str, typer.Argument(help="Suite file, or the name of a shipped one (suites/quickstart.yaml).")],
    json_file: JsonFile = None,
) -> None:
    """Metrics of a checkpoint on the sources of a suite, as a table and JSON."""
    from trichord.config.load import load_suite

    load_suite(suite)  # a mistake in it is told before torch is loaded
    from trichord.core.log import configure_logging
    from trichord.evaluate import evaluate as evaluate_checkpoint

    configure_logging()
    result = evaluate_checkpoint(path, suite)
    _print_metrics(result["metrics"])
    _write_json(json_file, result)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, or a run folder for its newest one.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist yet.")],
) -> None:
    """Write a checkpoint in Hugging Face format."""
    if out.exists():
        raise ConfigError(f"{out} exists already; an export never overwrites: name a new folder, or remove it")
    from trichord.release.export import export_checkpoint
    from trichord.restore import restore

    restored = restore(checkpoint)
    weights = dict(restored.model.named_parameters())
    facts = {"run": restored.config.run.name, "step": restored.step}
    print(export_checkpoint(weights, restored.config, restored.tokenizer, out, facts=facts))


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    json_file: JsonFile = None,
) -> None:
    """Parameters and memory per GPU of a run, before it runs."""
    from trichord.config.load import load_run_config

    run_config = load_run_config(config, overrides or [])
    from trichord.planning.plan import plan as make_plan
    from trichord.planning.plan import render_plan

    facts = make_plan(run_config, gpus)
    print(render_plan(facts))
    _write_json(json_file, facts)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, such as runs/NAME.")],
    out: Annotated[Path | None, typer.Option(help="The page; default: report.html in the first run's folder.")] = None,
) -> None:
    """One self-contained HTML page from the records of one or more runs."""
    from trichord.tracking.report import render_report

    out = out or runs[0] / "report.html"
    render_report(runs, out)
    print(out)


@track_app.command("sync")
def track_sync(run: RunPath) -> None:
    """Rebuild the run on Weights & Biases from its metrics.jsonl."""
    from trichord.tracking.wandb import sync_run

    result = sync_run(run)
    print(f"{result.rows} steps, run {result.run_id} ({result.mode}): {result.location}")


@bench_app.command("kernels")
def bench_kernels(
    static: Annotated[bool, typer.Option("--static", help="Judge the compiled kernels; needs no GPU.")] = False,
    archs: Annotated[
        list[str] | None, typer.Option("--arch", help="With --static: sm_90 and so on, repeatable; default: all.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_file: JsonFile = None,
) -> int:
    """Time every kernel against plain torch, or let the compiler judge it: exit code 1 if it fails a bar."""
    if archs and not static:
        raise ConfigError("--arch is for --static; timings are of the device that is there, see --device")
    if static:
        rows = _static_rows(archs)
    else:
        from trichord_kernels.bench import bench_kernels as run_bench

        rows = run_bench(device)
        _print_rows(rows)
    _write_json(json_file, rows)
    return EXIT_UNEXPECTED if any(row.get("failures") for row in rows) else EXIT_DONE


def _static_rows(archs: list[str] | None) -> list[dict]:
    from trichord_kernels.errors import KernelError
    from trichord_kernels.static import render_table, static_report

    try:
        rows = static_report(archs)
    except KernelError as error:
        raise ConfigError(str(error)) from error
    print(render_table(rows))
    return rows


@data_app.command("build")
def data_build(
    source: Annotated[
        Path, typer.Argument(help="Folder of files, or a .csv or .jsonl table (image, audio, text, ...).")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    prefix: Annotated[str, typer.Option(help="Shards are called PREFIX-000000.tar and so on.")] = "shard",
    samples_per_shard: Annotated[int, typer.Option(min=1)] = 10_000,
) -> None:
    """Shards with their sidecars from a folder or a table."""
    from trichord.core.log import configure_logging
    from trichord.shards.build import build_shards, rows_from_folder, rows_from_table

    configure_logging()
    rows = rows_from_table(source) if source.suffix in (".csv", ".jsonl") else rows_from_folder(source)
    for shard in build_shards(rows, out, prefix, samples_per_shard):
        print(shard)


@data_app.command("index")
def data_index(
    shards: Annotated[list[str], typer.Argument(help="Paths, globs, brace ranges or URLs of tar files.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
) -> None:
    """Make the sidecars (.idx, .len) of shards, or make stale ones anew."""
    from trichord.core.log import configure_logging
    from trichord.shards.index import index_shards
    from trichord.shards.sources import expand_shards
    from trichord.tracking.progress import work_progress

    configure_logging()
    urls = expand_shards(_source(shards))
    with work_progress("index", len(urls)) as advance:
        headers = index_shards(urls, workers, lambda done, total, url: advance(1))
    damaged = [header for header in headers if header.damage is not None]
    print(f"{len(headers)} shards, {sum(header.num_samples for header in headers)} samples, {len(damaged)} damaged")
    for header in damaged:
        print(f"{header.url}: {header.damage}")


@data_app.command("tokenizer")
def data_tokenizer(
    sources: Annotated[list[str], typer.Argument(help="Folders of shards, shards, or text files (a text per line).")],
    out: Annotated[Path, typer.Option(help="Folder for the tokenizer.")],
    kind: Annotated[TokenizerKind, typer.Option(help="Sort of tokenizer.")] = TokenizerKind.bpe,
    vocab_size: Annotated[int, typer.Option(min=1)] = 32_000,
) -> None:
    """Train a tokenizer on the texts of files or shards."""
    from trichord.batches.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(_texts(sources), kind.value, vocab_size, out)
    print(f"{out}: {tokenizer.vocab_size} tokens")


@config_app.command("show")
def config_show(config: ConfigPath, overrides: Overrides = None) -> None:
    """The whole resolved config, defaults included."""
    from trichord.config.load import load_run_config, resolved_yaml

    print(resolved_yaml(load_run_config(config, overrides or [])), end="")


@config_app.command("check")
def config_check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Is this run config, suite or cluster file valid? Every mistake with file, line and the nearest valid key."""
    from trichord.config.load import check_config

    print(check_config(config, overrides or []))


@config_app.command("schema")
def config_schema(of: Annotated[ConfigKind, typer.Option(help="Which kind of file.")] = ConfigKind.run) -> None:
    """JSON Schema for editors."""
    from trichord.config.schema import cluster_schema, run_schema, suite_schema

    make = {ConfigKind.run: run_schema, ConfigKind.suite: suite_schema, ConfigKind.cluster: cluster_schema}[of]
    print(json.dumps(make(), indent=2))


@config_app.command("new")
def config_new(
    name: Annotated[str, typer.Argument(help="Name of the run; the file is NAME.yaml in this folder.", metavar="NAME")],
    like: Annotated[str, typer.Option(help="Shipped config to start from.")] = "runs/quickstart.yaml",
) -> None:
    """Copy a shipped config, comments and all, under a new name."""
    from trichord.config.load import new_config

    print(new_config(name.removesuffix(".yaml"), like))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Only bugs leave as exceptions."""
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        result = app(args=words, prog_name="trichord", standalone_mode=False)
        return result if isinstance(result, int) else EXIT_DONE
    except TrichordError as error:
        return _fail(str(error), error.exit_code)
    except typer.Abort:  # what click makes of Ctrl-C
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except _UsageError as error:
        if (help_text := error.format_message()).startswith("Usage:"):  # called without a verb
            print(help_text, file=sys.stderr)
            return EXIT_CONFIG
        command = error.ctx.command_path if getattr(error, "ctx", None) else "trichord"
        return _fail(f"{help_text.rstrip('.')}; see `{command} --help`", EXIT_CONFIG)
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        return _fail(f"this needs {error.name}, which is not installed; pip install 'trichord[{extra}]'", EXIT_CONFIG)


# typer carries click inside, or beside it, depending on its version
_UsageError: type[Exception] = cast(Any, typer.BadParameter).__bases__[0]
_EXTRA_OF = {
    **dict.fromkeys(("torch", "triton"), "kernels"),
    **dict.fromkeys(("deepspeed", "transformers", "timm", "accelerate", "webdataset", "wandb", "safetensors"), "train"),
    **dict.fromkeys(("tokenizers", "huggingface_hub", "PIL", "soundfile", "matplotlib", "psutil", "numpy"), "train"),
    **dict.fromkeys(("sklearn", "scipy", "captcha", "torchvision"), "train"),
    "s3fs": "s3",
    "ray": "ray",
}


def _fail(message: str, code: int) -> int:
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    rank = f"[rank {os.environ.get('RANK', '?')}] " if several else ""
    print(f"{rank}error: {message}", file=sys.stderr)
    return code


def _source(shards: list[str]):
    from trichord.shards.config import SourceConfig

    return SourceConfig(name="arguments", shards=tuple(shards))


def _texts(sources: list[str]) -> Iterator[str]:
    """Lines of text files, and the text members of shards (`.tar`, or all in a folder)."""
    from trichord.shards.config import ShardsConfig
    from trichord.shards.reader import open_sources, read_member

    sources = [f"{source}/*.tar" if Path(source).is_dir() else source for source in sources]
    for file in (Path(source) for source in sources if not source.endswith(".tar")):
        try:
            yield from file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: expected a UTF-8 text file or shards named *.tar, got {error}") from error
    shards = [source for source in sources if source.endswith(".tar")]
    for table in open_sources(ShardsConfig(sources=(_source(shards),))) if shards else ():
        for entry in map(table.entry, range(table.num_samples)):
            if entry.problem is None and "text" in entry.members:
                yield read_member(entry, "text", MAX_TEXT_BYTES).decode("utf-8", errors="replace")


def _write_json(file: Path | None, data: object) -> None:
    if file is None:
        return
    try:
        file.write_text(json.dumps(data, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {file}: cannot be written: {error.strerror}") from error


def _print_metrics(metrics: dict[str, dict]) -> None:
    rows = [{"metric": name, **{k: v for k, v in row.items() if v not in (None, "")}} for name, row in metrics.items()]
    _print_rows(rows)


def _print_rows(rows: list[dict]) -> None:
    """A plain table: one line per row, columns in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
