"""`trichord data`: shards, their sidecars, tokenizers."""

import os
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from trichord.cli.app import data_app
from trichord.core.errors import DataError

MAX_TEXT_BYTES = 2**20


class TokenizerKind(str, Enum):
    bpe = "bpe"
    unigram = "unigram"
    word = "word"


_USED_UP = {
    TokenizerKind.bpe: "every word of the texts is a single token by now, so nothing is left to merge",
    TokenizerKind.unigram: "the texts hold no more pieces that occur often enough",
    TokenizerKind.word: "the texts hold no more different words",
}


@data_app.command("index")
def data_index(
    shards: Annotated[list[str], typer.Argument(help="Tar files: paths, globs, brace ranges, URLs, folders.")],
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
    if tokenizer.vocab_size < vocab_size:
        print(f"fewer than the {vocab_size} asked for: {_USED_UP[kind]}; more texts would give more tokens")


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
