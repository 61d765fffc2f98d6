"""`trichord provenance`: the samples of a past step, planned anew, are those that the loader gave."""

import json
import shutil

import pytest

from trichord.batches.loader import Loader
from trichord.cli import main
from trichord.config.identity import read_run_config
from trichord.core.errors import CheckpointError, DataError
from trichord.provenance import samples_of_step
from trichord.replay import Replay, rebuild_batch
from trichord.restore import item_lengths
from trichord.shards.index import index_shards
from trichord.shards.known import record_shards


@pytest.fixture
def run(finished_world, tmp_path, monkeypatch):
    folder = tmp_path / "world"
    shutil.copytree(finished_world, folder)
    monkeypatch.chdir(folder)
    return folder / "runs" / "demo"


def given(run, step):
    """(source, epoch, number in the source) of the samples of a step, from the loader itself."""
    config = read_run_config(run)
    loader = Loader(
        config.shards, config.samples, config.batches, seed=config.run.seed, lengths=item_lengths(config), augment=False
    )
    steps = iter(loader)
    batches = [next(steps) for _ in range(step)][-1].micro_batches
    return [tuple(ref) for batch in batches for ref in batch.sample_ids.tolist()]


@pytest.mark.parametrize("step", [1, 2])
def test_they_are_what_the_loader_gave_and_the_digest_says_so(run, step):
    found = samples_of_step(run, step)
    assert (found.planned_from, found.verified_by) == (step - 1, step)
    assert [("things", s.epoch, int(s.key)) for s in found.samples] == [
        ("things", epoch, number) for _, epoch, number in given(run, step)
    ]
    assert {(s.lane, s.row) for s in found.samples} == {(0, 0), (1, 1)}


def test_without_a_checkpoint_before_or_behind(run):
    wanted = samples_of_step(run, 2).samples
    shutil.rmtree(run / "checkpoints" / "step-000001")
    found = samples_of_step(run, 2)
    assert (found.planned_from, found.verified_by, found.samples) == (0, 2, wanted)
    shutil.rmtree(run / "checkpoints" / "step-000002")
    found = samples_of_step(run, 2)
    assert (found.planned_from, found.verified_by, found.samples) == (0, None, wanted)
    assert [s.lane for s in samples_of_step(run, 2, lanes=[1]).samples] == [1, 1, 1, 1]


@pytest.fixture
def of_another_order(run):
    """The run, whose last checkpoint has another digest."""
    path = run / "checkpoints" / "step-000002" / "loader.json"
    state = json.loads(path.read_text())
    state["lanes"]["1"]["chain"] = "00" * 16
    path.write_text(json.dumps(state))
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"].pop("loader.json")  # its hash is another test's matter
    manifest["files"]["loader.json"] = _facts(path)
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    return run


def test_another_order_than_the_runs_is_refused_not_listed(of_another_order):
    with pytest.raises(DataError, match="lane 1 planned from step 1 does not reach the digest"):
        samples_of_step(of_another_order, 2)
    assert len(samples_of_step(of_another_order, 2, verify=False).samples) == 8


