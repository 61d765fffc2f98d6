"""A small run that is ready: shards with sidecars, a tokenizer, a config; what preflight tests then break."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

from typer.testing import CliRunner

from trichord.config.load import load_run_config, resolved_yaml
from trichord.shards.index import index_shards
from trichord_launch.cli import app

CONFIG = """\
run: {name: words, root: ROOT/runs, max_steps: 10}
shards: {window_samples: 8, sources: [{name: words, shards: ROOT/data/words-*.tar, epochs: 4}]}
batches: {tokenizer: ROOT/tokenizer, rows_per_step: 2, row_tokens: 16, max_samples_per_row: 2}
fusion: {trunk: {family: llama, hidden_size: 16, intermediate_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 2}}
objectives: {next_token: {}}
tracking: {wandb: {mode: off}}
"""
SHARDS, SAMPLES = 3, 5


class Ready:
    """The run, in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.config = folder / "words.yaml"
        self.config.write_text(CONFIG.replace("ROOT", str(folder)))
        (folder / "data").mkdir(parents=True)
        self.shards = [folder / "data" / f"words-{number}.tar" for number in range(SHARDS)]
        for shard in self.shards:
            write_shard(shard)
        index_shards([str(shard) for shard in self.shards])
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"one": 0, "two": 1}}}))
        self.run_folder = folder / "runs" / "words"

    def preflight(self, *words, **environment) -> tuple[int, list[dict]]:
        """(exit code, findings) of the verb, in this process."""
        words = ["preflight", str(self.config), *map(str, words), "--json"]
        done = CliRunner().invoke(app, words, env={"DS_ACCELERATOR": "cpu", **environment})
        assert done.stdout, done.exception
        return done.exit_code, json.loads(done.stdout)["findings"]

    def command(self, *words, **environment) -> subprocess.CompletedProcess:
        """As a user runs it."""
        argv = [sys.executable, "-m", "trichord_launch.cli", "preflight", str(self.config), *map(str, words)]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", **environment}
        return subprocess.run(argv, capture_output=True, text=True, timeout=120, env=environment, cwd=self.folder)

    def checkpoint(self, step: int = 5, **changed) -> Path:
        """As training leaves one, without tensors; `changed` are overrides of the config it was made with."""
        config = load_run_config(self.config, [f"{key.replace('__', '.')}={value}" for key, value in changed.items()])
        folder = self.run_folder / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (self.run_folder / "config.yaml").write_text(resolved_yaml(config))
        state = {"step": step, "optimizer_step": step, "config": config.model_dump(mode="json"), "progress": {}}
        contents = {
            "train_state.json": json.dumps(state),
            "index.json": json.dumps({"format": 1, "params": {"a": {"shape": [1]}}, "slices": {}}),
            "loader.json": "{}",
            "rank-00000.safetensors": "weights",
            "rank-00001.safetensors": "weights",
        }
        for name, text in contents.items():
            (folder / name).write_text(text)
        files = {name: {"size": len(text), "blake2b": ""} for name, text in contents.items()}
        (folder / "manifest.json").write_text(json.dumps({"step": step, "files": files}))
        return folder


def guide_commands() -> list[list[str]]:
    """The words of each command of docs/guides/preflight.md, in order."""
    guide = Path(__file__).parents[2] / "docs" / "guides" / "preflight.md"
    blocks = re.findall(r"^```bash\n(.*?)^```", guide.read_text(), re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith("trichord")]


def write_shard(path: Path, samples: int = SAMPLES) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            member = tarfile.TarInfo(f"{path.stem}-{number}.txt")
            text = b"one two " * 4
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))


def failed(findings: list[dict]) -> dict[str, dict]:
    """The findings that failed, by check; each says what to do."""
    found = {finding["check"]: finding for finding in findings if finding["verdict"] == "fail"}
    assert all(finding["remedy"] for finding in found.values()), found
    return found
