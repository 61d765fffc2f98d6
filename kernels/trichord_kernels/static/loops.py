"""Loops of machine code: instructions -> basic blocks -> dominators -> natural loops.

A jump back is not yet a loop: compilers move waits and slow paths behind the end of a kernel and jump back from there.
A loop here is what compilers mean by it (Aho et al., Compilers, section 9.6): a jump to an instruction that every path
to the jump has passed, with everything that can reach the jump from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: its predicate or none, opcode and operands as printed, where it may jump to (index
    into its listing) and whether control may also go on to the next one."""

    opcode: str
    operands: str
    target: int | None = None
    falls_through: bool = True

    @property
    def base(self) -> str:
        """The opcode without its modifiers: `LDG` of `LDG.E.128`."""
        return self.opcode.partition(".")[0]


def natural_loops(code: Sequence[Instruction]) -> list[frozenset[int]]:
    """The instruction indices of each loop; jumps back to one header are one loop. Unreachable code is in none."""
    blocks = _basic_blocks(code)
    successors = _successors(code, blocks)
    dominators = _dominators(successors)
    bodies: dict[int, set[int]] = {}
    predecessors = _reversed(successors)
    for block, dominating in dominators.items():
        for header in successors[block]:
            if header in dominating:
                bodies.setdefault(header, {header}).update(_reaching(block, header, predecessors))
    return [frozenset(i for block in body for i in range(*blocks[block])) for body in bodies.values()]


def innermost(loops: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    """Those that hold none of the others."""
    return [loop for loop in loops if not any(other < loop for other in loops)]


def _basic_blocks(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """[start, end) of each run of instructions that is entered at its first and left at its last."""
    starts = {0}
    for i, instruction in enumerate(code):
        if instruction.target is not None:
            starts.add(instruction.target)
        if instruction.target is not None or not instruction.falls_through:
            starts.add(i + 1)
    ordered = sorted(start for start in starts if start < len(code))
    return list(zip(ordered, [*ordered[1:], len(code)]))


def _successors(code: Sequence[Instruction], blocks: Sequence[tuple[int, int]]) -> list[list[int]]:
    block_at = {start: block for block, (start, _) in enumerate(blocks)}
    successors = []
    for _, end in blocks:
        last = code[end - 1]
        following = [end] if last.falls_through and end < len(code) else []
        successors.append([block_at[at] for at in [*following, *([] if last.target is None else [last.target])]])
    return successors


def _dominators(successors: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """{block reachable from block 0: every block that all paths to it pass, itself among them}."""
    order = _reachable(successors)
    predecessors = _reversed(successors)
    dominators = {block: {0} if block == 0 else set(order) for block in order}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [dominators[before] for before in predecessors[block] if before in dominators]
            found = set.intersection(*known) | {block}
            changed |= found != dominators[block]
            dominators[block] = found
    return dominators


def _reachable(successors: Sequence[Sequence[int]]) -> list[int]:
    """Blocks reachable from block 0, in the order in which a walk meets them."""
    seen, waiting = {}, [0] if successors else []
    while waiting:
        block = waiting.pop()
        if block not in seen:
            seen[block] = None
            waiting.extend(reversed(successors[block]))
    return list(seen)


def _reversed(successors: Sequence[Sequence[int]]) -> list[list[int]]:
    predecessors: list[list[int]] = [[] for _ in successors]
    for block, following in enumerate(successors):
        for after in following:
            predecessors[after].append(block)
    return predecessors


def _reaching(block: int, header: int, predecessors: Sequence[Sequence[int]]) -> set[int]:
    """Blocks from which `block` can be reached without passing `header`."""
    seen, waiting = {header}, [block]
    while waiting:
        at = waiting.pop()
        if at not in seen:
            seen.add(at)
            waiting.extend(predecessors[at])
    return seen
