"""Whatever file people bring is read, with the places of its rows; or it is refused by name."""

from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import http.server
import io
import json
import lzma
import os
import pickle
import re
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lora_core.config.schema import RunConfig, TrainFile
from lora_core.configuration import load_config, with_overrides
from lora_core.data.counts import EncodedFile
from lora_core.data.encoded import encode_file, load_data
from lora_core.data.in_memory import with_rows
from lora_core.errors import ConfigError, DataError
from lora_core.evaluation.replies import sample_prompts
from lora_core.sources import json_stream
from lora_core.sources.files import as_jsonl
from lora_core.sources.json_stream import JsonStream, on_one_line
from lora_core.sources.kinds import kind_of
from lora_core.sources.places import Places
from lora_core.sources.readers import read_rows
from tests.conftest import ROOT, chat

ROWS = [chat(f"question {i}, said “so”", f"answer\n{i}") for i in range(7)]
PAIRS = [{"prompt": f'a "{i}", b', "completion": f"one\ntwo {i}"} for i in range(7)]


def lines_of(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def arrow(rows: list[Any], stream: bool) -> bytes:
    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    writer = pa.ipc.new_stream(sink, table.schema) if stream else pa.ipc.new_file(sink, table.schema)
    with writer:
        writer.write_table(table, max_chunksize=3)
    return sink.getvalue()


def parquet(rows: list[Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def table(rows: list[Any], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def pretty(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row, indent=2, ensure_ascii=False) for row in rows).encode()


# name of the file -> (its bytes of some rows, what places in it look like for the third row)
KINDS: dict[str, tuple[Callable[[list[Any]], bytes], str]] = {
    "rows.jsonl.gz": (lambda rows: gzip.compress(lines_of(rows)), ":3"),
    "rows.jsonl.xz": (lambda rows: lzma.compress(lines_of(rows)), ":3"),
    "rows.jsonl.bz2": (lambda rows: bz2.compress(lines_of(rows)), ":3"),
    "gzipped without an ending": (lambda rows: gzip.compress(lines_of(rows)), ":3"),
    "array.jsonl": (lambda rows: json.dumps(rows).encode(), ":row 3"),
    "array with a mark.json": (lambda rows: b"\xef\xbb\xbf\n" + json.dumps(rows, indent=1).encode(), ":row 3"),
    "array.json.gz": (lambda rows: gzip.compress(json.dumps(rows).encode()), ":row 3"),
    "holder.json": (lambda rows: json.dumps({"version": [1], "data": rows, "by": {"a": []}}).encode(), ":row 3"),
    "holder, indented": (lambda rows: json.dumps({"train": rows}, indent=4).encode(), ":row 3"),
    "pretty.jsonl": (pretty, ":25"),
    "pretty, windows.json": (lambda rows: pretty(rows).replace(b"\n", b"\r\n"), ":25"),
    "one line.json": (lambda rows: "".join(map(json.dumps, rows)).encode(), ":row 3"),
    "old Mac.jsonl": (lambda rows: lines_of(rows).replace(b"\n", b"\r"), ":row 3"),
    "rows.parquet": (parquet, ":row 3"),
    "parquet by another name.jsonl": (parquet, ":row 3"),
    "rows.arrow": (partial(arrow, stream=False), ":row 3"),
    "stream.arrow": (partial(arrow, stream=True), ":row 3"),
}
TABLES: dict[str, Callable[[list[Any]], bytes]] = {
    "rows.csv": table,
    "rows.csv.gz": lambda rows: gzip.compress(table(rows)),
    "with a mark.csv": lambda rows: b"\xef\xbb\xbf" + table(rows),
    "semicolons.csv": partial(table, delimiter=";"),
    "rows.tsv": partial(table, delimiter="\t"),
    "csv by another name.jsonl": table,
}


def encode(path: Any, tokenizer: PreTrainedTokenizerFast, cache: Path, **changes: Any) -> EncodedFile:
    return encode_file(path, tokenizer, **{"max_seq_length": 512, "cache_dir": cache, **changes})


def content(places: Places) -> list[Any]:
    lines = places.path.read_text(encoding="utf-8-sig").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def read(path: Any, cache: Path, **changes: Any) -> list[Any]:
    return content(as_jsonl(path, cache, **changes))


@pytest.mark.parametrize("name", [*KINDS, *TABLES])
def test_every_kind_gives_the_rows_of_the_jsonl(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    rows, as_bytes = (PAIRS, TABLES[name]) if name in TABLES else (ROWS, KINDS[name][0])
    (tmp_path / "plain.jsonl").write_bytes(lines_of(rows))
    (tmp_path / name).write_bytes(as_bytes(rows))
    before = (tmp_path / name).read_bytes()
    plain = encode(tmp_path / "plain.jsonl", tokenizer, tmp_path / "cache")
    encoded = encode(tmp_path / name, tokenizer, tmp_path / "cache")
    for column in ("input_ids", "loss_mask"):
        assert encoded.dataset[column][:] == plain.dataset[column][:]
    assert encoded.counts == plain.counts
    ending = ":row 3" if name in TABLES else KINDS[name][1]
    assert encoded.places.place(encoded.dataset["line"][2]) == f"{tmp_path / name}{ending}"
    assert "7 rows, read as" in encoded.places.notes[0]
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("name", KINDS)
def test_a_bad_row_is_named_by_its_place_in_the_users_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    as_bytes, ending = KINDS[name]
    (tmp_path / name).write_bytes(as_bytes([*ROWS[:2], {"messages": [{"role": "robot", "content": "Hi"}]}]))
    with pytest.raises(DataError) as caught:
        encode(tmp_path / name, tokenizer, tmp_path / "cache")
    first, second, _ = str(caught.value).splitlines()
    assert first == f"{tmp_path / name}: 1 of 3 rows cannot be used:"
    assert second.startswith(f"  {tmp_path / name}{ending}: turn 1 has the role 'robot'")


def test_one_plain_jsonl_is_read_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n" + lines_of(ROWS))
    places = as_jsonl(path, tmp_path / "cache")
    assert places == Places.of_file(path)
    assert (places.place(2), places.mark(2), places.listed([2, 5]), places.notes) == (f"{path}:2", 2, "lines 2, 5", ())
    assert places.between(1, 3) == f"{path}, in lines 1 to 3"
    assert not (tmp_path / "cache").exists()


def test_lines_of_a_compressed_file_pass_as_they_are(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "rows.jsonl.gz"
    good = json.dumps(ROWS[0]).encode()
    path.write_bytes(gzip.compress(b"\n\n".join([good, b"{'a': 1}", b"\xff\xfe", good])))
    with pytest.raises(DataError) as caught:
        encode(path, tokenizer, tmp_path / "cache")
    assert f"{path}:3: not valid JSON" in str(caught.value)
    assert f"{path}:5: not UTF-8 at byte 0" in str(caught.value)
    encoded = encode(path, tokenizer, tmp_path / "cache", on_bad_row="skip")
    assert (encoded.dataset["line"][:], encoded.counts.dropped_bad) == ([1, 7], 2)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS[0]),
        json.dumps({"dialogue": [{"speaker": "a", "role": "user", "content": "b"}]}),
        json.dumps({"conversations": [{"x": 1}]}),
        lines_of([{"data": [{"a": 1}]}, {"data": [{"a": 2}]}]).decode(),
        '{"messages": [\n{"messages": []}\n{"messages": []}',  # a first line that was cut off
        '{"a": "' + "b" * 100 + '\n{"a": 1}',
        "Hello, world",
        "ORC is no magic word in a text",
        lines_of([row["messages"] for row in ROWS]).decode(),
        '"Hi"',
    ],
)
def test_lines_stay_lines(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    assert kind_of(path, "rows").name == "JSONL"


def test_one_row_over_several_lines_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "row.json").write_bytes(pretty(ROWS[:1]))
    assert read(tmp_path / "row.json", tmp_path) == ROWS[:1]


# ---------------------------------------------------------------------------------------------------------------
# JSON over several lines

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.lists(st.dictionaries(st.text(), JSON, max_size=4), min_size=1, max_size=5)


@settings(suppress_health_check=[HealthCheck.too_slow])  # drawing takes as long as the machine is busy
@given(
    rows=OBJECTS,
    indent=st.none() | st.integers(0, 9) | st.just("\t"),
    ascii_only=st.booleans(),
    gap=st.sampled_from(["\n", "\r\n", "\n\n \n"]),
    chunk=st.integers(1, 40),
)
def test_objects_come_back_however_they_are_indented(
    rows: list[Any], indent: Any, ascii_only: bool, gap: str, chunk: int
) -> None:
    texts = [json.dumps(row, indent=indent, ensure_ascii=ascii_only) for row in rows]
    # Half a surrogate pair is no UTF-8; json writes it as an escape.
    whole = gap.join(texts).encode("utf-8", errors="replace")
    rows = [json.loads(text.encode("utf-8", errors="replace")) for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_CHUNK", chunk)
        stream = JsonStream(io.BytesIO(whole), "rows")
        found = []
        while stream.peek():
            line = stream.line
            found.append((line, on_one_line(stream.value())))
    assert [json.loads(text) for _, text in found] == rows
    assert all(b"\n" not in text for _, text in found)
    lines = whole.split(b"\n")
    assert all(lines[line - 1].startswith(b"{") for line, _ in found)


def test_what_is_written_keeps_digits_and_what_rows_are_refused_for(tmp_path: Path) -> None:
    number = "0.1000000000000000055511151231257827" + "1" * 5000
    text = f'[\n{{"a": {number},\n "a": NaN}}, {{"b": "x \\n y"}}\n]'
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    lines = as_jsonl(tmp_path / "rows.json", tmp_path).path.read_text(encoding="utf-8").splitlines()
    assert lines == [f'{{"a": {number}, "a": NaN}}', '{"b": "x \\n y"}']


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"a": 1},\n{"a": }]', "rows.json:2: not valid JSON: Expecting value"),
        ('[{"a": 1}\n{"a": 2}]', "rows.json:2: needs ',' here, not '{'"),
        ('[{"a": 1},', "rows.json:1: not valid JSON: Expecting value"),
        ('[{"a": 1}]\n[{"a": 2}]', "rows.json:2: there is more after the list's end"),
        ('{\n"a": 1\n}\n{\n"a" 2\n}', r"rows.json:\d: "),
        ('{\n"a": 1\n},\n{\n"a": 2\n}', "rows.json:3: needs an object here, not ','"),
        ('{\n"a": 1\n}{\n"a": 2\n}{}{}', "rows.json:5: a second object in this line"),
        ('{\n"a": [1, 2\n}', r"rows.json:3: needs ',' here, not '}'"),
        ('[{"a": 1},\n]', "rows.json:2: a comma without an item after it; fix: leave the last comma out"),
        ('[{"a": 1}\n', "rows.json:2: the list has no end, so the file was cut off; fix: fetch"),
        ('{"a": 1},\n{"a": 2},\n', "rows.json:1: needs an object here, not ','; fix: objects alone, no commas"),
        ('{"a": 1}{"a": 2}\n{"a": ', r"rows.json:2: not valid JSON"),
        ("[]", "holds no rows; it was read as a JSON list"),
        ("[" * 100_000, "JSON nested too deeply"),
    ],
)
def test_json_that_is_broken_is_named_by_its_line(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=expected):
        as_jsonl(tmp_path / "rows.json", tmp_path / "cache")
    assert list((tmp_path / "cache/rows").glob("**/*")) == []


