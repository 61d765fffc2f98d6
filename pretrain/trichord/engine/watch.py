"""Faults. A thread watches the other ranks and leaves when one is gone.

Ranks save only after all have agreed on the flag in a completed collective (it travels with the step's counts). A rank
that dies cannot agree: its peers would wait in a collective until the timeout. Each rank's watcher therefore beats in
the job's store and looks at its neighbour's beat; one that is missing for too long ends this process at once, without
saving, and leaves a note that all other watchers read. So does a rank that fails, and a step that does not end.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist

from trichord.core.dist import rank_facts
from trichord.core.log import get_logger, log_stream
from trichord.core.phase import current_phase
from trichord.engine.config import EngineConfig
from trichord.engine.fault import Fault
from trichord.engine.stuck import Sight, describe, dump_stacks, look, stuck_ranks, table

log = get_logger(__name__)

START_FACTOR = 3.0
"""Times the patience with a silent rank while the run starts."""
KEYS_AT_ONCE = 256
OWN_END_S = 15.0
"""How long a rank that failed may take to end: the teardown of broken groups can hang."""


class Judge(Protocol):
    """Who writes down what became of the run."""

    step: int

    def lost(self, fault: Fault) -> None:
        """The process leaves right after this."""
        ...

    def slow(self, report: str, table: Sequence[str]) -> None:
        """Nothing has moved for a while; on rank 0."""
        ...


class PeerWatch:
    """Leaves the process when another rank is gone, has failed, or when the step is stuck.

    Each rank puts what it does (`Sight`) under a key of its own, and reads that of the next rank and the common key
    `fault`, in which whoever notices first says what is wrong. That is two requests per rank and beat, and beats are
    rarer in a large world, so that the store sees a few hundred per second at any size. All ranks' keys are read by
    rank 0 only, and only when nothing has moved on it for a while.
    """

    def __init__(self, engine: EngineConfig, judge: Judge):
        self.judge = judge
        self.patience_s = START_FACTOR * engine.heartbeat_timeout_s
        self._beat_timeout_s = engine.heartbeat_timeout_s
        self._stuck_after_s = engine.stuck_limit_s
        self._facts = rank_facts()
        self.beat_every_s = beat_every_s(self._facts.world_size, engine.heartbeat_timeout_s)
        self._beats = 0
        self._armed = self._ready = self._slow_told = False
        self._looked = 0.0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: dist.Store | None = None

    def start(self) -> PeerWatch:
        """Start the thread. Until `arm`, patience is longer: start-up has stretches that let no thread run."""
        if self._facts.world_size > 1:
            # A connection of its own: the process group's may be blocked in a wait when it is needed.
            self._store = dist.PrefixStore("trichord_watch", _connect_store(self._beat_timeout_s))
            self._store.set(self._key(self._facts.rank), look(self._facts.rank, self.judge.step).to_json())
            if self._facts.rank == 0:
                self._store.compare_set("fault", "", "{}")
        self._thread = threading.Thread(target=self._run, name="peer-watch", daemon=True)
        self._thread.start()
        return self

    def arm(self) -> None:
        """The steps begin: from now on a step that does not end is a fault."""
        self.patience_s = self._beat_timeout_s
        self._armed = True

    def stop(self) -> None:
        """End of the run: beats stop without anyone taking it for a death (all ranks call this after a barrier)."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        faulthandler.cancel_dump_traceback_later()

    def tell(self, fault: Fault) -> Fault:
        """Say what is wrong to all ranks. Returns what was said first, which may be another rank's."""
        if self._store is None:
            return fault
        try:
            said = self._store.compare_set("fault", "{}", fault.to_json())
            return Fault.from_json(said) if said != b"{}" else fault
        except Exception:  # the store is gone: every rank notices that by itself
            log.warning("could not tell the other ranks: %s", fault.reason)
            return fault

    def cause_of(self, error: BaseException) -> Fault:
        """Why a collective broke: what the rank that caused it says, or the watch over it. Waits for that."""
        self.patience_s = min(self.patience_s, max(3.0, 5 * self.beat_every_s))  # somebody is gone, most likely
        deadline = time.monotonic() + self._beat_timeout_s + 2 * self.beat_every_s
        while self._store is not None and time.monotonic() < deadline:
            try:
                if (fault := self._fault()) is not None:
                    return fault
            except Exception as gone:
                return _store_is_gone(gone)
            time.sleep(0.2)
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return Fault("lost", f"the connection to the other ranks broke in {current_phase() or 'the start'}: {said}")

    def linger(self) -> None:
        """Where this process holds the job's store: stay until the others have read there what is wrong."""
        agents_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if self._facts.rank == 0 and self._store is not None and not agents_store:
            time.sleep(2.5 * self.beat_every_s)

    def _run(self) -> None:
        peer = (self._facts.rank + 1) % self._facts.world_size
        last_beat, last_change = b"", time.monotonic()
        while not self._stopping.wait(self.beat_every_s):
            sight = look(self._facts.rank, self.judge.step)
            # Where the main thread lets no other run, this one included, its stack is told by a thread in C.
            faulthandler.dump_traceback_later(0.75 * self.patience_s, file=log_stream())
            if self._store is not None:
                try:
                    beat, fault = self._exchange(sight, peer)
                except Exception as error:
                    return self._leave(_store_is_gone(error))
                now = time.monotonic()
                if fault is not None:
                    return self._obey(fault)
                if beat != last_beat:
                    last_beat, last_change = beat, now
                elif now - last_change > self.patience_s:
                    return self._leave(self.tell(_gone(peer, last_beat, now - last_change)))
            if self._facts.rank == 0 and self._armed and (fault := self._judge_step(sight)) is not None:
                return self._leave(self.tell(fault))

    def _exchange(self, sight: Sight, peer: int) -> tuple[bytes, Fault | None]:
        """One beat: what this rank does goes to the store, what the next one does and the fault come from it."""
        assert self._store is not None
        # The number of the beat makes two beats of a rank that does the same thing differ.
        self._beats += 1
        self._store.set(self._key(self._facts.rank), f"{self._beats} {sight.to_json()}")
        keys = ["fault", self._key(peer)]
        self._ready = self._ready or self._store.check(keys)
        if not self._ready:  # a rank that has not come here yet
            return b"", None
        said, beat = self._store.multi_get(keys)
        return beat, Fault.from_json(said) if said != b"{}" else None

    def _fault(self) -> Fault | None:
        assert self._store is not None
        said = self._store.get("fault") if self._store.check(["fault"]) else b"{}"
        return Fault.from_json(said) if said != b"{}" else None

    def _judge_step(self, own: Sight) -> Fault | None:
        """On rank 0: a warning at half the time, the verdict at the whole of it. Reads the other ranks' keys at most 16
        times in that time, and only when nothing moves here."""
        half = self._stuck_after_s / 2
        if own.idle_s < half:
            self._slow_told = False
            return None
        now = time.monotonic()
        if now - self._looked < self._stuck_after_s / 16:
            return None
        self._looked = now
        sights = self._sights(own)
        idle_s = min(sight.idle_s for sight in sights)
        if idle_s < half:
            return None
        stuck = stuck_ranks(sights)
        report = describe(sights, stuck, idle_s)
        if idle_s >= self._stuck_after_s:
            return Fault("stuck", report, stuck=tuple(stuck), table=tuple(table(sights)))
        if not self._slow_told:
            self._slow_told = True
            self.judge.slow(f"{report}; the run ends if it does not by {self._stuck_after_s:.0f} s", table(sights))
        return None

    def _sights(self, own: Sight) -> list[Sight]:
        keys = [self._key(rank) for rank in range(1, self._facts.world_size)]
        found = [own]
        for at in range(0, len(keys), KEYS_AT_ONCE):
            assert self._store is not None
            beats = self._store.multi_get(keys[at : at + KEYS_AT_ONCE])
            found += [_sight_of(beat) for beat in beats]
        return found

    def _obey(self, fault: Fault) -> None:
        """Somebody has said what is wrong."""
        if fault.rank == self._facts.rank:  # this rank: it is on its way out, and may hang there
            self._stopping.wait(OWN_END_S)
        elif fault.kind == "error":  # all ranks may be raising the same, and each says it better than its watcher
            self._stopping.wait(2.0)
        self._leave(fault)

    def _leave(self, fault: Fault) -> None:
        if self._stopping.is_set():
            return
        try:
            self.linger()
            if fault.kind == "stuck" and (self._facts.rank in fault.stuck or not fault.stuck):
                dump_stacks(fault.reason)
                time.sleep(0.2)  # its workers write theirs
            self.judge.lost(fault)
        finally:
            os._exit(fault.code)  # the main thread may be stuck in a collective that can never complete

    @staticmethod
    def _key(rank: int) -> str:
        return f"sight/{rank}"


def beat_every_s(world_size: int, timeout_s: float) -> float:
    """A second; longer in a large world, so that the store sees 600 requests per second; but 5 beats per timeout."""
    return min(timeout_s / 5, max(1.0, 2 * world_size / 600))


def _sight_of(beat: bytes) -> Sight:
    return Sight.from_json(beat[beat.index(b"{") :])


def _gone(peer: int, last_beat: bytes, seconds: float) -> Fault:
    reason = f"rank {peer} has shown no sign of life for {seconds:.0f} s"
    if last_beat:
        seen = _sight_of(last_beat)
        reason += f"; at its last one it was in {seen}, in step {seen.step + 1}"
    return Fault("lost", reason, rank=peer)


def _store_is_gone(error: Exception) -> Fault:
    return Fault("lost", f"the job's store does not answer any more ({type(error).__name__}): its host process died")


def _connect_store(timeout_s: float) -> dist.TCPStore:
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=max(5.0, timeout_s)),
    )
