"""What a tool looks at: the sources of a run config, or shards that are named."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from trichord.config.load import find_config, load_run_config, load_suite
from trichord.config.run import RunConfig
from trichord.core.errors import ConfigError
from trichord.samples.config import SamplesConfig
from trichord.shards.arguments import argument_shards
from trichord.shards.config import ShardsConfig, SourceConfig

_SHARD = re.compile(r"(\.tar(\.[a-z0-9]+)?|\.tgz|\.tbz2|\.txz|\.txt)$|/$|://|^pipe:|[*?{\[]")


@dataclass(frozen=True)
class Target:
    """Sources, and how their samples are read. config: the whole run; None where only shards were named."""

    shards: ShardsConfig
    samples: SamplesConfig
    config: RunConfig | None

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """All that a run of the config reads: its own sources, and those of the suite that looks at it on its way."""
        during = self.config.evaluation if self.config is not None else None
        return self.shards.sources + (load_suite(during.suite).sources if during is not None else ())

    @property
    def fields(self) -> frozenset[str]:
        """The fields that the model takes; all of them without a config."""
        if self.config is None:
            return frozenset({"image", "audio", "text"})
        towers = {"image": self.config.encoders.vision, "audio": self.config.encoders.audio}
        return frozenset({"text"} | {name for name, tower in towers.items() if tower is not None})


def find_target(words: Sequence[str]) -> Target:
    """CONFIG [overrides ...], or shards: paths, globs, brace ranges, URLs, folders of tars.

    Raises:
        ConfigError: neither of both, a pipe, or the config is not valid.
    """
    if not words:
        raise ConfigError("expected a config, or shards (paths, globs, URLs or folders of .tar files), got nothing")
    named = [names_shards(word) for word in words]
    if all(named):
        return Target(ShardsConfig(sources=(argument_shards(words),)), SamplesConfig(), None)
    if named[0]:
        raise ConfigError(f"expected shards only after {words[0]!r}, got {words[named.index(False)]!r}")
    refuse_missing(words[0])
    config = load_run_config(words[0], words[1:])
    return Target(config.shards, config.samples, config)


def names_shards(word: str) -> bool:
    """Whether a word of the command line means shards: by its ending, as a pattern or URL, or as a folder."""
    return bool(_SHARD.search(word)) or os.path.isdir(word)


def refuse_missing(word: str) -> None:
    """Raise ConfigError for what is not there and not called like a config: most likely shards, misspelt."""
    if word.endswith((".yaml", ".yml")) or os.path.exists(word):
        return
    try:
        find_config(word)
    except ConfigError as error:
        folder = os.path.dirname(word) or "."
        place = folder if os.path.isdir(folder) else f"{folder}, which is not there either"
        raise ConfigError(
            f"{word}: there are no such shards (no file or folder of that name in {place}), and {_after_colon(error)}"
        ) from None


def refuse_shards(word: str, verb: str) -> None:
    """Raise ConfigError for shards where a verb takes a config."""
    if names_shards(word) and not os.path.isfile(os.path.join(word, "config.yaml")):
        raise ConfigError(
            f"`trichord data {verb}` takes a config, since rows depend on the model; got shards, {word}. Make one with "
            f"`trichord config new NAME`, set shards.sources[].shards and batches.tokenizer in it, and call "
            f"`trichord data {verb} NAME.yaml`"
        )


def _after_colon(error: ConfigError) -> str:
    return str(error).partition(": no such file, and ")[2] or str(error)
