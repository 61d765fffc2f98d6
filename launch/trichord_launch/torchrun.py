"""torchrun, whose own traceback after a failed rank goes to a file: `python -m trichord_launch.torchrun OPTIONS ...`.

When a rank fails, torchrun dies of an exception and prints fifty lines that say only that. What went wrong stands
above them, in the rank's one message, and must stay in sight. Everything else is torchrun's, options included.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

FAILURES_FILE = "failures.json"


def main() -> None:
    """Run torchrun in this process; exit code 1 if a rank failed."""
    try:
        runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
    except Exception as error:
        # By name: this package imports no torch. SignalException is how torchrun ends after a signal.
        if type(error).__name__ not in ("ChildFailedError", "SignalException"):
            raise
        _keep(error)
        sys.exit(1)


def _keep(error: Exception) -> None:
    """Write what torchrun knows of the failed ranks, first failure first, to its log folder, if it was given one."""
    if "--log-dir" not in sys.argv:
        return
    folder = Path(sys.argv[sys.argv.index("--log-dir") + 1])
    failures = sorted(getattr(error, "failures", {}).items(), key=lambda item: item[1].timestamp)
    facts = [
        {"rank": rank, "exitcode": failure.exitcode, "pid": failure.pid, "timestamp": failure.timestamp}
        for rank, failure in failures
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILURES_FILE).write_text(json.dumps({"failures": facts, "text": str(error)}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
