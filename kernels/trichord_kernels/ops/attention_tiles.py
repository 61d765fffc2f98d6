"""What the attention kernels share: which rows a program owns, which rows those may see, and tiles of a head's rows.

Visibility is one interval per row (docs/kernels/attention.md), the same rule from a query's and from a key's side, so
one function serves the forward, dq (rows are queries) and dk/dv (rows are keys). Program slots need no host knowledge
of the lengths: segment s owns the slots from cu[s] // BLOCK + s + 1 on, which are always enough for its tiles. The rows
before the first segment and behind the last are segments -1 and S, which see nothing: so all T rows are written by
T // BLOCK + S + 2 slots.

A head of H elements is held as MAIN + TAIL columns, both powers of two (80 = 64 + 16), so that 80 and 96 do not pay for
128. TAIL is 0 where H needs none; the tail's variables then repeat the main part's and are never used.
"""

# pyright types a jitted function as the plain one that it was made from, and what it returns as a tuple.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

# An index behind every row: launchers refuse longer streams, so that sums of two positions stay below 2^31.
FAR = tl.constexpr(2**30)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_SEARCH_CHUNK = tl.constexpr(256)

# Arguments that change from call to call: one compilation serves all their values.
INTEGERS = ["q_row_stride", "q_head_stride", "k_row_stride", "k_head_stride", "v_row_stride", "v_head_stride"]
INTEGERS += ["grad_row_stride", "grad_head_stride", "num_segments", "total_q", "total_k", "groups"]
INTEGERS += ["left", "right", "align_ends"]


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """H -> (MAIN, TAIL): the least columns that one or two powers of two (16 at least) can hold it in."""
    main = max(16, triton.next_power_of_2(head_dim + 1) // 2)
    tail = 0 if head_dim <= main else max(16, triton.next_power_of_2(head_dim - main))
    return (main, tail) if tail < main else (2 * main, 0)


@triton.jit
def locate_tile(slot, Cu_ptr, num_segments, total, BLOCK: tl.constexpr):
    """(segment, its begin, its end, first row of the tile) of a program slot; the first row may lie past the end.

    Counts the segments whose slots begin at or before this one, in chunks: one round of loads for up to 255 segments.
    """
    segment = -1
    for first in range(0, num_segments + 1, _SEARCH_CHUNK):
        segments = first + tl.arange(0, _SEARCH_CHUNK)
        inside = segments <= num_segments
        begins = tl.load(Cu_ptr + segments, mask=inside, other=0)
        segment += tl.sum((inside & (begins // BLOCK + segments < slot)).to(tl.int32))
    begin = tl.load(Cu_ptr + segment, mask=segment >= 0, other=0)
    end = tl.load(Cu_ptr + segment + 1, mask=segment < num_segments, other=total)
    return segment, begin, end, begin + (slot - begin // BLOCK - segment - 1) * BLOCK


def num_slots(total: int, num_segments: int, block: int) -> int:
    """Program slots that cover every tile of every split of `total` rows into `num_segments` segments."""
    return total // block + num_segments + 2


@triton.jit
def segment_bounds(Cu_ptr, Used_ptr, segment, num_segments):
    """[begin, end) of a segment; with Used_ptr only its first so many rows. Empty for the rows outside all segments."""
    exists = (segment >= 0) & (segment < num_segments)
    begin = tl.load(Cu_ptr + segment, mask=exists, other=0)
    end = tl.load(Cu_ptr + segment + 1, mask=exists, other=0)
    if Used_ptr is not None:
        end = tl.minimum(end, begin + tl.maximum(tl.load(Used_ptr + segment, mask=exists, other=0), 0))
    return begin, end


@triton.jit
def seen_intervals(rows, valid, shift, left, right, lower, upper, Span_begins_ptr, Span_ends_ptr):
    """[begin, end) that each row sees: [p - left, p + right) with p = row + shift, and its span, in [lower, upper]."""
    begin = rows + shift - left
    end = rows + shift + right
    if Span_begins_ptr is not None:
        begin = tl.minimum(begin, tl.load(Span_begins_ptr + rows, mask=valid, other=FAR))
        end = tl.maximum(end, tl.load(Span_ends_ptr + rows, mask=valid, other=0))
    begin = tl.minimum(tl.maximum(begin, lower), upper)
    return begin, tl.minimum(tl.maximum(end, lower), upper)


@triton.jit
def tile_ranges(begin, end, valid, BLOCK: tl.constexpr):
    """(low, size, left, full, edges, begin, end): what the rows see, [low, low + size), as tiles of BLOCK from low on.

    First come `left` tiles that only some rows see whole, then `full` ones that every row sees whole (inside the
    intersection of the intervals, so they need no mask), then the other `edges` - left. The union of the intervals has
    no gap, since neighbouring rows' intervals touch: some row sees each position of it. begin and end come back
    counted from low.
    """
    low = tl.min(tl.where(valid, begin, FAR))
    size = tl.maximum(tl.max(tl.where(valid, end, 0)) - low, 0)
    full_begin = tl.cdiv(tl.maximum(tl.max(tl.where(valid, begin, 0)) - low, 0), BLOCK)
    full_end = tl.maximum(tl.min(tl.where(valid, end, FAR)) - low, 0) // BLOCK
    num_tiles = tl.cdiv(size, BLOCK)
    full = tl.maximum(full_end - full_begin, 0)
    left = tl.where(full > 0, full_begin, num_tiles)
    return low, size, left, full, num_tiles - full, begin - low, end - low


@triton.jit
def tile_offsets(BLOCK: tl.constexpr, stride, UNIT: tl.constexpr):
    """(BLOCK, 1) 64-bit offsets of a tile's rows from its first one."""
    return tl.arange(0, BLOCK).to(tl.int64)[:, None] * stride * UNIT


@triton.jit
def load_tile(
    Row_ptr, offsets, inside, H: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, CHECK_ROWS: tl.constexpr
):
    """Columns [FIRST, FIRST + WIDTH) of the rows at `offsets` (rows, 1); 0 past H and, with CHECK_ROWS, not inside."""
    cols = FIRST + tl.arange(0, WIDTH)[None, :]
    pointers = Row_ptr + offsets + cols
    if CHECK_ROWS:
        if FIRST + WIDTH > H:
            return tl.load(pointers, mask=inside[:, None] & (cols < H), other=0.0)
        else:
            return tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        if FIRST + WIDTH > H:
            return tl.load(pointers, mask=cols < H, other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def store_tile(Row_ptr, offsets, inside, values, H: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Store what `load_tile` loads, in the pointer's dtype."""
    cols = FIRST + tl.arange(0, WIDTH)[None, :]
    mask = inside[:, None] & (cols < H)
    tl.store(Row_ptr + offsets + cols, values.to(Row_ptr.dtype.element_ty), mask=mask)


@triton.jit
def tanh_of_half(x_log2, ACCURATE: tl.constexpr):
    """tanh(x / 2) for x given in units of ln 2 (x_log2 = x * log2 e), without overflow.

    ACCURATE divides, and below 1/4 takes the Taylor series to the 9th power (relative error 1e-8), where the
    exponential form is right to 6e-8 absolutely, not relatively. It is for float32: half-precision inputs are rounded
    far coarser than the 3e-7 of the short form.
    """
    if ACCURATE:
        y = x_log2 * (0.5 * LN2)
        square = y * y
        series = 1.0 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835))))
        return tl.where(square < 0.0625, y * series, 1.0 - 2.0 / (tl.exp2(x_log2) + 1.0))
    else:
        root = tl.rsqrt(tl.exp2(x_log2) + 1.0)  # squared it is the quotient, without a division's range checks
        return 1.0 - 2.0 * root * root
