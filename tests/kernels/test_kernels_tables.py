"""Tile tables: which entry a GPU takes, how an entry is rewritten, how ranks agree on them."""

from __future__ import annotations

import ast
import inspect
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from trichord_kernels.errors import KernelError
from trichord_kernels.tables.agree import agree_on_tables, tables_from_json, tables_to_json
from trichord_kernels.tables.collect import all_tables
from trichord_kernels.tables.lookup import SMALL_ARCHS, choose
from trichord_kernels.tables.rewrite import rewrite_table
from trichord_kernels.tables.tile import Tile

ARCHS = [("sm_80", 64), ("sm_90", 64), ("sm_100", 64), ("small", 64), ("gfx90a", 64), ("cpu", 64), ("sm_90", 128)]
TABLE = {key: ":".join(map(str, key)) for key in ARCHS}


@pytest.mark.parametrize(
    ("arch", "head_dim", "chosen"),
    [
        ("sm_90", 64, "sm_90:64"),
        ("sm_103", 64, "sm_100:64"),
        ("sm_87", 64, "sm_80:64"),
        ("sm_86", 64, "small:64"),
        ("sm_120", 64, "small:64"),
        ("sm_120", 128, "sm_90:128"),  # no small entry: the nearest older one, which may not fit
        ("sm_100", 128, "sm_90:128"),
        ("gfx942", 64, "gfx90a:64"),
        ("cpu", 64, "cpu:64"),
    ],
)
def test_the_nearest_older_architecture_stands_in(arch, head_dim, chosen) -> None:
    assert choose(TABLE, arch, head_dim) == chosen


@pytest.mark.parametrize(
    ("arch", "head_dim", "listed"),
    [("sm_75", 64, "cpu, gfx90a"), ("sm_80", 128, "sm_90"), ("gfx1100", 64, "sm_80"), ("sm_90", 80, "none")],
)
def test_what_no_entry_fits_is_an_error(arch, head_dim, listed) -> None:
    with pytest.raises(KernelError, match=rf"expected an entry \({head_dim},\) for {arch} .*{listed}"):
        choose(TABLE, arch, head_dim)


SOURCE = '''"""A table – with a dash of two bytes."""

_STATIC = "static: fits"

# (arch, head dim, mask): queries x keys
FORWARD: dict[tuple, Tile] = {
    **{("cpu", head_dim, "causal"): Tile(32, 32, 1, 1, "interpreter") for head_dim in (64, 128)},
    # two – stages: three spill
    ("sm_80", 64, "causal"): Tile(128, 64, 4, 2, _STATIC),
    ("sm_80", 128, "causal"): Tile(
        128, 64, 8, 3, _STATIC  # as found
    ),
    ("sm_90", 64, "causal"): Tile(128, 64, 4, 3, _STATIC),
}
BACKWARD = {
    ("sm_80", 64, "causal"): Tile(64, 64, 4, 2, _STATIC),
}
'''
SWEPT = Tile(64, 128, 4, 3, 'swept on NVIDIA "H100", 2026-11-22')
WRITTEN = 'Tile(64, 128, 4, 3, "swept on NVIDIA \\"H100\\", 2026-11-22")'


def _tables(text: str) -> dict:
    names = {"Tile": Tile}
    exec(compile(ast.parse(text), "table", "exec"), names)
    return names


def test_an_entry_is_replaced_where_it_stands() -> None:
    text = rewrite_table(SOURCE, "FORWARD", {("sm_80", 64, "causal"): SWEPT})
    assert text == SOURCE.replace("Tile(128, 64, 4, 2, _STATIC)", WRITTEN)
    assert _tables(text)["FORWARD"] == _tables(SOURCE)["FORWARD"] | {("sm_80", 64, "causal"): SWEPT}
    assert _tables(text)["BACKWARD"] == _tables(SOURCE)["BACKWARD"]


