"""What the GPU rows of attention compare, checked on a CPU with small sizes: every contestant gets the same mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trichord_kernels.bench import attention_gpu
from trichord_kernels.bench.attention_gpu import Mask
from trichord_kernels.bench.timing import absent_row, contestants

SMALL_MASKS = [Mask("causal"), Mask("documents", 8), Mask("window", window=16), Mask("spans", num_spans=4, span=16)]


@pytest.fixture(autouse=True)
def _small(monkeypatch) -> None:
    monkeypatch.setattr(attention_gpu, "NUM_TOKENS", 256)


@pytest.mark.parametrize("mask", SMALL_MASKS, ids=lambda mask: mask.name)
def test_contestants_see_the_same_pairs(mask) -> None:
    device = torch.device("cpu")
    positions = torch.arange(256)
    dense = attention_gpu._sees(mask, device)(0, 0, positions[:, None], positions[None, :])
    assert int(dense.sum()) == mask.pairs
    q, k, v = (torch.randn(256, heads, 16) for heads in (4, 2, 2))
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=dense, enable_gqa=True)[0].transpose(0, 1)
    for make in (attention_gpu._ours, attention_gpu._sdpa):
        torch.testing.assert_close(make(mask, device)(q, k, v), expected, atol=1e-5, rtol=1e-5)


def test_full_size_masks_have_the_pairs_their_names_say() -> None:
    by_name = {mask.name: mask.pairs for mask in attention_gpu.MASKS}
    assert by_name["causal"] == 256 * 257 // 2
    assert by_name["causal"] > by_name["documents"] == 8 * 32 * 33 // 2


def test_a_contestant_that_is_not_installed_is_a_row() -> None:
    def missing():
        import flash_attention_of_another_world  # pyright: ignore[reportMissingImports]

        return flash_attention_of_another_world

    runs, absent = contestants({"here": lambda: print, "there": missing})
    assert list(runs) == ["here"]
    row = absent_row("attention_fwd", "there", absent["there"])
    assert row["note"] == "absent: No module named 'flash_attention_of_another_world'"
