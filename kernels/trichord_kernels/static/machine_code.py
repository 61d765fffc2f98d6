"""Read compiled kernels (NVIDIA SASS, AMD assembly): registers, spills, memory accesses by width, barriers."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

WIDE_BYTES = 16  # 128 bits: the widest access both vendors issue per thread in one instruction


@dataclass
class AccessCount:
    """Global memory instructions of one kind: how many, how many of 128 bits or more, and their bytes per thread."""

    total: int = 0
    wide: int = 0
    thread_bytes: int = 0

    def add(self, num_bytes: int, is_bulk: bool = False) -> None:
        """Count one instruction; a bulk copy (LDGSTS, TMA) counts as wide whatever its size."""
        self.total += 1
        self.wide += is_bulk or num_bytes >= WIDE_BYTES
        self.thread_bytes += num_bytes

    @property
    def wide_share(self) -> float:
        return self.wide / self.total if self.total else 1.0

    def __str__(self) -> str:
        return f"{self.wide}/{self.total}"


@dataclass
class CodeCount:
    """What one kernel's machine code holds. Bytes are static, per thread; `loop_*` counts the loop bodies only."""

    registers: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    loop_spill_bytes: int = 0
    barriers: int = 0
    tensor_core: int = 0
    has_loop: bool = False
    loads: AccessCount = field(default_factory=AccessCount)
    stores: AccessCount = field(default_factory=AccessCount)
    loop_loads: AccessCount = field(default_factory=AccessCount)
    loop_stores: AccessCount = field(default_factory=AccessCount)

    @property
    def hot_loads(self) -> AccessCount:
        """Loads of the loop where there is one, else of the whole kernel."""
        return self.loop_loads if self.has_loop else self.loads

    @property
    def hot_stores(self) -> AccessCount:
        return self.loop_stores if self.has_loop else self.stores


def read_cubin(cubin: bytes) -> CodeCount:
    """Count an NVIDIA binary with the cuobjdump that comes with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        count = count_sass(_cuobjdump("-sass", path))
        usage = re.search(r"REG:(\d+)", _cuobjdump("--dump-resource-usage", path))
    count.registers = int(usage.group(1)) if usage else 0
    return count


def _cuobjdump(option: str, path: Path) -> str:
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, option, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


_SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


def count_sass(text: str) -> CodeCount:
    """Count the instructions of one SASS listing as `cuobjdump -sass` prints it."""
    lines = [(int(at, 16), opcode, operands) for at, opcode, operands in _SASS_LINE.findall(text)]
    loops = [
        (int(target.group(1), 16), at)
        for at, opcode, operands in lines
        if opcode.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", operands))
    ]
    loops = [(start, end) for start, end in loops if start < end]  # the endless jump to itself at the end is no loop
    count = CodeCount(has_loop=bool(loops))
    for at, opcode, _ in lines:
        _count_sass_line(count, opcode, in_loop=any(start <= at <= end for start, end in loops))
    return count


def _count_sass_line(count: CodeCount, opcode: str, in_loop: bool) -> None:
    base, num_bytes = opcode.split(".")[0], _sass_bytes(opcode)
    is_bulk = base in ("LDGSTS", "UTMALDG", "UTMASTG", "UBLKCP")
    if base in ("LDG", "LDGSTS", "UTMALDG", "UBLKCP"):
        for access in (count.loads, count.loop_loads)[: 1 + in_loop]:
            access.add(num_bytes, is_bulk)
    elif base in ("STG", "UTMASTG"):
        for access in (count.stores, count.loop_stores)[: 1 + in_loop]:
            access.add(num_bytes, is_bulk)
    elif base in ("STL", "LDL"):
        count.spill_store_bytes += num_bytes * (base == "STL")
        count.spill_load_bytes += num_bytes * (base == "LDL")
        count.loop_spill_bytes += num_bytes * in_loop
    elif base == "BAR":
        count.barriers += 1
    elif base in ("HMMA", "HGMMA") or re.match(r"UTC\w*MMA", base):
        count.tensor_core += 1


def _sass_bytes(opcode: str) -> int:
    """Bytes per thread of a memory instruction: from its width suffix, 4 where it has none."""
    for suffix in reversed(opcode.split(".")):
        if suffix in ("256", "128", "64"):
            return int(suffix) // 8
        if suffix in ("U16", "S16", "U8", "S8"):
            return int(suffix[1:]) // 8
    return 4


_AMD_ACCESS = re.compile(r"^\s+(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+)", re.M)
_AMD_BYTES = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "ushort": 2, "sshort": 2, "short": 2}


def read_amdgcn(text: str) -> CodeCount:
    """Count one AMD kernel's assembly. Loops are not told apart there: the whole kernel is counted."""
    count = CodeCount(registers=_amd_field(text, "vgpr_count"))
    count.spill_store_bytes = count.spill_load_bytes = 4 * _amd_field(text, "vgpr_spill_count")
    count.barriers = len(re.findall(r"^\s+s_barrier", text, re.M))
    count.tensor_core = len(re.findall(r"^\s+v_mfma", text, re.M))
    for kind, width in _AMD_ACCESS.findall(text):
        (count.loads if kind == "load" else count.stores).add(_AMD_BYTES.get(width, 1))
    return count


def _amd_field(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", text)
    return int(found.group(1)) if found else 0
