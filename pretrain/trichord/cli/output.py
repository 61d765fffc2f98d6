"""What verbs print and write: plain tables, JSON files, progress."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from trichord.core.errors import ConfigError


def write_json(file: Path | None, data: object) -> None:
    if file is None:
        return
    try:
        file.write_text(json.dumps(data, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {file}: cannot be written: {error.strerror}") from error


def print_metrics(metrics: dict[str, dict]) -> None:
    rows = [{"metric": name, **{k: v for k, v in row.items() if v not in (None, "")}} for name, row in metrics.items()]
    print_rows(rows)


def print_rows(rows: list[dict]) -> None:
    """A plain table: one line per row, columns in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def advancing(what: str) -> Iterator[Callable[[int, int], None]]:
    """Progress whose total is known only on the way: yields `show(done, total)`."""
    from trichord.tracking.progress import work_progress

    with ExitStack() as stack:
        seen = 0
        advance: Callable[[int], None] | None = None

        def show(done: int, total: int) -> None:
            nonlocal seen, advance
            advance = advance or stack.enter_context(work_progress(what, total))
            advance(done - seen)
            seen = done

        yield show
