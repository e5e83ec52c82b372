"""A stand-in for the server of Weights & Biases, as much of it as ``wandb sync`` asks for."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VIEWER = {"id": "u", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}
PROJECT = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}


class WandbServer:
    """Keeps the history of one run as the real one does: lines are written from the offset that a client gives."""

    def __init__(self) -> None:
        self.history: list[str] = []
        self.offsets: list[int] = []
        self.exists = False
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = self.body()
                answer = server.answer(self.path, json.loads(body) if "otel" not in self.path else {})
                text = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_PUT = do_GET = do_POST

            def body(self) -> bytes:
                body = b""
                if self.headers.get("Transfer-Encoding") == "chunked":
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body or b"{}"

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        if "file_stream" in path:
            for name, part in (asked.get("files") or {}).items():
                if "history" in name:
                    self.offsets.append(part["offset"])
                    self.history[part["offset"] : part["offset"] + len(part["content"])] = part["content"]
            return {"exitcode": None, "limits": {}}
        name = (asked.get("variables") or {}).get("name")
        if asked.get("operationName") == "RunResumeStatus":
            return {"data": {"model": {**PROJECT, "bucket": self._run(name) if self.exists else None}}}
        if asked.get("operationName") == "UpsertBucket":
            self.exists = True
            bucket = {"id": "r", "name": name, "displayName": "n", "config": "{}", "project": PROJECT}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        files = {"runID": "r", "uploadHeaders": [], "files": []}
        info = {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []}
        return {"data": {"viewer": VIEWER, "serverInfo": info, "createRunFiles": files}}

    def _run(self, name: str) -> dict[str, Any]:
        last = self.history[-1] if self.history else "{}"
        counts = {"logLineCount": 0, "historyLineCount": len(self.history), "eventsLineCount": 0}
        tails = {"summaryMetrics": last, "historyTail": json.dumps(self.history[-1:]), "eventsTail": "[]"}
        texts = {"config": "{}", "wandbConfig": '{"t": 1}', "displayName": "n", "tags": [], "notes": None}
        return {"id": "r", "name": name, **counts, **tails, **texts}
