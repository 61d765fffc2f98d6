"""The road as an import table: a room imports only rooms above it, core, and its own config; nothing goes round."""

import ast
import re
import sys

import pytest
from import_graph import find_cycle, imports, imports_in, modules, project

# The order in which the data travels; then the stories told over all rooms, and the verbs.
ROOMS = (
    "core",
    "shards",
    "building",
    "samples",
    "batches",
    "layers",
    "encoders",
    "fusion",
    "objectives",
    "engine",
    "checkpoints",
    "evaluation",
    "release",
    "tracking",
    "planning",
    "config",
    "restore",
    "progress",
    "journal",
    "verdict",
    "evaluate",
    "opening",
    "assembly",
    "train",
    "export",
    "provenance",
    "replay",
    "inspection",
    "selftest",
    "benchmarks",
    "quickstart",
    "cli",
)
ALSO_ALLOWED = {
    # (room, module): why this one step back up the road is right
    ("fusion", "trichord.objectives.config"): "the heads and the logit scale a model has follow from its objectives",
}
BASE_INSTALL = {"pydantic", "pydantic_core", "yaml", "typer", "rich", "jinja2", "fsspec"}


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "trichord" and len(parts) > 1 else None


def is_leaf(module: str) -> bool:
    """`trichord.ROOM.config`: a room's torch-free config."""
    return module.count(".") == 2 and module.endswith(".config")


def violation(importer: str, target: str) -> str | None:
    """What is wrong with `importer` importing `target` (a module of ours or of others); None when it is allowed."""
    package, foreign = importer.split(".")[0], target.split(".")[0]
    if target.startswith(("trichord.cli", "trichord_launch.cli")) and not importer.startswith(
        f"{target.split('.')[0]}.cli"
    ):
        return "nobody imports a command line"
    if package == "trichord_kernels":
        mine = foreign in sys.stdlib_module_names | {"trichord_kernels", "torch", "triton"}
        return None if mine else "kernels need torch and triton only"
    if package == "trichord_launch":
        return (
            None
            if launch_may_import(target) or (importer, foreign) in FETCHES
            else "the launcher runs on a login node: config, shard index, base install"
        )
    if foreign == "trichord_launch":
        return "the framework does not know its launcher"
    return room_violation(importer, target)


FETCHES = {("trichord_launch.preflight.fetch", "huggingface_hub")}  # on a login node, with the extra `hub`
LOGIN_NODE = (  # what the launcher may use of the framework: torch-free
    *("trichord.config", "trichord.core", "trichord.checkpoints.manifest", "trichord.tracking.wandb"),
    *(f"trichord.shards.{name}" for name in ("cache", "index", "locations", "shares", "sources", "storage")),
)


def launch_may_import(target: str) -> bool:
    return (
        target.startswith((*LOGIN_NODE, "trichord_launch"))
        or target == "trichord"
        or is_leaf(target)
        or target.split(".")[0] in sys.stdlib_module_names | BASE_INSTALL
    )


def room_violation(importer: str, target: str) -> str | None:
    here, there = room_of(importer), room_of(target)
    torch_free = here in ("core", "config") or is_leaf(importer)
    if there is None:
        plain = target.split(".")[0] in sys.stdlib_module_names | BASE_INSTALL | {"trichord"}
        lazy = (here, target) == ("core", "numpy")  # seed.py, where it is asked for a generator
        return (
            None
            if plain or lazy or not torch_free
            else "core and configs are read without anything but the base install"
        )
    if here == "core" and there != "core":
        return "core knows no room"
    if here == "config" and there not in ("core", "config") and not is_leaf(target):
        return "the run config is made of leaves"
    if is_leaf(importer) and there not in ("core", here) and not is_leaf(target):
        return "a leaf imports leaves only"
    if here is None or here == there or there == "core" or (here, target) in ALSO_ALLOWED:
        return None
    order = ROOMS.index(there) < ROOMS.index(here) or (here == "config" and is_leaf(target))
    return None if order else f"{there} comes after {here} on the road"


def test_every_room_is_on_the_road():
    rooms = {room_of(module) for module in modules()} - {None}
    assert rooms <= set(ROOMS)


