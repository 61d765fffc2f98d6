"""The command line of the launcher. Starts in a fraction of a second: what a verb needs is imported when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
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
    from trichord_launch.supervise import tell

    if dry_run:
        typer.echo(show_local(config, overrides or (), procs=procs))
        return
    verdict = launch_local(config, overrides or (), procs=procs, max_restarts=max_restarts)
    if verdict.outcome != "failed":  # of a failure the supervisor has told, with the reason
        tell(f"{verdict.outcome} at step {verdict.step}: {verdict.reason}")
    raise typer.Exit(verdict.exit_code)


@app.command()
def hosts(
    config: Annotated[str, typer.Argument(help="Run config: a YAML file, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Values on top of it: engine.lr=3e-4 ...")] = None,
    hosts: Annotated[str | None, typer.Option("--hosts", help="n1,n2,n3: the first hosts the rendezvous.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="Or a file with one host per line.")] = None,
    cluster: Annotated[str | None, typer.Option(help="Cluster file with facts about them, or the name of one.")] = None,
    procs: Annotated[int | None, typer.Option(help="Processes per host. Default: one per GPU.")] = None,
    ssh_config: Annotated[Path | None, typer.Option(help="A file for `ssh -F`.")] = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="How often a crashed run is started again.")] = 0,
    start: Annotated[bool, typer.Option("--start", help="Start it. Without this it is only shown.")] = False,
) -> None:
    """Train on hosts without a scheduler, over ssh: show the commands, or start them with --start.

    The hosts share a file system, and ssh reaches them without a password. Ctrl-C saves a checkpoint and stops; pressed
    twice it kills. Exit codes as of `local`, and 69: a host cannot be reached, or is not fit.
    """
    from trichord_launch import hosts as target
    from trichord_launch.supervise import tell

    request = target.Request(config, target.read_hosts(hosts, hostfile), overrides or (), cluster, procs, ssh_config)
    if not start:
        typer.echo(target.show_hosts(request))
        typer.echo("shown only; --start starts it", err=True)
        return
    verdict = target.launch_hosts(request, max_restarts=max_restarts)
    if verdict.outcome != "failed":  # of a failure the supervisor has told, with the reason
        tell(f"{verdict.outcome} at step {verdict.step}: {verdict.reason}")
    raise typer.Exit(verdict.exit_code)


@app.command()
def slurm(
    config: Annotated[str, typer.Argument(help="Run config: a YAML file, or the name of a shipped one.")],
    cluster: Annotated[str, typer.Option(help="Cluster file, or the name of one under configs/clusters.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Values on top of it: engine.lr=3e-4 ...")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    time: Annotated[str | None, typer.Option(help="Time limit of a start: 24:00:00. Default: the cluster's.")] = None,
    grid: Annotated[list[str] | None, typer.Option(help="KEY=V1,V2: a run for each value, in one job array.")] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="How many runs of a grid may run at a time.")] = None,
    links: Annotated[int | None, typer.Option(min=1, help="Jobs of a chain, where requeue is forbidden.")] = None,
    launcher: Annotated[str, typer.Option(help="torchrun: one per node. srun: one task per rank.")] = "torchrun",
    max_restarts: Annotated[int, typer.Option(min=0, help="How many crashes are started again.")] = 3,
    max_requeues: Annotated[int, typer.Option(min=0, help="How often the job may go back into the queue.")] = 100,
    same_step: Annotated[int, typer.Option(min=2, help="This many crashes at one step end the run.")] = 2,
    submit: Annotated[bool, typer.Option("--submit", help="Submit it. Without this it is only shown.")] = False,
) -> None:
    """Train on a Slurm cluster: show the batch script, or submit it with --submit.

    The job saves and requeues itself at its time limit and when it is preempted, and starts again after a crash.
    """
    from trichord_launch import slurm as target
    from trichord_launch.job import Budget

    request = target.Request(
        config=config,
        cluster=cluster,
        nodes=nodes,
        time=time,
        overrides=overrides or (),
        grid=grid or (),
        at_once=at_once,
        links=links,
        launcher=launcher,
        budget=Budget(max_restarts, max_requeues, same_step),
    )
    submission = target.prepare(request)
    if submit:
        for job_id in target.submit(submission):
            typer.echo(job_id)
    else:
        typer.echo(submission.script, nl=False)
    typer.echo(target.describe(submission, submit), err=True)


@app.command()
def preflight(
    config: Annotated[str, typer.Argument(help="Run config: a YAML file, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Values on top of it: engine.lr=3e-4 ...")] = None,
    cluster: Annotated[str | None, typer.Option(help="Cluster file, or the name of one.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Look at this many nodes of it, too.")] = None,
    nodes_list: Annotated[str | None, typer.Option(help="Look at these: n1,n2,n3.")] = None,
    procs: Annotated[
        int | None, typer.Option(min=1, help="Look at this machine as a node, with this many ranks.")
    ] = None,
    plan: Annotated[str | None, typer.Option(help="What `trichord plan --save` wrote.")] = None,
    fetch: Annotated[bool, typer.Option("--fetch", help="Download tokenizer and backbones first.")] = False,
    port: Annotated[int | None, typer.Option(help="At which ranks shall meet. Default: the launcher's choice.")] = None,
    time: Annotated[str, typer.Option(help="Time limit of the job that looks at nodes.")] = "10",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the job that would look at nodes.")] = False,
) -> None:
    """Find what would stop a run before it waits in a queue, and say what to do about it.

    Exit codes: 0 ready, 2 config, 3 data, 4 checkpoint, 69 a machine is not fit; of several the first of these.
    """
    from trichord_launch.preflight.finding import exit_code
    from trichord_launch.preflight.preflight import preflight as look
    from trichord_launch.preflight.preflight import show
    from trichord_launch.preflight.report import as_json as render_json
    from trichord_launch.preflight.report import print_table
    from trichord_launch.preflight.request import Request

    named = tuple(name for name in (nodes_list or "").split(",") if name)
    request = Request(config, overrides or (), cluster, nodes, named, procs, plan, fetch, port, time)
    if dry_run:
        typer.echo(show(request), nl=False)
        return
    result = look(request, lambda text: typer.echo(text, err=True))
    if as_json:
        typer.echo(render_json(result.findings, {"links": result.links}))
    else:
        print_table(result.findings)
    raise typer.Exit(exit_code(result.findings))


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
    job: Annotated[bool, typer.Option("--job", help="Instead: what the job said of its starts and stops.")] = False,
) -> None:
    """The log of one rank."""
    from trichord_launch.follow import find_run, job_log, log_file, tail

    path = job_log(find_run(run)) if job else log_file(find_run(run), rank)
    typer.echo(f"==> {path}", err=True)
    try:
        for text in tail(path, lines, follow):
            typer.echo(text, nl=False)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


@app.command()
def cancel(
    run: Annotated[str, typer.Argument(help="Run folder, or name of a run under runs/.")],
    now: Annotated[bool, typer.Option("--now", help="At once, without a checkpoint.")] = False,
) -> None:
    """Have a run save and stop, for good: it is not requeued. Running the same command again goes on with it."""
    from trichord_launch.control import cancel as cancel_run
    from trichord_launch.follow import find_run

    typer.echo(cancel_run(find_run(run), now))


@app.command()
def attach(
    run: Annotated[str, typer.Argument(help="Run folder, or name of a run under runs/.")],
    command: Annotated[list[str] | None, typer.Argument(help="What to run there, after --. Default: a shell.")] = None,
    rank: Annotated[int, typer.Option(min=0, help="On whose node.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the command and start nothing.")] = False,
) -> None:
    """A shell, or a command, on the node of a rank, inside the running Slurm job."""
    import os
    import shlex

    from trichord_launch.control import attach_command
    from trichord_launch.follow import find_run

    argv = attach_command(find_run(run), rank, command or ())
    if dry_run:
        typer.echo(shlex.join(argv))
    else:
        os.execvp(argv[0], argv)


cluster_app = typer.Typer(help="Cluster files.", rich_markup_mode=None, no_args_is_help=True)
app.add_typer(cluster_app, name="cluster")


@cluster_app.command("new")
def cluster_new(
    name: Annotated[str, typer.Argument(help="Name of the cluster; the file is NAME.yaml, here.")],
    partition: Annotated[str | None, typer.Option(help="Default: the one with the most GPUs.")] = None,
) -> None:
    """Draft a cluster file from what sinfo says of this cluster."""
    from trichord_launch.cluster_draft import write_draft

    typer.echo(write_draft(name, partition))


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
