"""The static report as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from trichord_kernels.static.baselines import peer_rows

_COLUMNS = ("kernel", "arch", "warps", "registers", "spills", "in loop", "shared KiB", "occupancy", "loads", "stores")
_COLUMNS += ("barriers", "tensor core", "bound", "serial", "bars")


def render_table(rows: Sequence[dict]) -> str:
    """The rows as aligned text, peers' figures under those that have them, then failures, and a line per op.

    Loads and stores are "wide/all" of the hot part (stores of a tensor-core kernel: of all of it); spills bytes per
    thread stored/loaded in the whole kernel, "in loop" those of the hot loop.
    """
    lines = [_COLUMNS]
    for row, shown in zip(rows, _peers_once(rows)):
        lines += [_cells(row), *(_cells(peer) for peer in shown)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    text += [f"{row['kernel']} on {row['arch']}: {why}" for row in rows for why in row["failures"]]
    text += [f"{row['kernel']} on {row['arch']} (reported only): {why}" for row in rows for why in row["reported"]]
    text += [_summary(op, [row for row in rows if row["op"] == op]) for op in dict.fromkeys(row["op"] for row in rows)]
    failures = sum(len(row["failures"]) for row in rows)
    return "\n".join([*text, f"{len(rows)} rows, {failures} failed bars; static, not timed"])


def _peers_once(rows: Sequence[dict]) -> list[list[dict]]:
    """Each row's peers, each peer under the last row that has it."""
    seen, kept = set(), []
    for row in reversed(rows):
        peers = [peer for peer in peer_rows(row) if (peer["kernel"], peer["arch"]) not in seen]
        seen |= {(peer["kernel"], peer["arch"]) for peer in peers}
        kept.append([{**peer, "kernel": f"  beside: {peer['kernel']}"} for peer in peers])
    return kept[::-1]


def _summary(op: str, rows: Sequence[dict]) -> str:
    """`attention: 60 rows, 60 hold every bar; sm_90: serial bound 0.48-0.66, at most 255 registers, ...`"""
    held = sum(not row["failures"] and not row["is_reported"] for row in rows)
    only_reported = sum(row["is_reported"] for row in rows)
    parts = [f"{op}: {len(rows)} rows, {held} hold every bar, {only_reported} reported only"]
    for arch in dict.fromkeys(row["arch"] for row in rows):
        compiled = [row for row in rows if row["arch"] == arch and "registers" in row]
        if not compiled:
            continue
        spilled = max(row["spill_store_bytes"] + row["spill_load_bytes"] for row in compiled)
        in_loop = max(row["hot_spill_bytes"] for row in compiled)
        bounds = [row["serial_bound"] for row in compiled if row["serial_bound"]]
        text = f"{arch}: at most {max(row['registers'] for row in compiled)} registers, {spilled} B spilled, "
        text += f"{in_loop} B in a hot loop"
        parts.append(text + (f", serial bound {min(bounds):.2f} to {max(bounds):.2f}" if bounds else ""))
    return "; ".join(parts)


def _cells(row: dict) -> tuple[str, ...]:
    bars = row.get("bars", {})
    bad = [bar for bar, verdict in bars.items() if verdict == "fail"]
    verdict = "report" if row.get("is_reported") else "fail" if bad else "pass"
    spills = f"{row['spill_store_bytes']}/{row['spill_load_bytes']}" if "spill_store_bytes" in row else "-"
    tensor_core = " ".join(f"{count} {kind}".strip() for kind, count in row.get("tensor_core", {}).items() if count)
    shown = [row["kernel"], row["arch"], row.get("num_warps"), row.get("registers"), spills, row.get("hot_spill_bytes")]
    stores = "whole_stores" if row.get("tensor_loops") else "stores"
    shown += [row.get(key) for key in ("shared_kib", "occupancy", "loads", stores, "barriers")]
    shown += [tensor_core or None, row.get("tensor_bound"), row.get("serial_bound")]
    shown += [f"{verdict} {','.join(bad or bars)}" if bars else None]
    return tuple("-" if cell is None else str(cell) for cell in shown)
