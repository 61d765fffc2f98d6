"""rope and rms_norm under torch.compile on a CPU, where they are plain torch: one graph, at several lengths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trichord_kernels import rms_norm, rope

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


class Block(nn.Module):
    """A pre-norm attention block's front: residual add and norm, projection, head norms and rotation."""

    def __init__(self, has_axes: bool) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.sections = (4, 2, 2) if has_axes else None
        self.norm, self.q_norm, self.k_norm = (nn.Parameter(torch.rand(n)) for n in (width, HEAD_DIM, HEAD_DIM))
        self.projection = nn.Linear(width, (HEADS + KV_HEADS) * HEAD_DIM, bias=False)
        self.inv_freq = nn.Buffer(10000.0 ** -(torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)))

    def forward(self, x: Tensor, residual: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x and residual (T, D) -> q (T, N, H), k (T, K, H) and the new residual."""
        normed, residual = rms_norm(x, self.norm, residual=residual)
        heads = self.projection(normed).unflatten(-1, (-1, HEAD_DIM))
        q, k = heads.split((HEADS, KV_HEADS), dim=1)
        q, k = rope(
            q, k, position_ids, self.inv_freq, sections=self.sections, q_weight=self.q_norm, k_weight=self.k_norm
        )
        return q, k, residual


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("has_axes", [False, True])
def test_one_graph_for_several_lengths(has_axes, backend) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    block = Block(has_axes)
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=True)
    for length in (7, 19):
        x, residual = (torch.randn(length, HEADS * HEAD_DIM) for _ in range(2))
        position_ids = torch.rand(3, length) * 50 if has_axes else torch.arange(length)
        found = []
        for run in (block, compiled):
            leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
            out = run(*leaves, position_ids)
            wanted = [*leaves, *block.parameters()]
            grads = torch.autograd.grad(sum((t * t.detach().cos()).sum() for t in out), wanted)
            found.append([*out, *grads])
        for eager, graph in zip(*found):
            torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-5)
