"""What a run prints: lines, only what matters, or JSON; and what its log file keeps in each case."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import psutil
import pytest

from lora_core.runtime.console import Console, Mode
from lora_core.runtime.run_folder import write_json
from lora_core.runtime.run_state import read_state, write_state
from tests.conftest import chat
from tests.forked import python


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("lines", "loading\nstep 1\nwarning: x\\x1b\n"),
        ("quiet", "warning: x\\x1b\n"),
        (
            "json",
            '{"event": "message", "text": "loading"}\n{"event": "train", "step": 1}\n'
            '{"event": "message", "text": "warning: x\\\\x1b"}\n',
        ),
    ],
)
def test_each_mode_prints_what_it_should_and_the_log_has_every_line(tmp_path: Path, mode: Mode, expected: str) -> None:
    stream = io.StringIO()
    console = Console(mode, stream)
    console.say("loading")
    console.open_log(tmp_path)
    console.event("train", {"step": 1})
    console.say("step 1", "event")
    console.say("warning: x\x1b", "always")
    console.note("stopped")
    console.close_log()
    assert stream.getvalue() == expected
    lines = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["loading", "step 1", "warning: x\\x1b", "stopped"]
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", line) for line in lines)


def test_other_ranks_say_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "1")
    stream = io.StringIO()
    console = Console("json", stream)
    console.say("loading", "always")
    console.event("train", {})
    console.open_log(tmp_path)
    assert (stream.getvalue(), [*tmp_path.iterdir()]) == ("", [])


def test_a_run_whose_process_is_gone_has_failed(tmp_path: Path) -> None:
    assert read_state(tmp_path) == (None, None)
    write_state(tmp_path, "running")
    assert read_state(tmp_path) == ("running", None)
    values = json.loads((tmp_path / "state.json").read_text(encoding="utf-8"))
    # The same number, of a process that started at another time; then a number that no process has.
    for gone in ({"process_started": values["process_started"] - 100}, {"pid": max(psutil.pids()) + 10**6}):
        write_json(tmp_path / "state.json", values | gone)
        state, reason = read_state(tmp_path)
        assert (state, str(reason)[:19]) == ("failed", "its process is gone")
    write_json(tmp_path / "state.json", values | {"host": "elsewhere"})
    assert read_state(tmp_path)[0] == "running"
    write_state(tmp_path, "stopped", "SIGTERM")
    assert read_state(tmp_path) == ("stopped", "SIGTERM")
    (tmp_path / "state.json").write_text("[]", encoding="utf-8")
    assert read_state(tmp_path) == (None, None)


def test_json_lines_are_the_only_thing_on_stdout_and_nothing_draws_without_a_terminal(
    tmp_path: Path, tiny_model_dir: Path, write_rows: Any
) -> None:
    rows = write_rows([chat(f"q{i}", f"a{i}") for i in range(16)])
    settings = [f"model.name_or_path={tiny_model_dir}", f"data.train_file={rows}", f"data.eval_file={rows}"]
    settings += [f"data.cache_dir={tmp_path / 'cache'}", "train.max_steps=4", "train.save_steps=2"]
    settings += ["train.sample_max_new_tokens=2", f"output_dir={tmp_path / 'run'}"]
    train = ["-m", "lora_core", "train", "--cfg", "demo"]
    done = python(*train, "--json-lines", *settings)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["step"] for event in events if event["event"] == "train"] == [1, 2, 3, 4]
    assert [event["step"] for event in events if event["event"] == "eval"] == [0, 2, 4]
    assert {"message", "reply", "sample", "checkpoint", "summary"} <= {event["event"] for event in events}
    assert json.loads((tmp_path / "run/summary.json").read_text(encoding="utf-8")) == {
        key: value for key, value in events[-1].items() if key != "event"
    }
    # Without a terminal: lines, and no bar.
    assert not re.search(r"[\r\x1b]|%\|", done.stdout + done.stderr)
    log = (tmp_path / "run/train.log").read_text(encoding="utf-8")
    assert all(f"step {step}/4" in log for step in range(1, 5))

    refused = python(*train, "--json-lines", *settings, "overwrite_output_dir=false")
    assert refused.returncode == 2
    assert json.loads(refused.stdout.splitlines()[-1])["exit_code"] == 2
    assert "contains an earlier run" in json.loads(refused.stdout.splitlines()[-1])["message"]

    quiet = python(*train, "--quiet", *settings, "overwrite_output_dir=true", "train.num_sample_replies=0")
    assert quiet.returncode == 0, quiet.stderr
    assert "replacing the earlier run in" in (tmp_path / "run/train.log").read_text(encoding="utf-8")
    assert [line for line in quiet.stdout.splitlines() if not line.startswith(("warning: ", "alarm"))] == [
        json.loads((tmp_path / "run/summary.json").read_text(encoding="utf-8"))["verdict"]
    ]
