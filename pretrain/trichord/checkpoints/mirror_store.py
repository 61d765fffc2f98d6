"""Checkpoints on a remote storage: list, put, fetch, remove. No rename is needed: the manifest is written last, and
removed first, so that a folder without one is never taken for a checkpoint.

    MIRROR/RUN/step-000100/{rank-*.safetensors, train_state.json, loader.json, index.json, manifest.json}
    MIRROR/RUN/mirrored.json               which run it is
    MIRROR/RUN/{tokenizer, shards}/...     what a run needs beside its checkpoints, where it has them
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from trichord.checkpoints.hashes import hash_file
from trichord.checkpoints.manifest import MANIFEST_FILE, Manifest, checkpoint_name
from trichord.core.errors import CheckpointError, DataError
from trichord.core.log import get_logger
from trichord.core.status import fsync_folder, try_write
from trichord.shards import remote
from trichord.shards.locations import filesystem, is_remote, local_path, shown
from trichord.shards.patience import settings, with_retries

log = get_logger(__name__)
Result = TypeVar("Result")

SIDE_FOLDERS = ("tokenizer", "shards")
"""Of the run folder: small, and without them a run cannot go on or be evaluated elsewhere."""
_SLOWEST_BYTES_PER_S = 2**20  # a transfer that is slower is given up and tried again


class MirrorStore:
    """One run's place on a storage. Errors are CheckpointErrors once `shards.storage`'s patience has ended."""

    def __init__(self, url: str):
        """url: `MIRROR/RUN`. Raises ConfigError: no file system goes by it."""
        self.url = url.rstrip("/")
        self._path = filesystem(self.url, "checkpoints")[1].rstrip("/")

    def try_write(self) -> None:
        """Where it is a folder of this machine: write and remove a file. Raises OSError: that fails."""
        if not is_remote(self.url):
            try_write(Path(local_path(self.url)))

    def steps(self) -> list[int]:
        """Steps that have a folder there, whole or not, ascending."""
        names = [path.rstrip("/").rpartition("/")[2] for path in self._list("")]
        numbers = [name.removeprefix("step-") for name in names if name.startswith("step-")]
        return sorted(int(number) for number in numbers if number.isdigit())

    def manifest(self, step: int) -> dict[str, Any] | None:
        """The manifest of a checkpoint there; None: it has none, or a torn one."""
        content = self.read_json(f"{checkpoint_name(step)}/{MANIFEST_FILE}")
        return content if content is not None and isinstance(content.get("files"), dict) else None

    def complete_manifest(self, step: int) -> dict[str, Any] | None:
        """As `manifest`; None also where a file is missing or has another size. Hashes are compared at the fetch."""
        manifest = self.manifest(step)
        if manifest is None:
            return None
        sizes = {info["name"].rpartition("/")[2]: info.get("size") for info in self._list(checkpoint_name(step), True)}
        for name, facts in manifest["files"].items():
            expected = facts.get("size") if isinstance(facts, dict) else None
            if expected is None or sizes.get(name) != expected:
                log.warning(
                    "skipping checkpoint %s/%s: %s has %s bytes there, the manifest says %s",
                    *(shown(self.url), checkpoint_name(step), name, sizes.get(name, "no"), expected),
                )
                return None
        return manifest

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A small JSON object below the run's place; None: not there, or none."""
        try:
            data = self._patiently(lambda: self._call("cat_file", self._at(name)), f"reading {name}")
            content = json.loads(data)
        except (FileNotFoundError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def put(self, folder: Path) -> int:
        """Upload a committed checkpoint folder, its manifest last. Returns the bytes that were sent.

        Files that are there already are sent anew unless the very same checkpoint is complete there.
        """
        manifest, step = Manifest(folder), int(folder.name.removeprefix("step-"))
        there = self.manifest(step)
        if there == manifest.content and self.complete_manifest(step) is not None:
            return 0
        if there is not None:  # another checkpoint of that step: from now on it is none
            self._remove(f"{folder.name}/{MANIFEST_FILE}")
        sent = sum(self._put_file(folder / name, f"{folder.name}/{name}") for name in manifest.files)
        return sent + self._put_file(folder / MANIFEST_FILE, f"{folder.name}/{MANIFEST_FILE}")

    def put_file(self, path: Path, name: str) -> None:
        """A small file below the run's place."""
        self._put_file(path, name)

    def put_side_folders(self, run_folder: Path) -> None:
        """What a run needs beside its checkpoints."""
        for side in SIDE_FOLDERS:
            for path in sorted((run_folder / side).rglob("*")):
                if path.is_file():
                    self._put_file(path, path.relative_to(run_folder).as_posix())

    def fetch(self, step: int, folder: Path, verify: bool = True) -> Path:
        """Bring a checkpoint to `folder`/step-N, which is not there before it is whole.

        verify: compare hashes; without, whatever is there is brought as it is, for the doctor.

        Raises:
            CheckpointError: it is not complete there, or its bytes are not those of the manifest.
        """
        name = checkpoint_name(step)
        manifest = self.complete_manifest(step) if verify else self.manifest(step)
        if manifest is None and verify:
            raise CheckpointError(f"{shown(self.url)}/{name} is not complete")
        partial = folder / f"{name}.partial-fetch-{secrets.token_hex(4)}"
        partial.mkdir(parents=True)
        try:
            files = list(manifest["files"]) if manifest is not None and verify else self._files_of(name)
            for file in files:
                self._get_file(f"{name}/{_plain(file)}", partial / _plain(file))
            if manifest is not None:
                (partial / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))
            if verify:
                self._compare(partial)
            final = folder / name
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            fsync_folder(folder)
            return final
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def fetch_side_folders(self, run_folder: Path) -> None:
        """What `put_side_folders` brought there; what lies here already stays."""
        for side in SIDE_FOLDERS:
            for path in self._find(side):
                name = path[len(self._path) :].lstrip("/")
                target = run_folder / name
                if not target.exists() and ".." not in Path(name).parts:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self._get_file(name, target)

    def remove(self, step: int) -> None:
        """The manifest goes first: what is half removed is no checkpoint."""
        name = checkpoint_name(step)
        for file in sorted(self._files_of(name), key=lambda file: file != MANIFEST_FILE):
            self._remove(f"{name}/{file}")
        fs = filesystem(self.url)[0]
        if not getattr(fs, "async_impl", False) and fs.isdir(self._at(name)):
            fs.rmdir(self._at(name))  # a store has no folders

    def _compare(self, partial: Path) -> None:
        manifest = Manifest(partial)
        for file in manifest.files:
            kind, expected = manifest.hash(file)
            if hash_file(partial / file, kind) != expected:
                raise CheckpointError(
                    f"{shown(self.url)}/{partial.name.partition('.')[0]}/{file} has not the hash of its manifest: its "
                    "bytes have changed on the mirror; remove that folder there"
                )

    def _files_of(self, name: str) -> list[str]:
        return [info["name"].rpartition("/")[2] for info in self._list(name, True) if info.get("type") == "file"]

    def _put_file(self, path: Path, name: str) -> int:
        def put() -> int:
            size = path.stat().st_size  # looked at anew in each try: what lies beside checkpoints may just be written
            self._call("put_file", str(path), self._at(name), size=size)
            stored = self._call("info", self._at(name))["size"]
            if stored != size:
                raise ConnectionError(f"{stored} bytes arrived of {size}")
            return size

        return self._patiently(put, f"uploading {name}")

    def _get_file(self, name: str, path: Path) -> None:
        def get() -> None:
            size = self._call("info", self._at(name))["size"]
            self._call("get_file", self._at(name), str(path), size=size)
            if path.stat().st_size != size:
                raise ConnectionError(f"{path.stat().st_size} bytes arrived of {size}")

        try:
            self._patiently(get, f"fetching {name}")
        except FileNotFoundError as error:
            raise CheckpointError(f"{shown(self.url)}/{name}: {error}") from error

    def _remove(self, name: str) -> None:
        try:
            self._patiently(lambda: self._call("rm_file", self._at(name)), f"removing {name}")
        except FileNotFoundError:
            return

    def _list(self, name: str, detail: bool = False) -> list[Any]:
        def ask() -> list[Any]:
            filesystem(self.url)[0].invalidate_cache()  # others write there, too
            return list(self._call("ls", self._at(name), detail=detail))

        try:
            return self._patiently(ask, f"listing {name or 'checkpoints'}")
        except FileNotFoundError:
            return []

    def _find(self, name: str) -> list[str]:
        def ask() -> list[str]:
            filesystem(self.url)[0].invalidate_cache()
            return list(self._call("find", self._at(name)))

        try:
            return self._patiently(ask, f"listing {name}")
        except FileNotFoundError:
            return []

    def _call(self, method: str, *args: Any, size: int = 0, **kwargs: Any) -> Any:
        timeout_s = settings().timeout_s + size / _SLOWEST_BYTES_PER_S
        if method == "put_file" and not getattr(filesystem(self.url)[0], "async_impl", False):
            filesystem(self.url)[0].makedirs(args[1].rpartition("/")[0], exist_ok=True)  # no store: a folder
        return remote.call(self.url, method, *args, timeout_s=timeout_s, **kwargs)

    def _patiently(self, action: Callable[[], Result], what: str) -> Result:
        """Tried again as shards are; a file that is not there is told as that."""
        missing: list[FileNotFoundError] = []

        def attempt() -> Result | None:
            try:
                return action()
            except FileNotFoundError as error:
                missing.append(error)
                return None

        try:
            result = with_retries(attempt, f"{what} ({shown(self.url)})")
        except DataError as error:
            why = error.__cause__ or error
            raise CheckpointError(f"{what} ({shown(self.url)}): {type(why).__name__}: {why}") from error
        if missing:
            raise missing[-1]
        return result  # pyright: ignore[reportReturnType]

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path


def _plain(name: str) -> str:
    """A file's name out of a manifest, which must not lead elsewhere."""
    if not name or Path(name).name != name:
        raise CheckpointError(f"a manifest names the file {name!r}: expected a name without folders")
    return name
