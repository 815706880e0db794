"""The folder of encoded rows: what is damaged, unwritable, full or too large there, and dates that stay in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lora_core.configuration import load_config
from lora_core.data import cache
from lora_core.data.counts import EncodedFile
from lora_core.data.encoded import CODE, encode_file
from lora_core.data.in_memory import with_rows
from lora_core.errors import ConfigError
from lora_core.preflight.rows import check_template_date
from tests.conftest import CHATML, ROOT, chat, make_tokenizer
from tests.forked import python

ROWS = [chat(f"question {i}", f"answer {i}") for i in range(60)]


def encode(path: Path, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> EncodedFile:
    arguments: dict[str, Any] = {"max_seq_length": 512, "cache_dir": path.parent / "cache", **changes}
    return encode_file(path, tokenizer, **arguments)


def test_rows_are_encoded_anew_where_any_module_that_reads_them_has_changed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(write_rows(ROWS), tokenizer)
    read_by = [
        sys.modules[name] for name in [*sys.modules] if name.startswith(("lora_core.rows.", "lora_core.encoding."))
    ]
    assert {Path(str(module.__file__)) for module in read_by} <= {*CODE}
    changed = tmp_path / "turns.py"
    changed.write_text("# another one\n")
    monkeypatch.setattr("lora_core.data.encoded.CODE", [*CODE, changed])
    encode(write_rows(ROWS), tokenizer)
    assert len([*(tmp_path / "cache").rglob("manifest.json")]) == 2


def cut_short(entry: Path) -> None:
    (file,) = entry.glob("*.arrow")
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(entry: Path) -> None:
    (file,) = entry.glob("*.arrow")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose_the_rows(entry: Path) -> None:
    next(entry.glob("*.arrow")).unlink()


def empty_the_manifest(entry: Path) -> None:
    (entry / "manifest.json").write_text("")


def change_the_manifest(entry: Path) -> None:
    (entry / "manifest.json").write_text('{"encoded_on": "2025-01-01", "files": {"rows.arrow": 3}}')


def lose_the_manifest(entry: Path) -> None:
    (entry / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (cut_short, "rows.arrow has "),
        (flip_a_bit, "rows.arrow has the size but not the checksum"),
        (lose_the_rows, "rows.arrow is missing"),
        (empty_the_manifest, "manifest.json cannot be read"),
        (change_the_manifest, "rows.arrow has "),
        (lose_the_manifest, "manifest.json is missing"),
    ],
)
def test_damaged_rows_are_set_aside_and_encoded_anew(
    write_rows: Any,
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    problem: str,
) -> None:
    path = write_rows(ROWS)
    wanted = encode(path, tokenizer).dataset.to_dict()
    (entry,) = (path.parent / "cache").iterdir()
    damage(entry)
    assert encode(path, tokenizer).dataset.to_dict() == wanted
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"{entry}: encoded rows are damaged ({problem}")
    (aside,) = (path.parent / "cache").glob("damaged-*")
    assert said.endswith(f"; set aside as {aside.name}, and encoded anew")
    encode(path, tokenizer)  # the new ones are whole
    assert capsys.readouterr().err == ""


def test_of_large_files_the_ends_and_some_places_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_HASHED_WHOLE_BYTES", 3 * cache._MIB)
    monkeypatch.setattr(cache, "_STRIDE_BYTES", 2 * cache._MIB)
    file = tmp_path / "rows.arrow"
    file.write_bytes(bytes(5 * cache._MIB + 7))
    before = cache._size_and_hash(file)
    for place in (0, 2 * cache._MIB, 5 * cache._MIB + 6):
        with file.open("r+b") as content:
            content.seek(place)
            content.write(b"x")
        after = cache._size_and_hash(file)
        assert after != before
        before = after


def test_rows_not_used_for_longest_are_removed_above_the_limit(
    tmp_path: Path, write_rows: Any, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(ROWS)
    folder = tmp_path / "cache"
    entries = {}
    for length in (100, 101, 102, 103):
        before = set(folder.iterdir()) if folder.is_dir() else set()
        encode(path, tokenizer, max_seq_length=length)
        (entries[length],) = set(folder.iterdir()) - before
    old, now = folder / f"{'0' * 32}-4_00000_of_00004.arrow", time.time()  # as earlier versions wrote them
    old.write_bytes(bytes(1000))
    (folder / "mine.arrow").write_bytes(bytes(10**7))
    (folder / "rows").mkdir()
    left, being_written = folder / ".new-left", folder / ".new-being-written"
    for number, written in enumerate((left, being_written)):
        written.mkdir()
        for each in (written / "tmp", written):
            each.touch()
            os.utime(each, (now - 90_000 * (1 - number),) * 2)
    os.utime(old, (now - 500,) * 2)
    for age, length in ((400, 100), (300, 101), (200, 102), (100, 103)):
        os.utime(entries[length] / "manifest.json", (now - age,) * 2)
    size = sum(file.stat().st_size for file in entries[100].iterdir())
    cache._used_here.clear()  # another run
    encode(path, tokenizer, max_seq_length=100)  # now it is the one used last
    cache._used_here.clear()
    encode(path, tokenizer, max_seq_length=102)
    capsys.readouterr()
    encode(path, tokenizer, max_seq_length=104, cache_limit_gib=3.5 * size / 2**30)
    (said,) = capsys.readouterr().err.splitlines()
    assert f"data.cache_dir={folder}: removed 3 sets of encoded rows not used for longest (" in said
    assert not any(gone.exists() for gone in (old, entries[101], entries[103], left))
    assert all(kept.exists() for kept in (entries[100], entries[102], folder / "mine.arrow", being_written))
    # What this run uses stays, however small the limit.
    encode(path, tokenizer, max_seq_length=105, cache_limit_gib=1e-9)
    assert "removed 1 set of" in capsys.readouterr().err
    assert not entries[100].exists()
    assert entries[102].exists()
    assert len(list(folder.glob("*/rows.arrow"))) == 3


def test_two_processes_that_encode_the_same_rows_both_get_them(tmp_path: Path) -> None:
    def fill(new: Path) -> None:
        (new / "rows.arrow").write_bytes(b"rows")
        if not (tmp_path / "name").exists():
            cache.make_entry(tmp_path, "name", fill_again, 1)  # the other is done first

    def fill_again(new: Path) -> None:
        (new / "rows.arrow").write_bytes(b"rows")

    entry = cache.make_entry(tmp_path, "name", fill, 1)
    assert [file.read_bytes() for file in entry.files] == [b"rows"]
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


@pytest.fixture
def settings(tmp_path: Path, tiny_model_dir: Path, write_rows: Any) -> list[str]:
    return [
        f"model.name_or_path={tiny_model_dir}",
        f"data.train_file={write_rows(ROWS * 10)}",
        "data.eval_file=null",
        f"output_dir={tmp_path / 'run'}",
        "train.bf16=false",
        "model.dtype=float32",
    ]


PREFLIGHT = ["-m", "lora_core", "preflight", "--cfg", "demo"]


def preflight(*overrides: str, max_file_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, with a limit on the size of any file that stands for a full disk."""

    return python(*PREFLIGHT, *overrides, max_file_bytes=max_file_bytes)


