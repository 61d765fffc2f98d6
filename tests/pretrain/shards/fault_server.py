"""An HTTP server with range requests that plants faults, on files of a folder or in front of an S3 server."""

import hashlib
import http.client
import re
import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PASSING_FAULTS = (
    "stall before the answer",
    "stall in the body",
    "reset before the answer",
    "reset in the body",
    "body ends early",
    "short body under a full range",
    "wrong Content-Range",
    "no Content-Range",
    "status 500",
    "status 503",
    "status 429",
)
FINAL_FAULTS = ("status 401", "status 403", "status 404", "status 400", "range ignored", "other etag", "other size")
STATUS_CODES = {400: "InvalidRequest", 401: "Unauthorized", 403: "AccessDenied", 404: "NoSuchKey", 429: "SlowDown"}


class FaultServer(ThreadingHTTPServer):
    """`fault` is planted into every `every`-th ranged GET of a path that ends in `ending`; `planted` counts."""

    daemon_threads = True

    def __init__(self, folder: Path | None = None, upstream: tuple[str, int] | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.upstream = folder, upstream
        self.lock = threading.Lock()
        self.released = threading.Event()
        self.log: list[tuple[str, str]] = []
        self.plan()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def plan(self, fault: str | None = None, every: int = 3, ending: str = ".tar", first: int = 0) -> None:
        """Plant `fault` into the requests number first + every, first + 2 * every, ... from now on."""
        with self.lock:
            self.fault, self.every, self.ending = fault, every, ending
            self.seen, self.planted = -first, 0
            self.log.clear()

    def next_fault(self, path: str) -> str | None:
        with self.lock:
            if self.fault is None or not path.split("?")[0].endswith(self.ending):
                return None
            self.seen += 1
            if self.seen <= 0 or self.seen % self.every:
                return None
            self.planted += 1
            return self.fault

    def requests(self) -> Counter:
        return Counter(self.log)

    def handle_error(self, request, client_address):
        pass  # clients that hang up are what these tests are about

    def stop(self) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body go out in two writes
    server: FaultServer

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_PUT(self):
        self._answer()

    def _answer(self) -> None:
        wanted = self.headers.get("Range")
        self.server.log.append((self.path, wanted or ""))
        status, headers, body = self._forwarded() if self.server.upstream else self._from_folder(wanted)
        ranged = self.command == "GET" and wanted is not None
        self._send(status, headers, body, self.server.next_fault(self.path) if ranged else None)

    def _from_folder(self, wanted: str | None) -> tuple[int, dict[str, str], bytes]:
        path = self.server.folder / self.path.split("?")[0].lstrip("/")
        if self.command == "PUT":
            path.write_bytes(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            return 201, {}, b""
        if not path.is_file():
            return 404, {}, b"no"
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "")
        if match is None:
            return 200, headers, data
        first, last = int(match[1]), min(int(match[2]), len(data) - 1)
        if first >= len(data):
            return 416, {**headers, "Content-Range": f"bytes */{len(data)}"}, b""
        return 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1]

    def _forwarded(self) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self.server.upstream)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        data = answer.read()
        dropped = ("content-length", "connection", "transfer-encoding", "server", "date")
        headers = {key: value for key, value in answer.getheaders() if key.lower() not in dropped}
        if self.command == "HEAD":
            headers["Content-Length"] = answer.getheader("Content-Length", "0")
        connection.close()
        return answer.status, headers, data

    def _send(self, status: int, headers: dict[str, str], body: bytes, fault: str | None) -> None:
        headers = {key.title().replace("Etag", "ETag"): value for key, value in headers.items()}
        half = len(body) // 2
        if fault == "stall before the answer":
            self.server.released.wait(60)
            return self._hang_up()
        if fault == "reset before the answer":
            return self._hang_up()
        if fault is not None and fault.startswith("status "):
            status, headers = int(fault.split()[1]), {"Content-Type": "application/xml"}
            code = STATUS_CODES.get(status, "InternalError")
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>planted</Message></Error>".encode()
        first, last, total = (int(word) for word in re.findall(r"\d+", headers.get("Content-Range", "0-0/0")))
        if fault == "wrong Content-Range":
            headers["Content-Range"] = f"bytes {first + 512}-{last + 512}/{total}"
            body = body[::-1]
        elif fault == "no Content-Range":
            body = body[::-1]
            headers.pop("Content-Range", None)
        elif fault == "range ignored":
            status, body = 200, b"x" * total
            headers.pop("Content-Range", None)
        elif fault == "other etag":
            headers["ETag"] = '"another"'
        elif fault == "other size":
            headers["Content-Range"] = f"bytes {first}-{last}/{total + 512}"
        elif fault == "short body under a full range":
            body = body[:half]
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if fault == "stall in the body":
            self.wfile.write(body[:half])
            self.server.released.wait(60)
            return self._hang_up()
        if fault == "reset in the body":
            self.wfile.write(body[:half])
            return self._hang_up()
        if fault == "body ends early":
            self.wfile.write(body[:half])
            self.close_connection = True
            return None
        self.wfile.write(body)
        return None

    def _hang_up(self) -> None:
        """A reset and not an orderly end: linger of zero seconds."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