def test_a_value_without_an_end_is_not_read_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MAX_VALUE_CHARACTERS", 1000)
    monkeypatch.setattr(json_stream, "_CHUNK", 100)
    (tmp_path / "rows.json").write_text('[{"a": "' + "b" * 5000, encoding="utf-8")
    with pytest.raises(DataError, match=r"more than 1,000 characters, or rows\.json:1: not valid JSON: Unterminated"):
        list(JsonStream((tmp_path / "rows.json").open("rb"), "rows.json").items())


# ---------------------------------------------------------------------------------------------------------------
# Columns


def test_null_columns_are_no_keys_and_dates_are_text(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "day": datetime.date(2024, 2, 29)}, {**ROWS[1], "at": datetime.datetime(2024, 1, 2, 3, 4)}]
    at = pa.array([row.get("at") for row in rows], pa.timestamp("ns"))
    columns = {"messages": [row["messages"] for row in rows], "day": [row.get("day") for row in rows], "at": at}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    expected = [{**ROWS[0], "day": "2024-02-29"}, {**ROWS[1], "at": "2024-01-02T03:04:00"}]
    assert read(tmp_path / "rows.parquet", tmp_path) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"\x89PNG", "the column 'more' holds bytes, which JSON cannot hold"),
        ({"deep": [float("nan")]}, "the column 'more' holds a number that is not finite"),
        (datetime.timedelta(1), "the column 'more' holds timedelta, which JSON cannot hold"),
    ],
)
def test_a_column_that_json_cannot_hold_is_named(tmp_path: Path, value: Any, expected: str) -> None:
    (tmp_path / "rows.parquet").write_bytes(parquet([{**ROWS[0], "more": None}, {**ROWS[1], "more": value}]))
    with pytest.raises(DataError, match=re.escape(f"rows.parquet:row 2: {expected}; fix: leave that column out")):
        as_jsonl(tmp_path / "rows.parquet", tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt,completion,prompt\na,b,c\n", "the header names 'prompt' more than once"),
        ("prompt,completion\na,b\nHi, you,c\n", "rows.csv:row 2: has 3 cells, and the header 2 (line 3)"),
        ('prompt,completion\na,"b" c\n', "rows.csv:row 1: not valid CSV"),
        ("prompt,completion\n", "holds no rows; it was read as CSV"),
        (b"prompt,completion\na,caf\xe9\n", "rows.csv: not UTF-8 after row 0; fix: save the file as CSV UTF-8"),
    ],
)
def test_tables_that_are_broken(tmp_path: Path, text: str | bytes, expected: str) -> None:
    (tmp_path / "rows.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=re.escape(expected)):
        as_jsonl(tmp_path / "rows.csv", tmp_path)


def test_cells_stay_text_and_may_be_long(tmp_path: Path) -> None:
    rows = [{"prompt": "007", "completion": "1e3"}, {"prompt": "", "completion": "x" * 200_000}]
    (tmp_path / "rows.csv").write_bytes(table(rows))
    limit = csv.field_size_limit()
    assert read(tmp_path / "rows.csv", tmp_path) == rows
    assert csv.field_size_limit() == limit


def test_names_of_columns_have_no_spaces_around_them_and_an_index_gets_a_name(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b",prompt, completion \n0,a, b\n")
    assert read(tmp_path / "rows.csv", tmp_path) == [{"column 1": "0", "prompt": "a", "completion": " b"}]


def test_many_rows_go_through_in_flat_memory(tmp_path: Path) -> None:
    columns = {"prompt": ["q" * 100] * 60_000, "completion": [f"{i}" * 10 for i in range(60_000)]}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    del columns
    next(read_rows(tmp_path / "rows.parquet", kind_of(tmp_path / "rows.parquet", ""), ""))  # imports
    tracemalloc.start()
    try:
        places = as_jsonl(tmp_path / "rows.parquet", tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert places.path.stat().st_size > 10_000_000
    assert peak < 8_000_000


# ---------------------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.parametrize(
    ("names", "key", "fix"),
    [
        (["train.jsonl", "test.jsonl"], "data.train_file", "data.train_file={folder}/train.jsonl, or for all"),
        (["train.jsonl", "test.jsonl"], "data.eval_file", "data.eval_file={folder}/test.jsonl, or for all"),
        (
            ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "validation-00000-of-00001.jsonl"],
            "data.train_file",
            "data.train_file='{folder}/*train*.jsonl', or for all",
        ),
    ],
)
def test_rows_to_measure_on_are_not_trained_on_by_mistake(tmp_path: Path, names: list[str], key: str, fix: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(lines_of(ROWS))
    for given_path in (tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(DataError, match="holds rows of several splits") as caught:
            as_jsonl(given_path, tmp_path / "cache", key=key)
        assert f"fix: {fix.format(folder=tmp_path)}" in str(caught.value)
    assert as_jsonl(tmp_path / "*train*.jsonl", tmp_path / "cache").parts[0].source.startswith(str(tmp_path / "train"))


def test_names_that_only_sound_like_a_split_are_no_splits(tmp_path: Path) -> None:
    for name in ("trainers.jsonl", "contest.jsonl", "train.jsonl", "train-without-test.jsonl"):
        (tmp_path / name).write_bytes(lines_of(ROWS[:1]))
    assert len(read(tmp_path, tmp_path / "cache")) == 4


def test_a_file_is_read_once_however_many_links_lead_to_it(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/a.jsonl").write_bytes(lines_of(ROWS))
    (tmp_path / "rows/b.jsonl").symlink_to("a.jsonl")
    (tmp_path / "rows/again").symlink_to(".")
    assert read(tmp_path / "rows/**/*.jsonl", tmp_path / "cache") == ROWS
    (tmp_path / "rows/gone.jsonl").symlink_to("nowhere.jsonl")
    with pytest.raises(DataError, match="a link to a file that is not there"):
        as_jsonl(tmp_path / "rows/gone.jsonl", tmp_path / "cache")


def test_the_fix_for_a_folder_of_folders_reads_rows(tmp_path: Path) -> None:
    """A saved DatasetDict, and a folder as the hub has it."""
    saved, hub = tmp_path / "saved", tmp_path / "hub"
    parts = {"train": datasets.Dataset.from_list(PAIRS), "test": datasets.Dataset.from_list(PAIRS[:1])}
    datasets.DatasetDict(parts).save_to_disk(str(saved))
    with pytest.raises(DataError, match=re.escape(f"fix: data.train_file={saved / 'train'}")):
        as_jsonl(saved, tmp_path / "cache")
    assert read(saved / "train", tmp_path / "cache") == PAIRS
    (hub / "data").mkdir(parents=True)
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: data/a.jsonl}\n---\n"
    )
    (hub / "data/a.jsonl").write_bytes(lines_of(PAIRS))
    (hub / "data/b.jsonl").write_bytes(lines_of(ROWS))
    with pytest.raises(DataError, match=re.escape(f"fix: 'data.train_files=[{{path: {hub}, split: train}}]'")):
        as_jsonl(hub, tmp_path / "cache")
    assert read([TrainFile(path=str(hub), split="train")], tmp_path / "cache") == PAIRS
    (hub / "README.md").unlink()
    with pytest.raises(DataError, match=re.escape(f"fix: data.train_file='{hub}/**/*.jsonl'")):
        as_jsonl(hub, tmp_path / "cache")


# ---------------------------------------------------------------------------------------------------------------
# What is no data file


def zipped(name: str) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr(name, lines_of(ROWS))
    return target.getvalue()


def tarred() -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        member = tarfile.TarInfo("rows.jsonl")
        member.size = len(lines_of(ROWS))
        archive.addfile(member, io.BytesIO(lines_of(ROWS)))
    return target.getvalue()


REFUSED: dict[str, tuple[bytes, str]] = {
    "zip": (zipped("rows.jsonl"), "a zip archive; fix: python -m zipfile -e "),
    "Excel": (zipped("[Content_Types].xml"), "an Office file"),
    "tar": (tarred(), "a tar archive; fix: mkdir "),
    "tar.gz": (gzip.compress(tarred()), "a tar archive; fix: mkdir "),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "a Git LFS pointer"),
    "HTML": (b"\n<!DOCTYPE html>\n<html>", "an HTML page, not the file"),
    "XML": (b'<?xml version="1.0"?>', "an XML file"),
    "PDF": (b"%PDF-1.7\n", "a PDF; rows are read from JSONL, JSON, CSV, TSV, Parquet and Arrow; fix: "),
    "UTF-16": (lines_of(ROWS).decode().encode("utf-16"), "UTF-16 text, not UTF-8; fix: iconv -f UTF-16 "),
    "UTF-16 without a mark": (b"{\0}\0\n\0", "UTF-16LE text"),
    "UTF-32": ("{}".encode("utf-32"), "UTF-32 text"),
    "pickle": (pickle.dumps(ROWS), "a Python pickle, which is never loaded"),
    "SQLite": (b"SQLite format 3\0", "a SQLite database"),
    "gzipped Parquet": (
        gzip.compress(parquet(ROWS)),
        "Parquet inside gz, which cannot be read in parts; fix: gzip ",
    ),
    "zeros": (bytes(5000), "only zero bytes"),
    "empty": (b"", "the file is empty"),
    "empty gz": (gzip.compress(b""), "holds no rows"),
    "half a gz": (gzip.compress(lines_of(ROWS))[:-20], "cannot be read"),
    "half a Parquet": (parquet(ROWS)[:-50], "cannot be read as Parquet"),
    "two lists": (
        json.dumps({"train": ROWS, "test": ROWS}).encode(),
        "one JSON object with lists of rows under 2 keys ('train', 'test'), and 1 is read; fix: python -c ",
    ),
    "two lists of odd names": (
        json.dumps({"it's $HOME": ROWS, "`b`": ROWS}).encode(),
        "one JSON object with lists of rows under 2 keys (\"it's $HOME\", '`b`'), and 1 is read; fix: python -c ",
    ),
    "two lists, gz": (
        gzip.compress(json.dumps({"train": ROWS, "test": ROWS}).encode()),
        "one JSON object with lists of rows under 2 keys ('train', 'test'), and 1 is read; fix: gzip -dc ",
    ),
    "a list beside texts": (
        json.dumps({"title": "t", "parts": ROWS}).encode(),
        "one JSON object with a list of objects under 'parts', beside other keys ('title'); fix: python -c ",
    ),
    "columns": (
        json.dumps({"messages": [row["messages"] for row in ROWS]}).encode(),
        "one JSON object of columns, each a list; fix: python -c ",
    ),
    "columns over lines": (
        json.dumps({"messages": [row["messages"] for row in ROWS]}, indent=1).encode(),
        "one JSON object of columns, each a list; fix: python -c ",
    ),
    "columns of pandas": (
        json.dumps({"messages": {i: row["messages"] for i, row in enumerate(ROWS)}}).encode(),
        "one JSON object of columns, each an object with a number for each row; fix: python -c ",
    ),
    "rows of pandas": (
        json.dumps(dict(enumerate(ROWS))).encode(),
        "one JSON object with a number for each row; fix: python -c ",
    ),
    "a table of pandas": (
        json.dumps(
            {"columns": ["messages"], "index": [*range(7)], "data": [[row["messages"]] for row in ROWS]}
        ).encode(),
        "one JSON object with a table in parts: columns, and data; fix: python -c ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_data_file_is_named(tmp_path: Path, name: str) -> None:
    raw, expected = REFUSED[name]
    (tmp_path / "rows.jsonl").write_bytes(raw)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'rows.jsonl'}: {expected}")):
        as_jsonl(tmp_path / "rows.jsonl", tmp_path / "cache")


WITH_A_COMMAND = ["tar", "tar.gz", "UTF-16", "gzipped Parquet", "zip", "two lists", "two lists of odd names"]
WITH_A_COMMAND += ["two lists, gz", "a list beside texts", "columns", "columns over lines", "columns of pandas"]
WITH_A_COMMAND += ["rows of pandas", "a table of pandas"]


@pytest.mark.parametrize("name", WITH_A_COMMAND)
def test_a_fix_works_when_pasted_and_writes_to_no_file_that_is_there(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("it's $HOME; rows.jsonl")
    path.write_bytes(REFUSED[name][0])
    Path("it's $HOME; rows.utf8.jsonl").write_text("here before", encoding="utf-8")
    before = {each: each.read_bytes() for each in Path().iterdir()}
    with pytest.raises(DataError) as caught:
        as_jsonl(path, tmp_path / "cache")
    command = re.split(r", and name that", str(caught.value).split("; fix: ", 1)[1])[0]
    subprocess.run(command, shell=True, check=True, capture_output=True)
    assert {each: each.read_bytes() for each in before} == before
    (new,) = set(Path().iterdir()) - set(before) - {Path("cache")}
    assert read(new, tmp_path / "cache") == ROWS


@pytest.mark.parametrize("value", [b"\x89PNG", {"bytes": b"x", "path": "a.png"}, [float("nan")]])
def test_a_column_that_json_cannot_hold_is_refused_with_a_command_that_leaves_it_out(
    tmp_path: Path, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("it's $HOME.parquet")
    path.write_bytes(parquet([{**row, "a column": value} for row in ROWS]))
    with pytest.raises(DataError, match=r"row 1: the column 'a column' holds .*out of the file: python -c ") as caught:
        as_jsonl(path, tmp_path / "cache")
    command = re.split(r", and name that", str(caught.value).split("out of the file: ", 1)[1])[0]
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # its Python has Arrow
    subprocess.run(command, shell=True, check=True, capture_output=True)
    (new,) = set(Path().iterdir()) - {path, Path("cache")}
    assert read(new, tmp_path / "cache") == ROWS


def test_a_map_of_arrow_is_an_object_and_a_key_twice_is_refused(tmp_path: Path) -> None:
    turns = [[[*turn.items()] for turn in row["messages"]] for row in ROWS]
    kind = pa.list_(pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"messages": pa.array(turns, kind)}), tmp_path / "maps.parquet")
    assert read(tmp_path / "maps.parquet", tmp_path / "cache") == ROWS
    turns[0][0] += [("role", "assistant")]
    pq.write_table(pa.table({"messages": pa.array(turns, kind)}), tmp_path / "twice.parquet")
    with pytest.raises(DataError, match=r"cannot be read as Parquet: .*duplicate key was 'role'"):
        as_jsonl(tmp_path / "twice.parquet", tmp_path / "cache")


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answer": "a", "sources": [{"url": "x"}]},
        {"text": "t", "links": [{"url": "x"}]},
        {"id": "0", "data": ["q", "a"]},
        {"messages": [{"role": "user", "content": "q"}], "tools": [{"name": "f"}]},
    ],
)
def test_one_row_with_a_list_is_a_row(tmp_path: Path, row: dict[str, Any]) -> None:
    for indent in (None, 1):
        (tmp_path / "row.json").write_text(json.dumps(row, indent=indent), encoding="utf-8")
        assert read(tmp_path / "row.json", tmp_path / "cache") == [row]


