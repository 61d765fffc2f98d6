"""What a tool looks at: the sources of a run config, or shards that are named."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from trichord.config.load import load_run_config
from trichord.config.run import RunConfig
from trichord.core.errors import ConfigError
from trichord.samples.config import SamplesConfig
from trichord.shards.arguments import argument_shards
from trichord.shards.config import ShardsConfig

_SHARD = re.compile(r"(\.tar|\.tar\.gz|\.tgz|\.txt)$|://|^pipe:|[*?{\[]")


@dataclass(frozen=True)
class Target:
    """Sources, and how their samples are read. config: the whole run; None where only shards were named."""

    shards: ShardsConfig
    samples: SamplesConfig
    config: RunConfig | None

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
    named = [bool(_SHARD.search(word)) or os.path.isdir(word) for word in words]
    if all(named):
        return Target(ShardsConfig(sources=(argument_shards(words),)), SamplesConfig(), None)
    if named[0]:
        raise ConfigError(f"expected shards only after {words[0]!r}, got {words[named.index(False)]!r}")
    config = load_run_config(words[0], words[1:])
    return Target(config.shards, config.samples, config)
