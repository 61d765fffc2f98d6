"""torchrun of one node as the launcher starts it, without torch: the same arguments, ranks as children, 1 if any fails.

slurm_node.py LOG_DIR TORCHRUN-OPTIONS ... SCRIPT ARGUMENTS ...
"""

import os
import subprocess
import sys
import time

from trichord_launch.node import torchrun_options


def main() -> int:
    log_dir, *rest = sys.argv[1:]
    print(torchrun_options(log_dir, os.environ), flush=True)  # fails as the real one would, if Slurm says less
    entry = rest.index("--signals-to-handle") + 2
    procs, nodes = (int(rest[rest.index(name) + 1]) for name in ("--nproc-per-node", "--nnodes"))
    first = int(os.environ["SLURM_NODEID"]) * procs
    ranks = [
        subprocess.Popen(
            [sys.executable, *rest[entry:]],
            env={**os.environ, "RANK": str(first + i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(procs * nodes)},
            start_new_session=True,
        )
        for i in range(procs)
    ]
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() not in (None, 0) for rank in ranks):
            for rank in ranks:
                rank.kill()
            return 1
        time.sleep(0.05)
    return int(any(rank.returncode for rank in ranks))


if __name__ == "__main__":
    sys.exit(main())
