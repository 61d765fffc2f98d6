"""`trichord config`: show, check and start configs."""

import json
import sys
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from trichord.cli.app import config_app
from trichord.cli.arguments import ConfigPath, Overrides

if TYPE_CHECKING:
    from trichord.config.run import RunConfig


class ConfigKind(str, Enum):
    run = "run"
    suite = "suite"
    cluster = "cluster"


@config_app.command("show")
def config_show(config: ConfigPath, overrides: Overrides = None) -> None:
    """The whole resolved config, defaults included."""
    from trichord.config.load import load_run_config, resolved_yaml

    print(resolved_yaml(load_run_config(config, overrides or [])), end="")


@config_app.command("check")
def config_check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Is this run config, suite or cluster file valid? Every mistake with file, line and the nearest valid key."""
    from trichord.config.load import check_config

    print(check_config(config, overrides or [], _look_over))


def _look_over(config: "RunConfig") -> None:
    """The overlay on DeepSpeed's JSON, which may contradict the rest, and what is probably not meant."""
    from trichord.engine.deepspeed_config import deepspeed_config
    from trichord.engine.doubts import doubts

    deepspeed_config(config.engine, micro_rows=config.batches.micro_rows, grad_accum_steps=1)
    for doubt in doubts(config.engine, config.run.max_steps):
        print(f"warning: {doubt}", file=sys.stderr)


@config_app.command("schema")
def config_schema(of: Annotated[ConfigKind, typer.Option(help="Which kind of file.")] = ConfigKind.run) -> None:
    """JSON Schema for editors."""
    from trichord.config.schema import cluster_schema, run_schema, suite_schema

    make = {ConfigKind.run: run_schema, ConfigKind.suite: suite_schema, ConfigKind.cluster: cluster_schema}[of]
    print(json.dumps(make(), indent=2))


@config_app.command("new")
def config_new(
    name: Annotated[str, typer.Argument(help="Name of the run; the file is NAME.yaml in this folder.", metavar="NAME")],
    like: Annotated[str, typer.Option(help="Shipped config to start from.")] = "runs/quickstart.yaml",
) -> None:
    """Copy a shipped config, comments and all, under a new name."""
    from trichord.config.load import new_config

    print(new_config(name.removesuffix(".yaml"), like))
