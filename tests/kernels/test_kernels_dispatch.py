"""Which implementation runs, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import trichord_kernels
from trichord_kernels import dispatch, reference, rms_norm
from trichord_kernels.errors import KernelError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _no_override(monkeypatch) -> None:
    monkeypatch.delenv("TRICHORD_KERNELS", raising=False)


def test_auto_goes_by_device() -> None:
    assert dispatch.choose_backend(CPU) == "reference"
    assert dispatch.choose_backend(torch.device("meta")) == "reference"
    assert dispatch.choose_backend(CUDA) == "triton"


@pytest.mark.parametrize(("value", "on_cpu", "on_cuda"), [("triton",) * 3, ("reference",) * 3])
def test_override(value, on_cpu, on_cuda, monkeypatch) -> None:
    monkeypatch.setenv("TRICHORD_KERNELS", value)
    assert (dispatch.choose_backend(CPU), dispatch.choose_backend(CUDA)) == (on_cpu, on_cuda)


@pytest.mark.parametrize("value", ["Triton", "", "fast"])
def test_unknown_override_names_the_valid_ones(value, monkeypatch) -> None:
    monkeypatch.setenv("TRICHORD_KERNELS", value)
    with pytest.raises(KernelError, match="auto, triton, reference") as caught:
        rms_norm(torch.zeros(2, 8), torch.ones(8))
    assert repr(value) in str(caught.value)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process is the interpreter")
    monkeypatch.setenv("TRICHORD_KERNELS", "triton")
    with pytest.raises(KernelError, match=r"TRITON_INTERPRET=1.*TRICHORD_KERNELS=reference"):
        rms_norm(torch.zeros(2, 8), torch.ones(8))


def test_a_gpu_without_triton_raises_and_never_falls_back(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert dispatch.choose_backend(CPU) == "reference"
    with pytest.raises(KernelError, match="pip install triton"):
        dispatch.choose_backend(CUDA)


def test_fake_gpu_tensors_take_the_kernel_path() -> None:
    """Shapes, strides and refusals of the GPU path, as a planner or compiler sees them, without a GPU."""
    with FakeTensorMode():
        x = torch.empty(4, 6, 8, device="cuda", dtype=torch.bfloat16).transpose(0, 1)
        out, new_residual = rms_norm(x, torch.empty(8, device="cuda"), residual=torch.empty_like(x))
        wide = torch.empty(2, 8200, device="cuda")
        with pytest.raises(KernelError, match=r"8192.*8200"):
            rms_norm(wide, torch.empty(8200, device="cuda"))
    for result in (out, new_residual):
        assert (result.shape, result.dtype, result.device.type) == ((6, 4, 8), torch.bfloat16, "cuda")
        assert result.is_contiguous()


def test_reference_twins_have_the_public_signatures() -> None:
    import inspect

    for name in reference.__all__:
        public, twin = getattr(trichord_kernels, name), getattr(reference, name)
        assert inspect.signature(public).parameters == inspect.signature(twin).parameters


def test_import_is_light_and_names_what_exists() -> None:
    code = "import sys, trichord_kernels; print('torch' in sys.modules, 'triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]
    with pytest.raises(AttributeError, match="rms_norm"):
        trichord_kernels.no_such_op  # noqa: B018


def test_compiles_on_the_reference_path_without_a_graph_break() -> None:
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    for length in (5, 9):
        x, weight = torch.randn(length, 24), torch.randn(24)
        assert torch.equal(compiled(x, weight), rms_norm(x, weight))
