"""The life of a job on a real Slurm, with ranks without torch: each way in which it can end, and what comes after."""

from slurm_rank import TOTAL_STEPS, digest_of
from slurm_world import World

from trichord.config.load import load_run_config
from trichord_launch.record import read_json

DONE = {f"{TOTAL_STEPS} {digest_of(TOTAL_STEPS)}"}


def test_a_run_that_finishes(world):
    job = world.submit(launcher="torchrun")
    assert world.wait_state(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", world.tell()
    assert world.outcome() == ("finished", 0)
    assert world.attempts() == [("finished", "leave")]
    assert world.checkpoints() == DONE
    record = world.run_folder / "attempts/1"
    assert {"n1.json", "n2.json"} <= {path.name for path in (record / "node_check").iterdir()}
    assert "rank 3 on n2" in (record / "node-1.log").read_text()
    assert f"JobId={job} " in (record / "job.txt").read_text()
    submission = next(world.run_folder.glob("submissions/*"))
    for name in ("job.sh", "job.json", "config.yaml", "environment.json", "links.json"):
        assert (submission / name).is_file(), name
    assert read_json(record / "command.json")["argv"][-1] == str(submission / "config.yaml")


def test_preempted_saved_at_one_step_requeued_and_finished(world):
    job = world.submit(step_s=0.2)
    world.wait_step(12)
    world.preempt()
    world.hurry()
    facts = world.wait_state(job, "COMPLETED", "FAILED", limit_s=90)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), world.tell()
    check_stopped_once_and_finished(world)


def test_a_stop_that_only_the_ranks_were_told_is_requeued_too(world):
    """Where Slurm does not signal the batch process at preemption, its SIGTERM reaches the ranks alone."""
    job = world.submit(step_s=0.2)
    world.wait_step(12)
    world.cluster.run("scancel", "--signal=TERM", job)
    world.wait_state(job, "COMPLETING", "PENDING")
    world.hurry()
    facts = world.wait_state(job, "COMPLETED", "FAILED", limit_s=90)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), world.tell()
    check_stopped_once_and_finished(world)


def test_time_limit_saved_at_one_step_requeued_and_finished(world):
    """Slurm looks every 30 seconds, and tells 30 seconds early: here 5 to 35 seconds after the start."""
    world.change_cluster("save_lead_s: 50", "save_lead_s: 85")
    job = world.submit(step_s=1.0, time="2")
    world.wait_for(lambda: world.verdict(1), 90, "the first attempt to end")
    world.hurry()
    facts = world.wait_state(job, "COMPLETED", "FAILED", "TIMEOUT", limit_s=120)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), world.tell()
    check_stopped_once_and_finished(world)


def check_stopped_once_and_finished(world):
    """Stopped in attempt 1 with a checkpoint of one step on all ranks; attempt 2 went on from there to the end."""
    assert world.attempts() == [("stopped", "requeue"), ("finished", "leave")], world.tell()
    stops = {tuple(save for save in world.saves(rank) if save[2] == "stop") for rank in range(4)}
    assert len(stops) == 1, "all ranks save at one step, once"
    ((attempt, step, _),) = stops.pop()
    assert attempt == 1
    assert world.verdict(1)["step"] == step
    assert world.checkpoints() == DONE, "no step left out, none taken twice"
    rendezvous = [read_json(world.run_folder / f"attempts/{k}/command.json")["environment"] for k in (1, 2)]
    for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT"):
        assert rendezvous[0][name] != rendezvous[1][name], "nothing of the attempt before may answer"


def test_nodes_without_power_are_waited_for_and_their_runs_finish(world):
    """One run loses its second node; another its only one, and with it the batch process: nobody judges that attempt
    until the next start."""
    other = World(world.cluster, world.folder / "other")
    job, lonely = world.submit(step_s=0.2, launcher="torchrun"), other.submit(step_s=0.2, nodes=1)
    world.wait_step(15)
    other.wait_step(15)
    nodes = [world.node_of(job, 1), other.node_of(lonely, 0)]
    for node in nodes:
        world.cluster.script("kill-node", node)
    for run, its_job in ((world, job), (other, lonely)):
        run.wait_state(its_job, "COMPLETING", "PENDING", limit_s=60)
        run.hurry()
    for node in nodes:
        world.cluster.script("start-node", node)
    for run, its_job in ((world, job), (other, lonely)):
        assert run.wait_state(its_job, "COMPLETED", "FAILED", limit_s=120)["JobState"] == "COMPLETED", run.tell()
        assert run.checkpoints() == DONE
        assert [outcome for outcome, _ in run.attempts()] == ["failed", "finished"]
        assert (1, 10, "time") in run.saves(0)
        assert (2, 10, "time") not in run.saves(0), "goes on from the checkpoint of step 10"
    assert "its node was lost" in other.verdict(1)["reason"]


