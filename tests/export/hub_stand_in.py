"""A stand-in for the Hugging Face hub: the endpoints of its HTTP API that an upload uses, over files in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml
from huggingface_hub.repocard_data import ModelCardData, model_index_to_eval_results

OWNER, TOKEN = "someone", "hf_" + "a1B2" * 8


class StandIn(ThreadingHTTPServer):
    """What it was given, and what it shall do wrong."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        """name -> private, files (path -> content)."""
        self.objects: dict[str, bytes] = {}
        """Large files by SHA-256, whether or not a commit holds them."""
        self.num_uploads = 0
        self.broken_uploads = 0
        """So many uploads are answered with 403, as by a link that is too old."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        if path == "/api/validate-yaml":
            self._validate_yaml(json.loads(body)["content"])
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif self._repo(path) is None:
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif path.endswith("/preupload/main"):
            self._preupload(self._repo(path), json.loads(body))
        elif path.endswith("/commit/main"):
            self._commit(self._repo(path), [json.loads(line) for line in body.splitlines()])
        else:
            self._answer({"error": f"unknown to the stand-in: POST {path}"}, 500)

    def do_GET(self) -> None:
        repo = self._repo(self.path.split("?")[0])
        if repo is None:
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        else:
            self._answer({"id": "/".join(self.path.split("/")[3:5]), "private": repo["private"], "sha": "0" * 40})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.broken_uploads:
            self.server.broken_uploads -= 1
            self._answer({"error": "this link is too old"}, 403)
            return
        self.server.objects[hashlib.sha256(content).hexdigest()] = content
        self.server.num_uploads += 1
        self._answer({})

    def _repo(self, path: str) -> Any:
        return self.server.repos.get("/".join(path.split("/")[3:5]))

    def _answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        always = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for name, text in {**always, **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def _validate_yaml(self, content: str) -> None:
        """By huggingface_hub's own classes; the hub's further rules are its secret."""
        try:
            metadata = yaml.safe_load(content.split("---\n")[1])
            ModelCardData(**metadata, ignore_metadata_errors=False)
            if "model-index" in metadata:
                assert model_index_to_eval_results(metadata["model-index"])[1]
        except (IndexError, KeyError, TypeError, ValueError, AssertionError) as error:
            self._answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
            return
        self._answer({"errors": [], "warnings": []})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        if not name.startswith(f"{OWNER}/"):
            self._answer({"error": "You don't have the rights"}, 403)
        elif name in self.server.repos:
            self._answer({"error": "You already created this model repo", "url": f"{self.server.address}/{name}"}, 409)
        else:
            private = asked.get("private") or asked.get("visibility") == "private"
            self.server.repos[name] = {"private": bool(private), "files": {}}
            self._answer({"url": f"{self.server.address}/{name}", "name": name})

    def _preupload(self, repo: Any, asked: dict[str, Any]) -> None:
        def answer(file: dict[str, Any]) -> dict[str, Any]:
            is_large = file["path"].endswith((".safetensors", ".gguf")) or file["size"] > 10 * 2**20
            there = repo["files"].get(file["path"])
            oid = None if there is None else _oid(there, is_large)
            mode = "lfs" if is_large else "regular"
            return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

        self._answer({"files": [answer(file) for file in asked["files"]]})

    def _batch(self, asked: dict[str, Any]) -> None:
        def answer(wanted: dict[str, Any]) -> dict[str, Any]:
            if wanted["oid"] in self.server.objects:
                return wanted
            return {**wanted, "actions": {"upload": {"href": f"{self.server.address}/upload/{wanted['oid']}"}}}

        self._answer({"transfer": "basic", "objects": [answer(wanted) for wanted in asked["objects"]]})

    def _commit(self, repo: Any, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo["files"][value["path"]] = self.server.objects[value["oid"]]
        address = f"{self.server.address}/{'/'.join(self.path.split('/')[3:5])}/commit/{'1' * 40}"
        self._answer({"commitOid": "1" * 40, "commitUrl": address, "success": True})


def _oid(content: bytes, is_large: bool) -> str:
    if is_large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # as git counts


@contextmanager
def standing_in() -> Iterator[StandIn]:
    """Runs in a thread for the block."""
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
