"""A stand-in for the Weights & Biases server: as much of its GraphQL, file stream and uploads as the client asks for.

What it answers was taken from the queries of the client; it is no proof of what the real server does with them. It can
fail as servers do: `ill = "error"` answers 500, `"hang"` keeps every request waiting, `stop()` refuses connections. A
request to `/be/error` makes it so, too: for a client that wants it at a certain step.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class StoredRun:
    """A run as the server has it. streams: file name -> lines, as the file stream brought them."""

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    streams: dict[str, list[str]] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.streams.get("wandb-history.jsonl", [])]

    def take(self, chunk: dict[str, Any]) -> None:
        """One request to the file stream. A chunk that comes again replaces itself."""
        for name, part in chunk.get("files", {}).items():
            lines = self.streams.setdefault(name, [])
            lines[part["offset"] : part["offset"] + len(part["content"])] = part["content"]
        if chunk.get("complete"):
            self.exit_code = chunk.get("exitcode")

    def update(self, variables: dict[str, Any]) -> None:
        self.facts |= {name: value for name, value in variables.items() if value is not None and name != "config"}
        if variables.get("config"):
            self.config = {name: item["value"] for name, item in json.loads(variables["config"]).items()}

    def rewind(self, step: float) -> None:
        kept = [json.dumps(row) for row in self.history if row["_step"] <= step]
        self.streams["wandb-history.jsonl"] = kept

    def bucket(self) -> dict[str, Any]:
        entity = {"id": "e", "name": self.facts.get("entity") or "team"}
        project = {"id": "p", "name": self.facts["project"], "entity": entity}
        config = json.dumps({name: {"value": value} for name, value in self.config.items()})
        lines = {kind: self.streams.get(f"wandb-{kind}.jsonl", []) for kind in ("history", "events")}
        tails = {f"{kind}Tail": json.dumps(found[-1:]) for kind, found in lines.items()}
        counts = {f"{kind}LineCount": len(found) for kind, found in lines.items()}
        names = {"id": f"id-{self.name}", "name": self.name, "displayName": self.facts.get("displayName")}
        summary = self.streams.get("wandb-summary.json", ["{}"])[-1]
        rest = {"logLineCount": 0, "tags": self.facts.get("tags", []), "notes": None, "wandbConfig": '{"t": {}}'}
        return {**names, "project": project, "config": config, "summaryMetrics": summary, **tails, **counts, **rest}


class WandbServer:
    """runs: by id. alerts, artifacts: what the client asked for, newest last. asked: names of the requests."""

    def __init__(self, rewinds: bool = True, takes_runs: bool = True):
        """rewinds: whether a run can be set back to a step. takes_runs: whether this user may write."""
        self.rewinds, self.takes_runs = rewinds, takes_runs
        self.ill: str | None = None
        self.runs: dict[str, StoredRun] = {}
        self.alerts: list[dict[str, Any]] = []
        self.artifacts: list[dict[str, Any]] = []
        self.uploads: dict[str, bytes] = {}
        self.asked: list[str] = []
        self._well = threading.Event()
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"world": self})
        self._http = _QuietServer(("127.0.0.1", 0), handler)
        self._port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def environ(self) -> dict[str, str]:
        """What leads the client here."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "x" * 40, "WANDB_MODE": "online"}

    def manifest(self, artifact: dict[str, Any]) -> dict[str, Any]:
        """The manifest that was uploaded of an artifact."""
        return json.loads(self.uploads[f"manifest-{artifact['id']}"])["contents"]

    def recover(self) -> None:
        self.ill = None
        self._well.set()

    def wait_while_ill(self) -> None:
        self._well.wait(600)

    def stop(self) -> None:
        """Connections are refused from now on."""
        self._well.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        """The `data` of one GraphQL request. Raises ValueError: it is refused."""
        ask = getattr(self, "_" + re.sub(r"(?<!^)(?=[A-Z])", "_", operation).lower(), None)
        with self._lock:
            self.asked.append(operation)
            return ask(given) if ask is not None else {}

    def file_stream(self, run: str, chunk: dict[str, Any]) -> None:
        with self._lock:
            self.runs[run].take(chunk)

    def _upsert_bucket(self, given: dict[str, Any]) -> dict[str, Any]:
        if not self.takes_runs:
            raise ValueError("permission denied")
        name = given["name"]
        inserted = name not in self.runs
        run = self.runs.setdefault(name, StoredRun(name))
        run.update(given)
        return {"upsertBucket": {"bucket": run.bucket(), "inserted": inserted}}

    def _run_resume_status(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(given["name"])
        bucket = run.bucket() if run is not None else None
        return {"model": {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "team"}, "bucket": bucket}}

    def _rewind_run(self, given: dict[str, Any]) -> dict[str, Any]:
        if not self.rewinds:
            raise ValueError("rewinding is not enabled for this entity")
        run = self.runs[given["runName"]]
        run.rewind(given["metricValue"])
        return {"rewindRun": {"rewoundRun": run.bucket()}}

    def _viewer(self, given: dict[str, Any]) -> dict[str, Any]:
        names = {"id": "u", "entity": "team", "username": "someone", "email": "someone@example.org", "flags": "{}"}
        return {"viewer": {**names, "teams": {"edges": []}}}

    def _server_features_query(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _artifact_type(self, given):
        return {"project": None}

    def _notify_scriptable_run_alert(self, given: dict[str, Any]) -> dict[str, Any]:
        self.alerts.append(given)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _create_run_files(self, given: dict[str, Any]) -> dict[str, Any]:
        self.runs[given["run"]].files.update(given["files"])
        files = [{"name": name, "uploadUrl": f"{self.url}/storage/{given['run']}/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}

    def _create_artifact(self, given: dict[str, Any]) -> dict[str, Any]:
        made = {"id": f"artifact{len(self.artifacts)}", "committed": False, **given["input"]}
        self.artifacts.append(made)
        sequence = {"id": "s", "latestArtifact": None}
        known = {"id": made["id"], "digest": made["digest"], "state": "PENDING", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": known}}

    def _create_artifact_manifest(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"createArtifactManifest": {"artifactManifest": self._manifest(given["artifactID"])}}

    def _update_artifact_manifest(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"updateArtifactManifest": {"artifactManifest": self._manifest(given["artifactManifestID"])}}

    def _manifest(self, artifact: str) -> dict[str, Any]:
        file = {"id": "f", "uploadUrl": f"{self.url}/storage/manifest-{artifact}", "uploadHeaders": []}
        return {"id": artifact, "file": file}

    def _create_artifact_files(self, given: dict[str, Any]) -> dict[str, Any]:
        nodes = []
        for spec in given["input"]["artifactFiles"]:
            place = f"{spec['artifactID']}/{spec['name']}"
            urls = {"uploadUrl": f"{self.url}/storage/{place}", "uploadHeaders": [], "uploadMultipartUrls": None}
            nodes.append({"node": {"storagePath": place, **urls, "artifact": {"id": spec["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def _commit_artifact(self, given: dict[str, Any]) -> dict[str, Any]:
        (made,) = (artifact for artifact in self.artifacts if artifact["id"] == given["artifactID"])
        made["committed"] = True
        return {"commitArtifact": {"artifact": {"id": made["id"], "digest": made["digest"]}}}


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    world: WandbServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self._body()
        if not self._fall_ill():
            self._answer(body)

    def do_GET(self) -> None:
        self.do_POST()

    def do_PUT(self) -> None:
        self.do_POST()

    def _fall_ill(self) -> bool:
        """Whether the server is out of order, and the request was answered so."""
        ill = self.world.ill
        if ill == "hang":
            self.world.wait_while_ill()
            self.close_connection = True
        elif ill == "error":
            self._reply({"error": "out of order"}, 500)
        return ill is not None

    def _answer(self, body: bytes) -> None:
        if self.path == "/graphql":
            asked = json.loads(body)
            operation = asked.get("operationName") or re.findall(r"(?:query|mutation)\s+(\w+)", asked["query"])[0]
            try:
                self._reply({"data": self.world.answer(operation, asked.get("variables") or {})})
            except ValueError as error:
                self._reply({"errors": [{"message": str(error)}]})
        elif self.path.startswith("/be/"):
            self.world.ill = self.path.removeprefix("/be/")
            self._reply({})
        elif self.path.endswith("/file_stream"):
            self.world.file_stream(self.path.split("/")[-2], json.loads(body))
            self._reply({})
        else:
            self.world.uploads[self.path.removeprefix("/storage/")] = body
            self._reply({})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(parts)
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, content: dict[str, Any], code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def wandb_server(**keys: bool) -> Iterator[WandbServer]:
    server = WandbServer(**keys)
    try:
        yield server
    finally:
        server.stop()
