"""The Weights & Biases mirror of a run. `metrics.jsonl` is the record; whatever happens here, training goes on.

Rows are logged at W&B's own step, and carry `step` as a column that every chart uses as its axis. When a run goes on
from a checkpoint, the steps after it are done again:

- online, W&B rewinds the run to the checkpoint's step (`resume_from`). Where the server refuses (rewinding is not
  enabled everywhere), the run is continued (`resume="allow"`); rows then carry the attempt number, and the steps that
  were done twice are there twice. Both paths are untested against a server.
- offline, every start leaves one more folder, and a killed process loses the rows W&B still buffered. `trichord track
  sync` rebuilds one clean run from the record.
"""

from __future__ import annotations

import contextlib
import json
import netrc
import os
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from trichord.core.log import get_logger
from trichord.core.status import write_atomically
from trichord.tracking.config import WandbConfig
from trichord.tracking.wandb_media import Reference, log_reference, sample_table

Mode = Literal["online", "offline", "off"]
Axis = Literal["step", "own"]  # "step": W&B's step is ours; "own": it is not, since a run was continued, not rewound

_INIT_TIMEOUT_S = 30.0
_FINISH_TIMEOUT_S = 60.0  # a stop has a deadline; what is not uploaded by then stays on disk
_logger = get_logger(__name__)


