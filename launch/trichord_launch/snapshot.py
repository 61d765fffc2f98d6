"""What a submission keeps: the resolved config from which the job trains, the state of the code, the environment."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from trichord.config.environment import environment, git_state
from trichord.config.load import resolved_yaml
from trichord.config.run import RunConfig
from trichord.core.status import write_atomically


def write_snapshot(folder: Path, config: RunConfig) -> None:
    """Write `config.yaml`, `environment.json` and, where tracked files differ from the commit, `code.diff`."""
    git = git_state()
    write_atomically(folder / "config.yaml", resolved_yaml(config))
    facts = {"time": time.time(), "command": sys.argv, "cwd": str(Path.cwd()), "git": git, **environment()}
    write_atomically(folder / "environment.json", json.dumps(facts, indent=2) + "\n")
    if git["dirty"]:
        write_atomically(folder / "code.diff", git_diff())


def git_diff() -> str:
    """How the code that runs differs from its commit: tracked files as a diff, new ones by name."""
    place = next(
        (str(p) for p in (Path(__file__).resolve().parent, Path.cwd()) if _git(str(p), "rev-parse", "HEAD")), "."
    )
    top = _git(place, "rev-parse", "--show-toplevel").strip() or place
    new = _git(top, "ls-files", "--others", "--exclude-standard").splitlines()
    return _git(top, "diff", "HEAD", "--binary") + "".join(f"new file, not in this diff: {name}\n" for name in new)


def _git(place: str, *arguments: str) -> str:
    """Output of a git command; empty when it fails in any way."""
    try:
        done = subprocess.run(["git", "-C", place, *arguments], capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", errors="replace") if done.returncode == 0 else ""
