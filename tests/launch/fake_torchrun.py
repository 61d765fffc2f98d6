"""torchrun as the launcher sees it, without torch: starts ranks in sessions of their own, exits 1 if any fails.

fake_torchrun.py PROCS SCRIPT ARGUMENTS...
"""

import os
import signal
import subprocess
import sys
import time


def main() -> int:
    procs = int(sys.argv[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, *sys.argv[2:]],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(procs)},
            start_new_session=True,
        )
        for rank in range(procs)
    ]
    asked = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    while any(rank.poll() is None for rank in ranks):
        if asked or any(rank.poll() not in (None, 0) for rank in ranks):
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
            return 1
        time.sleep(0.02)
    return int(any(rank.returncode for rank in ranks))


if __name__ == "__main__":
    sys.exit(main())
