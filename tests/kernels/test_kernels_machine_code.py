"""What the judge reads off machine code: accesses, spills, loops, tensor cores."""

from __future__ import annotations

import pytest

from trichord_kernels.static.loops import Instruction, innermost, natural_loops
from trichord_kernels.static.machine_code import parse_sass, read_amdgcn, read_sass

SASS = """
  Function judged:
  REG:40 STACK:0 SHARED:0
        /*0000*/                   LDC R1, c[0x0][0x28] ;          /* 0x00 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ; /* 0x00 */
        /*0020*/                   LDG.E.U16 R4, desc[UR4][R2.64] ; /* 0x00 */
        /*0030*/                   LDG.E.64 R4, desc[UR4][R2.64] ;  /* 0x00 */
        /*0040*/                   STL.64 [R1+0x8], R4 ;            /* 0x00 */
        /*0050*/                   LDGSTS.E.BYPASS.64 [R5], [R2] ;  /* 0x00 */
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;    /* 0x00 */
        /*0070*/               @P0 BRA 0x30 ;                       /* 0x00 */
        /*0080*/                   LDL R4, [R1] ;                   /* 0x00 */
        /*0090*/                   STG.E desc[UR4][R2.64], R4 ;     /* 0x00 */
        /*00a0*/                   EXIT ;                           /* 0x00 */
        /*00b0*/                   BRA 0xb0;                        /* 0x00 */
"""


def test_sass_is_counted() -> None:
    code = read_sass(SASS)
    assert (str(code.whole.loads), str(code.loops.loads), str(code.whole.stores)) == ("2/4", "1/2", "0/1")
    assert code.registers == 40
    assert code.whole.loads.thread_bytes == 16 + 2 + 8 + 8
    assert (code.whole.spill_store_bytes, code.whole.spill_load_bytes, code.loops.spill_bytes) == (8, 4, 8)
    assert (code.whole.barriers, code.loops.instructions) == (1, 5)
    assert code.hot is code.loops
    assert read_sass(SASS.replace("@P0 BRA 0x30", "NOP")).hot.instructions == 12


def test_a_slow_path_behind_the_end_is_no_loop() -> None:
    """As sm_100 code waits: the first try in place, the retries behind the end, and a jump back from there."""
    code = parse_sass(
        """
        /*0000*/  SYNCS.TRYWAIT P0, [UR4], R6 ;
        /*0010*/  @!P0 BRA 0x40 ;
        /*0020*/  UTCHMMA gdesc[UR6], gdesc[UR20], tmem[UR13], idesc[UR39], !UPT ;
        /*0030*/  EXIT ;
        /*0040*/  SYNCS.TRYWAIT P0, [UR4], R6 ;
        /*0050*/  @!P0 BRA 0x40 ;
        /*0060*/  BRA 0x20 ;
        """
    )
    assert natural_loops(code) == [frozenset({4, 5})]


def test_conditions_stand_before_or_among_the_operands() -> None:
    text = "/*0000*/ BRA.U !UP1, 0x20 ; /*0010*/ BRA 0x0 ; /*0020*/ @P0 EXIT ; /*0030*/ RET.REL.NODEC R2 0x0 ;"
    code = parse_sass(text)
    assert [(i.target, i.falls_through) for i in code] == [(2, True), (0, False), (None, True), (None, False)]


def _code(*jumps: tuple[int, int, bool], length: int) -> list[Instruction]:
    """Instructions that do nothing but (from, to, conditional) jumps."""
    by_origin = {origin: (target, conditional) for origin, target, conditional in jumps}
    return [Instruction("X", "", *by_origin.get(i, (None, True))) for i in range(length)]


def test_loops_nest_and_jumps_to_one_header_are_one_loop() -> None:
    loops = natural_loops(_code((3, 2, True), (5, 1, True), (4, 1, True), length=7))
    assert set(loops) == {frozenset({2, 3}), frozenset({1, 2, 3, 4, 5})}
    assert innermost(loops) == [frozenset({2, 3})]


def test_a_loop_of_two_entries_is_none() -> None:
    """No compiler makes one of a `for`: the jump back does not go to a block that all its paths have passed."""
    assert natural_loops(_code((0, 3, True), (4, 1, False), length=6)) == []


@pytest.mark.parametrize(
    ("opcode", "flops"),
    [
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 2 * 2 * 16 * 8 * 8),
        ("HGMMA.64x128x16.F32", 2 * 64 * 128 * 16 // 4),
        ("HGMMA.64x64x8.F32.TF32", 2 * 2 * 64 * 64 * 8 // 4),
        ("UTCHMMA", 0),
    ],
)
def test_flops_of_one_warp_by_opcode(opcode, flops) -> None:
    code = read_sass(f"/*0000*/ {opcode} R24, R4, R8, R24 ; /*0010*/ @P0 BRA 0x0 ; /*0020*/ EXIT ;")
    assert [loop.tensor_flops for loop in code.tensor_loops] == [flops]
    assert code.hot.tensor_core.total() == 1


def test_the_hot_loop_is_the_shortest_with_tensor_cores() -> None:
    code = read_sass(
        """
        /*0000*/ NOP ;
        /*0010*/ HMMA.16816.F32 R24, R4, R8, R24 ;
        /*0020*/ ISETP.GE.AND P1, PT, R1, R2, PT ;
        /*0030*/ FSEL R3, R3, -INF, P1 ;
        /*0040*/ MUFU.EX2 R3, R3 ;
        /*0050*/ @P0 BRA 0x10 ;
        /*0060*/ HMMA.16816.F32 R24, R4, R8, R24 ;
        /*0070*/ MUFU.EX2 R3, R3 ;
        /*0080*/ @P0 BRA 0x60 ;
        /*0090*/ MUFU.RCP R3, R3 ;
        /*00a0*/ @P0 BRA 0x90 ;
        /*00b0*/ EXIT ;
        """
    )
    assert [(loop.instructions, loop.compares, loop.selects) for loop in code.tensor_loops] == [(3, 0, 0), (5, 1, 1)]
    assert (code.hot.mufu, code.hot.exponentials, code.loops.mufu) == (1, 1, 3)


def test_amd_assembly_is_counted() -> None:
    code = read_amdgcn(
        """
kernel:                                 ; @kernel
\tglobal_load_dwordx4 v[0:3], v0
\tbuffer_load_ushort v1
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
\tv_mfma_f32_32x32x8_bf16 v[34:49], v[64:65], v[154:155], 0
\tv_exp_f32_e32 v1, v1
\tv_cmp_gt_i32_e32 vcc, v1, v2
\tv_cndmask_b32_e32 v1, v1, v2, vcc
\ts_barrier
\ts_cbranch_scc1 .LBB0_2
\tbuffer_store_dwordx4 v[0:3]
\ts_endpgm
    .vgpr_count:     23
    .vgpr_spill_count: 2
"""
    )
    assert (str(code.whole.loads), str(code.whole.stores), code.whole.barriers) == ("1/2", "1/1", 1)
    assert (code.registers, code.whole.spill_store_bytes) == (23, 8)
    assert (code.hot.instructions, code.hot.compares, code.hot.selects, code.hot.exponentials) == (6, 1, 1, 1)
    assert dict(code.hot.tensor_core)["v_mfma"] == 1