def test_the_import_table_holds():
    broken = [
        f"{i.importer}:{i.line} imports {i.module}: {why}"
        for i in imports()
        if (why := violation(i.importer, i.module))
    ]
    assert not broken, "\n".join(broken)


def declared(extras: tuple[str, ...]) -> set[str]:
    """Names of the packages that the base install and these extras bring."""
    lines = [
        *project()["dependencies"],
        *(line for extra in extras for line in project()["optional-dependencies"][extra]),
    ]
    return {re.match(r"[\w-]+", line)[0].lower().replace("-", "_") for line in lines}


IMPORT_NAMES = {
    "pydantic_core": "pydantic",
    "yaml": "pyyaml",
    "PIL": "pillow",
    "sklearn": "scikit_learn",
}  # import name: package name, where they differ


@pytest.mark.parametrize(
    ("package", "extras"),
    [
        ("trichord", ("kernels", "train", "convert", "ray", "8bit")),
        ("trichord_kernels", ("kernels",)),
        ("trichord_launch", ("hub",)),
    ],
)
def test_every_library_that_is_imported_is_declared(package, extras):
    ours = sys.stdlib_module_names | {"trichord", "trichord_kernels", "trichord_launch"}
    names = {i.module.split(".")[0] for i in imports() if i.importer.split(".")[0] == package} - ours
    assert {IMPORT_NAMES.get(name, name).lower() for name in names} <= declared(extras)


def test_no_module_is_its_own_ancestor():
    edges: dict[str, set[str]] = {}
    for found in imports():
        if found.module in modules() and found.module != found.importer:
            edges.setdefault(found.importer, set()).add(found.module)
    assert find_cycle(edges) is None


def test_package_inits_hold_a_docstring():
    for name, file in modules().items():
        if file.name == "__init__.py":
            assert ast.get_docstring(ast.parse(file.read_text())), f"{name}: say what the room is for"


def test_there_is_no_drawer_for_odds_and_ends():
    assert not [name for name in modules() if name.rsplit(".", 1)[-1] in ("utils", "util", "helpers", "common", "misc")]


@pytest.mark.parametrize(
    ("importer", "target"),
    [
        ("trichord.shards.reader", "trichord.samples.image"),
        ("trichord.fusion.model", "trichord.engine.build"),
        ("trichord.core.log", "trichord.shards.config"),
        ("trichord.core.log", "torch"),
        ("trichord.engine.config", "torch"),
        ("trichord.engine.config", "trichord.shards.reader"),
        ("trichord.config.load", "trichord.shards.reader"),
        ("trichord.planning.plan", "trichord.config.run"),
        ("trichord.train", "trichord.cli"),
        ("trichord.train", "trichord_launch.local"),
        ("trichord_kernels.dispatch", "trichord.core.errors"),
        ("trichord_kernels.dispatch", "numpy"),
        ("trichord_launch.slurm", "trichord.train"),
        ("trichord_launch.slurm", "torch"),
        ("trichord_launch.slurm", "trichord.shards.reader"),
        ("trichord_launch.preflight.checkpoint", "trichord.checkpoints.load"),
    ],
)
def test_the_table_refuses(importer, target):
    assert violation(importer, target)


@pytest.mark.parametrize(
    ("importer", "target"),
    [
        ("trichord.samples.image", "trichord.shards.reader"),
        ("trichord.evaluation.config", "trichord.shards.config"),
        ("trichord.config.run", "trichord.engine.config"),
        ("trichord.layers.norm", "trichord_kernels"),
        ("trichord.train", "torch"),
        ("trichord_launch.slurm", "trichord.engine.config"),
        ("trichord_launch.slurm", "trichord.shards.index"),
        ("trichord_launch.preflight.checkpoint", "trichord.checkpoints.manifest"),
        ("trichord.cli", "trichord.train"),
    ],
)
def test_the_table_allows(importer, target):
    assert violation(importer, target) is None


def test_imports_inside_functions_are_seen():
    source = "def f():\n    from a.b import c, d\n    import e.f\n"
    assert [(i.line, i.module) for i in imports_in("m", source, {"a.b.c"})] == [(2, "a.b"), (2, "a.b.c"), (3, "e.f")]


def test_cycles_are_found():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}}) is None
