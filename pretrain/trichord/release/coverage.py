"""Which weights of a source fit a model: nothing missing, left over or of another shape goes unsaid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class CoverageReport:
    """Names of parameters, sorted. mismatched: with the shape in the source and the shape in the model."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def summary(self, most: int = 3) -> str:
        """One line: the counts, and up to `most` names of each kind."""
        parts = [f"{len(self.loaded)} fit"]
        for what, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            parts.append(f"{len(names)} {what}" + _names(names, most))
        shapes = [f"{name} {theirs} instead of {ours}" for name, theirs, ours in self.mismatched]
        parts.append(f"{len(shapes)} of another shape" + _names(shapes, most))
        return ", ".join(parts)


def _names(names, most: int) -> str:
    return f" ({'; '.join(names[:most])}{'; ...' if len(names) > most else ''})" if names else ""


def compare(model: Mapping[str, tuple[int, ...]], weights: Mapping[str, tuple[int, ...]]) -> CoverageReport:
    """The shape of each parameter by name: of the model, and of what the source holds."""
    common = sorted(model.keys() & weights.keys())
    return CoverageReport(
        loaded=tuple(name for name in common if weights[name] == model[name]),
        missing=tuple(sorted(model.keys() - weights.keys())),
        unexpected=tuple(sorted(weights.keys() - model.keys())),
        mismatched=tuple((name, weights[name], model[name]) for name in common if weights[name] != model[name]),
    )
