"""YAML file + overlay files + dotted overrides -> typed, frozen config; and back to YAML.

Order: defaults of the leaves < file < overrides, from left to right: `engine.lr=3e-4` sets one value, `more.yaml` lays
a file over what is there (mappings are merged, a list's elements go by number or name, all else is replaced). Every
mistake of a file is reported in one `ConfigError`, each with file and line, key, what was expected, what came, and the
nearest valid key. Relative paths *inside* a config are relative to the working directory, like paths on the command
line, not to the config file.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from trichord.config.cluster import ClusterConfig
from trichord.config.problems import Problem, dotted, explain, numbers_from_bools, primary_errors, report
from trichord.config.run import RunConfig
from trichord.config.yaml_text import KeyPath, ParsedYaml, dump_yaml, parse_scalar_or_yaml, parse_yaml
from trichord.core.errors import ConfigError
from trichord.evaluation.config import SuiteConfig

Model = TypeVar("Model", bound=BaseModel)
_SHIPPED_IN = {RunConfig: ("runs", "debug", "recipes"), SuiteConfig: ("suites",), ClusterConfig: ("clusters",)}


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run config in file `path` (or a shipped one by its name), overrides (`a.b=c`, or overlay files) on top.

    Raises:
        ConfigError: no such file, no YAML, or values that do not fit; all mistakes in one message.
    """
    return load_config(path, RunConfig, overrides)


def load_suite(path: str | Path, overrides: Sequence[str] = ()) -> SuiteConfig:
    """The evaluation suite in file `path` (or a shipped one by its name). Raises ConfigError like `load_run_config`."""
    return load_config(path, SuiteConfig, overrides)


def load_cluster(path: str | Path, overrides: Sequence[str] = ()) -> ClusterConfig:
    """A cluster's facts in file `path` (or a shipped one by its name). Raises ConfigError like `load_run_config`."""
    return load_config(path, ClusterConfig, overrides)


def load_config(path: str | Path, model: type[Model], overrides: Sequence[str] = ()) -> Model:
    """Any config class from a file: what `load_run_config` does, for any leaf."""
    file = find_config(path, _SHIPPED_IN.get(model, ()))
    parsed = parse_yaml(_read_text(file), str(file))
    if parsed.data is None and not parsed.problems:
        raise ConfigError(f"{file}: the file is empty; expected {', '.join(model.model_fields)}")
    if not isinstance(parsed.data, dict):
        raise ConfigError(f"{file}: expected keys and values at the top level, got {type(parsed.data).__name__}")
    return validate(parsed, model, overrides, str(file))


def validate(parsed: ParsedYaml, model: type[Model], overrides: Sequence[str], where: str) -> Model:
    """Overrides onto parsed values, then the typed model; `where` names the file in messages."""
    problems = [Problem(f"{where}:{line}", path, text) for line, path, text in parsed.problems]
    origins: dict[KeyPath, str] = {path: f"{where}:{line}" for path, line in parsed.lines.items()}
    for override in overrides:
        if "=" not in override and override.endswith((".yaml", ".yml")):
            problems += _lay_over(parsed.data, override, origins)
            continue
        try:
            path = _apply(parsed.data, override)
        except ConfigError as error:
            problems.append(Problem(f"override {override!r}", (), str(error)))
            continue
        _set_origin(origins, path, f"override {override!r}")
    for path in numbers_from_bools(parsed.data, model):
        problems.append(Problem(_origin(path, origins, where), path, "expected a number, got true or false"))
    try:
        result = model.model_validate(parsed.data)
    except ValidationError as error:
        known = {problem.key for problem in problems}
        for detail in primary_errors(error):
            if detail["loc"] not in known:
                problems.append(Problem(_origin(detail["loc"], origins, where), detail["loc"], explain(detail, model)))
        raise ConfigError(report(problems, where)) from None
    if problems:
        raise ConfigError(report(problems, where))
    return result


def check_config(
    path: str | Path, overrides: Sequence[str] = (), look_over: Callable[[RunConfig], None] = lambda config: None
) -> str:
    """One line that says what a valid file is: a suite (it has `tasks`), a cluster (`gpus_per_node`), or a run config.

    look_over: called with a run config, to say what goes beyond it.

    Raises ConfigError like `load_run_config`.
    """
    file = find_config(path)
    data = parse_yaml(_read_text(file), str(file)).data
    if isinstance(data, dict) and "tasks" in data:
        suite = load_suite(file, overrides)
        return f"{file}: valid suite {suite.name!r} of {len(suite.tasks)} tasks"
    if isinstance(data, dict) and "gpus_per_node" in data:
        cluster = load_cluster(file, overrides)
        return f"{file}: valid cluster {cluster.name!r} of {cluster.num_gpus} GPUs"
    config = load_run_config(file, overrides)
    look_over(config)
    return f"{file}: valid config of run {config.run.name!r}"


def new_config(name: str, like: str | Path, folder: Path | None = None) -> Path:
    """Copy config `like`, comments and all, to `folder/NAME.yaml` (default: here) as the config of run `name`.

    Raises:
        ConfigError: the file is there already, or `name` is no run name.
    """
    source = find_config(like)
    text = _read_text(source)
    line = parse_yaml(text, str(source)).lines.get(("run", "name"))
    if line is None:
        raise ConfigError(f"{source}: expected a run config with run.name to start from")
    validate(parse_yaml(text, str(source)), RunConfig, [f"run.name={json.dumps(name)}"], str(source))
    lines = text.splitlines(keepends=True)
    lines[line - 1] = re.sub(r"(\bname:\s*)[^\s,}#]+", lambda m: m[1] + json.dumps(name), lines[line - 1], count=1)
    target = (folder or Path()) / f"{name}.yaml"
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write("".join(lines))
    except FileExistsError:
        raise ConfigError(f"{target} exists; choose another name, or remove it") from None
    return target


