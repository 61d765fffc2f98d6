"""`trichord bench step`: processor time of the training step, against simpler loops over the same model and batches.

    trichord          the whole loop but the loader: rates, counts, forward, backward, update, metrics
    deepspeed         the DeepSpeed engine at the same stage: forward, mean loss, backward, step
    ddp               torch's DistributedDataParallel, gradient clipping and AdamW
    trainer           Hugging Face Trainer on the same texts, one by one and padded, per useful token

Each figure is the median over pairs of steps, taken in turn inside the same processes, with its 95 % interval.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from trichord.benchmarks.data_corpus import make_corpus
from trichord.core.errors import TrichordError

CORPUS_SAMPLES = 128
WARM_STEPS = 3
NUM_LAYERS, ROW_TOKENS = 6, 512
_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class StepRequest:
    """What the ranks of one measurement do. stage: ZeRO's; pairs: rounds in which every contestant takes one step.

    accumulation: micro-batches per step; folder: of the corpus, and for what the loop records; num_layers: of the
    decoder, row_tokens: of its rows.
    """

    contestants: tuple[str, ...]
    stage: int
    accumulation: int
    pairs: int
    folder: str
    num_layers: int = NUM_LAYERS
    row_tokens: int = ROW_TOKENS


@dataclass(frozen=True)
class Ratio:
    """Median over the pairs, and the interval that holds the true median in 95 of 100 such measurements."""

    median: float
    low: float
    high: float
    pairs: int


def bench_step(
    folder: Path,
    stages: Sequence[int],
    ranks: int,
    pairs: int,
    say: Callable[[str], None],
    *,
    num_layers: int = NUM_LAYERS,
    row_tokens: int = ROW_TOKENS,
) -> list[dict[str, Any]]:
    """One row per stage and baseline; num_layers and row_tokens are the decoder's, at least 256 for a whole sample.

    Raises:
        TrichordError: a rank failed; with the end of what it said.
    """
    make_corpus(folder / "corpus", CORPUS_SAMPLES)
    size = {"num_layers": num_layers, "row_tokens": row_tokens}
    rows = []
    for stage in stages:
        contestants = ("trichord", "deepspeed", "ddp")
        say(f"ZeRO stage {stage}, {ranks} ranks, {pairs} pairs ...")
        seconds = _measure(StepRequest(contestants, stage, 1, pairs, str(folder), **size), ranks)
        rows += [
            _row(f"stage {stage}: trichord / deepspeed", seconds["trichord"], seconds["deepspeed"]),
            _row(f"stage {stage}: trichord / ddp", seconds["trichord"], seconds["ddp"]),
            _row(f"stage {stage}: deepspeed / ddp", seconds["deepspeed"], seconds["ddp"]),
        ]
    say(f"ragged texts, 1 rank, {pairs} pairs ...")
    per_token = _measure(StepRequest(("packed", "trainer"), 1, 1, pairs, str(folder), **size), 1)
    rows.append(_row("ragged texts, per useful token: trichord / trainer", per_token["packed"], per_token["trainer"]))
    return rows


def judge_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is asked of the ratios: against DeepSpeed a median of at most 1.05 and an interval that reaches 1.03;
    against Trainer less time per useful token. Against DDP is reported only: it keeps whole optimizer states."""
    verdicts = []
    for row in rows:
        name = row["comparison"]
        if name.endswith("trichord / deepspeed"):
            verdicts.append(_verdict(f"{name}, median", row["ratio"], 1.05))
            verdicts.append(_verdict(f"{name}, interval from", row["from"], 1.03))
        elif name.endswith("trichord / trainer"):
            verdicts.append(_verdict(f"{name}, interval to", row["to"], 1.0))
    return verdicts


def _verdict(what: str, value: float, bar: float) -> dict[str, Any]:
    return {"what": what, "value": value, "bar": bar, "at_most": True, "met": value <= bar}


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Of the pairwise ratios ours / theirs: the median, and its interval by order statistics, which assumes no shape of
    the noise (David & Nagaraja, Order Statistics, section 7.1)."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    rank = interval_rank(len(ratios))
    return Ratio(median(ratios), ratios[rank], ratios[len(ratios) - 1 - rank], len(ratios))


def interval_rank(count: int, level: float = 0.95) -> int:
    """Largest r so that [sorted[r], sorted[count - 1 - r]] holds the median with at least this probability."""
    rank, below = 0, 2 * 0.5**count
    while 2 * rank + 2 < count and 1 - (below + 2 * math.comb(count, rank + 1) * 0.5**count) >= level:
        rank += 1
        below += 2 * math.comb(count, rank) * 0.5**count
    return rank


def _row(what: str, ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    ratio = ratio_of(ours, theirs)
    return {
        "comparison": what,
        "ratio": ratio.median,
        "from": ratio.low,
        "to": ratio.high,
        "pairs": ratio.pairs,
        "first, CPU s": median(ours),
        "second, CPU s": median(theirs),
    }


def _measure(request: StepRequest, ranks: int) -> dict[str, list[float]]:
    """Contestant -> CPU seconds of each of its steps, summed over the ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "trichord.benchmarks.step_rank", json.dumps(asdict(request))]
    started = []
    for rank in range(ranks):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",  # processor time says nothing about a GPU
            "DS_ACCELERATOR": "cpu",
        }
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env))
    try:
        said = [process.communicate(timeout=_TIMEOUT_S) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
    failed = [said[rank][1] for rank, process in enumerate(started) if process.returncode]
    if failed:
        raise TrichordError(f"a rank of the benchmark failed: {failed[0].strip()[-1500:]}")
    by_rank = [json.loads(out.splitlines()[-1]) for out, _ in said]
    return {name: [sum(step) for step in zip(*(own[name] for own in by_rank))] for name in by_rank[0]}
