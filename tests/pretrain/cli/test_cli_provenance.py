"""`trichord provenance`: the samples of a past step, planned anew, are those that the loader gave."""

import json
import shutil

import pytest

from trichord.batches.loader import Loader
from trichord.cli import main
from trichord.config.identity import read_run_config
from trichord.core.errors import CheckpointError
from trichord.provenance import samples_of_step
from trichord.restore import item_lengths


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


def test_another_order_than_the_runs_is_refused_not_listed(run):
    path = run / "checkpoints" / "step-000002" / "loader.json"
    state = json.loads(path.read_text())
    state["lanes"]["1"]["chain"] = "00" * 16
    path.write_text(json.dumps(state))
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"].pop("loader.json")  # its hash is another test's matter
    manifest["files"]["loader.json"] = _facts(path)
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="lane 1 planned from step 1 does not reach the digest"):
        samples_of_step(run, 2)
    assert len(samples_of_step(run, 2, verify=False).samples) == 8


def test_a_shard_that_was_swapped_is_refused(run):
    shard = run.parents[1] / "shards" / "shard-000000.tar"
    for sidecar in (".idx", ".len"):
        shard.with_suffix(sidecar).unlink()
    data = bytearray(shard.read_bytes())
    at = data.index(b"0003.txt")
    data[at : at + 8] = b"0003.TXT"
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="the loader state was made with sources"):
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
    assert main(["provenance", "shards", "--step", "1"]) != 0


def _facts(path):
    from trichord.checkpoints.hashes import file_facts

    return file_facts(path)
