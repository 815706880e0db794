"""A dataset of the hub, read row by row from a server on this machine that speaks as the hub does."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lora_core.config.schema import TrainFile
from lora_core.sources.files import as_jsonl
from tests.conftest import ROOT
from tests.sources.test_files import content, lines_of

ROWS = [
    {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]} for i in range(40)
]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "owner/rows"


class Hub(http.server.BaseHTTPRequestHandler):
    """One dataset of one file, in the few answers that reading it takes."""

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]] = {"train.jsonl": lines_of(ROWS)}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer()

    def _answer(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(f"{self.command} {path}")
        if path.startswith(f"/datasets/{NAME}/resolve/"):
            return self._file(path.rsplit("/", 1)[1])
        entries = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in self.files.items()]
        if "/tree/" in path or "/paths-info/" in path:
            return self._send(200, json.dumps(entries).encode())
        if path.startswith(f"/api/datasets/{NAME}"):
            siblings = [{"rfilename": name} for name in self.files]
            answer = {"id": NAME, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            return self._send(200, json.dumps(answer).encode())
        return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _file(self, name: str) -> None:
        if name not in self.files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data, headers = self.files[name], {"ETag": '"1"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range", "")
        if not asked:
            return self._send(200, data, headers)
        first, last = (int(part or len(data) - 1) for part in asked.removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        return self._send(206, part, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def read_by_command(endpoint: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`lora-core convert` in a process of its own: the hub's address is read when its library is imported."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    command = [sys.executable, "-m", "lora_core", "convert", NAME, "--output", str(folder / "out.jsonl")]
    return subprocess.run(
        [*command, f"data.cache_dir={folder / 'cache'}", *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment,
    )


def test_a_dataset_of_the_hub_is_read_without_a_copy_of_its_files(hub: str, tmp_path: Path) -> None:
    done = read_by_command(hub, tmp_path, "data.streaming=true")
    assert done.returncode == 0, done.stderr
    assert f"wrote {tmp_path / 'out.jsonl'}: 40 rows" in done.stdout
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == ROWS
    assert any(asked.endswith("/train.jsonl") for asked in Hub.asked)
    kept = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and b"q39" in path.read_bytes()]
    assert kept == []


def test_a_hub_that_cannot_be_reached_is_a_sentence(tmp_path: Path) -> None:
    done = read_by_command("http://127.0.0.1:9", tmp_path, "data.streaming=true")
    assert done.returncode == 2
    assert f"{NAME}:train: no such file or folder here" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_first_rows_of_a_split_that_is_read_as_it_comes(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(lines_of(ROWS))
    given = [TrainFile(path=str(folder), split="train", max_rows=7), TrainFile(path=str(folder), split="train")]
    places = as_jsonl(given, tmp_path / "cache", streaming=True)
    assert content(places) == [*ROWS[:7], *ROWS]
    assert places.place(8) == f"{folder}:train:row 1"
    assert places.notes[0] == f"{folder}:train: 7 rows, read as it comes; its first 7"
    # Other rows in the folder are other rows here.
    (folder / "train.jsonl").write_bytes(lines_of(ROWS[:5]))
    assert content(as_jsonl(given[1:], tmp_path / "cache", streaming=True)) == ROWS[:5]