@pytest.mark.parametrize("key", ["data", "conversations", "messages"])
def test_a_list_of_chats_under_any_name_holds_rows(tmp_path: Path, key: str) -> None:
    (tmp_path / "rows.json").write_text(json.dumps({key: ROWS}), encoding="utf-8")
    assert read(tmp_path / "rows.json", tmp_path / "cache") == ROWS


def test_keys_beside_the_rows_of_an_object_are_named(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps({"version": "1", "tags": ["a"], "data": ROWS}), encoding="utf-8")
    places = as_jsonl(tmp_path / "rows.json", tmp_path / "cache")
    assert content(places) == ROWS
    assert places.notes == (
        f"{tmp_path / 'rows.json'}: 7 rows, read as a JSON object (its key 'data'; not read: 'tags', 'version')",
    )


def test_cells_may_be_kept_apart_by_bars(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('prompt|completion\n"q|, 1"|a\n', encoding="utf-8")
    assert read(tmp_path / "rows.csv", tmp_path / "cache") == [{"prompt": "q|, 1", "completion": "a"}]


def test_zst_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("zstandard", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "rows.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\0")
    with pytest.raises(DataError, match=r"rows\.jsonl\.zst: compressed with zstd.*fix: pip install zstandard"):
        as_jsonl(tmp_path / "rows.jsonl.zst", tmp_path)


def test_zst_is_read_where_its_package_is(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.zst").write_bytes(zstandard.compress(lines_of(ROWS)))
    assert read(tmp_path / "rows.jsonl.zst", tmp_path) == ROWS


# ---------------------------------------------------------------------------------------------------------------
# Folders, patterns, addresses, the hub


def test_folders_patterns_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = tmp_path / "rows", tmp_path / "cache"
    folder.mkdir()
    (folder / "b.parquet").write_bytes(parquet(ROWS[2:4]))
    (folder / "a.jsonl").write_bytes(lines_of(ROWS[:2]))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines_of(ROWS[4:])))
    for name in ("README.md", ".hidden.jsonl", "_old.jsonl", "dataset_info.json"):
        (folder / name).write_text("no rows", encoding="utf-8")
    places = as_jsonl(folder, cache)
    assert content(places) == ROWS
    assert [part.source for part in places.parts] == [str(folder / n) for n in ("a.jsonl", "b.parquet", "c.jsonl.gz")]
    assert places.listed([2, 3, 4, 6]) == (
        f"{folder}/a.jsonl line 2; {folder}/b.parquet rows 1, 2; {folder}/c.jsonl.gz line 2"
    )
    assert places.between(1, 3) == f"{folder}/a.jsonl:1 to {folder}/b.parquet:row 1"
    assert read(f"{folder}/[a-c].jsonl*", cache) == [*ROWS[:2], *ROWS[4:]]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/rows/b.parquet", cache) == ROWS[2:4]
    assert read("~/rows/**/*.parquet", cache) == ROWS[2:4]


