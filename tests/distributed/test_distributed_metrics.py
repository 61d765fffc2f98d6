"""What a run measures: real collectives counted, and lines of metrics that do not depend on the split; and what of it
arrives at a stand-in for the W&B server (tests/wandb_server.py)."""

import gzip
import json
import os
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from plants import at_step
from ranks import run_ranks
from tiny_run import make_data, train, write_config

from trichord.cli import main
from trichord.core.errors import EXIT_UNEXPECTED
from trichord.engine.build import start_process_group
from trichord.engine.step import COUNT_NAMES
from trichord.engine.wire import wire_meter
from trichord.tracking.metrics import read_events, read_metrics
from wandb_server import wandb_server

pytestmark = pytest.mark.distributed


def send_some(rank_zero_only: bool = False) -> dict[str, tuple[float, int]]:
    """A few collectives of known sizes, by the ways that DeepSpeed and we use. Kind -> (bytes sent, calls)."""
    start_process_group(60.0)
    import deepspeed.comm

    meter, n = wire_meter(), dist.get_world_size()
    meter.read()
    deepspeed.comm.barrier()
    dist.all_reduce(torch.zeros(60))  # 240 bytes
    deepspeed.comm.all_reduce(torch.zeros(60, dtype=torch.bfloat16))  # 120
    whole = torch.zeros(12 * n)
    deepspeed.comm.all_gather_into_tensor(whole, torch.zeros(12))  # 48 n
    dist.all_gather([torch.empty(5, dtype=torch.int64) for _ in range(n)], torch.zeros(5, dtype=torch.int64))  # 40 n
    deepspeed.comm.reduce_scatter_fn(torch.zeros(12), whole)  # 48 n
    dist.broadcast(torch.zeros(30), src=0)  # 120
    deepspeed.comm.reduce(torch.zeros(30), dst=n - 1)  # 120
    return {kind: (sent, meter.calls[kind]) for kind, sent in meter.sent.items()}


@pytest.mark.parametrize("n", [1, 3])
def test_collectives_are_counted_at_their_real_sizes(n):
    share = (n - 1) / n
    expected = {
        "all_reduce": (2 * share * 360, 2),
        "all_gather": (share * 88 * n, 2),
        "reduce_scatter": (share * 48 * n, 1),
        "broadcast": (share * 120, 1),
        "reduce": (share * 120, 1),
    }
    for found in run_ranks(n, send_some):
        assert set(found) == set(expected)
        for kind, (sent, calls) in expected.items():
            assert found[kind] == (pytest.approx(sent), calls), kind


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def watched_train(config: str, *overrides: str) -> tuple[int, list[list[tuple[str, int]]]]:
    """A run, and the all-reduces of this rank: (dtype, elements), step by step."""
    import trichord.journal as story

    steps: list[list[tuple[str, int]]] = [[]]
    begin, reduce = story.Recording.begin, dist.all_reduce

    def watched(tensor, *args, **kwargs):
        steps[-1].append((str(tensor.dtype), tensor.numel()))
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = watched
    story.Recording.begin = lambda self, step: (steps.append([]), begin(self, step))[1]
    return train(config, *overrides), steps[1:]


OVERRIDES = (
    *("run.max_steps=6", "tracking.log_every_steps=3", "engine.zero_stage=1", "engine.heartbeat_timeout_s=30"),
    *("tracking.tensorboard=true", "tracking.profile={start_step: 2, steps: 2}"),
)


class Runs(NamedTuple):
    found: dict
    folder: Path


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """The same six steps on one and on two ranks: (lines of metrics, all-reduces of rank 0), and the folder of two."""
    found = {}
    for n in (1, 2):
        root = tmp_path_factory.mktemp(f"on{n}")
        results = run_ranks(n, watched_train, str(write_config(data, root)), *OVERRIDES)
        assert [code for code, _ in results] == [0] * n
        found[n] = read_metrics(root / "tiny"), results[0][1]
    return Runs(found, root / "tiny")


def test_between_lines_only_the_counts_are_reduced(runs):
    """ZeRO-1 reduces gradients in fp32; in float64 there are the counts of the step, and at a line its figures."""
    for lines, steps in runs.found.values():
        assert len(lines) == 2
        assert len(steps) == 6
        for number, calls in enumerate(steps, start=1):
            wide = [elements for dtype, elements in calls if dtype == "torch.float64"]
            assert wide.count(len(COUNT_NAMES)) == 1
            assert len(wide) == (2 if number % 3 == 0 else 1), (number, wide)


def test_figures_do_not_depend_on_the_split(runs):
    """Losses by source and kind, and the work needed: one rank with 4 micro-steps, or two with 2."""
    for one, two in zip(runs.found[1][0], runs.found[2][0], strict=True):
        names = {name for name in one if name.startswith("train/loss")}
        assert {f"train/loss/next_token/source/{source}" for source in ("it", "at", "iat")} <= names
        assert {f"train/loss/next_token/modality/{kind}" for kind in ("image", "audio", "image_audio")} <= names
        for name in names:
            assert two[name] == pytest.approx(one[name], rel=1e-4), name
        needed = [line["speed/flops_per_s"] * line["speed/step_ms"] for line in (one, two)]
        assert needed[1] == pytest.approx(needed[0], rel=1e-6)
        assert "speed/mfu_frac" not in one, "a CPU has no peak in the table"


