"""Parquet and arrow files, and datasets of Hugging Face on disk (`save_to_disk`, or parquet as the hub keeps it).

pyarrow alone reads them: no loading script can run, and nothing is fetched. Bytes of images and clips are not copied
into the list of rows unless it is shuffled: the process that writes a shard reads them again from their row group.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trichord.building.columns import check_columns, tell_columns
from trichord.building.media import CellPlace
from trichord.building.rows import BadRow, BuildRow, CellPart
from trichord.building.tabular import FIELD_COLUMNS, TableReading, row_members
from trichord.core.errors import ConfigError, DataError
from trichord.shards.quarantine import BadSample

_ROWS_AT_ONCE = 16
_ARROW_FILE_MAGIC = b"ARROW1"
_HUGGINGFACE_KEY = b"huggingface"
_TYPES = {"Image": "image", "Audio": "audio"}
_KEPT_BATCHES = 2


def dataset_files(folder: Path, split: str | None) -> list[Path]:
    """The files of a dataset on disk, in its order.

    Args:
        folder: a `save_to_disk` folder, that of a dictionary of splits, or one with parquet or arrow files anywhere
            below. split: which split of a dictionary, or the beginning of the files' names (`train-00000-of-00002`).

    Raises:
        ConfigError: there are several splits and none was named, or not that one. DataError: there is no dataset.
    """
    if folder.is_file():
        return [folder]
    if (folder / "dataset_dict.json").is_file():
        names = _json(folder / "dataset_dict.json").get("splits", [])
        if split is None or split not in names or not (folder / split).is_dir():
            raise ConfigError(f"{folder} holds the splits {', '.join(map(str, names))}; name one: --split {names[0]}")
        folder, split = folder / split, None
    if (folder / "state.json").is_file():
        return _saved_files(folder)
    files = sorted(file for ending in ("parquet", "arrow") for file in folder.rglob(f"*.{ending}"))
    if split is not None:
        files = [
            file for file in files if file.name.startswith((f"{split}-", f"{split}.")) or file.parent.name == split
        ]
    if not files:
        wanted = f" of split {split}" if split else ""
        raise DataError(f"no dataset in {folder}: expected state.json, or files *.parquet or *.arrow{wanted}")
    splits = {file.name.split("-")[0] for file in files if "-of-" in file.name}
    if split is None and len(splits) > 1:
        raise ConfigError(f"{folder} holds the splits {', '.join(sorted(splits))}; name one: --split {min(splits)}")
    return files


def rows_from_arrow(files: list[Path], reading: TableReading) -> Iterator[BuildRow | BadRow]:
    """One sample per row, keyed by its number over all files; columns by name, or by type where the dataset says it."""
    number = -1
    for file in files:
        schema, batches = _open(file)
        features = _features(schema, file)
        check_columns(reading, schema.names, str(file))
        own = replace(reading, columns={**_columns_by_type(features), **reading.columns})
        if not any(own.column(name, schema.names) in schema.names for name in FIELD_COLUMNS):
            raise DataError(
                f"{file}: none of its columns ({', '.join(schema.names)}) is an image, a clip, a text or a chat; "
                "say which one is: --column text=caption"
            )
        if file == files[0]:
            tell_columns(own, schema.names, str(file))
        for batch, in_batch, row in _rows(file, batches):
            number += 1
            origin = f"{file}, row {number}" if len(files) > 1 else f"{file}, row {in_batch[0]}"
            copied = reading.inline and file.suffix == ".parquet"  # a row group per sample would have to be unpacked
            place = None if copied else functools.partial(_place, file, batch, in_batch[1])
            try:
                members = row_members(_with_class_names(row, features), own, place)
                yield BuildRow(f"{number:09d}", members, origin)
            except BadSample as error:
                yield BadRow(origin, str(error))


def read_cell(part: CellPart) -> bytes:
    """The bytes in a cell. Raises DataError where the file is not what it was."""
    column, *steps = part.steps
    try:
        value = _column(part.path, part.batch, str(column))[part.row].as_py()
        for step in steps:
            value = value[step]
    except (pa.ArrowException, OSError, LookupError, TypeError) as error:
        raise DataError(
            f"{part.path}, row group {part.batch}, row {part.row}: cannot be read again ({error})"
        ) from error
    return value


def _place(file: Path, batch: int, row: int, column: str) -> CellPlace:
    return CellPlace(str(file.absolute()), batch, row, (column,))


def _saved_files(folder: Path) -> list[Path]:
    state = _json(folder / "state.json")
    if state.get("_indices_files"):
        raise DataError(
            f"{folder} has its rows in an indices file; save it again: ds.flatten_indices().save_to_disk(..)"
        )
    names = [str(entry.get("filename")) for entry in state.get("_data_files") or [] if isinstance(entry, dict)]
    files = [folder / Path(name).name for name in names]  # the names come with the data: no folders in them
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        raise DataError(
            f"{folder}/state.json names {', '.join(names) or 'no file'}; not there: {missing[:1]}; copy it again"
        )
    return files


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); copy the dataset again") from error
    if not isinstance(value, dict):
        raise DataError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def _open(file: Path) -> tuple[pa.Schema, Any]:
    """The schema, and a parquet file or an arrow reader."""
    try:
        if file.suffix == ".parquet":
            parquet = pq.ParquetFile(file)
            return parquet.schema_arrow, parquet
        batches = _arrow_batches(str(file))
        return batches[0].schema if batches else pa.schema([]), batches
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is no {file.suffix[1:]} file that can be read ({error}); copy it again") from error


@functools.lru_cache(maxsize=1)
def _arrow_batches(path: str) -> list[pa.RecordBatch]:
    """The batches of an arrow file as views of the mapped file."""
    source = pa.memory_map(path)
    if source.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC:
        reader = pa.ipc.open_file(source)
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]
    source.seek(0)
    return list(pa.ipc.open_stream(source))


def _rows(file: Path, batches: Any) -> Iterator[tuple[int, tuple[int, int], dict[str, Any]]]:
    """(number of the batch, (row in the file, row in the batch), values)."""
    start = 0
    many = range(batches.num_row_groups) if file.suffix == ".parquet" else range(len(batches))
    for number in many:
        row = 0
        try:
            for piece in _pieces(file, batches, number):
                for values in piece.to_pylist():
                    yield number, (start + row, row), values
                    row += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{file}, row group {number}, after row {start + row}: damaged ({error}); copy it again"
            ) from error
        start += row


def _pieces(file: Path, batches: Any, number: int) -> Iterator[pa.RecordBatch]:
    if file.suffix == ".parquet":
        yield from batches.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=[number])
        return
    batch = batches[number]
    batch.validate(full=True)  # offsets of a damaged file may point anywhere
    for first in range(0, batch.num_rows, _ROWS_AT_ONCE):
        yield batch.slice(first, _ROWS_AT_ONCE)


@functools.lru_cache(maxsize=_KEPT_BATCHES)
def _column(path: str, batch: int, column: str) -> Any:
    if path.endswith(".parquet"):
        return pq.ParquetFile(path).read_row_group(batch, columns=[column]).column(column)
    record_batch = _arrow_batches(path)[batch]
    record_batch.validate(full=True)
    return record_batch.column(column)


def _features(schema: pa.Schema, file: Path) -> dict[str, Any]:
    """What the `datasets` library noted of the columns: {column: {"_type": "Image"}}."""
    note = (schema.metadata or {}).get(_HUGGINGFACE_KEY)
    try:
        features = json.loads(note)["info"]["features"] if note else {}
    except (ValueError, LookupError, TypeError):
        raise DataError(f"{file}: its note on Hugging Face features cannot be read; save the dataset again") from None
    return features if isinstance(features, dict) else {}


def _columns_by_type(features: Mapping[str, Any]) -> dict[str, str]:
    """The first image column and the first audio column, lists of them included."""
    found: dict[str, str] = {}
    for column, feature in features.items():
        while isinstance(feature, list) and feature:
            feature = feature[0]
        if isinstance(feature, dict) and feature.get("_type") in ("List", "Sequence", "LargeList"):
            feature = feature.get("feature")
        kind = _TYPES.get(feature.get("_type", "")) if isinstance(feature, dict) else None
        if kind:
            found.setdefault(kind, column)
    return found


def _with_class_names(row: dict[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """The row, with `COLUMN_name` beside each class label."""
    for column, feature in features.items():
        value = row.get(column)
        names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
        if names and isinstance(value, int) and 0 <= value < len(names):
            row[f"{column}_name"] = names[value]
    return row
