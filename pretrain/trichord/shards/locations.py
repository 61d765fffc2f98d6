"""Where a shard is: on this machine's disks, or behind a file system of fsspec."""

import re
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import fsspec.core

from trichord.core.errors import ConfigError

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*(://|::)")
_EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http", "gs": "gcs", "gcs": "gcs", "hf": "train"}
COMPRESSED = (".tar.gz", ".tgz")
_per_url = lru_cache(maxsize=8192)  # asked for each member that is read, of a few shards at a time


@_per_url
def is_remote(url: str) -> bool:
    """Whether the URL is read through fsspec (`s3://`, `https://`, chained ones) and not from this disk."""
    return _SCHEME.match(url) is not None and not url.startswith("file://")


def local_path(url: str) -> str:
    """The path of a local URL."""
    return url.removeprefix("file://")


def scheme(url: str) -> str:
    """`s3`, `https`, ...; empty for local paths and for chained URLs (`simplecache::s3://...`)."""
    return url.split("://", 1)[0].lower() if "://" in url and "::" not in url else ""


def plain_name(url: str) -> str:
    """The URL without the query of an http address, so that its ending can be looked at."""
    return url.split("?", 1)[0] if scheme(url) in ("http", "https") else url


@_per_url
def is_compressed(url: str) -> bool:
    """Whether the shard is a tar.gz, which is read from an unpacked copy."""
    return plain_name(url).lower().endswith(COMPRESSED)


@_per_url
def shown(url: str) -> str:
    """The URL as messages name it: without the query, where presigned addresses carry their signature."""
    name = plain_name(url)
    return name if name == url else f"{name}?..."


def filesystem(url: str, what: str = "shards") -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it. fsspec keeps one instance per process and thread, so that
    this is to be asked anew after a fork. what: lies there, as messages name it.

    Raises:
        ConfigError: nothing goes by this scheme, what does is not installed, or the URL holds a password.
    """
    kind = scheme(url)
    if kind in ("http", "https") and urlsplit(url).username is not None:
        raise ConfigError(
            f"the address of {kind}://...@{urlsplit(url).hostname} holds a user name; configs are written into run "
            "folders, so put name and password into ~/.netrc"
        )
    # trust_env: proxies from the environment, credentials from ~/.netrc
    options = {"client_kwargs": {"trust_env": True}} if kind in ("http", "https") else {}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = _EXTRAS.get(kind, "s3")
        raise ConfigError(
            f"{what} at {shown(url)!r} need a file system that is not installed ({error}); install it, for "
            f"{kind or 'S3'} with `pip install 'trichord[{extra}]'`"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{what} at {shown(url)!r}: {error}; expected a path, file://, s3://, gs://, https:// or another scheme of "
            "fsspec"
        ) from error
