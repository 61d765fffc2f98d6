"""Read compiled kernels (NVIDIA SASS, AMD assembly): registers, spills, accesses by width, tensor cores, loops."""

from __future__ import annotations

import gzip
import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from trichord_kernels.static.loops import Instruction, innermost, natural_loops

_SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
WIDE_BYTES = 16  # 128 bits: the widest access both vendors issue per thread in one instruction


@dataclass
class AccessCount:
    """Global memory instructions of one kind: how many, how many of 128 bits or more, and their bytes per thread."""

    total: int = 0
    wide: int = 0
    thread_bytes: int = 0
    wide_bytes: int = 0

    def add(self, num_bytes: int, is_bulk: bool = False) -> None:
        """Count one instruction; a bulk copy (LDGSTS, TMA) counts as wide whatever its size."""
        is_wide = is_bulk or num_bytes >= WIDE_BYTES
        self.total += 1
        self.wide += is_wide
        self.thread_bytes += num_bytes
        self.wide_bytes += num_bytes * is_wide

    @property
    def wide_share(self) -> float:
        return self.wide / self.total if self.total else 1.0

    @property
    def wide_byte_share(self) -> float:
        return self.wide_bytes / self.thread_bytes if self.thread_bytes else 1.0

    def __str__(self) -> str:
        return f"{self.wide}/{self.total}"


@dataclass
class CodeCount:
    """What a piece of machine code holds. Counts are static; bytes are per thread, tensor_flops per warp."""

    instructions: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    barriers: int = 0
    tensor_core: Counter[str] = field(default_factory=Counter)  # {opcode without modifiers: count}
    tensor_flops: int = 0  # of the instructions whose opcode states the shape, scaled to the half-precision rate
    mufu: int = 0  # special functions
    exponentials: int = 0  # those of them that are 2^x
    compares: int = 0  # of integers, per thread: a mask compares positions
    selects: int = 0
    loads: AccessCount = field(default_factory=AccessCount)
    stores: AccessCount = field(default_factory=AccessCount)

    @property
    def spill_bytes(self) -> int:
        return self.spill_store_bytes + self.spill_load_bytes


@dataclass
class KernelCode:
    """One compiled kernel: all of it, what lies in loops, and its innermost loops that use tensor cores, the one with
    the fewest instructions first (the full-tile loop: masks only add instructions)."""

    registers: int
    whole: CodeCount
    loops: CodeCount
    tensor_loops: list[CodeCount]

    @property
    def hot(self) -> CodeCount:
        """The full-tile loop of a tensor-core kernel; else what lies in loops; without a loop all of it."""
        if self.tensor_loops:
            return self.tensor_loops[0]
        return self.loops if self.loops.instructions else self.whole


def read_cubin(cubin: bytes) -> KernelCode:
    """Count an NVIDIA binary. Its listing is kept in Triton's cache: making it takes a third of a second."""
    from triton.runtime.cache import get_cache_manager

    kept = get_cache_manager(hashlib.sha256(cubin).hexdigest())
    file = kept.get_file("listing.gz")
    if file is None:
        file = kept.put(gzip.compress(_disassembled(cubin).encode()), "listing.gz")
    return read_sass(gzip.decompress(Path(file).read_bytes()).decode())


def _disassembled(cubin: bytes) -> str:
    """What `read_sass` needs of the listing by the cuobjdump that comes with Triton."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "--dump-resource-usage", str(path)]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return "\n".join(found.group() for found in re.finditer(rf"REG:\d+|{_SASS_LINE.pattern}", listing))


def read_sass(listing: str) -> KernelCode:
    """Count the kernel of one listing as `cuobjdump -sass` prints it, with `--dump-resource-usage` for registers."""
    usage = re.search(r"REG:(\d+)", listing)
    return _kernel_code(parse_sass(listing), int(usage.group(1)) if usage else 0, _count_sass)


def read_amdgcn(text: str) -> KernelCode:
    """Count one AMD kernel's assembly. Its spills are what the compiler states, not placed in loops."""
    code = _kernel_code(parse_amdgcn(text), _amd_field(text, "vgpr_count"), _count_amdgcn)
    code.whole.spill_store_bytes = code.whole.spill_load_bytes = 4 * _amd_field(text, "vgpr_spill_count")
    return code


def _kernel_code(code: list[Instruction], registers: int, count) -> KernelCode:
    def total(indices: Iterable[int]) -> CodeCount:
        counted = CodeCount()
        for i in sorted(indices):
            counted.instructions += 1
            count(counted, code[i])
        return counted

    loops = natural_loops(code)
    with_tensor_cores = [loop for loop in loops if any(_is_tensor_core(code[i]) for i in loop)]
    tensor_loops = [total(loop) for loop in innermost(with_tensor_cores)]
    return KernelCode(
        registers,
        whole=total(range(len(code))),
        loops=total(frozenset().union(*loops)),
        tensor_loops=sorted(tensor_loops, key=lambda loop: loop.instructions),
    )


_ENDS = ("EXIT", "RET", "BRX", "JMX", "BPT", "KILL")