def said_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on standard error, of a refusal."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (said,) = done.stderr.strip().splitlines()
    return said


def test_a_file_in_the_place_of_the_folder(settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = said_of(preflight(*settings, f"data.cache_dir={tmp_path}/file/cache"))
    assert said.startswith(f"error: data.cache_dir={tmp_path}/file/cache: encoded rows cannot be kept there: ")
    assert said.endswith("; fix: data.cache_dir=ANOTHER_FOLDER")
    config = load_config("demo", [f"data.cache_dir={tmp_path}/file/cache"])
    with pytest.raises(ConfigError, match=r"fix: data\.cache_dir=ANOTHER_FOLDER"):
        with_rows(config, ROWS, None)


def test_a_home_that_cannot_be_written_to(settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    home = str(tmp_path / "file/home")
    said = said_of(python(*PREFLIGHT, *settings, environment={"HOME": home}))
    assert f"data.cache_dir={home}/.cache/lora_core/encoded: encoded rows cannot be kept there: " in said
    assert said.endswith("; fix: data.cache_dir=ANOTHER_FOLDER")
    # In a new process: libraries choose their own folders when they are imported.
    command = [sys.executable, *PREFLIGHT, *settings, f"data.cache_dir={tmp_path}/cache"]
    environment = {**os.environ, "HOME": home}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_disk_that_fills_up_while_rows_are_encoded(settings: list[str], tmp_path: Path, num_proc: int) -> None:
    overrides = [*settings, f"data.cache_dir={tmp_path}/cache", f"data.num_proc={num_proc}"]
    said = said_of(preflight(*overrides, max_file_bytes=20_000))
    assert f"data.cache_dir={tmp_path}/cache: encoded rows cannot be kept there: File too large" in said
    assert said.endswith("; fix: data.cache_dir=ANOTHER_FOLDER")
    assert list((tmp_path / "cache").iterdir()) == []
    done = preflight(*overrides)
    assert done.returncode == 0, done.stderr
    assert "600 rows read, 600 kept" in done.stdout


def test_processes_without_room_for_semaphores(settings: list[str], tmp_path: Path) -> None:
    overrides = [*settings, f"data.cache_dir={tmp_path}/cache", "data.num_proc=2"]
    said = said_of(preflight(*overrides, max_file_bytes=16))  # a semaphore is a file of 32 bytes
    assert "/dev/shm: the processes that encode rows need room there for their semaphores: " in said
    assert "; fix: data.num_proc=1, or" in said
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_date_in_rows_is_that_of_the_day_they_were_encoded_on(
    write_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(ROWS[:2])
    dated = make_tokenizer("{{ strftime_now('%d %b %Y') }}" + CHATML)
    encode(path, dated)
    (manifest,) = (tmp_path / "cache").glob("*/manifest.json")
    content = json.loads(manifest.read_text())
    assert content["encoded_on"] == time.strftime("%Y-%m-%d")
    manifest.write_text(json.dumps({**content, "encoded_on": "2025-01-31"}))
    data = encode(path, dated)
    assert data.encoded_on == "2025-01-31"

    def found(tokenizer: PreTrainedTokenizerFast, eval_data: EncodedFile | None = None) -> list[str]:
        facts: Any = SimpleNamespace(tokenizer=tokenizer, train_data=data, eval_data=eval_data)
        return [str(finding) for finding in check_template_date(facts)]

    (said,) = found(dated)
    assert said == (
        "note: the chat template writes the date of the day: the encoded rows have 2025-01-31, the day they were "
        "encoded on  [template_uses_date]"
    )
    assert "2025-01-31 and 2025-02-01" in found(dated, replace(data, encoded_on="2025-02-01"))[0]
    fixed = make_tokenizer("{% set date_string = date_string or '26 Jul 2024' %}{{ date_string }}" + CHATML)
    assert "(date_string): the rows, encoded on 2025-01-31, have the one that" in found(fixed)[0]
    assert found(make_tokenizer()) == []
