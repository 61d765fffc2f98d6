"""`supervise` around the fakes, as a process of its own, so that tests can send it signals.

fake_launcher.py FOLDER PLAN PROCS MAX_RESTARTS
"""

import sys
from pathlib import Path

from trichord_launch.command import Command
from trichord_launch.supervise import supervise

HERE = Path(__file__).parent


def main() -> int:
    folder, plan, procs, max_restarts = sys.argv[1:5]
    ranks = (sys.executable, str(HERE / "fake_torchrun.py"), procs, str(HERE / "fake_rank.py"), folder, plan)

    def command_of(attempt: int, restart: bool) -> Command:
        return Command((*ranks, "restart") if restart else ranks, {"TRICHORD_ATTEMPT": str(attempt)})

    verdict = supervise(
        Path(folder), command_of, max_restarts=int(max_restarts), restart_pause_s=0.1, leftover_grace_s=0.5
    )
    return verdict.exit_code


if __name__ == "__main__":
    sys.exit(main())
