"""Runs on a list of hosts, over a real ssh: finish, stop, kill, crash, a host that is gone, a launcher that dies."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hosts_world import HOSTS, missing, start_sshd
from trichord.core.errors import ConfigError
from trichord.core.status import read_status
from trichord_launch.cli import app
from trichord_launch.control import cancel
from trichord_launch.host_agent import Agent
from trichord_launch.host_command import HostsJob, host_environment, launch_id, ssh_command, train_commands
from trichord_launch.hosts import Request, _port_of, launch_hosts, read_hosts, show_hosts
from trichord_launch.hosts_check import ask_host, clear_hosts
from trichord_launch.job import NodeCheck
from trichord_launch.machine import Machine, MachineError
from trichord_launch.processes import LAUNCH_ID
from trichord_launch.record import read_json
from trichord_launch.supervise import StopSignals, is_held, run_lock

HERE = Path(__file__).parent
LIMIT_S = 90.0
CONFIG = "runs/quickstart.yaml"

needs_ssh = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(scope="module")
def ssh(tmp_path_factory):
    running = start_sshd(tmp_path_factory.mktemp("ssh"))
    yield running
    running.server.terminate()
    running.server.wait()


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with a config and a cluster file; the current one."""
    monkeypatch.chdir(tmp_path)
    shipped = Path(__file__).resolve().parents[2] / "configs" / CONFIG
    (tmp_path / "run.yaml").write_text(shipped.read_text().replace("name: quickstart", "name: far"))
    (tmp_path / "pair.yaml").write_text(
        f"name: pair\nnodes: 2\ngpus_per_node: 1\nnetwork_interface: lo\npython: {sys.executable}\n"
        "env: {FROM_CLUSTER: 'two words'}\nsetup: ['export FROM_SETUP=yes']\n"
    )
    return tmp_path


