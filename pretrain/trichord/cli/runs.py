"""Verbs about runs: train, evaluate, export, plan, report, the quick-start, the Weights & Biases mirror."""

from dataclasses import asdict
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated

import typer

from trichord.cli.app import app, track_app
from trichord.cli.arguments import Averaged, CheckpointPath, ConfigPath, JsonFile, Overrides, RunPath
from trichord.cli.output import advancing, print_metrics, print_rows, write_json
from trichord.core.errors import EXIT_CHECKPOINT, EXIT_DATA, EXIT_DONE, ConfigError


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
    print_metrics(result["metrics"])


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> int:
    """Train: one process, or one rank of many under torchrun or trichord-launch."""
    from trichord.config.identity import inspect_run_folder
    from trichord.config.load import load_run_config
    from trichord.core.dist import rank_facts
    from trichord.layers.selection import select_kernels

    run_config = load_run_config(config, overrides or [])
    select_kernels(run_config.layers.kernels)
    if rank_facts().rank == 0:  # the others may come when rank 0 has already begun to write there
        inspect_run_folder(run_config)  # a run that cannot go on is told before torch is loaded
    from trichord.train import run

    return run(run_config)


@app.command()
def evaluate(
    path: CheckpointPath,
    suite: Annotated[str, typer.Argument(help="Suite file, or the name of a shipped one (suites/quickstart.yaml).")],
    ema: Averaged = False,
    json_file: JsonFile = None,
) -> None:
    """Metrics of a checkpoint on the sources of a suite, as a table and JSON."""
    from trichord.config.load import load_suite

    load_suite(suite)  # a mistake in it is told before torch is loaded
    from trichord.checkpoints.mirror import local_checkpoint
    from trichord.core.log import configure_logging
    from trichord.evaluate import evaluate as evaluate_checkpoint

    configure_logging()
    result = evaluate_checkpoint(local_checkpoint(path), suite, ema=ema)
    print_metrics(result["metrics"])
    write_json(json_file, result)


@app.command()
def export(
    checkpoint: CheckpointPath,
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist yet.")],
    ema: Averaged = False,
) -> None:
    """Write a checkpoint in Hugging Face format."""
    if out.exists():
        raise ConfigError(f"{out} exists already; an export never overwrites: name a new folder, or remove it")
    from trichord.checkpoints.mirror import local_checkpoint
    from trichord.export import export as export_model

    print(export_model(local_checkpoint(checkpoint), out, ema=ema))


@app.command()
def doctor(
    path: CheckpointPath,
    json_file: JsonFile = None,
) -> int:
    """What is wrong with a checkpoint: files, hashes, slices, keys of each room, values. Exit code 4 if anything is."""
    from trichord.checkpoints.doctor import examine, find_patient, worst
    from trichord.checkpoints.mirror import local_checkpoint
    from trichord.restore import expected_model
    from trichord.tracking.progress import work_progress

    folder = find_patient(local_checkpoint(path, verify=False))  # as it is: what is wrong with it is the question
    with work_progress("examining files", sum(1 for _ in folder.iterdir())) as advance:
        findings = examine(folder, expected_model(folder), lambda: advance(1))
    verdict = worst(findings)
    print(f"{folder}: {verdict}")
    print_rows([{"": f.verdict, "check": f.check, "found": f.detail, "do": f.remedy} for f in findings])
    write_json(json_file, {"folder": str(folder), "verdict": verdict, "findings": [asdict(f) for f in findings]})
    return EXIT_CHECKPOINT if verdict == "fail" else EXIT_DONE


@app.command()
def provenance(
    run: RunPath,
    step: Annotated[int, typer.Option(help="Optimizer step, as in metrics.jsonl; 1 is the first.")],
    lane: Annotated[list[int] | None, typer.Option(help="Of this lane only; repeatable.")] = None,
    verify: Annotated[bool, typer.Option(help="Plan on to the next checkpoint and compare digests.")] = True,
    replay: Annotated[bool, typer.Option("--replay", help="Do the step again and compare its loss.")] = False,
    data_only: Annotated[
        bool, typer.Option("--data-only", help="Rebuild the step's batch, without weights, compare and digest it.")
    ] = False,
    json_file: JsonFile = None,
) -> int:
    """Which samples a past step was made of, planned anew from the nearest checkpoint before it; or the step again.

    Exit code 3 where it is not what the run has recorded.
    """
    if replay and data_only:
        raise ConfigError("--replay makes the batch too: choose it or --data-only")
    if lane and (replay or data_only):
        raise ConfigError("--lane lists samples; a step is replayed with all its lanes")
    if replay:
        return _replay(run, step, json_file)
    if data_only:
        return _rebuild(run, step, json_file)
    from trichord.provenance import samples_of_step

    with advancing("planning lanes") as show:
        found = samples_of_step(run, step, lanes=lane, verify=verify, on_progress=show)
    print_rows([asdict(sample) for sample in found.samples])
    proof = "not verified" if found.verified_by is None else f"reaches the digest of step {found.verified_by}"
    typer.echo(f"{len(found.samples)} samples, planned from step {found.planned_from}, {proof}", err=True)
    write_json(json_file, found.to_json())
    return EXIT_DONE


