"""What a process under attack may touch: one folder. Everything else it tries is noted and refused."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

_FORBIDDEN = frozenset({
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn",
    "pickle.find_class", "socket.connect", "socket.bind", "socket.getaddrinfo", "ctypes.dlopen", "urllib.Request",
    "code.__new__", "os.symlink", "os.link", "os.mknod", "webbrowser.open",
})  # fmt: skip
_CHANGING = frozenset(
    {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown", "shutil.rmtree"}
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_READABLE = ("/proc/self", "/sys", "/dev/urandom", "/usr/lib", "/usr/share/zoneinfo", "/lib")


class Guard:
    """An audit hook that is armed while a case runs. `breaches` says what was tried.

    Python's audit events see what Python code does; memory and file sizes are bounded by the kernel.
    """

    def __init__(self, writable: Path, readable: tuple[Path, ...]):
        self.breaches: list[str] = []
        self.armed = False
        self._writable = os.path.realpath(writable)
        libraries = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), str(Path(__file__).parents[2])}
        self._readable = tuple(
            os.path.realpath(path) for path in (*libraries, *readable, *_READABLE, *filter(os.path.isdir, sys.path))
        )
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event in _FORBIDDEN:
            self._refuse(f"{event} {str(args)[:200]}")
        elif event == "open" and isinstance(args[0], (str, bytes)):
            self._judge_open(os.fsdecode(args[0]), args[1], args[2])
        elif event in _CHANGING and isinstance(args[0], (str, bytes)) and not self._inside(os.fsdecode(args[0])):
            self._refuse(f"{event} {str(args)[:200]}")

    def _judge_open(self, path: str, mode: str | None, flags: int) -> None:
        if self._inside(path) or path == os.devnull:
            return
        writing = any(letter in mode for letter in "wax+") if mode else bool(flags & _WRITING)
        if writing or not os.path.realpath(path).startswith(self._readable):
            self._refuse(f"open {path!r} for {'writing' if writing else 'reading'}")

    def _inside(self, path: str) -> bool:
        return f"{os.path.realpath(path)}/".startswith(f"{self._writable}/")

    def _refuse(self, what: str) -> None:
        self.breaches.append(what)
        raise PermissionError(f"refused while under attack: {what}")


def enter_sandbox(root: Path, max_bytes: int) -> None:
    """Work in an empty folder below `root`, with all places for temporary files inside it and memory bounded.

    max_bytes: how much the address space may grow from here.
    """
    work = root / "work"
    work.mkdir(parents=True, exist_ok=True)
    os.chdir(work)
    for variable in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "TRICHORD_CACHE"):
        os.environ[variable] = str(root / "cache")
    (root / "cache").mkdir(exist_ok=True)
    tempfile.tempdir = None
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + max_bytes
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def has_children() -> bool:
    """Whether this process has started another one that is still there."""
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread is over
            if children.read_text().strip():
                return True
    return False


def sweep(root: Path, shard: str) -> list[str]:
    """Files below `root` that no shard and no cache of it explain; afterwards all of them are gone."""
    expected = {shard, "shard.idx", "shard.len", shard + ".idx", shard + ".len"}
    found = [path for path in root.rglob("*") if path.is_file() or path.is_symlink()]
    strangers = [
        str(path.relative_to(root))
        for path in found
        if path.parent.parent != root / "case" or path.name not in expected
        if "cache" not in path.relative_to(root).parts[:1]
    ]
    for folder in ("case", "work", "cache"):
        shutil.rmtree(root / folder, ignore_errors=True)
        (root / folder).mkdir()
    os.chdir(root / "work")
    return strangers
