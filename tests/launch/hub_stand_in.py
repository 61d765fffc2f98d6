"""A Hugging Face hub of one repository on this machine, as far as its client asks: what is in it, and the files."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c1899de289a04d12100db370d81485cdf75e47ca"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b'{"model": {"vocab": {"a": 0}}}',
    "tokenizer_config.json": b'{"eos_token": "a"}',
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickled",
    "modeling_own.py": b"raise SystemExit",
    "consolidated.00.pth": b"pickled",
}


class Hub:
    """`someone/model`, branch main at COMMIT. asked: paths of all requests."""

    def __init__(self, files: dict[str, bytes] | None = None):
        self.files = FILES if files is None else files
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self, with_body=True)

            def do_HEAD(self):
                hub.answer(self, with_body=False)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> "Hub":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        path = request.path.split("?")[0]
        self.asked.append(path)
        body, headers, code = b'{"error": "Not Found"}', {"X-Error-Code": "RepoNotFound"}, 404
        file = path.rpartition("/")[2]
        if path in (f"/api/models/someone/model/revision/{name}" for name in ("main", COMMIT)):
            facts = {"id": "someone/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
            body, headers, code = json.dumps(facts).encode(), {"Content-Type": "application/json"}, 200
        elif path.startswith(f"/api/models/someone/model/tree/{COMMIT}"):
            facts = [{"type": "file", "path": n, "size": len(d), "oid": _etag(d)} for n, d in self.files.items()]
            body, headers, code = json.dumps(facts).encode(), {"Content-Type": "application/json"}, 200
        elif path == f"/someone/model/resolve/{COMMIT}/{file}" and file in self.files:
            body, code = self.files[file], 200
            headers = {"ETag": f'"{_etag(body)}"', "X-Repo-Commit": COMMIT}
        request.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if with_body:
            request.wfile.write(body)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