class WandbMirror:
    """Copies metrics to W&B. A failure warns once and switches the mirror off; it never raises.

    config: mode, project, entity, group, tags.
    folder: the run folder; W&B's files go to `wandb/` in it.
    run_name, run_config, attempt: the run's name, its resolved config as plain data, which start of it this is.
    run_id: the id stored in the checkpoint that the run goes on from; None for a new run (a restart before the first
        checkpoint finds the id in the folder). A branch is a new run: pass None.
    resume_step: the step of that checkpoint.

    `run_id` (None with mode off and no id given) is what the checkpoint must store.
    """

    def __init__(
        self,
        config: WandbConfig,
        folder: Path,
        *,
        run_name: str,
        run_config: Mapping[str, Any],
        run_id: str | None = None,
        resume_step: int | None = None,
        attempt: int = 0,
    ) -> None:
        self.mode: Mode = resolve_mode(config.mode)
        self.run_id = run_id
        self._run: Any = None
        self._folder = Path(folder)
        self._attempt = attempt
        self._axis: Axis = "step"
        if self.mode == "off":
            return
        stored = read_identity(Path(folder))
        resuming = run_id or stored.get("id")
        self.run_id = resuming or new_id()
        rewind_step = resume_step if stored.get("axis", "step") == "step" else None
        init = partial(open_run, self.mode, config, Path(folder), run_name, run_config)
        try:
            if resuming and self.mode == "online":
                self._run, self._axis = _rewind_or_continue(init, self.run_id, rewind_step)
            else:
                self._run = init(id=self.run_id)
            write_identity(Path(folder), self.run_id, self._axis)
        except Exception as error:  # a network, a server or a package at fault: none is worth a training run
            self._give_up("could not start", error)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Mirror one line of the record."""
        self._try("could not log", lambda run: self._log_row(run, step, metrics))

    def table(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """A step's lines of `previews.jsonl`, with their pictures and sounds."""
        self._try("could not log a table", lambda run: self._log_row(run, step, {"previews": self._table(lines)}))

    def reference(self, reference: Reference | None) -> None:
        """An artifact by where it lies; None: nothing."""
        if reference is not None:
            self._try("could not log an artifact", lambda run: log_reference(run, reference))

    def alert(self, title: str, text: str, level: Literal["INFO", "WARN", "ERROR"]) -> None:
        """Tell whoever subscribed to the project's alerts."""
        self._try("could not send an alert", lambda run: run.alert(title=title, text=text, level=level))

    def _table(self, lines: Sequence[Mapping[str, Any]]) -> Any:
        return sample_table(self._folder, lines)

    def _log_row(self, run: Any, step: int, values: Mapping[str, Any]) -> None:
        if self._axis == "step":
            run.log({**values, "step": step}, step=step)
        else:
            run.log({**values, "step": step, "attempt": self._attempt})

    def _try(self, what: str, act: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:
            self._give_up(what, error)

    def finish(self, exit_code: int = 0) -> None:
        """Close the run, waiting at most a minute for uploads."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            self._give_up("could not finish", error)

    def _give_up(self, what: str, error: Exception) -> None:
        self._run = None
        _logger.warning(
            "wandb %s (%s: %s); going on without it, metrics.jsonl has everything and `trichord track sync` uploads it",
            what,
            type(error).__name__,
            error,
        )


def resolve_mode(mode: Literal["auto", "online", "offline", "off"], environ: Mapping[str, str] | None = None) -> Mode:
    """What mode a run uses: `auto` follows WANDB_MODE, then is online where an API key is configured, else offline.

    Online without a key becomes offline with a warning, since W&B would ask for the key on the terminal and wait.
    """
    environ = os.environ if environ is None else environ
    wanted = mode
    if mode == "auto":
        named = {"online": "online", "offline": "offline", "dryrun": "offline", "disabled": "off"}
        wanted = named.get(environ.get("WANDB_MODE", ""), "auto")
    if wanted == "off":
        return "off"
    if wanted == "offline" or (wanted == "auto" and not has_api_key(environ)):
        return "offline"
    if not has_api_key(environ):
        _logger.warning("wandb: online was asked for, but no API key is configured (`wandb login`); writing offline")
        return "offline"
    return "online"


def has_api_key(environ: Mapping[str, str]) -> bool:
    """Whether W&B would find a key without asking: WANDB_API_KEY, an identity token, or a netrc entry of its host."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(environ.get("NETRC") or Path(environ.get("HOME", "/")) / ".netrc")
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _rewind_or_continue(init: Callable[..., Any], run_id: str, step: int | None) -> tuple[Any, Axis]:
    """The online run, rewound to `step` where the server does that (then W&B's steps stay ours), else continued."""
    if step is not None:
        try:
            return init(resume_from=f"{run_id}?_step={step}"), "step"
        except Exception as error:  # W&B names no single error for "this server does not rewind"
            _logger.warning("wandb did not rewind run %s to step %d (%s); continuing it", run_id, step, error)
    return init(id=run_id, resume="allow"), "own"


def open_run(
    mode: Mode, config: WandbConfig, folder: Path, run_name: str, run_config: Mapping[str, Any], **identity: Any
) -> Any:
    import wandb  # heavy, and not part of the base install

    folder.mkdir(parents=True, exist_ok=True)  # else W&B silently writes to a temporary folder
    wishes = {
        "init_timeout": _INIT_TIMEOUT_S,
        "finish_timeout": _FINISH_TIMEOUT_S,
        "console": "off",  # our logs are per rank in the run folder
        "disable_git": True,  # the run folder has the git state
        "disable_code": True,
        "silent": True,
    }
    known = {name: value for name, value in wishes.items() if name in wandb.Settings.model_fields}
    run = wandb.init(
        mode="online" if mode == "online" else "offline",
        dir=str(folder),
        name=run_name,
        project=config.project,
        entity=config.entity,
        group=config.group,
        tags=list(config.tags) or None,
        config={**run_config, **_surroundings(folder)},
        settings=wandb.Settings(**known),
        **identity,
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _surroundings(folder: Path) -> dict[str, Any]:
    """What the run was made with: versions, host, state of the code, as `environment.json` has it."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        return {"environment": found} if isinstance(found, dict) else {}
    return {}


def new_id() -> str:
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def read_identity(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        identity = json.loads((folder / "wandb" / "identity.json").read_text(encoding="utf-8"))
        return identity if isinstance(identity, dict) else {}
    return {}


def write_identity(folder: Path, run_id: str, axis: Axis) -> None:
    write_atomically(folder / "wandb" / "identity.json", json.dumps({"id": run_id, "axis": axis}) + "\n")