def _replay(run: Path, step: int, json_file: Path | None) -> int:
    from trichord.replay import replay_step

    with advancing("replaying steps") as show:
        found = replay_step(run, step, on_progress=show)
    rows = [
        {"step": step, "": "recorded", "loss": found.recorded_loss, "grad norm": found.recorded_grad_norm},
        {"step": step, "": "replayed", "loss": found.loss, "grad norm": found.grad_norm},
    ]
    print_rows([{name: "not logged" if value is None else value for name, value in row.items()} for row in rows])
    start = f"checkpoint {found.replayed_from}" if found.replayed_from else "the start"
    apart = "" if found.difference is None else f", by {found.difference:.1e}, relative; allowed {found.limit:.0e}"
    typer.echo(f"{step - found.replayed_from} steps from {start} on, in one process; {found.verdict}{apart}", err=True)
    write_json(json_file, found.to_json())
    return EXIT_DATA if found.verdict == "differs" else EXIT_DONE


def _rebuild(run: Path, step: int, json_file: Path | None) -> int:
    from trichord.replay import rebuild_batch

    found = rebuild_batch(run, step)
    shown = ("step", "samples", "useful_tokens", "left_out", "digest")
    print_rows([{name: getattr(found, name) for name in shown}])
    with_what = [f"the digest of step {found.verified_by}"] * (found.verified_by is not None)
    with_what += ["the recorded counts"] * (found.recorded_samples is not None)
    told = "; ".join(found.differences) or f"compared with {' and '.join(with_what) or 'the samples left out'}"
    typer.echo(f"{found.verdict}: {told}", err=True)
    write_json(json_file, found.to_json())
    return EXIT_DATA if found.verdict == "differs" else EXIT_DONE


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    gpu: Annotated[str, typer.Option(help="a100-40, a100-80, h100, h200, b200 or mi300x.")] = "h100",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    network: Annotated[
        float | None, typer.Option(min=0.1, help="GB/s from one node to the others, all cards together.")
    ] = None,
    host_gib: Annotated[
        float | None, typer.Option(min=1, help="Host memory of a node; default: as much as asked.")
    ] = None,
    stats: Annotated[Path | None, typer.Option(help="JSON of `trichord data stats CONFIG`: what samples hold.")] = None,
    price: Annotated[float | None, typer.Option(help="Of one GPU for an hour.")] = None,
    save: Annotated[
        Path | None, typer.Option(help="FILE.json: the plan; beside it FILE.overlay.yaml, its best layout.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Memory, time and cost of a run before it runs, and its best layout. A prediction; needs no GPU."""
    from trichord.config.load import load_run_config

    run_config = load_run_config(config, overrides or [])
    from trichord.planning.saving import check_place, save_plan

    if save is not None:
        check_place(save)
    from trichord.planning.plan import Question
    from trichord.planning.plan import plan as make_plan
    from trichord.planning.render import render_plan

    with advancing("planning") as show:
        facts = make_plan(run_config, Question(gpus, gpu, gpus_per_node, network, host_gib, stats, price), show)
    print(render_plan(facts, get_terminal_size((120, 24)).columns))
    write_json(json_file, facts)
    for path in save_plan(save, facts) if save is not None else ():
        print(path)
    if save is not None and facts["overlay"] is None:
        print("no overlay: nothing fits")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, such as runs/NAME.")],
    out: Annotated[Path | None, typer.Option(help="The page; default: report.html in the first run's folder.")] = None,
) -> None:
    """One self-contained HTML page from the records of one or more runs."""
    from trichord.tracking.report import read_runs, write_report

    out = out or runs[0] / "report.html"
    with advancing("reading runs") as show:
        shown = read_runs(runs, show)
    with advancing("drawing charts") as show:
        write_report(shown, out, show)
    print(out)


@track_app.command("sync")
def track_sync(run: RunPath) -> None:
    """Rebuild the run on Weights & Biases from its metrics.jsonl."""
    from trichord.tracking.wandb_sync import sync_run

    result = sync_run(run)
    print(f"{result.rows} steps, run {result.run_id} ({result.mode}): {result.location}")
    print(f"with {result.tables} tables of samples and {result.artifacts} artifacts; without alerts and system metrics")
