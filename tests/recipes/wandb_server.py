"""A double of wandb's server on 127.0.0.1: as much of it as a run and `wandb sync` talk to, kept in memory."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef" * 2 + "01234567"


@dataclass
class ServerRun:
    """What the server has of a run. A history line is at the place that its writer gave it, as on the real one."""

    lines: dict[int, dict[str, Any]] = field(default_factory=dict)
    summary: str = "{}"
    bucket: dict[str, Any] = field(default_factory=dict)  # the last value of each variable of UpsertBucket
    exits: list[int] = field(default_factory=list)
    artifacts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def history(self) -> list[dict[str, Any]]:
        return [self.lines[place] for place in sorted(self.lines)]

    @property
    def config(self) -> dict[str, Any]:
        return {key: entry["value"] for key, entry in json.loads(self.bucket["config"]).items()}


class WandbServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, ServerRun] = {}
        self.refuses = False  # every key
        self.awake = threading.Event()  # while it is not, nothing is answered
        self.awake.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_MODE": "online", "WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}


@contextlib.contextmanager
def wandb_server() -> Iterator[WandbServer]:
    server = WandbServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.awake.set()
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.awake.wait()
        if "/otel/" in self.path:  # wandb's own telemetry
            self.answer({})
        elif self.server.refuses:
            self.answer({"errors": [{"message": "permission denied"}]}, 401)
        elif self.path == "/graphql":
            asked = json.loads(body)
            name = asked.get("operationName") or re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])[1]
            answer = getattr(self, name, lambda variables: {})
            self.answer({"data": answer(asked.get("variables") or {})})
        else:
            self.file_stream(self.path.split("/")[4], json.loads(body))

    def answer(self, content: dict[str, Any], code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: Any) -> None:
        pass

    def file_stream(self, name: str, request: dict[str, Any]) -> None:
        run = self.server.runs[name]
        for file, chunk in request.get("files", {}).items():
            if file == "wandb-history.jsonl":
                run.lines |= {chunk["offset"] + i: json.loads(line) for i, line in enumerate(chunk["content"])}
            elif file == "wandb-summary.json":
                run.summary = chunk["content"][-1]
        if request.get("complete"):
            run.exits.append(request["exitcode"])
        self.answer({"exitcode": None, "limits": {}})

    # What GraphQL is asked, by the name of the operation.

    def Viewer(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}

    def RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.server.runs.get(variables["name"])
        bucket = run and {
            "id": variables["name"],
            "name": variables["name"],
            "summaryMetrics": run.summary,
            "historyLineCount": len(run.lines),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(run.history[-1])] if run.lines else []),
            "eventsTail": "[]",
            "config": run.bucket["config"],
            "tags": run.bucket["tags"],
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}, "bucket": bucket}}

    def UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.server.runs.setdefault(variables["name"], ServerRun())
        run.bucket |= {key: value for key, value in variables.items() if value is not None}
        project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "me"}}
        bucket = {
            "id": variables["name"],
            "name": variables["name"],
            "displayName": run.bucket.get("displayName"),
            "historyLineCount": len(run.lines),
            "project": project,
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": not run.lines}}

    def CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": []}}
