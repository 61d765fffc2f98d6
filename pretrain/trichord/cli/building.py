"""`trichord data build` and `split`: shards from anything, and shards from shards."""

import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from trichord.cli.app import data_app
from trichord.cli.output import advancing
from trichord.core.errors import ConfigError
from trichord.core.stopping import stoppable


class SourceKind(str, Enum):
    """The keys of `trichord.building.kinds.KINDS`, which `--help` should not have to import."""

    folder = "folder"
    table = "table"
    imagefolder = "imagefolder"
    llava = "llava"
    coco = "coco"
    vqa = "vqa"
    text = "text"
    huggingface = "huggingface"


class Captions(str, Enum):
    all = "all"
    first = "first"


class Questions(str, Enum):
    together = "together"
    single = "single"


class Documents(str, Enum):
    file = "file"
    line = "line"
    block = "block"


class OnBad(str, Enum):
    stop = "stop"
    skip = "skip"


_CPUS = os.cpu_count() or 1
Out = Annotated[Path, typer.Option(help="Folder for the shards.")]
Prefix = Annotated[str, typer.Option(help="Shards are called PREFIX-000000.tar and so on.")]
SamplesPerShard = Annotated[int, typer.Option(min=1, help="At most; shards are of even size.")]
MaxMib = Annotated[float, typer.Option(min=0.001, help="At most, per shard.")]
Shuffle = Annotated[int | None, typer.Option(help="Seed of an order over all samples.", metavar="SEED")]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
OnBadOption = Annotated[OnBad, typer.Option(help="What is bad ends the build, or is left out and listed.")]
Ray = Annotated[
    bool,
    typer.Option("--ray", help="Write as Ray tasks: on $RAY_ADDRESS, else on this machine."),
]


