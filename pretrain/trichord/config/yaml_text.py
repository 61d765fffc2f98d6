"""YAML text -> plain values, with the line of every key kept, and back.

Scalars follow the YAML 1.2 core schema, not PyYAML's 1.1: `3e-4` is a number, and `on`, `off`, `yes`, `no` and
`12:30` are text. A key that stands twice, a key that is no text and a tag outside the core schema are problems, not
silent choices. Only nodes are composed; no YAML constructor ever runs, so no tag can build an object.
"""

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml

from trichord.core.errors import ConfigError

KeyPath = tuple[str | int, ...]

MAX_VALUES = 100_000  # more than any config; stops an alias bomb before it fills the memory


class _CoreLoader(yaml.SafeLoader):
    """Resolves plain scalars as YAML 1.2 core does."""

    yaml_implicit_resolvers: ClassVar[dict[str, list]] = {}


class _SafeDumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 *or* 1.2 would read as something else, so both read the file alike."""

    yaml_implicit_resolvers: ClassVar[dict[str, list]] = {
        key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # PyYAML folds Unicode line ends into blanks in plain text; between double quotes it escapes them.
        style = '"' if not text.isprintable() and set(text) & set("\r\x85\u2028\u2029\ufeff") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_SafeDumper.add_representer(str, _SafeDumper.represent_text)

_CORE_SCALARS = (
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("tag:yaml.org,2002:int", r"^(?:[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+0123456789."),
    ),
)
for _tag, _pattern, _first in _CORE_SCALARS:
    _CoreLoader.add_implicit_resolver(_tag, re.compile(_pattern), _first)
    _SafeDumper.add_implicit_resolver(_tag, re.compile(_pattern), _first)


@dataclass
class ParsedYaml:
    """Plain values of a document.

    lines: 1-based line of each key or list element, by path; problems: (line, key path, text) of what is wrong
    although the text is YAML, for the caller to report together with what else is wrong.
    """

    data: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[tuple[int, KeyPath, str]] = field(default_factory=list)


def parse_yaml(text: str, where: str) -> ParsedYaml:
    """Read one YAML document; `where` (a file name) opens the message when the text is no YAML.

    Raises:
        ConfigError: the text is not one YAML document, is nested too deeply, or is an alias bomb.
    """
    try:
        root = yaml.compose(text, Loader=_CoreLoader)
        parsed = ParsedYaml(data=None)
        if root is not None:
            parsed.data = _Values(parsed, where).build(root, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        context = f" ({error.context})" if error.context else ""
        raise ConfigError(
            f"{where}{line}: not valid YAML: {error.problem}{context}; check indentation, colons and quotes"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: nested too deeply, or an alias that holds itself") from error
    return parsed


def parse_scalar_or_yaml(text: str, where: str) -> Any:
    """The value of a dotted override: any YAML value (`3e-4`, `null`, `[a, b]`, `{k: v}`)."""
    parsed = parse_yaml(text, where)
    if parsed.problems:
        raise ConfigError(f"{where}: {parsed.problems[0][2]}")
    return parsed.data


def dump_yaml(data: Any) -> str:
    """Plain values -> YAML text that `parse_yaml` reads back equal; keys stay in order."""
    return yaml.dump(data, Dumper=_SafeDumper, sort_keys=False, allow_unicode=True, width=120)


class _Values:
    """Builds plain values from composed nodes, noting lines and problems on the way."""

    def __init__(self, parsed: ParsedYaml, where: str):
        self.parsed = parsed
        self.where = where
        self.count = 0

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self.count += 1
        if self.count > MAX_VALUES:
            raise ConfigError(f"{self.where}: more than {MAX_VALUES} values; aliases multiply, write the values out")
        self.parsed.lines.setdefault(path, node.start_mark.line + 1)
        if not isinstance(node, yaml.ScalarNode) and node.tag.rsplit(":", 1)[-1] not in ("map", "seq"):
            self._problem(node.start_mark.line + 1, path, f"tag {node.tag!r} is not allowed; write plain values")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, i)) for i, child in enumerate(node.value)]
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:str":
                text = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                self._problem(line, path, f"expected a text as key, got {text!r}; quote it if it is meant as text")
                continue
            key = key_node.value
            if key in result:
                first = self.parsed.lines[(*path, key)]
                self._problem(line, (*path, key), f"key given twice, first in line {first}; keep one")
                continue
            self.parsed.lines[(*path, key)] = line
            result[key] = self.build(value_node, (*path, key))
        return result

    def _scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        kind, text = node.tag.rsplit(":", 1)[-1], node.value
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                return int(text.replace("_", ""), 0 if text[:2] in ("0o", "0x") else 10)
            if kind == "float":
                return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
        except (ValueError, KeyError):
            self._problem(node.start_mark.line + 1, path, f"{text!r} is not a valid {kind}")
            return None
        if kind != "str":
            self._problem(node.start_mark.line + 1, path, f"tag {node.tag!r} is not allowed; write a plain value")
        return text

    def _problem(self, line: int, path: KeyPath, text: str) -> None:
        self.parsed.problems.append((line, path, text))
