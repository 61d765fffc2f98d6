"""One rank of a job without torchrun: `python -m trichord_launch.rank ARGUMENTS ...`, started by srun for each.

Says who it is in the variables that torchrun would set, then becomes `python ARGUMENTS ...`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from trichord_launch.node import threads_per_rank


def rank_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK and its kin, from what srun says."""
    return {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "WORLD_SIZE": environ["SLURM_NTASKS"],
        "LOCAL_WORLD_SIZE": environ["TRICHORD_RANKS_PER_NODE"],
        "GROUP_RANK": environ["SLURM_NODEID"],
    }


def main() -> None:
    """Replace this process by the rank's own."""
    environ = {**os.environ, **rank_variables(os.environ)}
    cores = environ.get("SLURM_CPUS_PER_TASK")  # of this rank; without it Slurm binds no rank to cores of its own
    environ.setdefault("OMP_NUM_THREADS", cores or threads_per_rank(environ, len(os.sched_getaffinity(0))))
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environ)


if __name__ == "__main__":
    main()
