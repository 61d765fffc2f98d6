"""Shards that a command line names, without a config."""

from collections.abc import Sequence

from trichord.core.errors import ConfigError
from trichord.shards.config import SourceConfig

ARGUMENTS_NAME = "shards"
"""Name of their source in tables."""


class ArgumentShards(SourceConfig):
    """A source of shards named as arguments: messages speak of the arguments, for there is no config to mend."""


def argument_shards(words: Sequence[str]) -> ArgumentShards:
    """The words as a source. Raises ConfigError where one is a pipe."""
    refuse_pipes(words)
    return ArgumentShards(name=ARGUMENTS_NAME, shards=tuple(words))


def refuse_pipes(words: Sequence[str]) -> None:
    """Raise ConfigError where a word is a shell command, as webdataset takes them."""
    piped = next((word for word in words if word.startswith("pipe:")), None)
    if piped is not None:
        raise ConfigError(
            f"{piped!r}: expected a path or a URL, got a shell command; pipes are never run: name the shard that it "
            "prints, by its path or its s3://, gs:// or https:// address"
        )
