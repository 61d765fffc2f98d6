"""One request to a remote storage: bounded in time, checked in length, range and version; errors told apart.

What may pass when asked again is raised as OSError (TimeoutError, ConnectionError among them); what will not, as
FileNotFoundError, PermissionError or DataError. Trying again is up to the caller.
"""

import asyncio
import concurrent.futures
import re
import threading
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from trichord.core.errors import DataError
from trichord.shards.locations import filesystem, scheme, shown

_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")
_VERSION_KEYS = ("ETag", "etag", "Last-Modified", "mtime", "LastModified", "generation", "blob_id", "created")
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError")
_MAY_PASS = (408, 425, 429)  # beside 5xx
_CLIENT_MODULES = ("aiohttp", "aiobotocore", "botocore", "asyncio", "concurrent", "fsspec", "s3fs", "gcsfs", "google")
_CLIENT_MODULES += ("huggingface_hub", "requests", "httpx", "httpcore", "urllib3", "http", "ssl", "azure")
_WHERE_CREDENTIALS = {
    "s3": "AWS_* variables, ~/.aws or the machine's role; FSSPEC_S3_ANON=true for public buckets",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, gcloud's login or the machine's account",
    "http": "~/.netrc, or a presigned address",
    "hf": "HF_TOKEN or the login of `hf auth login`",
}
_WHERE_CREDENTIALS |= {"s3a": _WHERE_CREDENTIALS["s3"], "https": _WHERE_CREDENTIALS["http"]}
_WHERE_CREDENTIALS |= {"gcs": _WHERE_CREDENTIALS["gs"]}


class Facts(NamedTuple):
    """What tells one version of an object from another: size in bytes, and etag or time of change ("": has neither)."""

    size: int
    etag: str


class _Answer(NamedTuple):
    facts: Facts
    data: bytes


def ask_facts(url: str, timeout_s: float) -> Facts:
    """Size and version of an object, by one request."""
    fs, path = filesystem(url)
    if scheme(url) in ("http", "https"):
        # not HEAD: presigned addresses are signed for GET, and fsspec takes any failure of HEAD for a missing file
        return _run(fs, _http_range(fs, path, 0, 1, facts_only=True), url, timeout_s).facts
    if scheme(url) in ("s3", "s3a"):
        try:
            return _run(fs, _s3_facts(fs, path), url, timeout_s)
        except FileNotFoundError as error:
            raise FileNotFoundError(missing_bucket(url, timeout_s) or str(error)) from error
    return _facts_of(call(url, "info", path, timeout_s=timeout_s), url)


def missing_bucket(url: str, timeout_s: float) -> str | None:
    """For a URL where nothing was found: that its S3 bucket is missing, in words. None: it is there, or cannot be told.

    An empty prefix and a bucket that is not there get the same answer from S3's listings.
    """
    if scheme(url) not in ("s3", "s3a"):
        return None
    fs, path = filesystem(url)
    bucket, _, _ = fs.split_path(path)
    try:
        _run(fs, fs._call_s3("head_bucket", Bucket=bucket), url, timeout_s)
    except FileNotFoundError:
        return f"there is no bucket {bucket!r}"
    except (OSError, DataError):
        return None
    return None


def fetch(url: str, start: int, end: int, expected: Facts | None, timeout_s: float) -> tuple[bytes, Facts]:
    """Bytes `start` to `end` (or to where the object ends, if before) and the facts of the object they are from.

    Raises:
        DataError: the object is not the `expected` one any more, or the server does not answer range requests.
        FileNotFoundError, PermissionError: as they say. OSError: what may pass, short answers among them.
    """
    fs, path = filesystem(url)
    if scheme(url) in ("http", "https"):
        answer = _run(fs, _http_range(fs, path, start, end, expected), url, timeout_s)
    elif scheme(url) in ("s3", "s3a"):
        answer = _run(fs, _s3_range(fs, path, start, end, expected), url, timeout_s)
    else:
        data = call(url, "cat_file", path, start=start, end=end, timeout_s=timeout_s)
        answer = _Answer(_facts_of(call(url, "info", path, timeout_s=timeout_s), url), data)
    _check_version(answer.facts, expected, url)
    wanted = max(0, min(end, answer.facts.size) - start)
    if len(answer.data) != wanted:
        raise ConnectionError(f"short answer: {len(answer.data)} of {wanted} bytes from byte {start}")
    return answer.data, answer.facts


