"""Submits a run whose ranks are `slurm_rank.py`: what `trichord-launch slurm ... --submit` does, with another entry.

submit_fake.py CONFIG CLUSTER NODES PLAN STEP_S JSON-OF-MORE-REQUEST-FIELDS
"""

import json
import sys
from pathlib import Path

from trichord_launch.job import Budget
from trichord_launch.slurm import Request, prepare, submit

HERE = Path(__file__).parent


def main() -> None:
    config, cluster, nodes, plan, step_s, more = sys.argv[1:]
    fields = json.loads(more)
    fields["budget"] = Budget(**fields.get("budget", {}))
    if fields.get("launcher", "torchrun") == "torchrun":
        fields["runner"] = (str(HERE / "slurm_node.py"),)
    entry = (str(HERE / "slurm_rank.py"), plan, step_s)
    request = Request(config=config, cluster=cluster, nodes=int(nodes), entry=entry, **fields)
    print("\n".join(submit(prepare(request))))


if __name__ == "__main__":
    main()
