"""`launch_hosts` around the fakes, as a process of its own, so that tests can send it signals.

fake_hosts_launcher.py CONFIG SSH_CONFIG CLUSTER HOSTS PLAN MAX_RESTARTS
"""

import sys
from pathlib import Path

from trichord.config.identity import run_path
from trichord.config.load import load_run_config
from trichord.core.errors import TrichordError
from trichord_launch.hosts import Request, launch_hosts

HERE = Path(__file__).parent


def main() -> int:
    config, ssh_config, cluster, hosts, plan, max_restarts = sys.argv[1:7]
    folder = run_path(load_run_config(config, ())).absolute()
    request = Request(
        config,
        tuple(hosts.split(",")),
        cluster=cluster,
        procs=1,
        ssh_config=Path(ssh_config),
        entry=(str(HERE / "fake_rank.py"), str(folder), plan),
        runner=(str(HERE / "fake_host_runner.py"),),
    )
    try:
        return launch_hosts(request, max_restarts=int(max_restarts)).exit_code
    except TrichordError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
