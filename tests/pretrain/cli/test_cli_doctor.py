"""`trichord doctor`: a whole checkpoint passes every check, and each kind of damage is told by the check it is for."""

import hashlib
import json
import shutil
import struct

import pytest

from trichord.checkpoints.doctor import examine, find_patient
from trichord.core.errors import CheckpointError
from trichord.restore import expected_model


@pytest.fixture
def step(finished_world, tmp_path, monkeypatch):
    folder = tmp_path / "world"
    shutil.copytree(finished_world, folder)
    monkeypatch.chdir(folder)
    return find_patient(folder / "runs" / "demo")


def verdicts(step, expected=None):
    return {f.check: f.verdict for f in examine(step, expected if expected is not None else expected_model(step))}


def failed(step, expected=None):
    return {check for check, verdict in verdicts(step, expected).items() if verdict == "fail"}


def rewrite(step, name, change):
    """Change a JSON file as someone who also mends the manifest would."""
    path = step / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    resign(step, name)


def resign(step, name):
    manifest = json.loads((step / "manifest.json").read_text())
    data = (step / name).read_bytes()
    manifest["files"][name] = {"size": len(data), "blake2b": hashlib.blake2b(data, digest_size=16).hexdigest()}
    (step / "manifest.json").write_text(json.dumps(manifest))


def poke(step, value: float, kind: str):
    """Overwrite the first number of one slice in the tensors' file."""
    name, kinds = next((n, k) for n, k in json.loads((step / "index.json").read_text())["slices"].items() if kind in k)
    file = step / kinds[kind][0][2]
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    at = 8 + length + json.loads(data[8 : 8 + length])[f"{name}:{kind}"]["data_offsets"][0]
    data[at : at + 4] = struct.pack("<f", value)
    file.write_bytes(data)
    resign(step, file.name)


def test_a_whole_checkpoint_passes_everything(step):
    found = verdicts(step)
    assert set(found.values()) == {"pass"}
    assert {"complete", "hashes", "coverage", "slices", "values", "training state", "loader state"} <= found.keys()
    assert "keys of vision" in found


def test_changed_bytes_and_missing_files(step):
    file = next(step.glob("rank-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert failed(step) == {"hashes"}
    file.unlink()
    assert {"complete", "slices", "values"} <= failed(step)
    (step / "manifest.json").write_text("[]")
    found = {f.check: f for f in examine(step, "no model")}
    assert found["complete"].detail == "manifest.json is damaged: it names no files"
    assert found["training state"].verdict == "pass", "the folder's name is right"
    (step / "manifest.json").unlink()
    assert verdicts(step) == {"complete": "fail"}


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "param"), (float("inf"), "exp_avg"), (-1.0, "exp_avg_sq")])
def test_impossible_values(step, value, kind):
    poke(step, value, kind)
    assert failed(step) == {"values"}


def test_slices_that_lack_elements_or_hold_them_twice(step):
    def drop(index):
        kinds = next(iter(index["slices"].values()))
        kinds["param"][0][1] -= 1

    rewrite(step, "index.json", drop)
    assert failed(step) == {"coverage", "slices"}


def test_a_renamed_parameter_is_missing_in_its_room_and_strange(step):
    def rename(index):
        name = next(n for n in index["params"] if n.startswith("vision."))
        for part in ("params", "slices"):
            index[part][name + "_x"] = index[part].pop(name)

    rewrite(step, "index.json", rename)
    assert {"keys of vision", "keys", "slices"} <= failed(step)


@pytest.mark.parametrize(
    ("name", "change", "check"),
    [
        ("train_state.json", lambda state: state.pop("progress"), "training state"),
        ("train_state.json", lambda state: state.update(step=1), "training state"),
        ("loader.json", lambda state: state.update(step=state["step"] + 1), "loader state"),
        ("loader.json", lambda state: state.pop("lanes"), "loader state"),
        ("index.json", lambda index: index.update(format=99), "index"),
        ("index.json", lambda index: index["params"].update(a={"shape": ["x"]}), "index"),
    ],
)
def test_json_that_says_something_else(step, name, change, check):
    rewrite(step, name, change)
    assert check in failed(step)


def test_code_lying_about_and_a_model_that_cannot_be_built(step):
    (step / "weights.pkl").write_bytes(b"cos\nsystem\n")
    found = verdicts(step, "no tokenizer")
    assert (found["no code"], found["complete"], found["keys"]) == ("warn", "warn", "skip")


def test_the_config_s_model_has_its_running_statistics(step):
    def change(state):
        small = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "output_stride": 8}
        state["config"]["encoders"]["vision"] |= {"name": "resnet18", "options": small}

    rewrite(step, "train_state.json", change)
    shapes = expected_model(step).shapes
    assert shapes["vision.backbone.bn1.running_mean"] == shapes["vision.backbone.bn1.weight"]


def test_who_is_meant(step):
    assert find_patient(step) == step
    assert find_patient(step.parent) == step
    with pytest.raises(CheckpointError, match="no checkpoint and no run folder"):
        find_patient(step.parents[3])
