"""Arguments that several verbs take."""

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[str, typer.Argument(help="YAML file, or the name of a shipped one (runs/quickstart.yaml).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Values on top of the file: engine.lr=3e-4, or overlay files.", metavar="[A.B=C|MORE.yaml]..."),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the result here, as JSON.")]
RunPath = Annotated[Path, typer.Argument(help="Run folder, such as runs/NAME.")]
CheckpointPath = Annotated[
    str,
    typer.Argument(help="Checkpoint or run folder (its newest one), or a mirror's s3://bucket/prefix/RUN[/step-N]."),
]
Averaged = Annotated[bool, typer.Option("--ema/--no-ema", help="Take the average of the weights (engine.ema_decay).")]