def test_an_entry_over_several_lines_is_replaced() -> None:
    text = rewrite_table(SOURCE, "FORWARD", {("sm_80", 128, "causal"): SWEPT})
    assert f'    ("sm_80", 128, "causal"): {WRITTEN},\n    ("sm_90"' in text


def test_a_new_entry_follows_those_of_its_architecture_or_comes_last() -> None:
    changes = {("sm_80", 96, "causal"): SWEPT, ("sm_100", 64, "causal"): SWEPT}
    text = rewrite_table(SOURCE, "FORWARD", changes)
    assert f'    ),\n    ("sm_80", 96, "causal"): {WRITTEN},\n    ("sm_90", 64' in text
    assert f'_STATIC),\n    ("sm_100", 64, "causal"): {WRITTEN},\n}}\nBACKWARD' in text
    assert _tables(text)["FORWARD"] == _tables(SOURCE)["FORWARD"] | changes
    assert rewrite_table(text, "FORWARD", changes) == text


@pytest.mark.parametrize("text", ["FORWARD = make()\n", "forward = {}\n", "FORWARD = {}\n", ""])
def test_a_table_that_cannot_be_rewritten_is_an_error(text) -> None:
    with pytest.raises(KernelError, match="table FORWARD: expected"):
        rewrite_table(text, "FORWARD", {("sm_80", 64): SWEPT})


@pytest.mark.parametrize("name", sorted(all_tables()))
def test_every_table_can_be_rewritten_and_serves_what_it_lists(name) -> None:
    module_name, _, table_name = name.partition(".")
    table = all_tables()[name]
    text = Path(inspect.getfile(import_module(f"trichord_kernels.tables.{module_name}"))).read_text()
    key = ("sm_90", *next(key for key in table if key[0] not in ("cpu", "small"))[1:])
    found = _names_of(rewrite_table(text, table_name, {key: SWEPT}))[table_name]
    assert found == table | {key: SWEPT}
    for arch, *rest in table:
        if arch.startswith("sm_"):
            assert isinstance(choose(table, "sm_999", *rest), Tile)
            assert all(isinstance(choose(table, small, *rest), Tile) for small in SMALL_ARCHS)
    assert all(tile.source for tile in table.values())


def _names_of(text: str) -> dict:
    module = sys.modules["rewritten_table"] = type(sys)("rewritten_table")  # dataclasses look their module up
    exec(compile(ast.parse(text), "rewritten_table", "exec"), vars(module))
    del sys.modules["rewritten_table"]
    return vars(module)


def test_tables_survive_the_way_as_text() -> None:
    tables = {"a.FORWARD": {("sm_90", 64, "causal"): SWEPT, ("cpu",): Tile(32, 32, 1, 1, "ü")}}
    assert tables_from_json(tables_to_json(tables)) == tables
    assert tables_from_json(tables_to_json(all_tables())) == all_tables()


@pytest.mark.distributed
def test_ranks_take_the_tables_of_the_first(tmp_path) -> None:
    mp.spawn(_agree, args=(str(tmp_path),), nprocs=2)
    assert (tmp_path / "0").read_text() == "[]"
    assert (tmp_path / "1").read_text() == "['a.FORWARD']"


def _agree(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mine = {("sm_90", 64): Tile(64 * (rank + 1), 64, 4, 3, f"rank {rank}"), ("sm_80", rank): SWEPT}
    tables = {"a.FORWARD": mine, "b.TABLE": {("cpu",): SWEPT}}
    differing = agree_on_tables(tables=tables)
    assert tables["a.FORWARD"] is mine
    assert mine == {("sm_90", 64): Tile(64, 64, 4, 3, "rank 0"), ("sm_80", 0): SWEPT}
    with pytest.raises(KernelError, match="one version of trichord_kernels") if rank else nullcontext():
        agree_on_tables(tables={f"only_on.{rank}": {("cpu",): SWEPT}})
    Path(folder, str(rank)).write_text(str(differing))
    dist.destroy_process_group()
