"""`trichord data fuzz`, `selftest`: what is promised of the data road, attacked and counted on this machine."""

import os
from pathlib import Path
from typing import Annotated

import typer

from trichord.cli.app import data_app
from trichord.cli.arguments import JsonFile
from trichord.cli.output import print_rows, write_json
from trichord.core.errors import EXIT_DONE, EXIT_UNEXPECTED

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
    from trichord.inspection.fuzz.campaign import run_campaign
    from trichord.tracking.progress import work_progress

    with work_progress("fuzz", cases) as advance:
        report = run_campaign(cases, seed=seed, workers=workers, first=first, out=out, on_case=lambda: advance(1))
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

    from trichord.inspection.selftest.proof import prove

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