def test_a_killed_rank_is_started_again_in_the_same_job(world):
    job = world.submit("crash@15,finish", launcher="torchrun")
    facts = world.wait_state(job, "COMPLETED", "FAILED", limit_s=90)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0"), world.tell()
    assert world.attempts() == [("failed", "restart"), ("finished", "leave")]
    assert [save for save in world.saves(0) if save[0] == 1] == [(1, 10, "time")], "survivors leave without saving"
    assert world.checkpoints() == DONE


def test_a_config_error_is_not_retried(world):
    job = world.submit("fail@7=2")
    facts = world.wait_state(job, "COMPLETED", "FAILED", limit_s=60)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0"), world.tell()
    assert world.outcome() == ("failed", 2)
    assert world.attempts() == [("failed", "leave")]
    assert "rank 3: told to fail at step 7" in world.log()
    assert "not started again: exit code 2 would come again" in world.log()


def test_a_crash_that_repeats_at_one_step_is_not_retried(world):
    job = world.submit("fail@13=1", budget={"restarts": 5})
    facts = world.wait_state(job, "COMPLETED", "FAILED", limit_s=60)
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "1:0"), world.tell()
    assert world.attempts() == [("failed", "restart"), ("failed", "leave")]
    assert "not started again: it failed twice at step 12" in world.log()


def test_scancel_leaves_no_process_and_a_checkpoint(world):
    job = world.submit(step_s=0.2, launcher="torchrun")
    world.wait_step(12)
    world.cluster.run("scancel", job)
    world.wait_state(job, "CANCELLED", limit_s=60)
    assert world.cluster.node_processes() == []
    assert world.outcome() == ("stopped", 75), world.tell()
    step = world.verdict(1)["step"]
    assert world.checkpoints() == {f"{step} {digest_of(step)}"}
    assert [next_ for _, next_ in world.attempts()] == ["leave"]


def test_a_node_that_fails_its_check_is_left_out(world):
    world.change_cluster("timeout_s: 20", "timeout_s: 20, commands: ['test $SLURMD_NODENAME != n2']")
    job = world.submit()
    facts = world.wait_state(job, "COMPLETED", "FAILED", limit_s=90)
    assert (facts["JobState"], facts["ExcNodeList"], facts["NodeList"]) == ("COMPLETED", "n2", "n[1,3]"), world.tell()
    assert world.attempts() == [("failed", "requeue"), ("finished", "leave")]
    assert "n2: `test $SLURMD_NODENAME != n2` ended with 1" in world.log()


def test_a_check_that_all_nodes_fail_is_told_and_no_node_is_blamed(world):
    world.change_cluster("min_shm_free_gib: 0.01", "min_shm_free_gib: 100000")
    job = world.submit()
    facts = world.wait_state(job, "COMPLETED", "FAILED", limit_s=60)
    assert (facts["JobState"], facts["ExitCode"], facts.get("ExcNodeList")) == ("FAILED", "2:0", None), world.tell()
    assert "free in /dev/shm, 100000 wanted" in world.log()


def test_where_requeue_is_forbidden_the_next_job_of_the_chain_goes_on(world):
    world.change_cluster("save_lead_s: 50", "save_lead_s: 50, requeue: false")
    job = world.submit(step_s=0.2, links=3)
    world.wait_step(12)
    world.cluster.run("scancel", "--batch", "--signal=USR1", job)
    links = read_json(next(world.run_folder.glob("submissions/*/links.json")))["job_ids"]
    assert links[0] == job
    world.wait_state(job, "COMPLETING", "COMPLETED", "FAILED")
    world.hurry()
    assert world.wait_state(links[1], "COMPLETED", "FAILED", limit_s=90)["JobState"] == "COMPLETED", world.tell()
    assert world.attempts() == [("stopped", "leave"), ("finished", "leave")]
    assert world.checkpoints() == DONE
    assert world.wait_state(links[2], "CANCELLED", "COMPLETED")["JobState"] == "CANCELLED", "nothing is left to do"


def test_a_grid_is_one_array_in_one_group(world):
    job = world.submit(grid=["engine.lr=1e-3,3e-4"], nodes=1, at_once=1)
    assert world.wait_state(f"{job}_1", "COMPLETED", "FAILED", limit_s=60)["JobState"] == "COMPLETED", world.tell()
    names = {"fake-lr-1e-3": 0.001, "fake-lr-3e-4": 0.0003}
    groups = set()
    for name, lr in names.items():
        config = load_run_config(next((world.folder / "runs" / name).glob("submissions/*/config.yaml")))
        assert (config.run.name, config.engine.lr) == (name, lr)
        groups.add(config.tracking.wandb.group)
        assert (world.folder / "runs" / name / "attempts/1/verdict.json").is_file()
    assert len(groups) == 1
    assert groups.pop().startswith("fake-2")
