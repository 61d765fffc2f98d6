"""What is wrong with a config, said so that its author can act: place, key, expectation, what came, nearest key."""

import difflib
import typing
from dataclasses import dataclass
from types import UnionType
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trichord.config.yaml_text import KeyPath


@dataclass(frozen=True)
class Problem:
    """One thing to correct. where: `file:line` or the override it came from."""

    where: str
    key: KeyPath
    text: str

    def __str__(self) -> str:
        key = f"{dotted(self.key)}: " if self.key else ""
        return f"{self.where}: {key}{self.text}"


def dotted(path: KeyPath) -> str:
    """`('shards', 'sources', 0)` -> `shards.sources.0`."""
    return ".".join(str(part) for part in path)


def report(problems: list[Problem], title: str) -> str:
    """All problems as one message; a single one stands alone on its line."""
    lines = list(dict.fromkeys(str(problem) for problem in problems))
    if len(lines) == 1:
        return lines[0]
    return "\n".join([f"{len(lines)} problems in {title}:", *(f"  {line}" for line in lines)])


def primary_errors(error: ValidationError) -> list[ErrorDetails]:
    """pydantic's errors without those that only follow from others: a list is "too short" once its elements failed."""
    details = error.errors(include_url=False)
    failed = [detail["loc"] for detail in details]
    return [
        detail
        for detail in details
        if detail["type"] != "too_short" or not any(loc[:-1][: len(detail["loc"])] == detail["loc"] for loc in failed)
    ]


def explain(error: ErrorDetails, root: type[BaseModel]) -> str:
    """One pydantic error in the project's words: what was expected and what came."""
    kind, path, limits = error["type"], error["loc"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return _explain_unknown_key(path, root)
    if kind == "missing":
        return f"required key is missing; {_expectation(path, root)}"
    if kind in ("value_error", "assertion_error"):
        return str(error["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"expected a mapping of keys to values, got {_short(error['input'])}"
    if kind in ("tuple_type", "list_type"):
        return f"expected a list, got {_short(error['input'])}"
    if kind == "too_short":
        return f"expected at least {limits['min_length']} element(s), got {limits['actual_length']}"
    if kind == "string_pattern_mismatch":
        return f"expected text matching {limits['pattern']}, got {_short(error['input'])}"
    text = error["msg"].replace("Input should be ", "expected ")
    hint = "; quote it if it is meant as text" if kind == "string_type" and error["input"] is not None else ""
    return f"{text}, got {_short(error['input'])}{hint}"


def numbers_from_bools(raw: Any, annotation: Any, path: KeyPath = ()) -> list[KeyPath]:
    """Paths where `true` or `false` stands for a number: Python's bool is an int, and pydantic takes it for 1 or 0."""
    options = [annotation, *typing.get_args(annotation)]
    if isinstance(raw, bool):
        return [path] if bool not in options and (int in options or float in options) else []
    model = _model_of(annotation)
    if isinstance(raw, dict) and model is not None:
        fields = model.model_fields
        inner = [(key, value, fields[key].annotation) for key, value in raw.items() if key in fields]
    elif isinstance(raw, list) and typing.get_origin(annotation) is tuple:
        inner = [(i, value, typing.get_args(annotation)[0]) for i, value in enumerate(raw)]
    else:
        inner = []
    return [found for key, value, kind in inner for found in numbers_from_bools(value, kind, (*path, key))]


def valid_keys(path: KeyPath, root: type[BaseModel]) -> list[str]:
    """Names a mapping at `path` may hold; empty where any key goes."""
    model = model_at(path, root)
    return list(model.model_fields) if model else []


def model_at(path: KeyPath, root: type[BaseModel]) -> type[BaseModel] | None:
    """The leaf class whose values stand at `path`, or None (a plain value, or a free mapping)."""
    annotation: Any = root
    for part in path:
        model = _model_of(annotation)
        if isinstance(part, int):
            arguments = typing.get_args(annotation)
            annotation = arguments[0] if arguments else None
        elif model is not None and part in model.model_fields:
            annotation = model.model_fields[part].annotation
        else:
            return None
    return _model_of(annotation)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The model class in an annotation such as `VisionConfig | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, UnionType):
        return next((model for argument in typing.get_args(annotation) if (model := _model_of(argument))), None)
    return None


def _explain_unknown_key(path: KeyPath, root: type[BaseModel]) -> str:
    keys = valid_keys(path[:-1], root)
    name = str(path[-1])
    near = difflib.get_close_matches(name, keys, n=1, cutoff=0.5)
    elsewhere = [place for place in _all_paths(root) if place.rsplit(".", 1)[-1] == name]
    if near and (not elsewhere or difflib.SequenceMatcher(None, name, near[0]).ratio() > 0.8):
        hint = f"; nearest valid key: {dotted((*path[:-1], near[0]))}"
    elif elsewhere:
        hint = f"; did you mean {' or '.join(elsewhere[:3])}?"
    else:
        hint = ""
    where = dotted(path[:-1]) or "the top level"
    return f"unknown key{hint} (keys of {where}: {', '.join(keys)})"


def _all_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    paths = []
    for name, field in model.model_fields.items():
        paths.append(f"{prefix}{name}")
        inner = _model_of(field.annotation)
        if inner is not None:
            paths += _all_paths(inner, f"{prefix}{name}.")
    return paths


def _expectation(path: KeyPath, root: type[BaseModel]) -> str:
    """`expected ...` for a key that is not there: its keys if it is a mapping, its type otherwise."""
    parent = model_at(path[:-1], root)
    field = parent.model_fields.get(str(path[-1])) if parent else None
    if field is None:
        return "expected a value"
    model = _model_of(field.annotation)
    if model is not None:
        return f"expected a mapping with {', '.join(model.model_fields)}"
    plain = {str: "text", int: "an integer", float: "a number", bool: "true or false"}
    if field.annotation in plain:
        return f"expected {plain[field.annotation]}"
    return "expected a list" if typing.get_origin(field.annotation) is tuple else "expected a value"


def _short(value: Any, limit: int = 80) -> str:
    """`value` as YAML writers know it, cut to one line."""
    text = {"True": "true", "False": "false", "None": "null"}.get(repr(value), repr(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."
