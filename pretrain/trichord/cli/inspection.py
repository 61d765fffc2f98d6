"""`trichord data lint`, `stats`, `preview`: looking at data before it trains anything."""

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from trichord.cli.app import data_app
from trichord.cli.arguments import ConfigPath, JsonFile, Overrides
from trichord.cli.output import print_rows, write_json
from trichord.core.errors import EXIT_DATA, EXIT_DONE, ConfigError

Target = Annotated[
    list[str], typer.Argument(help="A config with overrides, or shards: paths, globs, URLs, folders of tars.")
]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
MAX_NOTES = 40
CPUS = os.cpu_count() or 1


@data_app.command("lint")
def data_lint(
    what: Target,
    json_file: JsonFile = None,
    out: Annotated[
        Path | None, typer.Option(help="Write a line per bad sample here, as filters.exclude takes them.")
    ] = None,
    workers: Workers = CPUS,
) -> int:
    """Decode every sample as training would, and say what is wrong with which; exit code 3 if it must be mended."""
    from trichord.core.log import configure_logging
    from trichord.core.stopping import stoppable
    from trichord.inspection.lint import lint
    from trichord.inspection.lint_report import write_report
    from trichord.inspection.target import find_target

    configure_logging()
    so_far = f"; {out} lists the bad ones so far" if out is not None else ""
    with stoppable(lambda: f"stopped before all samples were looked at{so_far}; sidecars that were made stay"):
        report = lint(find_target(what), workers, out)
    print_rows(report.source_rows())
    tables = {"bad samples": report.reason_rows(), "shards": report.note_rows(), "warnings": report.warning_rows()}
    for title, rows in tables.items():
        if rows:
            print(f"\n{title}")
            print_rows(rows[:MAX_NOTES])
            if len(rows) > MAX_NOTES:
                print(f"... and {len(rows) - MAX_NOTES} more; --json has all")
    print(f"\n{report.verdict()}")
    if json_file is not None:
        write_report(report, json_file)
    return EXIT_DATA if report.fails else EXIT_DONE


class Scheme(str, Enum):
    sqrt = "sqrt"
    effective = "effective"
    inverse = "inverse"


class Means(str, Enum):
    draws = "draws"
    loss = "loss"


@data_app.command("stats")
def data_stats(
    what: Target,
    json_file: JsonFile = None,
    html: Annotated[Path | None, typer.Option(help="Write one page with histograms here.")] = None,
    duplicates: Annotated[
        Path | None, typer.Option(help="Write a line per sample whose content an earlier one has, for filters.exclude.")
    ] = None,
    hashes: Annotated[bool, typer.Option(help="Look for duplicates, which reads every image, clip or text.")] = True,
    tokenizer: Annotated[str | None, typer.Option(help="Count tokens by this one; default: the config's.")] = None,
    every_text: Annotated[bool, typer.Option("--all", help="Count tokens of all texts, not of a sample.")] = False,
    label: Annotated[
        list[str] | None, typer.Option(help="Count classes of this key of the json (a.b goes inside); repeatable.")
    ] = None,
    balance_by: Annotated[
        str | None, typer.Option(help="Weights against imbalance: of `source`, or of the classes of a --label.")
    ] = None,
    scheme: Annotated[Scheme, typer.Option(help="How strongly --balance evens out.")] = Scheme.sqrt,
    balance_as: Annotated[Means, typer.Option(help="Draw the rare more often, or have them count more.")] = Means.draws,
    beta: Annotated[float, typer.Option(help="Of the effective number of samples.")] = 0.9999,
    balance: Annotated[Path | None, typer.Option(help="Write the weights here, to lay over a config.")] = None,
    workers: Workers = CPUS,
) -> None:
    """How much there is of what: counts, sizes, lengths, classes, duplicates, and weights against imbalance."""
    from trichord.core.log import configure_logging
    from trichord.core.stopping import stoppable
    from trichord.inspection.balance import balance as weigh
    from trichord.inspection.balance import balance_json, balance_table, counts_of, write_overlay
    from trichord.inspection.collect import Wishes, class_keys
    from trichord.inspection.stats import gather_stats
    from trichord.inspection.stats_page import source_rows, write_page
    from trichord.inspection.target import find_target

    by = balance_by or ("source" if balance is not None else None)
    if duplicates is not None and not hashes:
        raise ConfigError("--duplicates needs the hashes that --no-hashes leaves out; drop one of them")
    configure_logging()
    target = find_target(what)
    labels = tuple(label or ()) + ((by,) if by not in (None, "source", *(label or ())) else ())
    wishes = Wishes(labels or class_keys(target), tokenizer, hashes=hashes)
    with stoppable(lambda: "stopped before all samples were counted; sidecars that were made stay"):
        stats = gather_stats(target, wishes, every_text=every_text, workers=workers, duplicates=duplicates)
    result = stats.to_json()
    print_rows(source_rows(stats))
    _print_spreads(stats)
    balanced = None
    if by is not None:
        balanced = by, weigh(counts_of(result, by), beta)
        result["balance"] = balance_json(balanced[1], by, beta)
        print(f"\nweights by {by}")
        print_rows(balance_table(balanced[1]))
        if balance is not None:
            write_overlay(balanced[1], by, scheme.value, balance_as.value, balance)
    write_json(json_file, result)
    if html is not None:
        title = target.config.run.name if target.config else ", ".join(what)
        print(write_page(stats, title, html, balanced))


def _print_spreads(stats) -> None:
    for source in stats.sources:
        rows = [{"what": name, **one.to_json()} for name, one in source.figures.spread.items() if one.count]
        shown = ("what", "count", "mean", "min", "p5", "p50", "p95", "max")
        print(f"\n{source.name}")
        print_rows([{key: row[key] for key in shown} for row in rows])
        for key, label in source.figures.labels.items():
            counts = [{key: name, "samples": count} for name, count in label.classes.most_common(MAX_NOTES)]
            print()
            print_rows([*counts, {key: "(missing)", "samples": label.missing}])


@data_app.command("preview")
def data_preview(
    config: ConfigPath,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps from the first.")] = 1,
    rank: Annotated[int, typer.Option(min=0, help="Whose rows.")] = 0,
    world_size: Annotated[int, typer.Option(min=1, help="Number of ranks.")] = 1,
    rows: Annotated[int, typer.Option(min=1, help="Rows on the page at most.")] = 32,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("preview.html"),
) -> None:
    """One page: the rows as the model will see them, with their images, clips and tokens."""
    from trichord.config.load import load_run_config
    from trichord.inspection.target import refuse_shards

    refuse_shards(config, "preview")
    run_config = load_run_config(config, overrides or [])
    if rank >= world_size:
        raise ConfigError(f"--rank must be less than --world-size {world_size}, got {rank}")
    from trichord.core.log import configure_logging
    from trichord.inspection.preview import write_preview

    configure_logging()
    counts = write_preview(run_config, out, steps=steps, rank=rank, world_size=world_size, max_rows=rows)
    useful = counts["useful_tokens"] / max(1, counts["tokens"])
    print(
        f"{counts['rows']} rows, {counts['samples']} samples, {useful:.1%} useful tokens, {counts['bad']} bad samples"
    )
    print(out)
