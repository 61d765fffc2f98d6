"""The bench rows: present for every op, labelled, sane."""

from __future__ import annotations

import json

from trichord_kernels.bench import bench_kernels


def test_cpu_rows() -> None:
    rows = bench_kernels("cpu", repeats=2)
    assert [row["kernel"] for row in rows] == [
        "add_rms_norm_fwd",
        "add_rms_norm_fwd_bwd",
        "linear_cross_entropy_fwd_bwd",
        "merge_embeddings_fwd",
        "merge_embeddings_fwd_bwd",
        "log_mel",
    ]
    for row in rows:
        assert min(row["time_ms"], row["torch_ms"], row["gb_per_s"]) > 0
        assert row["note"] == "reference path on a CPU"
    json.dumps(rows)
