"""Peak FLOP/s by the names that drivers report."""

import pytest

from trichord.tracking.peak import number_of, peak_flops_per_s


@pytest.mark.parametrize(
    ("gpu", "number", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835),
        ("NVIDIA H200", "fp16", 989.4),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "tf32", 156),
        ("NVIDIA A100-SXM4-40GB", "fp32", 19.5),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L40", "bf16", 181),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("Tesla T4", "fp16", 65),
        ("AMD Instinct MI300X", "bf16", 1307.4),
        ("h100", "bf16", 989.4),
    ],
)
def test_cards_are_known_by_their_names(gpu, number, tflops):
    assert peak_flops_per_s(gpu, number) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("gpu", "number"), [("NVIDIA A10G", "bf16"), ("NVIDIA GeForce GTX 1080", "fp32"), ("Tesla V100-SXM2-32GB", "bf16")]
)
def test_what_is_not_known_is_not_guessed(gpu, number):
    assert peak_flops_per_s(gpu, number) is None


def test_numbers_of_a_run():
    assert number_of("bf16", allow_tf32=False) == number_of("autocast_bf16", allow_tf32=False) == "bf16"
    assert number_of("fp32", allow_tf32=False) == "fp32"
    assert number_of("fp32", allow_tf32=True) == "tf32"
