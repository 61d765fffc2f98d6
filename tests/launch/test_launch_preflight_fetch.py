"""`preflight --fetch`: from a hub that stands in for the real one into its client's own cache; jobs then read that."""

import json
import os
import subprocess
import sys

import pytest
from hub_stand_in import COMMIT, FILES, Hub
from preflight_world import Ready, failed

from trichord.batches.tokenizer import train_tokenizer
from trichord_launch.preflight.models import Reference, hub_cache, missing_files

pytest.importorskip("huggingface_hub")
NAMED = ("batches.tokenizer=someone/model@main", f"run.init_from=someone/model@{COMMIT}#trunk")


@pytest.fixture
def ready(tmp_path):
    return Ready(tmp_path)


def fetched(ready, hub, *words, **more):
    """The findings of the command in a process of its own: the hub's client reads its address when it is imported."""
    places = {"HF_HOME": str(ready.folder / "hf"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "no_proxy": "*"}
    done = ready.command(*words, "--json", **{**places, "HF_ENDPOINT": hub.url, **more})
    return done.returncode, json.loads(done.stdout)["findings"]


def test_everything_named_is_fetched_and_nothing_that_could_be_code(ready):
    with Hub() as hub:
        code, findings = fetched(ready, hub, *NAMED, "--fetch")
        assert (code, failed(findings)) == (0, {})
    told = {finding["check"]: finding for finding in findings}
    assert told["fetch batches.tokenizer"]["detail"].endswith(f"in the cache at commit {COMMIT[:12]}")
    snapshot = ready.folder / "hf" / "hub" / "models--someone--model" / "snapshots" / COMMIT
    safe = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert {path.name for path in snapshot.iterdir()} == safe
    assert {path.rpartition("/")[2] for path in hub.asked} & set(FILES) == safe, "not even asked for"
    assert (snapshot / "model.safetensors").read_bytes() == b"weights"
    assert (told["batches.tokenizer"]["verdict"], told["run.init_from"]["verdict"]) == ("warn", "pass")
    assert told["batches.tokenizer"]["remedy"] == f"pin it: batches.tokenizer=someone/model@{COMMIT}"


READ_TOKENIZER = """
from trichord.batches.tokenizer import load_tokenizer
print(load_tokenizer("someone/model@main").vocab_size)
"""
READ_TRUNK = f"""
from trichord.fusion.config import TrunkConfig
from trichord.fusion.trunk import build_trunk
config = TrunkConfig(family="llama", weights="someone/model@{COMMIT}", hidden_size=16, num_heads=2, num_kv_heads=2)
print(float(build_trunk(config, 8, {{}}).get_input_embeddings().weight[0, 0]))
"""


def read_offline(ready, code: str) -> str:
    """What training's own code prints where there is no hub, in a process of its own."""
    names = ("PATH", "PYTHONPATH", "HOME")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    environment |= {"HF_HOME": str(ready.folder / "hf"), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment, cwd=ready.folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_training_reads_a_fetched_tokenizer_offline(ready):
    """Its client wants the snapshot whole, as far as what it asks for goes."""
    train_tokenizer(["one two"], "word", 64, ready.folder / "made")
    made = {path.name: path.read_bytes() for path in (ready.folder / "made").iterdir()}
    with Hub(files={**FILES, **made}) as hub:
        assert fetched(ready, hub, *NAMED[:1], "--fetch")[0] == 0
        assert fetched(ready, hub, *NAMED[:1], HF_HUB_OFFLINE="1")[0] == 0
    assert int(read_offline(ready, READ_TOKENIZER)) > 2


@pytest.mark.slow
def test_training_reads_a_fetched_trunk_offline(ready):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 8}
    trunk = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))
    trunk.save_pretrained(ready.folder / "made")
    made = {path.name: path.read_bytes() for path in (ready.folder / "made").iterdir()}
    with Hub(files={**FILES, **made}) as hub:
        code, findings = fetched(ready, hub, f"fusion.trunk.weights=someone/model@{COMMIT}", "--fetch")
        assert (code, failed(findings)) == (0, {})
    first = trunk.model.embed_tokens.weight[0, 0].item()
    assert float(read_offline(ready, READ_TRUNK)) == pytest.approx(first)


def test_what_the_hub_does_not_have_is_a_failed_line(ready):
    with Hub(files={"config.json": b"{}", "pytorch_model.bin": b"pickled"}) as hub:
        code, findings = fetched(ready, hub, "run.init_from=someone/model", "--fetch")
        assert code == 2
        assert "it lacks model.safetensors" in failed(findings)["fetch run.init_from"]["detail"]
        assert "pickled ones are never fetched" in failed(findings)["fetch run.init_from"]["remedy"]
        code, findings = fetched(ready, hub, "batches.tokenizer=nobody/nothing", "--fetch")
        assert code == 2
        assert "nobody/nothing@main" in failed(findings)["fetch batches.tokenizer"]["detail"]
        assert "hf auth login" in failed(findings)["fetch batches.tokenizer"]["remedy"]


def test_offline_is_said(ready):
    with Hub() as hub:
        _, findings = fetched(ready, hub, *NAMED, "--fetch", HF_HUB_OFFLINE="1")
    assert failed(findings)["fetch batches.tokenizer"]["detail"] == "HF_HUB_OFFLINE is set here"
    assert hub.asked == []


def test_a_snapshot_with_a_part_missing_is_not_whole(tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors").write_text("x")
    reference = Reference("fusion.trunk.weights", str(tmp_path), "model")
    assert missing_files(reference, tmp_path) == ["model-00002-of-00002.safetensors"]
    (tmp_path / "model-00002-of-00002.safetensors").symlink_to(tmp_path / "gone")
    assert missing_files(reference, tmp_path) == ["model-00002-of-00002.safetensors"]
    (tmp_path / "gone").write_text("x")
    assert missing_files(reference, tmp_path) == []
    (tmp_path / "model.safetensors.index.json").unlink()
    assert missing_files(reference, tmp_path) == ["model.safetensors.index.json"]


def test_a_tokenizer_that_was_fetched_in_part_is_found(ready):
    snapshot = ready.folder / "hub" / "models--someone--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    code, findings = ready.preflight(f"batches.tokenizer=someone/model@{COMMIT}", HF_HUB_CACHE=f"{ready.folder}/hub")
    assert code == 2
    assert failed(findings)["batches.tokenizer"]["detail"] == f"{snapshot} lacks tokenizer.json"
    assert "--fetch" in failed(findings)["batches.tokenizer"]["remedy"]


def test_the_cache_is_where_the_client_looks(tmp_path):
    assert str(hub_cache({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"})) == "/a"
    assert str(hub_cache({"HF_HOME": "/b"})) == "/b/hub"
    assert str(hub_cache({"XDG_CACHE_HOME": "/c"})) == "/c/huggingface/hub"
    assert str(hub_cache({})).endswith("/.cache/huggingface/hub")
