"""One node of a job: `python -m trichord_launch.node LOG_DIR TORCHRUN-OPTIONS ...`, started by srun on each."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from trichord_launch import torchrun


def torchrun_options(log_dir: str, environ: Mapping[str, str]) -> list[str]:
    """What differs from node to node. The first node hosts the rendezvous: said here, since its name may have many
    forms; ranks meet under the names that Slurm knows the nodes by."""
    node = environ["SLURM_NODEID"]
    return [
        *("--log-dir", f"{log_dir}/node-{node}"),
        *("--rdzv-conf", f"is_host={'true' if node == '0' else 'false'}"),
        *("--local-addr", environ["SLURMD_NODENAME"]),
    ]


def threads_per_rank(environ: Mapping[str, str], cores: int) -> str:
    """OMP_NUM_THREADS of a rank where nobody has set it: this node's cores, shared out."""
    return environ.get("OMP_NUM_THREADS") or str(max(1, cores // int(environ["TRICHORD_RANKS_PER_NODE"])))


def main() -> None:
    """torchrun on this node, in this process."""
    os.environ["OMP_NUM_THREADS"] = threads_per_rank(os.environ, len(os.sched_getaffinity(0)))
    log_dir, *options = sys.argv[1:]
    sys.argv = [sys.argv[0], *torchrun_options(log_dir, os.environ), *options]
    torchrun.main()


if __name__ == "__main__":
    main()