def call(url: str, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> Any:
    """A method of the URL's file system (`glob`, `info`, `cat_file`, `pipe_file`), its errors and its time as above."""
    fs, _ = filesystem(url)
    if getattr(fs, "async_impl", False) and hasattr(fs, f"_{method}"):
        return _run(fs, getattr(fs, f"_{method}")(*args, **kwargs), url, timeout_s)
    return _translated(lambda: _in_thread(lambda: getattr(fs, method)(*args, **kwargs), timeout_s), url)


def _run(fs: Any, coroutine: Coroutine[Any, Any, Any], url: str, timeout_s: float) -> Any:
    """Run on fsspec's event loop. Past `timeout_s` the request is cancelled, and its connection closed with it."""

    def wait() -> Any:
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, timeout_s), fs.loop)
        try:
            return future.result(timeout_s + 5)  # 5 s: should the loop itself hang
        except (asyncio.TimeoutError, concurrent.futures.TimeoutError):
            future.cancel()
            raise TimeoutError(f"no complete answer within {timeout_s:g} s") from None

    return _translated(wait, url)


def _in_thread(action: Callable[[], Any], timeout_s: float) -> Any:
    """For file systems without an event loop: a call that stalls is left behind in its thread."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True, name="storage-call").start()
    try:
        return future.result(timeout_s)
    except concurrent.futures.TimeoutError:
        raise TimeoutError(f"no answer within {timeout_s:g} s") from None


async def _http_range(
    fs: Any, path: str, start: int, end: int, expected: Facts | None = None, facts_only: bool = False
) -> _Answer:
    session = await fs.set_session()
    options = dict(fs.kwargs)
    headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    async with session.get(fs.encode_url(path), headers=headers, **options) as response:
        version = next((response.headers[key] for key in _VERSION_KEYS[:3] if response.headers.get(key)), "")
        if response.status == 200:
            if response.content_length is None:
                raise DataError(f"{shown(path)}: the server names no length; expected answers to range requests (206)")
            facts = Facts(response.content_length, version)
            if end < facts.size and not facts_only:
                raise _no_ranges(path)
            return _Answer(facts, b"" if facts_only else (await response.read())[start:end])
        if response.status not in (206, 416):
            response.raise_for_status()
            raise OSError(f"HTTP status {response.status}, expected 206")
        first, last, total = _content_range(response.headers.get("Content-Range", ""))
        if response.status == 416:
            return _Answer(Facts(total, version), b"")
        facts = Facts(total, version)
        _check_version(facts, expected, path)
        _check_range(first, last, start, min(end, total))
        try:
            return _Answer(facts, await response.content.readexactly(last + 1 - first))
        except asyncio.IncompleteReadError as error:
            raise ConnectionError(f"short answer: {len(error.partial)} of {error.expected} bytes") from error


async def _s3_facts(fs: Any, path: str) -> Facts:
    bucket, key, version = fs.split_path(path)
    extra = {"VersionId": version} if version else {}
    answer = await fs._call_s3("head_object", Bucket=bucket, Key=key, **extra)
    return Facts(int(answer["ContentLength"]), str(answer.get("ETag", "")))


async def _s3_range(fs: Any, path: str, start: int, end: int, expected: Facts | None) -> _Answer:
    bucket, key, version = fs.split_path(path)
    extra = {"VersionId": version} if version else {}
    answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", **extra)
    body = answer["Body"]
    try:
        if answer["ResponseMetadata"]["HTTPStatusCode"] == 206:
            first, last, total = _content_range(answer.get("ContentRange", ""))
        else:  # the whole object
            first, last, total = 0, int(answer["ContentLength"]) - 1, int(answer["ContentLength"])
            if start > 0 or end < total:
                raise _no_ranges(f"s3://{path}")
        facts = Facts(total, str(answer.get("ETag", "")))
        _check_version(facts, expected, f"s3://{path}")
        _check_range(first, last, start, min(end, total))
        return _Answer(facts, await body.read())
    finally:
        body.close()


def _content_range(value: str) -> tuple[int, int, int]:
    """(first byte, last byte, total); first and last are 0 and -1 for `bytes */total`."""
    match = _CONTENT_RANGE.fullmatch(value.strip())
    if match is None or match[3] == "*":
        raise OSError(f"Content-Range {value!r}; expected `bytes FIRST-LAST/TOTAL`")
    return int(match[1] or 0), int(match[2] or -1), int(match[3])


def _facts_of(info: dict[str, Any], url: str) -> Facts:
    if info.get("size") is None:
        raise DataError(f"{shown(url)}: its storage names no size (it is a {info.get('type', 'thing')}); name a file")
    return Facts(int(info["size"]), next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), ""))


def _no_ranges(url: str) -> DataError:
    return DataError(
        f"{shown(url)}: the server ignores range requests (it answers 200, expected 206), and every read would "
        "transfer the whole shard; use a server with ranges, or copy the shards"
    )


def _check_range(first: int, last: int, start: int, end: int) -> None:
    if first != start or last != end - 1:
        raise OSError(f"wrong range: asked for bytes {start} to {end - 1}, the answer holds {first} to {last}")


def _check_version(found: Facts, expected: Facts | None, url: str) -> None:
    if expected is not None and not _same(found, expected):
        raise DataError(
            f"shard {shown(url)} changed while it was in use: it had {_words(expected)}, now {_words(found)}; "
            "start again so that all processes see the same data"
        )


def _same(found: Facts, expected: Facts) -> bool:
    return found.size == expected.size and (found.etag == expected.etag or not found.etag)


def _words(facts: Facts) -> str:
    return f"{facts.size} bytes" + (f" and version {facts.etag}" if facts.etag else "")


def _translated(action: Callable[[], Any], url: str) -> Any:
    """Run `action`, its errors sorted as the module says."""
    try:
        return action()
    except DataError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no {shown(url)} ({error})") from error
    except Exception as error:
        status, code = _status(error), _code(error)
        if type(error).__name__ in _NO_CREDENTIALS:
            raise PermissionError(f"no credentials for {shown(url)} ({error}); {_hint(url)}") from error
        if status in (404, 410):
            raise FileNotFoundError(f"there is no {shown(url)} (HTTP status {status})") from error
        if status in (401, 403) or isinstance(error, PermissionError) or code in ("ExpiredToken", "InvalidToken"):
            raise PermissionError(
                f"access to {shown(url)} is refused ({code or status or error}); {_hint(url)}"
            ) from error
        may_pass = status is None or status in _MAY_PASS or status >= 500 or status < 400 or code == "RequestTimeout"
        if not may_pass:
            raise DataError(f"{shown(url)}: the server refuses the request (HTTP status {status}: {error})") from error
        if isinstance(error, OSError) and not isinstance(error, NotImplementedError):
            raise
        if type(error).__module__.split(".")[0] in _CLIENT_MODULES:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
        raise


def _hint(url: str) -> str:
    places = _WHERE_CREDENTIALS.get(scheme(url), "the usual places of its file system")
    return f"credentials are looked for in {places}"


def _status(error: BaseException) -> int | None:
    """HTTP status of an error of aiohttp, botocore (as s3fs wraps it), gcsfs, requests or httpx."""
    for found in (error, error.__cause__):
        response = getattr(found, "response", None)
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        # aiohttp's errors of half an answer carry a `code` of 400 that no server sent
        status = getattr(found, "status", None) or getattr(response, "status_code", None)
        if status is None and type(found).__module__.startswith("gcsfs"):
            status = getattr(found, "code", None)
        if isinstance(status, int):
            return status
    return None


def _code(error: BaseException) -> str | None:
    """S3's own word for the error, such as `ExpiredToken`."""
    for found in (error, error.__cause__):
        response = getattr(found, "response", None)
        if isinstance(response, dict):
            return response.get("Error", {}).get("Code")
    return None
