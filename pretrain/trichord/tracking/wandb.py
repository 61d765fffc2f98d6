"""The Weights & Biases mirror of a run. `metrics.jsonl` is the record; whatever happens here, training goes on: some of
W&B's calls ask the server and wait for its answer, so all but the first are made by a thread.

Rows are logged at W&B's own step, and carry `step` as a column that every chart uses as its axis. When a run goes on
from a checkpoint, the steps after it are done again:

- online, W&B rewinds the run to the checkpoint's step (`resume_from`). Where the server refuses (rewinding is not
  enabled everywhere), the run is continued (`resume="allow"`); rows then carry the attempt number, and the steps that
  were done twice are there twice. Both paths are tested against a stand-in for the server, not against a real one.
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
from trichord.tracking.outbox import Outbox
from trichord.tracking.wandb_media import Reference, log_reference, sample_table
from trichord.tracking.wandb_service import end_service, service_is_gone

Mode = Literal["online", "offline", "off"]
Axis = Literal["step", "own"]  # "step": W&B's step is ours; "own": it is not, since a run was continued, not rewound

_INIT_TIMEOUT_S = 30.0
# A stop has a deadline; what is not there by then stays on disk.
_UPLOAD_TIMEOUT_S = 20.0  # for what is left to upload when the run is closed
_FINISH_TIMEOUT_S = 60.0  # for this and all calls that were asked for before
_SAFE = "metrics.jsonl has everything and `trichord track sync` uploads it"
_logger = get_logger(__name__)


class WandbMirror:
    """Copies metrics to W&B; never raises, and nobody waits for it but for a bounded time at the start and the end.
    Without its rows it is switched off, with one warning; of tables, artifacts and alerts that fail each is told.

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
        self._outbox: Outbox | None = None
        self._over = False  # whatever fails from then on has been told of
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
            self._outbox = Outbox("wandb")
        except Exception as error:  # a network, a server or a package at fault: none is worth a training run
            self._give_up("could not start", error)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Mirror one line of the record."""
        self._ask("could not log", lambda run: self._log_row(run, step, metrics), vital=True)

    def table(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """A step's lines of `previews.jsonl`, with their pictures and sounds."""
        self._ask("could not log a table", lambda run: self._log_row(run, step, {"previews": self._table(lines)}))

    def reference(self, reference: Reference | None) -> None:
        """An artifact by where it lies; None: nothing."""
        if reference is not None:
            self._ask("could not log an artifact", lambda run: log_reference(run, reference))

    def alert(self, title: str, text: str, level: Literal["INFO", "WARN", "ERROR"]) -> None:
        """Tell whoever subscribed to the project's alerts."""
        self._ask("could not send an alert", lambda run: run.alert(title=title, text=text, level=level))

    def finish(self, exit_code: int = 0, wait_s: float | None = None) -> None:
        """Close the run, waiting at most `wait_s` (None: `_FINISH_TIMEOUT_S`) for what is left to send."""
        wait_s = _FINISH_TIMEOUT_S if wait_s is None else wait_s
        outbox, self._outbox = self._outbox, None
        if outbox is None:
            return
        outbox.put(lambda: self._finish(exit_code))
        if not outbox.close(wait_s):
            self._over = True
            _logger.warning("wandb did not take everything within %.0f s; %s", wait_s, _SAFE)
            end_service()

    def _finish(self, exit_code: int) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish(exit_code=exit_code)
        except TimeoutError:
            _logger.warning("wandb did not take everything within %.0f s; %s", _UPLOAD_TIMEOUT_S, _SAFE)
        except Exception as error:
            self._give_up("could not finish", error)

    def _table(self, lines: Sequence[Mapping[str, Any]]) -> Any:
        return sample_table(self._folder, lines)

    def _log_row(self, run: Any, step: int, values: Mapping[str, Any]) -> None:
        if self._axis == "step":
            run.log({**values, "step": step}, step=step)
        else:
            run.log({**values, "step": step, "attempt": self._attempt})

    def _ask(self, what: str, act: Callable[[Any], None], vital: bool = False) -> None:
        """Have `act(run)` done when what was asked for before is done. vital: without it there is no mirror."""
        if self._outbox is not None:
            self._outbox.put(lambda: self._act(what, act, vital))

    def _act(self, what: str, act: Callable[[Any], None], vital: bool) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:
            if vital:
                self._give_up(what, error)
            elif not self._over:
                _logger.warning("wandb %s (%s: %s); %s", what, type(error).__name__, error, _SAFE)

    def _give_up(self, what: str, error: Exception) -> None:
        self._run = None
        if self._over:
            return
        end_service()
        _logger.warning("wandb %s (%s: %s); going on without it, %s", what, type(error).__name__, error, _SAFE)


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
            end_service()
    return init(id=run_id, resume="allow"), "own"


def open_run(
    mode: Mode,
    config: WandbConfig,
    folder: Path,
    run_name: str,
    run_config: Mapping[str, Any],
    *,
    upload_timeout_s: float = _UPLOAD_TIMEOUT_S,
    **identity: Any,
) -> Any:
    """Start or continue a W&B run. upload_timeout_s: its `finish` raises a TimeoutError when that takes longer."""
    import wandb  # heavy, and not part of the base install

    folder.mkdir(parents=True, exist_ok=True)  # else W&B silently writes to a temporary folder
    wishes = {
        "init_timeout": _INIT_TIMEOUT_S,
        "finish_timeout": upload_timeout_s,
        "finish_timeout_raises": True,
        "console": "off",  # our logs are per rank in the run folder
        "disable_git": True,  # the run folder has the git state
        "disable_code": True,
        "silent": True,
    }
    known = {name: value for name, value in wishes.items() if name in wandb.Settings.model_fields}
    init = partial(
        wandb.init,
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
    try:
        run = init()
    except Exception as error:
        if not service_is_gone(error):
            raise
        end_service()  # it ended since an earlier run of this process, and W&B would ask it for ever
        run = init()
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
