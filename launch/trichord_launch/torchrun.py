"""torchrun, whose own traceback after a failed rank goes to a file: `python -m trichord_launch.torchrun OPTIONS ...`.

When a rank fails, torchrun dies of an exception and prints fifty lines that say only that. What went wrong stands
above them, in the rank's one message, and must stay in sight. Everything else is torchrun's, options included.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

# By name: this package imports no torch. SignalException is how torchrun ends after a signal.
_EXPECTED = ("ChildFailedError", "SignalException")


def main() -> None:
    """Run torchrun in this process; exit code 1 if a rank failed."""
    try:
        runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
    except Exception as error:
        if type(error).__name__ not in _EXPECTED:
            raise
        _keep(str(error))
        sys.exit(1)


def _keep(text: str) -> None:
    """Write torchrun's table of failures to `failures.txt` in its log folder, if it was given one."""
    if "--log-dir" in sys.argv:
        folder = Path(sys.argv[sys.argv.index("--log-dir") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failures.txt").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