def test_rows_that_came_with_the_package_are_named_where_they_are_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as refused:
        as_jsonl("examples/train.jsonl", tmp_path)
    fix = str(refused.value).partition("fix: data.train_file=")[2]
    assert as_jsonl(fix, tmp_path).path.samefile(ROOT / "examples/train.jsonl")


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "rows [1].jsonl").write_bytes(lines_of(ROWS))
    assert read(tmp_path / "rows [1].jsonl", tmp_path) == ROWS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing.jsonl", r"missing\.jsonl: no such file \(working folder: "),
        ("data/missing.json.gz", "no such file"),
        ("nothing/*.jsonl", "no file matches this pattern"),
        ("empty", r"no data file in this folder .*; there is: notes\.txt, sub; fix: data\.train_file=PATH"),
        ("s3://bucket/rows.jsonl", "only https:// is read; fix: download it, and data.train_file=FILE"),
        (os.devnull, "is not a regular file"),
        ("x" * 5000, "cannot be read: .*name too long"),
    ],
)
def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty/sub").mkdir(parents=True)
    (tmp_path / "empty/notes.txt").touch()
    with pytest.raises(DataError, match=expected):
        as_jsonl(name, tmp_path / "cache")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a server on this machine that serves tmp_path/served."""
    (tmp_path / "served").mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_address_is_downloaded_once(tmp_path: Path, address: str) -> None:
    (tmp_path / "served/rows.parquet").write_bytes(parquet(ROWS))
    places = as_jsonl(f"{address}/rows.parquet", tmp_path / "cache")
    assert content(places) == ROWS
    assert places.place(2) == f"{address}/rows.parquet:row 2"
    as_jsonl(f"{address}/rows.parquet", tmp_path / "cache")
    assert len(list((tmp_path / "cache/rows").glob("download-*"))) == 1
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be downloaded: HTTP Error 404"):
        as_jsonl(f"{address}/none.jsonl", tmp_path / "cache")


def test_a_hub_id_is_loaded_with_split_and_revision_and_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load(name: str, **options: Any) -> datasets.Dataset:
        calls.append((name, options))
        return datasets.Dataset.from_list([{**row, "empty": None} for row in ROWS])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    places = as_jsonl("owner/some-name", tmp_path)
    assert content(places) == ROWS
    assert places.place(2) == "owner/some-name:train:row 2"
    as_jsonl("owner/name@v1.0:test", tmp_path)
    as_jsonl([TrainFile(path="owner/name", split="train[:10%]", revision="abc")], tmp_path)
    assert calls == [
        ("owner/some-name", {"split": "train", "revision": None}),
        ("owner/name", {"split": "test", "revision": "v1.0"}),
        ("owner/name", {"split": "train[:10%]", "revision": "abc"}),
    ]


def test_a_folder_with_splits_is_loaded_as_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_bytes(lines_of(ROWS[:4]))
    (tmp_path / "set/test.jsonl").write_bytes(lines_of(ROWS[4:]))
    given_folder = [TrainFile(path=str(tmp_path / "set"), split="test")]
    assert read(given_folder, tmp_path / "cache") == ROWS[4:]
    with pytest.raises(DataError, match=r"cannot be loaded: Unknown split \"none\""):
        as_jsonl([TrainFile(path=str(tmp_path / "set"), split="none")], tmp_path / "cache")


def test_a_hub_id_that_cannot_be_loaded_says_that_no_file_is_there_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"owner/name:train: no such file or folder here .*, and as a dataset"):
        as_jsonl("owner/name", tmp_path)
    with pytest.raises(DataError, match=r"owner/name:train\[:10%\]: no such file or folder here .*, and as a dataset"):
        as_jsonl("owner/name:train[:10%]", tmp_path)
    with pytest.raises(DataError, match="split and revision are of datasets on the hub"):
        as_jsonl([TrainFile(path="rows.jsonl", split="train")], tmp_path)


# ---------------------------------------------------------------------------------------------------------------
# Several files


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "a.jsonl").write_bytes(lines_of(ROWS[:2]))
    (tmp_path / "b.parquet").write_bytes(parquet([chat(f"b{i}", "c") for i in range(10)]))
    return str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")


def test_a_weight_takes_rows_so_many_times(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, two: tuple[str, str]
) -> None:
    a, b = two
    files = [TrainFile(path=a, weight=2), TrainFile(path=b, weight=0.3), TrainFile(path=b, weight=1.5, max_rows=4)]
    places = as_jsonl(files, tmp_path / "cache", seed=1)
    rows = content(places)
    assert len(rows) == 4 + 3 + 6
    assert rows[:2] == rows[2:4] == ROWS[:2]
    again = [row["messages"][0]["content"] for row in rows[11:]]
    assert again == sorted(again)
    assert set(again) < {"b0", "b1", "b2", "b3"}
    assert places.notes == (
        f"{a}: 4 rows, read as JSONL; weight 2",
        f"{b}: 3 rows, read as Parquet; weight 0.3",
        f"{b}: 6 rows, read as Parquet; its first 4; weight 1.5",
    )
    assert content(as_jsonl(files, tmp_path / "elsewhere", seed=1)) == rows
    assert content(as_jsonl(files, tmp_path / "cache", seed=2)) != rows
    encoded = encode(places, tokenizer, tmp_path / "cache")
    assert encoded.rows.is_repeat.tolist() == [False] * 2 + [True] * 2 + [False] * 3 + [False] * 4 + [True] * 2
    for line, row in zip(encoded.dataset["line"], rows, strict=True):
        source, _, number = places.place(line).rpartition(":")
        original = ROWS[:2] if source == a else [chat(f"b{i}", "c") for i in range(10)]
        assert original[int(number.removeprefix("row ")) - 1] == row


def test_train_files_of_a_configuration(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, two: tuple[str, str]
) -> None:
    a, b = two
    (tmp_path / "run.yaml").write_text(
        f"extends: qwen0.5b\ndata:\n  cache_dir: {tmp_path}/cache\n  train_files:\n  - {a}\n"
        f"  - {{path: {b}, weight: 2, max_rows: 3}}\n",
        encoding="utf-8",
    )
    config = load_config(tmp_path / "run.yaml")
    assert config.data.train_source == f"{a}, {b} x 2"
    assert RunConfig.model_validate(config.to_dict()) == config
    train_data, _ = load_data(config, tokenizer)
    assert train_data.counts.kept == 2 + 6
    prompts = sample_prompts(config, train_data, None)
    assert [prompt["line"] for prompt in prompts] == [f"{a}:1", f"{a}:2", f"{b}:row 1"]
    assert prompts[2]["messages"][0]["content"] == "b0"
    # The one that is set later replaces the other, also where rows come from memory.
    assert with_overrides(config, [f"data.train_file={a}"]).data.train_files == []
    assert with_rows(config, ROWS, None).data.train_files == []
    back = with_overrides(with_overrides(config, [f"data.train_file={a}"]), [f"data.train_files=[{b}]"])
    assert back.data.train_source == b


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.train_file=a.jsonl", "data.train_files=[b.jsonl]"], "train_file=a.jsonl and train_files .* both name"),
        (["data.train_files=[{path: a, weight: 0}]"], r"data\.train_files = .* must be a list of str or mapping"),
        (["data.train_files=[{path: a, rows: 3}]"], r"must be a list of str or mapping.*\{path, weight, split, rev"),
        (['data.train_files=[{path: "a\\u0007"}]'], "holds a control character"),
    ],
)
def test_train_files_that_are_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config("qwen0.5b", ["data.eval_file=null", *overrides])


def test_a_second_start_finds_what_was_written_and_a_changed_file_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    first = as_jsonl(path, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("lora_core.sources.files._write", None)
        assert as_jsonl(path, tmp_path / "cache") == first
    path.write_text(json.dumps(ROWS[:3]), encoding="utf-8")
    assert read(path, tmp_path / "cache") == ROWS[:3]
    first.path.write_bytes(b"")  # emptied by somebody: written again
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    assert read(path, tmp_path / "cache") == ROWS
    assert list((tmp_path / "cache/rows").glob(".*")) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    with pytest.raises(DataError, match=r"cache/rows: cannot be written: .*; fix: data.cache_dir=FOLDER"):
        as_jsonl(tmp_path / "rows.json", tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("m.safetensors", (2).to_bytes(8, "little") + b'{"a"}' + b"\0" * 40, "weights of a model (safetensors)"),
        ("notes.txt", b"Hello there.\nThis is a book.\n", "plain text, not rows"),
        ("rows.yaml", b"- prompt: q\n  completion: a\n", "YAML, not rows"),
        ("rows.bin", bytes(range(128, 256)) * 4, "a binary file that is not known"),
        (
            "rows.json",
            b'{"x": {"prompt": "q", "completion": "a"}, "y": {"prompt": "r", "completion": "b"}}',
            "a name for",
        ),
    ],
)
def test_a_file_without_rows_is_one_line_and_its_command_works(
    tmp_path: Path, name: str, content: bytes, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        as_jsonl(name, tmp_path / "cache")
    assert expected in str(caught.value)
    command = re.search(r"(python -c .*) > (\S+), and name that file", str(caught.value))
    if command is not None:
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # it has PyYAML
        subprocess.run(f"{command[1]} > {command[2]}", shell=True, check=True, capture_output=True)
        assert read(command[2], tmp_path / "cache")


@pytest.mark.parametrize("row", [["q", "a"], [["q", "a"], ["r", "b"]]])
def test_lines_of_pairs_are_lines(tmp_path: Path, row: list[object]) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 2, encoding="utf-8")
    assert kind_of(path, "rows").name == "JSONL"
    path.write_text(json.dumps([row, row]), encoding="utf-8")
    assert read(path, tmp_path) == [row, row]
