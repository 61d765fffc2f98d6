"""A real sshd on this machine, and two names for it: 127.0.0.1 and 127.0.0.2."""

import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

HOSTS = ("127.0.0.1", "127.0.0.2")


@dataclass(frozen=True)
class Ssh:
    """config: for `ssh -F`."""

    config: Path
    server: subprocess.Popen


def missing() -> str:
    """Why there can be no sshd here; empty where there can."""
    if shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None or shutil.which("ssh") is None:
        return "no sshd; on Debian: apt-get install openssh-server openssh-client"
    return ""


def start_sshd(folder: Path) -> Ssh:
    """For this user alone, with keys of its own."""
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "authorized_keys").write_text((folder / "user_key.pub").read_text())
    (folder / "authorized_keys").chmod(0o600)
    port = _free_port()
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nListenAddress 127.0.0.2\nHostKey {folder}/host_key\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPidFile {folder}/pid\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin yes\nPasswordAuthentication no\nMaxStartups 100\n"
    )
    (folder / "ssh_config").write_text(
        f"Host *\n  Port {port}\n  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n"
        "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd drops its privileges to
    sshd = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    assert sshd is not None
    words = [sshd, "-D", "-E", str(folder / "sshd.log"), "-f", str(folder / "sshd_config")]
    server = subprocess.Popen(words)
    _wait_for(port)
    return Ssh(folder / "ssh_config", server)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.2", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("sshd does not listen")
