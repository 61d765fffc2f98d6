"""`trichord data`: shards, their sidecars, tokenizers."""

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from trichord.cli.app import data_app
from trichord.core.errors import DataError
from trichord.core.stopping import stoppable


class TokenizerKind(str, Enum):
    bpe = "bpe"
    unigram = "unigram"
    word = "word"


_MAX_VOCAB_SIZE = 2**22
"""Far above any vocabulary in use; for absurd sizes the trainers ask for memory at once and abort the process."""
_USED_UP = {
    TokenizerKind.bpe: "every word of the texts is a single token by now, so nothing is left to merge",
    TokenizerKind.unigram: "the texts hold no more pieces that occur often enough",
    TokenizerKind.word: "the texts hold no more different words",
}


@data_app.command("index")
def data_index(
    what: Annotated[
        list[str],
        typer.Argument(
            help="A config with overrides, or shards: paths, globs, brace ranges, URLs, folders of tars (s3:// too)."
        ),
    ],
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
) -> None:
    """Make the sidecars (.idx, .len) of shards, or make stale ones anew; of a config, with its fields and storage."""
    from trichord.core.log import configure_logging
    from trichord.inspection.target import find_target
    from trichord.shards.index import index_shards
    from trichord.shards.sources import expand_shards
    from trichord.shards.storage import configure_storage
    from trichord.tracking.progress import work_progress

    configure_logging()
    target = find_target(what)
    configure_storage(target.shards.storage)
    named = [(source, expand_shards(source)) for source in target.sources]
    headers, failures = [], []
    words = "stopped; the sidecars that were made stay, and the same command goes on"
    for source, urls in named:
        with stoppable(lambda: words), work_progress(f"index {source.name}", len(urls)) as advance:
            headers += index_shards(
                urls,
                workers,
                lambda done, total, url: advance(1),
                source.fields,
                lambda url, error: failures.append(str(error)),
            )
    damaged = [header for header in headers if header.damage is not None]
    print(f"{len(headers)} shards, {sum(header.num_samples for header in headers)} samples, {len(damaged)} damaged")
    for header in damaged:
        print(f"{header.url}: {header.damage}")
    if failures:
        total = len(headers) + len(failures)
        raise DataError("\n  ".join([f"{len(failures)} of {total} shards are not indexed; the others are", *failures]))


@data_app.command("tokenizer")
def data_tokenizer(
    sources: Annotated[
        list[str],
        typer.Argument(help="Shards (as of index; chats too), lists of them (.txt), or text files (a text per line)."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the tokenizer.")],
    kind: Annotated[TokenizerKind, typer.Option(help="Sort of tokenizer.")] = TokenizerKind.bpe,
    vocab_size: Annotated[int, typer.Option(min=1, max=_MAX_VOCAB_SIZE)] = 32_000,
) -> None:
    """Train a tokenizer on the texts of files or shards."""
    from trichord.batches.tokenizer import train_tokenizer
    from trichord.building.places import refuse_address
    from trichord.building.texts import texts_of
    from trichord.core.log import configure_logging

    configure_logging()
    refuse_address(out, "--out", "train into a folder and copy it: aws s3 sync FOLDER ADDRESS")
    tokenizer = train_tokenizer(texts_of(sources), kind.value, vocab_size, out)
    print(f"{out}: {tokenizer.vocab_size} tokens")
    if tokenizer.vocab_size < vocab_size:
        print(f"fewer than the {vocab_size} asked for: {_USED_UP[kind]}; more texts would give more tokens")