@data_app.command("build")
def data_build(
    source: Annotated[Path, typer.Argument(help="Folder, table, annotation file or dataset on this machine.")],
    out: Out,
    kind: Annotated[
        SourceKind | None, typer.Option("--from", help="What SOURCE is; default: guessed where there is no doubt.")
    ] = None,
    prefix: Prefix = "shard",
    samples_per_shard: SamplesPerShard = 10_000,
    max_mib: MaxMib = 1024.0,
    shuffle: Shuffle = None,
    workers: Workers = _CPUS,
    on_bad: OnBadOption = OnBad.stop,
    ray: Ray = False,
    media: Annotated[Path | None, typer.Option(help="Folder that file names are relative to.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="Which column is a field, repeatable: text=caption.", metavar="FIELD=COLUMN"),
    ] = None,
    captions: Annotated[
        Captions | None, typer.Option(help="coco: a sample per caption (default), or the first of each image.")
    ] = None,
    questions: Annotated[
        Questions | None, typer.Option(help="vqa: one chat per image (default), or per question.")
    ] = None,
    annotations: Annotated[Path | None, typer.Option(help="vqa: the answers; default: found beside SOURCE.")] = None,
    instruction: Annotated[
        str | None, typer.Option(help="vqa: added to the first question; '': nothing. Default: LLaVA-1.5's.")
    ] = None,
    documents: Annotated[
        Documents | None, typer.Option(help="text: a document per file (default), line, or block of lines.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="huggingface: which split of the dataset.")] = None,
) -> None:
    """Shards with their sidecars from a folder, a table, annotations, conversations or a dataset on disk."""
    from trichord.building.build import Layout, build
    from trichord.building.kinds import ConvertOptions, guess_kind, source_identity, source_rows
    from trichord.building.partial import stopped_words
    from trichord.building.places import refuse_remote_out
    from trichord.core.log import configure_logging
    from trichord.shards.config import FieldsConfig

    configure_logging()
    refuse_remote_out(out)
    options = ConvertOptions(
        media=media,
        column=_pairs(column or [], "--column text=caption"),
        captions=captions and captions.value,
        questions=questions and questions.value,
        annotations=annotations,
        instruction=instruction,
        documents=documents and documents.value,
        split=split,
    )
    chosen = kind.value if kind else guess_kind(source)
    layout = Layout(prefix, samples_per_shard, round(max_mib * 2**20), shuffle)
    rows = source_rows(source, chosen, options, FieldsConfig(), shuffle is not None)
    identity = source_identity(source, chosen, options)
    with stoppable(lambda: stopped_words(out, prefix)), advancing("build") as advance:
        result = build(
            rows,
            out,
            layout,
            identity=identity,
            on_bad=on_bad.value,  # type: ignore[arg-type]
            workers=workers,
            ray=ray,
            on_progress=advance,
        )
    _print_result(result)


@data_app.command("split")
def data_split(
    shards: Annotated[list[str], typer.Argument(help="Tar files: paths, globs, brace ranges, URLs, folders.")],
    out: Out,
    by: Annotated[
        str | None, typer.Option(help="A folder per value of this key of the json member: licence.id")
    ] = None,
    fractions: Annotated[
        str | None, typer.Option(help="Folders of these shares, by a hash of the key: train=0.98,val=0.02")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="With --fractions: samples of one value of this json key stay together.")
    ] = None,
    prefix: Prefix = "shard",
    samples_per_shard: SamplesPerShard = 10_000,
    max_mib: MaxMib = 1024.0,
    shuffle: Shuffle = None,
    workers: Workers = _CPUS,
    on_bad: OnBadOption = OnBad.stop,
    ray: Ray = False,
) -> None:
    """Copy samples to shards per class, or to training and held-out shards; with an overlay for run configs."""
    from trichord.building.build import Layout
    from trichord.building.partial import stopped_words
    from trichord.building.places import refuse_remote_out
    from trichord.building.split import SOURCES_FILE, by_fractions, by_value, split_shards
    from trichord.core.log import configure_logging
    from trichord.shards.arguments import argument_shards
    from trichord.shards.sources import expand_shards

    if (by is None) == (fractions is None):
        raise ConfigError("say either --by KEY or --fractions train=0.98,val=0.02")
    if group is not None and fractions is None:
        raise ConfigError("--group is for --fractions; --by KEY keeps equal values together already")
    configure_logging()
    refuse_remote_out(out)
    group_of = by_value(by) if by is not None else by_fractions(_shares(fractions or ""), group)
    urls = expand_shards(argument_shards(shards))
    with stoppable(lambda: stopped_words(out, prefix)), advancing("split") as advance:
        result = split_shards(
            urls,
            out,
            group_of,
            Layout(prefix, samples_per_shard, round(max_mib * 2**20), shuffle),
            of={"by": by, "fractions": fractions, "group": group},
            workers=workers,
            on_bad=on_bad.value,
            ray=ray,
            on_progress=advance,
        )
    _print_result(result)
    print(out / SOURCES_FILE)
    if fractions is not None:
        held = "a run with it trains on all parts; take out of it what is held out"
        print(f"{SOURCES_FILE} names {', '.join(result.shards)}: {held}", file=sys.stderr)


def _print_result(result) -> None:
    for path in result.paths:
        print(path)
    left_out = f", {len(result.left_out)} left out" if result.left_out else ""
    print(f"{result.samples} samples in {len(result.paths)} shards{left_out}", file=sys.stderr)


def _pairs(values: list[str], example: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in values:
        name, _, value = text.partition("=")
        if not name or not value or name in pairs:
            raise ConfigError(f"{text!r}: expected each name once, with a value, as in {example}")
        pairs[name] = value
    return pairs


def _shares(text: str) -> dict[str, float]:
    try:
        return {
            name: float(share) for name, share in _pairs(text.split(","), "--fractions train=0.98,val=0.02").items()
        }
    except ValueError as error:
        raise ConfigError(f"--fractions {text}: {error}; expected train=0.98,val=0.02") from error