def test_times_and_bytes_are_there(runs):
    parts = ("data/wait_ms", *(f"speed/{part}_ms" for part in ("features", "forward", "backward", "update", "save")))
    for lines, _ in runs.found.values():
        for line in lines:
            assert all(line[part] >= 0 for part in parts)
            assert min(line["speed/forward_ms"], line["speed/backward_ms"], line["speed/update_ms"]) > 0
            assert sum(line[part] for part in parts) <= 1.02 * line["speed/step_ms"]
            assert line["memory/host_gib"] > 0
    assert all(line["comm/wire_mib"] == 0 for line in runs.found[1][0]), "one rank sends nothing"
    first, second = runs.found[2][0]
    kinds = {name for name in second if name.startswith("comm/wire_mib/")}
    assert sum(second[kind] for kind in kinds) == pytest.approx(second["comm/wire_mib"])
    assert second["comm/wire_mib/all_gather"] > 0
    assert json.dumps(first)


def test_the_target_mix_stands_beside_the_drawn_one(runs):
    for line in runs.found[2][0]:
        assert [line[f"data/mix_target_frac/{name}"] for name in ("it", "at", "iat")] == [pytest.approx(1 / 3)] * 3
        assert sum(line[f"data/mix_frac/{name}"] for name in ("it", "at", "iat")) == pytest.approx(1)


def test_a_window_of_steps_leaves_a_trace_of_every_rank(runs):
    traces = sorted((runs.folder / "profile").iterdir())
    assert [path.name for path in traces] == [f"step-000002-attempt-1-rank-0000{rank}.json.gz" for rank in (0, 1)]
    for path in traces:
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        assert {e["name"] for e in events if e.get("name", "").startswith("step ")} == {"step 3", "step 4"}
        assert any("all_reduce" in e.get("name", "") for e in events)
    (event,) = [event for event in read_events(runs.folder) if event["kind"] == "profile"]
    assert event["step"] == 4


def test_tensorboard_has_what_the_record_has(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(runs.folder / "tensorboard"))
    reader.Reload()
    for line in runs.found[2][0]:
        for name in set(line) - {"step", "time"}:
            values = {event.step: event.value for event in reader.Scalars(name)}
            assert values[line["step"]] == pytest.approx(line[name], rel=1e-6), name


def test_a_peak_of_ones_own_gives_utilisation(data, tmp_path):
    config = str(write_config(data, tmp_path))
    run_ranks(1, train, config, "run.max_steps=2", "tracking.log_every_steps=2", "tracking.peak_tflops=0.5")
    (line,) = read_metrics(tmp_path / "tiny")
    assert line["speed/mfu_frac"] == pytest.approx(line["speed/flops_per_s"] / 0.5e12)
    # 4 micro-batches under a contrastive loss: towers run twice, and rows have slack
    assert line["speed/hfu_frac"] > 1.2 * line["speed/mfu_frac"]


def train_online(environ: dict[str, str], step: int, fault: str, config: str, *overrides: str) -> int:
    """The exit code of `trichord train` with a crash at a step, or with a W&B server that is ill from then on."""
    os.environ.update(environ)
    from trichord.tracking import wandb as wandb_module

    wandb_module._FINISH_TIMEOUT_S = 2.0
    at_step(step, 0, lambda: 1 // 0 if fault == "crash" else ask(f"{environ['WANDB_BASE_URL']}/be/{fault}"))
    with suppress(ZeroDivisionError):
        return main(["train", config, *overrides])
    return EXIT_UNEXPECTED


def ask(url: str) -> None:
    urllib.request.urlopen(url).close()


def test_a_run_that_crashes_tells_wandb_and_one_whose_server_goes_ends_well(data, tmp_path, monkeypatch):
    """Real runs with the real client; then the record is sent by `trichord track sync`, when the server is back."""
    config = str(write_config(data, tmp_path))
    kept = {f"WANDB_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "CACHE", "DATA")}
    wandb = "tracking.wandb={mode: online, group: sweep, tags: [small]}"
    overrides = ("run.max_steps=8", "checkpoints.save_every_steps=2", "engine.zero_stage=1", wandb)
    with wandb_server() as server:
        environ = {**server.environ, **kept}
        assert run_ranks(1, train_online, environ, 6, "crash", config, *overrides) == [EXIT_UNEXPECTED]
        (run,) = server.runs.values()
        (alert,) = server.alerts
        assert (alert["title"], alert["severity"]) == ("tiny failed", "ERROR")
        assert "ZeroDivisionError: integer division or modulo by zero" in alert["text"]
        assert run.exit_code == EXIT_UNEXPECTED
        assert [(row["_step"], row["step"]) for row in run.history] == [(step, step) for step in range(1, 7)]
        assert (run.facts["groupName"], run.facts["tags"]) == ("sweep", ["small"])
        assert run.config["run"]["max_steps"] == 8
        assert run.config["environment"]

        assert run_ranks(1, train_online, environ, 1, "hang", config, *overrides) == [0]
        assert list(server.runs) == [run.name], "resumed in the same run"
        events = read_events(tmp_path / "tiny")
        starts = [(event["kind_of_start"], event["step"]) for event in events if event["kind"] == "start"]
        assert [kind for kind, _ in starts] == ["fresh", "resume"]
        assert "RewindRun" in server.asked
        log = (tmp_path / "tiny" / "logs" / "rank-00000.log").read_text()
        assert "wandb did not take everything within 2 s" in log

        server.recover()
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        assert main(["track", "sync", str(tmp_path / "tiny")]) == 0
        lines = {row["step"]: row["train/loss"] for row in read_metrics(tmp_path / "tiny")}
        assert [(row["step"], row["train/loss"]) for row in run.history] == [
            (step, pytest.approx(lines[step])) for step in range(1, 9)
        ]
        assert {made["artifactTypeName"] for made in server.artifacts if made["committed"]} == {"checkpoint"}
