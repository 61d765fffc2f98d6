"""JSON Schema of the configs, for editors: completion, types, and the docstring of every field as its description."""

import ast
import inspect
import itertools
import textwrap
from typing import Any

from pydantic import BaseModel

from trichord.config.cluster import ClusterConfig
from trichord.config.run import RunConfig
from trichord.evaluation.config import SuiteConfig


def run_schema() -> dict[str, Any]:
    """Schema of a run config (`configs/runs`, `configs/debug`)."""
    return json_schema(RunConfig)


def suite_schema() -> dict[str, Any]:
    """Schema of an evaluation suite (`configs/suites`)."""
    return json_schema(SuiteConfig)


def cluster_schema() -> dict[str, Any]:
    """Schema of a cluster's facts (`configs/clusters`)."""
    return json_schema(ClusterConfig)


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """JSON Schema (2020-12) of any leaf, with field docstrings as descriptions."""
    schema = model.model_json_schema()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    classes = {cls.__name__: cls for cls in _classes_of(model)}
    for name, part in [(model.__name__, schema), *schema.get("$defs", {}).items()]:
        for key, text in field_docs(classes[name]).items():
            if key in part.get("properties", {}):
                part["properties"][key].setdefault("description", text)
    return schema


def field_docs(model: type[BaseModel]) -> dict[str, str]:
    """The docstring under each field of a leaf, by field name; empty where the source is not at hand."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(model)))
    except (OSError, TypeError):
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    docs = {}
    for statement, following in itertools.pairwise(body):
        is_field = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if is_field and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            docs[statement.target.id] = inspect.cleandoc(str(following.value.value))
    return docs


def _classes_of(model: type[BaseModel]) -> set[type[BaseModel]]:
    """A leaf and all leaves inside it."""
    found = {model}
    for field in model.model_fields.values():
        for inner in _models_in(field.annotation):
            found |= _classes_of(inner)
    return found


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models_in(argument)]
