"""Many cases in a few processes, each watched from outside: what crashes, hangs or breaks a rule is a finding."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from trichord.batches.tokenizer import train_tokenizer
from trichord.core.errors import ConfigError
from trichord.core.status import write_atomically
from trichord.core.stopping import signals_held
from trichord.inspection.fuzz.case import make_case, write_case
from trichord.inspection.fuzz.child import Verdict, serve
from trichord.inspection.fuzz.corpus import base_samples
from trichord.inspection.fuzz.road import Outcome

REPORT_FILE = "report.json"
MAX_SECONDS = 2.0
MAX_BYTES = 2 * 2**30
_TRIES = 3  # a slow case is tried again, since the machine may have been busy
_HANG_SECONDS = 20.0  # making the case and driving it twice; after that the process is ended
_START_SECONDS = 120.0
_CONTEXT = get_context("fork")  # a crash costs a fork, not an import of everything


@dataclass
class Report:
    """What a campaign found. outcomes: cases by how they ended; families: the same by kind of fault. next_case: all
    before it have been judged."""

    seed: int
    next_case: int = 0
    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    families: dict[str, Counter[str]] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
    slowest_seconds: float = 0.0
    slowest_case: int | None = None
    peak_mib: float = 0.0
    restarts: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        counts = {"outcomes": dict(self.outcomes), "families": {name: dict(by) for name, by in self.families.items()}}
        return {**vars(self), **counts}

    def rows(self) -> list[dict[str, Any]]:
        """A table: kinds of fault against outcomes."""
        kinds = [kind for kind in ("samples", "left out", "refused", "fault") if kind in self.outcomes]
        return [
            {"kind of fault": name, **{kind: counts[kind] for kind in kinds}}
            for name, counts in sorted(self.families.items())
        ]


class _Child:
    """One process under attack and the case it is at; -1 while it gets ready."""

    def __init__(self, root: Path, tokenizer: Path, seed: int, max_bytes: int):
        self.root = root
        self.number = -1
        self.deadline = time.monotonic() + _START_SECONDS
        self.connection, theirs = _CONTEXT.Pipe()
        told = (os.getpid(), theirs, root, str(tokenizer), seed, max_bytes)
        self.process = _CONTEXT.Process(target=serve, args=told, daemon=True)
        with signals_held():
            self.process.start()
        theirs.close()

    def give(self, number: int, seconds: float) -> None:
        self.number = number
        self.deadline = time.monotonic() + seconds
        self.connection.send(number)

    def answer(self) -> Verdict | str:
        """Its verdict, or how it came to its end."""
        try:
            if self.connection.poll():
                return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return f"the process was {how}" if code < 0 else f"the process {how}"
        return "the process hung and was ended"

    def last_words(self) -> str:
        log = self.root / "stderr"
        return log.read_text(errors="replace")[-4000:] if log.exists() else ""

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()
        shutil.rmtree(self.root, ignore_errors=True)


class _Campaign:
    def __init__(self, numbers: Sequence[int], seed: int, out: Path | None, root: Path, max_bytes: int) -> None:
        self.report = Report(seed, next_case=numbers[0])
        self._judged: set[int] = set()
        self._todo = deque(numbers)
        self._out, self._root, self._max_bytes = out, root, max_bytes
        self._tries: Counter[int] = Counter()
        self._started = 0
        self._tokenizer = root / "tokenizer"
        texts = [sample["txt"].decode() for sample in base_samples() if "txt" in sample]
        train_tokenizer(texts, "bpe", 300, self._tokenizer)

    def run(self, workers: int, on_case: Callable[[Report], None] | None) -> None:
        children = [self._start() for _ in range(min(workers, len(self._todo)))]
        try:
            while children:
                ready = wait([child.connection for child in children], timeout=0.2)
                for child in list(children):
                    if child.connection in ready or time.monotonic() > child.deadline:
                        self._take(child, children)
                        if on_case is not None:
                            on_case(self.report)
        finally:
            for child in children:
                child.end()

    def _take(self, child: _Child, children: list[_Child]) -> None:
        """Judge what a child says, and give it the next case; a child that is lost gets a successor."""
        answer = child.answer()
        if isinstance(answer, Verdict):
            self._count(answer)
        else:
            self._lost(child, answer)
        lost = not isinstance(answer, Verdict)
        if lost or not self._todo:
            children.remove(child)
            child.end()
        if lost and self._todo:
            self.report.restarts += 1
            children.append(self._start())
        elif self._todo:
            child.give(self._todo.popleft(), _HANG_SECONDS)

    def _count(self, verdict: Verdict) -> None:
        report = self.report
        report.peak_mib = max(report.peak_mib, round(verdict.peak_mib, 1))
        if verdict.number < 0:
            if (
                verdict.outcome.kind != "left out"
            ):  # the shard of all valid samples; two of them are in no mapped format
                raise RuntimeError(f"the unharmed corpus cannot be read: {verdict.outcome} {verdict.trace}")
            return
        self._tries[verdict.number] += 1
        if verdict.seconds > MAX_SECONDS and self._tries[verdict.number] < _TRIES:
            self._todo.appendleft(verdict.number)
            return
        if verdict.seconds > report.slowest_seconds:
            report.slowest_seconds, report.slowest_case = round(verdict.seconds, 3), verdict.number
        outcome = verdict.outcome
        if verdict.seconds > MAX_SECONDS and outcome.kind != "fault":
            outcome = Outcome("fault", detail=f"took {verdict.seconds:.1f} s, at most {MAX_SECONDS:g} s are allowed")
        self._note(verdict.number, outcome, verdict.trace)

    def _lost(self, child: _Child, how: str) -> None:
        if child.number < 0:
            raise RuntimeError(f"{how} before its first case: {child.last_words()}")
        self._tries[child.number] += 1
        if "hung" in how and self._tries[child.number] < _TRIES:
            self._todo.appendleft(child.number)
            return
        self._note(child.number, Outcome("fault", detail=how), child.last_words())

    def _note(self, number: int, outcome: Outcome, trace: str) -> None:
        self.report.cases += 1
        self._judged.add(number)
        while self.report.next_case in self._judged:
            self._judged.remove(self.report.next_case)
            self.report.next_case += 1
        self.report.outcomes[outcome.kind] += 1
        case = make_case(self.report.seed, number)
        for family in case.families:
            self.report.families.setdefault(family, Counter())[outcome.kind] += 1
        if outcome.kind != "fault":
            return
        finding = {"case": number, "families": case.families, "fault": outcome.detail, "trace": trace}
        self.report.findings.append(finding)
        if self._out is not None:
            folder = self._out / f"seed{self.report.seed}-case{number}"
            folder.mkdir(parents=True, exist_ok=True)
            write_case(case, folder)
            (folder / "finding.json").write_text(json.dumps({**finding, "options": case.options}, indent=2))

    def _start(self) -> _Child:
        self._started += 1
        return _Child(self._root / str(self._started), self._tokenizer, self.report.seed, self._max_bytes)


def run_campaign(
    cases: int = 20_000,
    *,
    seed: int = 0,
    workers: int = 1,
    first: int = 0,
    out: Path | None = None,
    max_bytes: int = MAX_BYTES,
    on_case: Callable[[Report], None] | None = None,
) -> Report:
    """Attack the data road with `cases` mangled shards, numbered from `first`.

    Each is driven from index to batch in a process that may touch one folder only. Fine are: samples, a quarantine, or
    a DataError of one readable line. A finding is anything else: another exception, death by a signal, more than 2 s in
    three tries, memory beyond `max_bytes` on top of the imports, a file written or read elsewhere, a process, a network
    connection, an unpickling, a sample that is neither given nor left out, or a second reading that ends otherwise.

    Args:
        out: folder for reproducers, one folder per finding, and for `report.json`, which a campaign that is stopped
            leaves too. on_case: called with what is known after each answer.

    Raises:
        ConfigError: `out` cannot be made.
    """
    begun = time.monotonic()
    _make_folder(out)
    with tempfile.TemporaryDirectory(prefix="trichord-fuzz-") as root:
        campaign = _Campaign(range(first, first + cases), seed, out, Path(root), max_bytes)
        report = campaign.report
        try:
            campaign.run(workers, on_case)
        finally:
            report.seconds = round(time.monotonic() - begun, 1)
            report.findings.sort(key=lambda finding: finding["case"])
            if out is not None:
                write_atomically(out / REPORT_FILE, json.dumps(report.to_json(), indent=2) + "\n")
    return report


def _make_folder(out: Path | None) -> None:
    """Now, not when the first finding is there, hours later."""
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out {out}: expected a folder to write to, and it cannot be made: {error.strerror}"
        ) from error
