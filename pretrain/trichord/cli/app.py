"""The app, its groups, and how a command ends.

A verb imports what it needs when it is called, so `trichord --help` needs neither torch nor the time to load it. A
mistake of the user ends in one message on stderr and the exit code of its error class; a bug keeps its traceback.
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, cast

import typer

from trichord import __version__
from trichord.core.errors import EXIT_CONFIG, EXIT_DONE, TrichordError
from trichord.core.log import quiet_libraries
from trichord.core.stopping import Stopped

EXIT_INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended

_PLAIN = {"rich_markup_mode": None, "no_args_is_help": True, "add_completion": False, "pretty_exceptions_enable": False}
app = typer.Typer(
    name="trichord", help="Pretraining of vision-language-audio transformers, from tar shards up.", **_PLAIN
)
data_app = typer.Typer(help="Shards, their sidecars, tokenizers.", **_PLAIN)
config_app = typer.Typer(help="Show, check and start configs.", **_PLAIN)
track_app = typer.Typer(help="The Weights & Biases mirror.", **_PLAIN)
bench_app = typer.Typer(help="What this machine reaches, against a stated baseline.", **_PLAIN)
selftest_app = typer.Typer(help="Your own config, killed and resumed, against the same run undisturbed.", **_PLAIN)
_GROUPS = {"data": data_app, "config": config_app, "track": track_app, "bench": bench_app, "selftest": selftest_app}
for _name, _group in _GROUPS.items():
    app.add_typer(_group, name=_name)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Only bugs leave as exceptions."""
    quiet_libraries()
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        result = app(args=words, prog_name="trichord", standalone_mode=False)
        return result if isinstance(result, int) else EXIT_DONE
    except Stopped as stopped:  # no error
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except TrichordError as error:
        return _fail(str(error), error.exit_code)
    except typer.Abort:  # what click makes of Ctrl-C
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except _UsageError as error:
        if (help_text := error.format_message()).startswith("Usage:"):  # called without a verb
            print(help_text, file=sys.stderr)
            return EXIT_CONFIG
        command = error.ctx.command_path if getattr(error, "ctx", None) else "trichord"
        return _fail(f"{help_text.rstrip('.')}; see `{command} --help`", EXIT_CONFIG)
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        return _fail(f"this needs {error.name}, which is not installed; pip install 'trichord[{extra}]'", EXIT_CONFIG)


# typer carries click inside, or beside it, depending on its version
_UsageError: type[Exception] = cast(Any, typer.BadParameter).__bases__[0]
_EXTRA_OF = {
    **dict.fromkeys(("torch", "triton"), "kernels"),
    **dict.fromkeys(("deepspeed", "transformers", "timm", "accelerate", "webdataset", "wandb", "safetensors"), "train"),
    **dict.fromkeys(("tokenizers", "huggingface_hub", "PIL", "soundfile", "matplotlib", "psutil", "numpy"), "train"),
    **dict.fromkeys(("sklearn", "scipy", "captcha", "torchvision", "simplejpeg", "soxr", "miniaudio"), "train"),
    "s3fs": "s3",
    "aiohttp": "http",
    "gcsfs": "gcs",
    **dict.fromkeys(("pyarrow", "ijson"), "convert"),
    "ray": "ray",
}


def _fail(message: str, code: int) -> int:
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    rank = f"[rank {os.environ.get('RANK', '?')}] " if several else ""
    print(f"{rank}error: {message}", file=sys.stderr)
    return code
