"""torchrun on one host as the launcher sees it, without torch: one rank, whose number is that of the host.

fake_host_runner.py TORCHRUN-OPTIONS --log-dir .../node-N --tee 3 SCRIPT ARGUMENTS ...
"""

import os
import subprocess
import sys


def main() -> int:
    words = sys.argv[1:]
    node = words[words.index("--log-dir") + 1].rpartition("node-")[2]
    rank = words[words.index("--tee") + 2 :]
    environ = {**os.environ, "RANK": node, "LOCAL_RANK": "0", "WORLD_SIZE": words[words.index("--nnodes") + 1]}
    told = [f"{name} {os.environ[name]}" for name in ("FROM_CLUSTER", "FROM_SETUP") if name in os.environ]
    print(", ".join([f"rank {node} begins", *told]), flush=True)
    return int(subprocess.call([sys.executable, *rank], env=environ, start_new_session=True) != 0)


if __name__ == "__main__":
    sys.exit(main())