def test_a_rebuilt_batch_is_compared_with_what_the_run_has_recorded(of_another_order, capsys):
    run = of_another_order
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = rebuild_batch(run, 1)
    assert (found.verdict, found.verified_by) == ("equal", 1)
    first = (metrics[0]["train/samples_seen"], metrics[0]["train/tokens_seen"])
    assert (found.recorded_samples, found.recorded_useful_tokens) == first == (found.samples, found.useful_tokens)
    assert main(["provenance", "runs/demo", "--step", "1", "--data-only"]) == 0
    assert "equal: compared with the digest of step 1 and the recorded counts" in capsys.readouterr().err

    metrics[0]["train/tokens_seen"] += 1
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    record = {"shard": "shards/shard-000000.tar", "key": "0003", "reason": "cut", "step": 2}
    (run / "quarantine.jsonl").write_text(json.dumps(record) + "\n")
    assert main(["provenance", "runs/demo", "--step", "2", "--data-only", "--json", "b.json"]) == 3
    told = capsys.readouterr().err
    assert "differs: the planned order does not reach the digest of checkpoint 2" in told
    assert f"{found.useful_tokens} useful tokens, recorded are {found.useful_tokens - 1}" in told
    assert "0 samples left out, quarantine.jsonl has 1" in told
    assert json.loads((run.parents[1] / "b.json").read_text())["verdict"] == "differs"

    for name in ("metrics.jsonl", "quarantine.jsonl"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints" / "step-000002")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 2}) + "\n")
    assert main(["provenance", "runs/demo", "--step", "2", "--data-only"]) == 0
    assert "nothing to compare with" in capsys.readouterr().err


NAN = float("nan")


@pytest.mark.parametrize(
    ("loss", "recorded", "verdict"),
    [
        *((2.0, 2.0 * (1 + 1.9e-5), "equal"), (2.0, 2.0 * (1 + 2.1e-5), "differs")),
        *((NAN, NAN, "both not finite"), (2.0, NAN, "differs"), (float("inf"), 2.0, "differs")),
        (2.0, None, "nothing to compare with"),
    ],
)
def test_a_replay_has_a_verdict_and_an_exit_code(monkeypatch, capsys, loss, recorded, verdict):
    found = Replay("runs/demo", 5, 3, loss, 1.0, {}, recorded, None, 2e-5)
    monkeypatch.setattr("trichord.replay.replay_step", lambda *_, **__: found)
    assert found.verdict == verdict
    assert main(["provenance", "runs/demo", "--step", "5", "--replay"]) == (3 if verdict == "differs" else 0)
    told = capsys.readouterr().err
    assert f"; {verdict}" in told
    assert "nan" not in told


def test_a_shard_that_is_gone_is_named(run):
    """A copy elsewhere is none; a run of an older version has no record of its shards."""
    shards = run.parents[1] / "shards"
    now = index_shards([str(shards / "shard-000000.tar")])
    before = [now[0]._replace(url="old/shard-000000.tar"), now[0]._replace(url="old/shard-000001.tar", idx="other")]
    record_shards(run / "shards.json", {"things": before})
    with pytest.raises(
        DataError, match=r"'things': shard old/shard-000001.tar is not there any more.*put the data back"
    ):
        samples_of_step(run, 2)
    record_shards(run / "shards.json", {"things": before[:1]})
    assert samples_of_step(run, 2).samples
    (run / "shards.json").unlink()
    assert samples_of_step(run, 2).samples


def test_a_shard_that_was_swapped_is_refused(run):
    shard = run.parents[1] / "shards" / "shard-000000.tar"
    for sidecar in (".idx", ".len"):
        shard.with_suffix(sidecar).unlink()
    data = bytearray(shard.read_bytes())
    at = data.index(b"0003.txt")
    data[at : at + 8] = b"0003.TXT"
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"shards/shard-000000.tar has changed: it had \d+ samples with index"):
        samples_of_step(run, 2)
    (run / "shards.json").unlink()
    with pytest.raises(CheckpointError, match=r"made with other shards .* of source 'things' than .*put the data back"):
        samples_of_step(run, 2)


def test_what_was_left_out_at_the_step_says_why(run):
    record = {"shard": "shards/shard-000000.tar", "key": "0003", "offset": 1, "member": "0003.png", "reason": "cut"}
    lines = [{**record, "source": "things", "step": 1}, {**record, "key": "0000", "source": "things", "step": 2}]
    (run / "quarantine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [(s.key, s.left_out) for s in samples_of_step(run, 1).samples if s.left_out] == [("0003", "cut")]


def test_the_verb(run, capsys):
    assert main(["provenance", "runs/demo", "--step", "1", "--json", "p.json"]) == 0
    assert "planned from step 0, reaches the digest of step 1" in capsys.readouterr().err
    assert len(json.loads((run.parents[1] / "p.json").read_text())["samples"]) == 8
    assert main(["provenance", "runs/demo", "--step", "3"]) == 2
    assert "has done 2 steps, got 3" in capsys.readouterr().err
    assert main(["provenance", "runs/demo", "--step", "0"]) == 2
    assert main(["provenance", "runs/demo", "--step", "1", "--lane", "2"]) == 2
    assert main(["provenance", "shards", "--step", "1"]) == 2
    assert "shards is no run folder: expected config.yaml in it" in capsys.readouterr().err


def _facts(path):
    from trichord.checkpoints.hashes import file_facts

    return file_facts(path)