def parse_sass(listing: str) -> list[Instruction]:
    """The instructions of the (one) kernel of a SASS listing, jumps resolved to indices."""
    lines = _SASS_LINE.findall(listing)
    index = {int(at, 16): i for i, (at, *_) in enumerate(lines)}
    code = []
    for _, predicate, opcode, operands in lines:
        base = opcode.partition(".")[0]
        # `BRA.U !UP1, 0x150` and `BRA.DIV UR4, 0x150` are conditional by an operand.
        conditional = bool(predicate) or "," in operands
        address = re.search(r"0x([0-9a-f]+)", operands) if base in ("BRA", "JMP") else None
        target = index.get(int(address.group(1), 16)) if address else None
        code.append(Instruction(opcode, operands, target, conditional or base not in (*_ENDS, "BRA", "JMP")))
    return code


def _is_tensor_core(instruction: Instruction) -> bool:
    return bool(re.match(r"HMMA|HGMMA|UTC\w*MMA|v_mfma", instruction.opcode))


def _count_sass(count: CodeCount, instruction: Instruction) -> None:
    opcode, base = instruction.opcode, instruction.base
    num_bytes = _sass_bytes(opcode)
    is_bulk = base in ("LDGSTS", "UTMALDG", "UTMASTG", "UBLKCP")
    if base in ("LDG", "LDGSTS", "UTMALDG", "UBLKCP"):
        count.loads.add(num_bytes, is_bulk)
    elif base in ("STG", "UTMASTG"):
        count.stores.add(num_bytes, is_bulk)
    elif base in ("STL", "LDL"):
        count.spill_store_bytes += num_bytes * (base == "STL")
        count.spill_load_bytes += num_bytes * (base == "LDL")
    elif base == "MUFU":
        count.mufu += 1
        count.exponentials += opcode.startswith("MUFU.EX2")
    elif base == "BAR":
        count.barriers += 1
    elif _is_tensor_core(instruction):
        count.tensor_core[base] += 1
        count.tensor_flops += _tensor_flops(opcode)
    count.compares += base == "ISETP"
    count.selects += base in ("SEL", "FSEL")


def _tensor_flops(opcode: str) -> int:
    """FLOPs one warp's HMMA or HGMMA makes, 2 per multiply-add; 0 where the opcode states no shape.

    `HMMA.16816.F32.BF16` is one warp's 16x8x16, `HGMMA.64x64x16.F32.BF16` is shared by the 4 warps of a group. TF32
    runs at half the rate of half precision: it counts double, so that FLOPs over the half-precision rate are time.
    """
    if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
        m, n, k = (int(size) for size in shape.groups())
        m //= 4
    elif shape := re.match(r"HMMA\.(?:SP\.)?16(8)(4|8|16)\.", opcode):
        m, n, k = 16, int(shape.group(1)), int(shape.group(2))
    else:
        return 0
    return 2 * m * n * k * (2 if ".TF32" in opcode else 1)


def _sass_bytes(opcode: str) -> int:
    """Bytes per thread of a memory instruction: from its width suffix, 4 where it has none."""
    for suffix in reversed(opcode.split(".")):
        if suffix in ("256", "128", "64"):
            return int(suffix) // 8
        if suffix in ("U16", "S16", "U8", "S8"):
            return int(suffix[1:]) // 8
    return 4


_AMD_LINE = re.compile(r"^(?:(\.?\w+):|\s+([a-z]\w+)[ \t]*([^;\n]*))", re.M)
_AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+)")
_AMD_BYTES = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "ushort": 2, "sshort": 2, "short": 2}


def parse_amdgcn(text: str) -> list[Instruction]:
    """The instructions of one AMD kernel's assembly, jumps resolved to indices."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for label, opcode, operands in _AMD_LINE.findall(text):
        if label:
            labels[label] = len(found)
        else:
            found.append((opcode, operands.strip()))
    code = []
    for opcode, operands in found:
        target = labels.get(operands) if opcode.startswith(("s_branch", "s_cbranch")) else None
        code.append(Instruction(opcode, operands, target, opcode not in ("s_branch", "s_endpgm", "s_setpc_b64")))
    return code


def _count_amdgcn(count: CodeCount, instruction: Instruction) -> None:
    opcode = instruction.opcode
    if access := _AMD_ACCESS.fullmatch(opcode):
        (count.loads if access.group(1) == "load" else count.stores).add(_AMD_BYTES.get(access.group(2), 1))
    count.barriers += opcode == "s_barrier"
    count.mufu += opcode.startswith(("v_exp_", "v_log_", "v_rcp_", "v_rsq_", "v_sqrt_", "v_sin_", "v_cos_"))
    count.exponentials += opcode.startswith("v_exp_")
    count.compares += bool(re.match(r"v_cmpx?_\w+_[iu](16|32|64)", opcode))
    count.selects += opcode.startswith("v_cndmask")
    count.tensor_core["v_mfma"] += opcode.startswith("v_mfma")
    count.spill_load_bytes += 4 * opcode.startswith("scratch_load")
    count.spill_store_bytes += 4 * opcode.startswith("scratch_store")


def _amd_field(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", text)
    return int(found.group(1)) if found else 0
