"""`trichord data fuzz`, `data selftest`, `selftest resume`, `chaos`: promises, attacked and counted on this machine."""

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from trichord.cli.app import data_app, selftest_app
from trichord.cli.arguments import ConfigPath, JsonFile, Overrides
from trichord.cli.output import print_rows, write_json
from trichord.core.errors import EXIT_DONE, EXIT_UNEXPECTED, ConfigError

MAX_SHOWN = 20


@data_app.command("fuzz")
def data_fuzz(
    cases: Annotated[int, typer.Option(min=1, help="Mangled shards.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Of all cases; case N of a seed is always the same.")] = 0,
    first: Annotated[int, typer.Option(min=0, help="Number of the first case: to repeat a finding.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
    out: Annotated[Path, typer.Option(help="Findings go here, with the shard of each.")] = Path("fuzz-findings"),
    json_file: JsonFile = None,
) -> int:
    """Drive mangled shards from index to batch; exit code 1 where one crashes, hangs, or reaches outside."""
    from trichord.core.stopping import stoppable
    from trichord.inspection.fuzz.campaign import Report, run_campaign
    from trichord.tracking.progress import work_progress

    known = Report(seed, next_case=first)

    def stopped() -> str:
        return (
            f"stopped after {known.cases} of {cases} cases with {len(known.findings)} findings, {out} has what is "
            f"known; --first {known.next_case} --cases {first + cases - known.next_case} does the rest"
        )

    with stoppable(stopped), work_progress("fuzz", cases) as advance:

        def note(report: Report) -> None:
            nonlocal known
            known = report
            advance(1)

        report = run_campaign(cases, seed=seed, workers=workers, first=first, out=out, on_case=note)
    print_rows(report.rows())
    print(
        f"\n{report.cases} cases in {report.seconds:.0f} s: {dict(report.outcomes)}; "
        f"slowest {report.slowest_seconds:.2f} s (case {report.slowest_case}), at most {report.peak_mib:.0f} MiB"
    )
    for finding in report.findings[:MAX_SHOWN]:
        print(f"case {finding['case']} ({', '.join(finding['families'])}): {finding['fault'][:200]}")
    if report.findings:
        print(f"{len(report.findings)} findings; their shards are in {out}")
    write_json(json_file, report.to_json())
    return EXIT_UNEXPECTED if report.findings else EXIT_DONE


@data_app.command("selftest")
def data_selftest(
    samples: Annotated[int, typer.Option(min=500, help="Of three sources, about 1 % of them bad.")] = 100_000,
    stops: Annotated[int, typer.Option(min=1, help="Random steps to stop at.")] = 25,
    seed: Annotated[int, typer.Option(help="Of the data, the order and the stops.")] = 0,
    json_file: JsonFile = None,
) -> int:
    """Read a mixture with stops, each time going on with other ranks and workers; exit code 1 if anything differs."""
    import logging

    from trichord.selftest.data import prove

    logging.disable(logging.WARNING)  # wasted places of odd world sizes, said once per loader
    report = prove(samples, stops, seed, lambda number, what: print(f"stretch {number}: {what}", flush=True))
    for name in ("", "_with_stops"):
        print(f"digest {report[f'digest{name}']}, of the quarantine {report[f'quarantine_digest{name}']}")
    print(
        f"{report['samples']} samples, {report['good_draws']} good and {report['bad_draws']} bad draws in "
        f"{report['steps']} steps, {report['stops']} stops, {sum(report['seconds'].values()):.0f} s"
    )
    for fault in report["faults"]:
        print(f"FAULT {fault}")
    if not report["faults"]:
        print("every good sample came exactly once per epoch, no bad one did, and the digests are the same")
    write_json(json_file, report)
    return EXIT_UNEXPECTED if report["faults"] else EXIT_DONE


Steps = Annotated[int, typer.Option(help="Length of the runs.")]
Procs = Annotated[int, typer.Option(help="Processes: those of the undisturbed run.")]
Work = Annotated[Path | None, typer.Option(help="Keep run folders and logs here; default: a temporary folder.")]


@selftest_app.command("resume")
def selftest_resume(
    config: ConfigPath,
    overrides: Overrides = None,
    steps: Steps = 20,
    procs: Procs = 2,
    other_procs: Annotated[int, typer.Option(min=1, help="Processes of the other split.")] = 1,
    other_stage: Annotated[int | None, typer.Option(min=0, max=3, help="Its ZeRO stage; default: the same.")] = None,
    other_shared: Annotated[int, typer.Option(min=1, help="Its engine.sequence_parallel.")] = 1,
    work: Work = None,
    json_file: JsonFile = None,
) -> int:
    """Train, kill -9, resume on the same and on another split, compare; exit code 1 where they differ."""
    from dataclasses import replace

    from trichord.selftest.kills import resume_cases

    def cases(trial):
        stage = trial.split.stage if other_stage is None else other_stage
        return resume_cases(trial, replace(trial.split, procs=other_procs, stage=stage, shared=other_shared)), None

    return _try_training(config, overrides, steps, procs, work, json_file, cases)


@selftest_app.command("chaos")
def selftest_chaos(
    config: ConfigPath,
    overrides: Overrides = None,
    kills: Annotated[int, typer.Option(min=1, help="Runs to kill.")] = 10,
    steps: Steps = 20,
    procs: Procs = 2,
    seeds: Annotated[int, typer.Option(help="Of run.seed, for the spread of the final loss; 0: no spread.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the instants and the splits.")] = 0,
    work: Work = None,
    json_file: JsonFile = None,
) -> int:
    """Kill runs at random instants, resume each on the same or a random split, compare; exit code 1 if any differs."""
    from trichord.selftest.epochs import read_epochs
    from trichord.selftest.kills import chaos_cases

    if seeds == 1 or seeds < 0:
        raise ConfigError(f"--seeds: expected 0, or at least 2 for a spread, got {seeds}")

    def cases(trial):
        epochs = read_epochs(trial.folder / "undisturbed")
        print(_epochs_line(epochs), flush=True)
        if seeds:
            print(_spread_line(trial.train_seeds(seeds)), flush=True)
        return chaos_cases(trial, kills, seed), epochs

    return _try_training(config, overrides, steps, procs, work, json_file, cases)


def _epochs_line(epochs) -> str:
    complete = ", ".join(
        f"{name} {in_run} ({epochs.epochs_checked[name]})" for name, in_run in epochs.epochs_in_run.items()
    )
    return (
        f"{epochs.uses_in_run} uses of samples in the run, {epochs.uses_checked} with those planned past its end; "
        f"whole epochs in the run (and so planned): {complete}: "
        + ("; ".join(epochs.faults[:MAX_SHOWN]) or "each sample exactly once in these, at most once in the others")
    )


def _spread_line(spread) -> str:
    low, high = spread.bounds
    finals = ", ".join(f"seed {seed}: {final:.6f}" for seed, final in spread.finals.items())
    return f"final losses: {finals}; the spread is {low:.6f} to {high:.6f}"


def _try_training(config, overrides, steps: int, procs: int, work: Path | None, json_file: Path | None, run) -> int:
    from trichord.selftest.kills import to_json
    from trichord.selftest.processes import quiet_environment
    from trichord.selftest.training import Trial

    quiet_environment()
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary)
        if work is not None and work.is_dir() and any(work.iterdir()):
            raise ConfigError(f"--work {work} is not empty; name a new folder")
        trial = Trial(str(config), overrides or [], folder, steps=steps, procs=procs, say=typer.echo)
        cases, epochs = run(trial)
    result = to_json(trial, cases, epochs)
    print_rows([{**case, "faults": "; ".join(case["faults"]) or "pass"} for case in result["cases"]])
    failed = sum(bool(case["faults"]) for case in result["cases"])
    print(f"{len(cases)} killed runs, {failed} differ; allowed on another split {result['tolerance']:.0e}")
    write_json(json_file, result)
    return EXIT_DONE if result["passed"] else EXIT_UNEXPECTED
