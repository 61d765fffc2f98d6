"""`trichord bench`: what this machine reaches, against a stated baseline."""

import os
import tempfile
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from trichord.cli.app import bench_app
from trichord.cli.arguments import JsonFile
from trichord.cli.output import print_rows, write_json
from trichord.core.errors import EXIT_DONE, EXIT_UNEXPECTED, ConfigError


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


@bench_app.command("kernels")
def bench_kernels(
    static: Annotated[bool, typer.Option("--static", help="Judge the compiled kernels; needs no GPU.")] = False,
    archs: Annotated[
        list[str] | None, typer.Option("--arch", help="With --static: sm_90 and so on, repeatable; default: all.")
    ] = None,
    ops: Annotated[
        list[str] | None, typer.Option("--op", help="attention and so on, repeatable; default: all.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="With --static: compilations at a time; default: one per processor.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to time them.")] = Device.cpu,
    log_file: Annotated[
        Path | None, typer.Option("--log", help="Add the timings to this Markdown file, with the device's name.")
    ] = None,
    json_file: JsonFile = None,
) -> int:
    """Time every kernel against plain torch, or let the compiler judge it: exit code 1 if it fails a bar."""
    if (archs or jobs) and not static:
        raise ConfigError("--arch and --jobs are for --static; timings are of the device that is there, see --device")
    if log_file and static:
        raise ConfigError("--log is for timings; keep what --static finds with --json")
    rows = _static_rows(archs, ops, jobs) if static else _timed_rows(device, ops)
    write_json(json_file, rows)
    if log_file:
        _log_timings(log_file, device, rows)
    return EXIT_UNEXPECTED if any(row.get("failures") for row in rows) else EXIT_DONE


@bench_app.command("data")
def bench_data(
    workers: Annotated[str, typer.Option(help="Numbers of worker processes to compare.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1, help="Alternated rounds; figures are their medians.")] = 5,
    batches: Annotated[int, typer.Option(min=1, help="Batches of 32 samples that a measurement times.")] = 16,
    samples: Annotated[int, typer.Option(min=64, help="Samples to make; 0.4 MB each.")] = 512,
    folder: Annotated[
        Path | None,
        typer.Option(help="Keep the shards here, or use those of an earlier run; default: a temporary one."),
    ] = None,
    json_file: JsonFile = None,
) -> int:
    """Time the loader against plain webdataset on images, speech and captions, and say what of it is decoding."""
    counts = _numbers("--workers", workers, least=1)
    from trichord.benchmarks.data import bench_data as run_bench

    def say(line: str) -> None:
        typer.echo(line, err=True)

    with tempfile.TemporaryDirectory() as temporary:
        result = run_bench(folder or Path(temporary), counts, rounds, batches, samples, say)
    print_rows(result["rows"])
    print()
    print_rows([{name: row[name] for name in ("pipeline", "peak PSS MiB", "growth MiB")} for row in result["memory"]])
    print()
    print_rows([_target_row(target) for target in result["targets"]])
    write_json(json_file, result)
    return EXIT_DONE


@bench_app.command("checkpoint")
def bench_checkpoint(
    state_gb: Annotated[float, typer.Option(min=0.3, help="Weights and Adam's moments in fp32, 1e9 bytes.")] = 1.05,
    rounds: Annotated[int, typer.Option(min=1, help="Alternated rounds; figures are their medians.")] = 7,
    folder: Annotated[
        Path | None, typer.Option(help="On the disk that is meant; default: where temporary files go.")
    ] = None,
    json_file: JsonFile = None,
) -> int:
    """What a save costs a training loop against a blocking one, and how fast it writes against the plain disk."""
    from trichord.benchmarks.checkpoint import bench_checkpoint as run_bench
    from trichord.core.log import configure_logging

    configure_logging()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        result = run_bench(Path(temporary), state_gb, rounds, lambda line: typer.echo(line, err=True))
    state = result["state"]
    print(f"state {state['bytes'] / 1e9:.2f} GB, {state['parameters']:,} parameters, {state['threads']} threads")
    print_rows(result["rows"])
    print(f"the first save, which allocates its memory: stall {result['first_save_s']:.3f} s\n")
    print_rows([_target_row(target) for target in result["targets"]])
    write_json(json_file, result)
    return EXIT_DONE


@bench_app.command("packing")
def bench_packing(
    samples: Annotated[int, typer.Option(min=100, help="Samples to make and plan.")] = 10_000,
    window: Annotated[int, typer.Option(min=1, help="shards.window_samples")] = 256,
    json_file: JsonFile = None,
) -> None:
    """Share of row tokens that is useful: planned per window, concatenated in order, and padded."""
    from trichord.benchmarks.packing import bench_packing as run_bench

    with tempfile.TemporaryDirectory() as folder:
        rows = run_bench(Path(folder), samples, window)
    print_rows(rows)
    write_json(json_file, rows)


@bench_app.command("step")
def bench_step(
    stages: Annotated[str, typer.Option(help="ZeRO stages to measure.")] = "0,1,2,3",
    ranks: Annotated[int, typer.Option(min=1, help="Processes, each on one thread.")] = 2,
    pairs: Annotated[int, typer.Option(min=6, help="Steps of each contestant, taken in turn.")] = 20,
    json_file: JsonFile = None,
) -> int:
    """Processor time of a training step against DeepSpeed in a minimal loop, bare DDP, and Hugging Face Trainer."""
    chosen = _numbers("--stages", stages, least=0)
    if not set(chosen) <= {0, 1, 2, 3}:
        raise ConfigError(f"--stages: expected some of 0,1,2,3, got {stages!r}")
    from trichord.benchmarks.step import bench_step as run_bench
    from trichord.benchmarks.step import judge_rows

    with tempfile.TemporaryDirectory() as folder:
        rows = run_bench(Path(folder), chosen, ranks, pairs, lambda line: typer.echo(line, err=True))
    targets = judge_rows(rows)
    print_rows(rows)
    print()
    print_rows([_target_row(target) for target in targets])
    write_json(json_file, {"rows": rows, "targets": targets})
    return EXIT_DONE


def _numbers(option: str, text: str, least: int) -> tuple[int, ...]:
    """The different numbers in a list such as 1,2."""
    try:
        numbers = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        numbers = ()
    if not numbers or numbers[0] < least:
        raise ConfigError(f"{option}: expected numbers such as 1,2, got {text!r}")
    return numbers


def _target_row(target: dict) -> dict:
    sign = "at most" if target["at_most"] else "at least"
    verdict = "met" if target["met"] else "MISSED"
    return {"target": target["what"], "measured": target["value"], "asked": f"{sign} {target['bar']:.3g}", "": verdict}


def _timed_rows(device: Device, ops: list[str] | None) -> list[dict]:
    import torch

    if device is Device.cuda and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: torch sees no GPU here; run it where nvidia-smi or rocm-smi lists one, with a torch "
            "built for it, or let the compiler judge the kernels by --static"
        )
    from trichord_kernels.bench import bench_kernels as run_bench
    from trichord_kernels.errors import KernelError

    try:
        rows = run_bench(device.value, ops=ops)
    except KernelError as error:
        raise ConfigError(str(error)) from error
    print_rows(rows)
    return rows


def _log_timings(file: Path, device: Device, rows: list[dict]) -> None:
    import torch

    from trichord_kernels.bench.log import append_section

    name = torch.cuda.get_device_name() if device is Device.cuda else "CPU"
    text = f"`trichord bench kernels --device {device.value}`, torch {torch.__version__}. Medians."
    shown = [{key: value for key, value in row.items() if key not in ("device", "backend")} for row in rows]
    try:
        append_section(file, f"Kernels on {name}", text, shown)
    except OSError as error:
        raise ConfigError(f"--log {file}: cannot be written: {error.strerror}") from error


def _static_rows(archs: list[str] | None, ops: list[str] | None, jobs: int | None) -> list[dict]:
    from trichord_kernels.errors import KernelError
    from trichord_kernels.static.judge import static_report
    from trichord_kernels.static.table import render_table

    try:
        rows = static_report(archs, ops, jobs or len(os.sched_getaffinity(0)), lambda line: typer.echo(line, err=True))
    except KernelError as error:
        raise ConfigError(str(error)) from error
    print(render_table(rows))
    return rows