class Far:
    """A launcher on two hosts, in a process of its own."""

    def __init__(self, world, ssh, plan, max_restarts=0, hosts=HOSTS):
        words = [str(HERE / "fake_hosts_launcher.py"), "run.yaml", str(ssh.config), "pair.yaml", ",".join(hosts), plan]
        self.folder = world / "runs" / "far"
        self.process = subprocess.Popen(
            [sys.executable, *words, str(max_restarts)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait(self):
        try:
            self.said = self.process.communicate(timeout=LIMIT_S)[0]
        finally:
            self.process.kill()
        return self.process.returncode

    def ready(self):
        """Process ids of both ranks, once they run."""
        files = [self.folder / f"ready.{rank}" for rank in (0, 1)]
        wait_for(lambda: all(file.exists() for file in files))
        return [int(file.read_text().split()[1]) for file in files]


def wait_for(condition, limit_s=60.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def log(folder, host, attempt=1):
    return (folder / "attempts" / str(attempt) / "hosts" / f"{host}.log").read_text()


@needs_ssh
def test_a_run_finishes_and_each_host_has_its_log(world, ssh):
    """Somebody else has the port that the launcher would take first."""
    port = _port_of("far", 1)
    with socket.create_server(("", port)):
        far = Far(world, ssh, "finish")
        assert far.wait() == 0, far.said
    assert read_status(far.folder).outcome == "finished"
    told = "FROM_CLUSTER two words, FROM_SETUP yes"
    assert f"rank 0 begins, {told}" in log(far.folder, HOSTS[0])
    assert f"rank 1 begins, {told}" in log(far.folder, HOSTS[1])
    assert "rank 0 begins" in far.said
    assert "rank 1 begins" not in far.said, "only the first host is shown"
    assert f"port {port} is in use on {HOSTS[0]}; ranks meet at" in far.said
    facts = read_json(far.folder / "attempts" / "1" / "command.json")
    assert f"{HOSTS[0]}:{port} " not in " ".join(facts["argv"])
    assert facts["ranks_per_node"] == 1, "`logs` asks for it"


@needs_ssh
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_reaches_the_ranks_of_all_hosts_once(world, ssh, number):
    far = Far(world, ssh, "wait")
    far.ready()
    far.process.send_signal(number)
    assert far.wait() == 75, far.said
    assert [(far.folder / f"signals.{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


@needs_ssh
def test_a_second_ctrl_c_leaves_nothing_running(world, ssh):
    far = Far(world, ssh, "deaf")
    ranks = far.ready()
    for _ in range(2):
        far.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert far.wait() == 130, far.said
    wait_for(lambda: not any(alive(pid) for pid in ranks), 15)


@needs_ssh
def test_a_crash_ends_the_others_and_starts_again_from_the_checkpoint(world, ssh):
    far = Far(world, ssh, "crash@7,finish", max_restarts=2)
    assert far.wait() == 0, far.said
    assert "attempt 1 failed" in far.said
    assert "starting again from the last checkpoint (1 of 2)" in far.said


@needs_ssh
def test_ranks_save_when_the_launcher_is_gone(world, ssh):
    """As when the machine with the launcher dies: the connections break."""
    far = Far(world, ssh, "wait")
    ranks = far.ready()
    os.killpg(far.process.pid, signal.SIGKILL)
    wait_for(lambda: not any(alive(pid) for pid in ranks), 30)
    assert read_status(far.folder).outcome == "stopped"
    assert [(far.folder / f"signals.{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


def break_connection(folder, host):
    """As where a network drops it: the process of sshd that serves the agent of that host dies."""
    words = f"--local-addr {host} ", f" {folder} "
    agents = [path.parent for path in Path("/proc").glob("[0-9]*/cmdline") if is_agent(path, words)]
    (agent,) = agents
    os.kill(int((agent / "stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)


def is_agent(path, words):
    try:
        said = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return False
    return said.startswith(f"{sys.executable} -m trichord_launch.host_agent ") and all(word in said for word in words)


@needs_ssh
def test_a_host_whose_connection_breaks_is_started_on_again_within_the_budget(world, ssh):
    far = Far(world, ssh, "wait", max_restarts=1)
    ranks = far.ready()
    break_connection(far.folder, HOSTS[1])
    wait_for(lambda: not any(alive(pid) for pid in ranks))
    assert [(far.folder / f"signals.{rank}").read_text() for rank in (0, 1)] == ["1", "1"], "all save, once"
    for rank in (0, 1):
        wait_for(lambda rank=rank: (far.folder / f"ready.{rank}").read_text().startswith("2 "))
    assert read_json(far.folder / "attempts" / "1" / "verdict.json")["hosts_lost"].keys() == {HOSTS[1]}
    break_connection(far.folder, HOSTS[0])
    assert far.wait() == 75, far.said
    assert "attempt 1 stopped at step" in far.said
    assert f"{HOSTS[1]}: the connection to it broke" in far.said
    assert "starting again from the last checkpoint (1 of 1)" in far.said
    assert f"{HOSTS[0]}: the connection to it broke" in far.said
    assert "the budget of 1 restarts is used up; the same command goes on, with --max-restarts N by itself" in far.said


@needs_ssh
def test_nothing_is_left_on_a_host_that_was_lost_before_the_next_start(world, ssh, monkeypatch):
    monkeypatch.setattr("trichord_launch.hosts_check._LEAVE_S", 0.2)
    monkeypatch.setattr("trichord_launch.hosts_check._BACK_S", 0.0)
    words = ("ssh", "-F", str(ssh.config))
    job = HostsJob(world, "far", "c", (), (HOSTS[0], "127.0.0.9"), 1, 3, 20007, world, sys.executable, words)
    left = {
        host: subprocess.Popen(["sleep", "60"], env={**os.environ, LAUNCH_ID: launch_id(job, host)}) for host in HOSTS
    }
    assert clear_hosts(job, [HOSTS[0]], 30.0, StopSignals()) == ""
    assert left[HOSTS[0]].wait(timeout=10) == -signal.SIGKILL
    assert left[HOSTS[1]].poll() is None, "of another host"
    left[HOSTS[1]].kill()
    left[HOSTS[1]].wait()
    told = clear_hosts(job, ["127.0.0.9"], 30.0, StopSignals())
    assert "127.0.0.9: ssh cannot reach it" in told
    assert "see that none is" in told


@needs_ssh
def test_setup_that_hangs_after_the_check_ends_the_start_with_its_host_named(world, ssh):
    """The second time that setup runs on a host, it does not end."""
    once = f"once={world}/$(echo $SSH_CONNECTION | cut -d' ' -f3); if test -e $once; then sleep 8; else touch $once; fi"
    text = (world / "pair.yaml").read_text().replace("'export FROM_SETUP=yes'", f'"{once}"')
    (world / "pair.yaml").write_text(text + "node_check: {timeout_s: 4}\n")
    far = Far(world, ssh, "wait")
    assert far.wait() == 1, far.said
    assert f"{HOSTS[1]}: its modules and setup had not ended after 4 s (node_check.timeout_s)" in far.said
    assert "the ranks died without a word" not in far.said


@needs_ssh
def test_a_stop_while_hosts_are_looked_at_is_said_and_starts_nothing(world, ssh):
    (world / "pair.yaml").write_text((world / "pair.yaml").read_text().replace("export FROM_SETUP=yes", "sleep 8"))
    far = Far(world, ssh, "finish")
    wait_for(lambda: is_held(far.folder) and list(far.folder.glob("hosts_check/*/token")))
    assert "asked to save and stop" in cancel(far.folder)
    assert far.wait() == 128 + signal.SIGTERM
    assert far.said == "SIGTERM: stopped before anything was started\n"
    assert not (far.folder / "attempts").exists()
    assert not is_held(far.folder)


@needs_ssh
def test_a_host_that_cannot_be_reached_is_named_and_nothing_starts(world, ssh):
    far = Far(world, ssh, "finish", hosts=(HOSTS[0], "127.0.0.9"))
    assert far.wait() == 69
    assert "1 of 2 hosts cannot train" in far.said
    assert "127.0.0.9: ssh cannot reach it" in far.said
    assert not (far.folder / "attempts").exists()


@needs_ssh
def test_a_host_that_is_not_fit_is_named(world, ssh):
    request = Request("run.yaml", HOSTS, cluster="pair.yaml", procs=1, ssh_config=ssh.config)
    with pytest.raises(MachineError, match=r"2 of 2 hosts cannot train.*\n  127.0.0.1: .*ended with 3"):
        launch_hosts(request, check=NodeCheck(commands=("exit 3",)))
    with pytest.raises(MachineError, match=r"GiB free in .*1e[+]09 wanted"):
        launch_hosts(request, check=NodeCheck(min_disk_free_gib=1e9))


def test_shown_first_and_nothing_is_written(world):
    done = CliRunner().invoke(
        app, ["hosts", "run.yaml", "engine.lr=1e-3", "--hosts", "n1,me@n2", "--cluster", "pair.yaml", "--procs", "4"]
    )
    assert done.exit_code == 0, done.output
    assert not (world / "runs").exists()
    assert "--rdzv-endpoint n1:2" in done.output
    assert "--local-addr n2" in done.output
    assert "engine.lr=1e-3" in done.output


def test_only_the_first_host_hosts_the_rendezvous():
    job = HostsJob(Path("/r"), "far", "c.yaml", (), ("n1", "n2", "n3"), 8, 2, 20007, Path("/w"), "python")
    commands = train_commands(job)
    assert ["is_host=true" in " ".join(words) for words in commands.values()] == [True, False, False]
    assert all(
        "--rdzv-endpoint n1:20007" in words[-1] and "--rdzv-id far-2" in words[-1] for words in commands.values()
    )
    assert host_environment(job)["HF_HUB_OFFLINE"] == "1"
    assert "DS_ACCELERATOR" not in host_environment(job)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1\nn2 slots=8\n\n# n3\n", ("n1", "n2")),
        ("me@10.0.0.7   # first\nn2\n", ("me@10.0.0.7", "n2")),
        ("\ufeffn1\r\nn2\r\n", ("n1", "n2")),
    ],
)
def test_a_hostfile_has_one_host_per_line(tmp_path, text, hosts):
    (tmp_path / "hosts").write_text(text, encoding="utf-8", newline="")
    assert read_hosts(None, tmp_path / "hosts") == hosts


@pytest.mark.parametrize(
    ("named", "file", "match"),
    [
        (None, None, "one of the two"),
        ("n1", "hosts", "one of the two"),
        ("n1,n1", None, "named twice"),
        ("n1,me@n1", None, "host n1 is named twice"),
        ("-oProxyCommand@n1", None, "is no name of a host"),
        ("-oProxyCommand=evil", None, "is no name of a host"),
        ("n1;reboot", None, "is no name of a host"),
        (" , ", None, "no host is named"),
        (None, "absent", "cannot be read"),
    ],
)
def test_hosts_that_cannot_be_meant(tmp_path, named, file, match):
    with pytest.raises(ConfigError, match=match):
        read_hosts(named, tmp_path / file if file else None)


def on_host(setup, code, limit_s=None, stdin=""):
    """What a host would run, run here."""
    job = HostsJob(Path("/r"), "far", "c", (), ("n1",), 1, 1, 20007, Path("/"), sys.executable, setup=tuple(setup))
    words = ssh_command(job, "n1", ["-c", code], limit_s)
    return subprocess.run(["sh", "-c", words[-1]], input=stdin, capture_output=True, text=True, timeout=60, check=False)


def test_lines_of_setup_do_not_disturb_each_other():
    setup = ["export A=1 # a comment", "false || true", "cat >/dev/null", "export B='it''s'"]
    done = on_host(setup, "import os, sys; print(os.environ['A'], os.environ['B'], sys.stdin.read())", stdin="stop")
    assert done.stdout == "1 its stop\n", done.stderr


@pytest.mark.parametrize("line", ["false", "false; true", "export A='open", "exit 4"])
def test_a_line_of_setup_that_fails_ends_the_start(line):
    done = on_host([line], "print('started')")
    assert done.returncode != 0
    assert not done.stdout


def test_a_check_that_never_ends_is_ended_on_the_host():
    began = time.monotonic()
    assert on_host(["sleep 50"], "print('started')", limit_s=0.5).returncode == 124
    assert time.monotonic() - began < 30


def test_what_a_host_says_need_not_be_text(tmp_path):
    said, report = ask_host(["sh", "-c", "printf 'gr\\374ezi\\n' >&2; exit 3"], tmp_path / "n1", 30.0)
    assert said == "its check ended with 3 (gr\ufffdezi)"
    assert report is None


def test_hosts_may_have_gpus_where_the_launcher_has_none(world, monkeypatch):
    monkeypatch.setattr("trichord_launch.hosts.this_machine", lambda: Machine(8, 0))
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert "DS_ACCELERATOR" not in show_hosts(Request("run.yaml", ("n1",), procs=8))
    (world / "cpus.yaml").write_text("name: cpus\nnodes: 2\ngpus_per_node: 2\nenv: {DS_ACCELERATOR: cpu}\n")
    shown = show_hosts(Request("run.yaml", ("n1",), cluster="cpus.yaml", procs=4))
    assert "DS_ACCELERATOR=cpu" in shown


def test_hosts_are_read_on_when_nobody_looks_any_more(tmp_path):
    chatty = shlex.join([sys.executable, "-c", "print(('x' * 99 + '\\n') * 9999); open('end', 'w')"])
    words = [sys.executable, "-m", "trichord_launch.fan_out", str(tmp_path / "logs"), "60", "60", "n1", chatty]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, cwd=tmp_path)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "end").exists()
    assert len((tmp_path / "logs" / "n1.log").read_text()) == 9999 * 100 + 1


def test_ranks_stop_when_nothing_is_heard_of_the_launcher(monkeypatch):
    """A network that is cut leaves the connection as it was."""
    monkeypatch.setattr("trichord_launch.host_agent._SILENCE_S", 0.5)
    monkeypatch.setenv("TRICHORD_RANKS_PER_NODE", "1")
    began = time.monotonic()
    assert Agent("id", ["-c", "import time; time.sleep(50)"]).wait() == -signal.SIGTERM
    assert time.monotonic() - began < 30


def test_a_run_that_is_held_is_refused_before_hosts_are_asked(world):
    with run_lock(world / "runs" / "far"), pytest.raises(ConfigError, match="in use by another launcher"):
        launch_hosts(Request("run.yaml", ("no.such.host",)))
    assert not (world / "runs" / "far" / "hosts_check").exists()


def test_ranks_that_would_idle_and_groups_over_two_hosts_are_told(world, capfd):
    show_hosts(Request("run.yaml", HOSTS, ("batches.rows_per_step=2", "engine.sequence_parallel=2"), procs=3))
    said = capfd.readouterr().err
    assert "engine.sequence_parallel 2 does not divide the 3 ranks of a node" in said
    assert "rows_per_step 2 for groups of 2 ranks (engine.sequence_parallel), so 2 of 6 ranks would idle" in said
    show_hosts(Request("run.yaml", HOSTS, ("batches.rows_per_step=2", "engine.sequence_parallel=2"), procs=2))
    assert capfd.readouterr().err == ""


def test_options_that_do_not_fit(world):
    for request, match in [
        (Request("run.yaml", HOSTS, procs=0), "--procs must be at least 1"),
        (Request("run.yaml", HOSTS, ssh_config=Path("absent")), "no such file"),
        (Request("run.yaml", HOSTS, cluster="absent"), "absent"),
        (
            Request("run.yaml", HOSTS, ("engine.sequence_parallel=4",), procs=3),
            r"4 does not divide the 6 ranks.*4 or 8",
        ),
    ]:
        with pytest.raises(ConfigError, match=match):
            show_hosts(request)
