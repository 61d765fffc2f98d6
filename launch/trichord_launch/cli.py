"""The command line of the launcher. Starts in a fraction of a second: what a verb needs is imported when it runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

app = typer.Typer(
    name="trichord-launch",
    help="Start, follow and stop training runs.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # --help answers three times faster without rich
    pretty_exceptions_enable=False,
)


@app.callback()
def _top() -> None:
    """Start, follow and stop training runs."""


@app.command()
def local(
    config: Annotated[str, typer.Argument(help="Run config: a YAML file, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Values on top of it: engine.lr=3e-4 ...")] = None,
    procs: Annotated[int | None, typer.Option(help="Processes. Default: one per GPU, or one on the CPU.")] = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="How often a crashed run is started again.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the command and start nothing.")] = False,
) -> None:
    """Train on this machine, now. Ctrl-C saves a checkpoint and stops; pressed twice it kills.

    Exit codes: 0 finished, 2 usage or config, 3 data, 4 checkpoint, 75 stopped with a checkpoint, others unexpected.
    """
    from trichord_launch.local import launch_local, show_local

    if dry_run:
        typer.echo(show_local(config, overrides or (), procs=procs))
        return
    verdict = launch_local(config, overrides or (), procs=procs, max_restarts=max_restarts)
    if verdict.outcome != "failed":  # of a failure the supervisor has told, with the reason
        typer.echo(f"{verdict.outcome} at step {verdict.step}: {verdict.reason}", err=True)
    raise typer.Exit(verdict.exit_code)


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="Run folder, or name of a run under runs/.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What a run is doing, or what became of it."""
    import json

    from trichord_launch.follow import find_run, render_status, run_status

    facts = run_status(find_run(run))
    typer.echo(json.dumps(facts, indent=2) if as_json else render_status(facts))


@app.command()
def logs(
    run: Annotated[str, typer.Argument(help="Run folder, or name of a run under runs/.")],
    rank: Annotated[int, typer.Option(min=0, help="Whose log.")] = 0,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last lines.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is appended.")] = False,
) -> None:
    """The log of one rank."""
    from trichord_launch.follow import find_run, log_file, tail

    path = log_file(find_run(run), rank)
    typer.echo(f"==> {path}", err=True)
    try:
        for text in tail(path, lines, follow):
            typer.echo(text, nl=False)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def main() -> None:
    """Entry point: errors a user can act on end in one message and their exit code."""
    from trichord.core.errors import TrichordError

    try:
        app()
    except TrichordError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
