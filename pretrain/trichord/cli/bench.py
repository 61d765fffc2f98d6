"""`trichord bench`: what this machine reaches, against a stated baseline."""

from typing import Annotated

import typer

from trichord.cli.app import bench_app
from trichord.cli.arguments import JsonFile
from trichord.cli.output import print_rows, write_json
from trichord.core.errors import EXIT_DONE, EXIT_UNEXPECTED, ConfigError


@bench_app.command("kernels")
def bench_kernels(
    static: Annotated[bool, typer.Option("--static", help="Judge the compiled kernels; needs no GPU.")] = False,
    archs: Annotated[
        list[str] | None, typer.Option("--arch", help="With --static: sm_90 and so on, repeatable; default: all.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_file: JsonFile = None,
) -> int:
    """Time every kernel against plain torch, or let the compiler judge it: exit code 1 if it fails a bar."""
    if archs and not static:
        raise ConfigError("--arch is for --static; timings are of the device that is there, see --device")
    if static:
        rows = _static_rows(archs)
    else:
        from trichord_kernels.bench import bench_kernels as run_bench

        rows = run_bench(device)
        print_rows(rows)
    write_json(json_file, rows)
    return EXIT_UNEXPECTED if any(row.get("failures") for row in rows) else EXIT_DONE


def _static_rows(archs: list[str] | None) -> list[dict]:
    from trichord_kernels.errors import KernelError
    from trichord_kernels.static import render_table, static_report

    try:
        rows = static_report(archs)
    except KernelError as error:
        raise ConfigError(str(error)) from error
    print(render_table(rows))
    return rows