def resolved_yaml(config: BaseModel) -> str:
    """The whole config, defaults included, as YAML that loads back to an equal config."""
    return dump_yaml(config.model_dump(mode="json"))


def config_folders() -> list[Path]:
    """Where shipped configs lie: inside the installed package, or in the repository of an editable install."""
    package = Path(__file__).resolve().parents[1]
    return [folder for folder in (package / "configs", package.parents[1] / "configs") if folder.is_dir()]


def shipped_configs() -> list[str]:
    """Names of all shipped YAML files, such as `runs/quickstart.yaml`."""
    names = {str(file.relative_to(folder)) for folder in config_folders() for file in folder.rglob("*.yaml")}
    return sorted(names)


def find_config(name: str | Path, folders: Sequence[str] = ()) -> Path:
    """A file of that path, or else the shipped config of that name (`configs/` and `.yaml` may be left out).

    folders: of several with that name the one in these is meant.

    Raises:
        ConfigError: neither exists; the message names the nearest shipped ones.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        inner = path / "config.yaml"
        hint = f"; did you mean {inner}?" if inner.is_file() else ""
        raise ConfigError(f"{path}: expected a YAML file, got a folder{hint}")
    short = str(name).removeprefix("configs/").removesuffix(".yaml")
    shipped = shipped_configs()
    matches = [s for s in shipped if s == f"{short}.yaml"] or [s for s in shipped if Path(s).stem == short]
    matches = [s for s in matches if s.split("/")[0] in folders] or matches
    if len(matches) > 1:
        raise ConfigError(f"{name}: several shipped configs have that name, say which: {', '.join(matches)}")
    if matches:
        return next(folder / matches[0] for folder in config_folders() if (folder / matches[0]).is_file())
    near = difflib.get_close_matches(f"{short}.yaml", shipped, n=3, cutoff=0.3)
    raise ConfigError(
        f"{name}: no such file, and no shipped config of that name; nearest shipped: {', '.join(near or shipped)}"
    )


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file}: expected UTF-8 text, got byte {error.object[error.start]:#x} at {error.start}"
        ) from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error


def _apply(data: dict, override: str) -> KeyPath:
    """Set the value of one `a.b=c` in `data`, creating mappings on the way.

    A list element is named by its `name` (`shards.sources.photos.weight=2`) or, where none is called so, its number.
    Returns the path that was set, list elements as numbers. Raises ConfigError where the path leads nowhere.
    """
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError("expected KEY.PATH=VALUE such as engine.lr=3e-4, or an overlay file such as more.yaml")
    return _set(data, parts, parse_scalar_or_yaml(text, "value"))


def _lay_over(data: dict, name: str, origins: dict[KeyPath, str]) -> list[Problem]:
    """Merge the overlay file `name` into `data`, noting where each value comes from; returns what is wrong with it.

    List elements that have names go by these alone: the file may be of another config, whose numbers mean others.
    """
    file = find_config(name)
    overlay = parse_yaml(_read_text(file), str(file))
    if not isinstance(overlay.data, dict):
        return [Problem(str(file), (), "expected an overlay with keys and values at the top level")]
    problems = [Problem(f"{file}:{line}", path, text) for line, path, text in overlay.problems]
    for parts, value in _leaves(overlay.data):
        origin = f"{file}:{overlay.lines.get(parts, 1)}"
        try:
            _set_origin(origins, _set(data, [str(part) for part in parts], value, names_only=True), origin)
        except ConfigError as error:
            problems.append(Problem(origin, (), str(error)))
    return problems


def _leaves(data: dict, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """(path, value) of everything in nested mappings that is no mapping, or an empty one."""
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _set_origin(origins: dict[KeyPath, str], path: KeyPath, origin: str) -> None:
    """The value at `path`, and with it all inside it, now comes from `origin`."""
    for inside in [p for p in origins if p[: len(path)] == path]:
        del origins[inside]
    origins[path] = origin


def _set(data: dict, parts: Sequence[str], value: Any, names_only: bool = False) -> KeyPath:
    """Set the value at a path, see `_apply`."""
    here: Any = data
    path: KeyPath = ()
    for i, part in enumerate(parts):
        step: Any = _list_index(here, part, path, names_only) if isinstance(here, list) else part
        if not isinstance(here, (dict, list)):
            raise ConfigError(f"{dotted(path)} is {here!r}, which has no keys inside")
        path = (*path, step)
        if i == len(parts) - 1:
            here[step] = value
            break
        if isinstance(here, dict) and here.get(step) is None:
            here[step] = {}
        here = here[step]
    return path


def _list_index(items: list, part: str, path: KeyPath, names_only: bool) -> int:
    names = [str(item["name"]) if isinstance(item, dict) and "name" in item else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items) and not (names_only and any(names)):
        return int(part)
    known = ", ".join(name for name in names if name) or f"0 to {len(items) - 1}"
    raise ConfigError(f"{dotted(path)} has no element {part!r}; expected one of {known}")


def _origin(path: KeyPath, origins: dict[KeyPath, str], where: str) -> str:
    """`file:line` or override that set the value at `path`; else something inside it, else the nearest around it."""
    inside = [origin for p, origin in origins.items() if path and p[: len(path)] == path]
    if path in origins or not inside:
        while path and path not in origins:
            path = path[:-1]
        return origins[path] if path else where
    return inside[0]
