"""What comes from outside is contained: rows, configurations, chat templates, model repositories, names and secrets.

SECURITY.md names these tests. What the files here hold is wrong in ways that nobody types by mistake; the mistakes that
people make are in test_corpus.py.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import hashlib
import json
import os
import pickle
import resource
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import lora_core.encoding.template
from lora_core.checkpoints.card import model_card
from lora_core.checkpoints.checkpoint import find_checkpoint
from lora_core.config.keys import config_keys
from lora_core.config.schema import DataConfig, ModelConfig, RunConfig
from lora_core.configuration import load_config
from lora_core.data.counts import EncodedFile, RowCounts
from lora_core.data.encoded import encode_file
from lora_core.encoding.chat import encode_chat
from lora_core.encoding.template import render_chat
from lora_core.errors import ChatTemplateError, ConfigError, DataError, LoraCoreError
from lora_core.model.base import load_base_model, load_model_config, load_tokenizer
from lora_core.runtime.run_folder import MetricsFile, write_json, write_text
from lora_core.untrusted.text import showable, without_secrets
from tests.conftest import CHATML, ROOT, chat, make_tokenizer
from tests.forked import python

GOOD = json.dumps(chat("question", "answer")).encode()

# ---------------------------------------------------------------------------------------------------------------
# Rows

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
SHAPES: dict[str, dict[str, Any]] = {
    "messages": {
        "system": "s",
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "1", "name": "f", "tool_call_id": "c1"},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
        ],
    },
    "conversations": {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": '[{"name": "f"}]',
    },
    "prompt": {"prompt": "q", "completion": "a"},
    "instruction": {"instruction": "q", "input": "i", "output": "a"},
}
WRONG: dict[str, Any] = {
    "null": None,
    "true": True,
    "number": 7,
    "fraction": 1.5,
    "text": "text",
    "empty text": "",
    "half a pair": "x\ud800",
    "list": [],
    "list of a list": [[]],
    "list of null": [None],
    "object": {},
    "object with a key": {"a": 1},
}
# Values that are right in a place although they were not there, by the last key that leads to it.
NOTHING = {"null", "list", "empty text"}
RIGHT: dict[str, set[str]] = {
    "system": {"null", "text", "empty text", "list"},
    "tools": NOTHING,
    "content": {"text", "empty text", "list"},
    "value": {"text", "empty text", "list"},
    "prompt": {"text", "empty text", "list"},
    "completion": {"text", "empty text", "list"},
    "instruction": {"null", "text", "empty text", "list"},  # without it, input and output are a pair
    "output": {"text", "empty text", "list"},
    "input": {*NOTHING, "text", "object"},
    "text": {"text", "empty text"},
    "arguments": {"object", "object with a key"},
}
BY_PLACE: dict[tuple[Any, ...], set[str]] = {
    ("tools", 0): {"object", "object with a key"},
    ("messages", 1, "content"): {"null", "text", "empty text", "list"},  # it has tool_calls
    ("conversations", 1, "value"): set(),  # a call, as JSON
}
# Read by nobody, or only by the template.
FREE = {"type", "id", "x", "name", "tool_call_id", "tool_calls", "function"}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything inside a row."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def with_value(row: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(row)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


def wrong_types() -> Iterator[tuple[str, bytes]]:
    for shape, row in SHAPES.items():
        for path in places(row):
            if path[-1] in FREE or (path[0] == "tools" and len(path) > 2):
                continue
            for name, value in WRONG.items():
                right = BY_PLACE.get(path, RIGHT.get(str(path[-1]), set()))
                if name not in right:
                    where = ".".join(map(str, path))
                    yield f"{shape}: {where} = {name}", json.dumps(with_value(row, path, value)).encode()


def nested(depth: int, inside: str = "1") -> str:
    return "[" * depth + inside + "]" * depth


def text_parts(depth: int) -> str:
    return '[{"type": "text", "text": ' * depth + '"a"' + "}]" * depth


LINES: dict[str, bytes] = {
    **{f"cut after {size} bytes": GOOD[:size] for size in range(1, len(GOOD), 7)},
    **{
        f"byte {byte:#x} in a text": GOOD.replace(b"answer", bytes([byte])) for byte in (0, 1, 8, 27, 31, 128, 192, 255)
    },
    "NUL bytes": b"\0" * 50,
    "NUL bytes around": b"\0" + GOOD + b"\0",
    "overlong UTF-8": GOOD.replace(b"answer", b"\xc0\xaf"),
    "a surrogate as UTF-8": GOOD.replace(b"answer", b"\xed\xa0\x80"),
    "Latin-1": GOOD.replace(b"answer", "é".encode("latin-1")),
    "two byte order marks": b"\xef\xbb\xbf\xef\xbb\xbf" + GOOD,
    "UTF-32": GOOD.decode().encode("utf-32"),
    "two rows in a line": GOOD + GOOD,
    "rows between lone CRs": GOOD + b"\r" + GOOD,
    "a comma after it": GOOD + b",",
    "64 spaces and half a row": b" " * 100 + GOOD[:30],
    "a bracket too few": GOOD[:-1],
    "single quotes": GOOD.replace(b'"', b"'"),
    "a comment": b"// " + GOOD,
    "Infinity": b'{"prompt": "q", "completion": Infinity}',
    "-Infinity": b'{"prompt": "q", "completion": -Infinity}',
    "NaN in what nobody reads": b'{"prompt": "q", "completion": "a", "score": NaN}',
    "1e999": b'{"prompt": "q", "completion": "a", "score": 1e999}',
    "a number of 5000 digits": b'{"prompt": "q", "completion": "a", "id": ' + b"9" * 5000 + b"}",
    "a key twice inside": b'{"messages": [{"role": "user", "content": "q", "content": "r"}]}',
    "a key twice in arguments": json.dumps(
        {"conversations": [{"from": "function_call", "value": '{"name": "f", "name": "g"}'}]}
    ).encode(),
    "the last of 200,000 keys twice": (
        b"{" + b",".join(b'"k%d": 1' % i for i in range(200_000)) + b', "z": 1, "z": 2}'
    ),
    "200,000 unknown keys": b"{" + b",".join(b'"k%d": 1' % i for i in range(200_000)) + b"}",
    "nested 100,000 brackets": nested(100_000).encode(),
    "nested 100,000 objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "nested content": b'{"prompt": "q", "completion": %s}' % nested(900).encode(),
    "nested text parts": b'{"prompt": "q", "completion": %s}' % text_parts(300).encode(),
    "nested tools": b'{"prompt": "q", "completion": "a", "tools": [{"x": %s}]}' % nested(800).encode(),
    "nested tools in a text": json.dumps(
        {"prompt": "q", "completion": "a", "tools": f'[{{"x": {nested(100_000)}}}]'}
    ).encode(),
    "nested arguments": (
        b'{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": %s}}]}]}'
        % nested(800).encode()
    ),
    "half a pair in arguments": (
        rb'{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": "\ud800"}}]}]}'
    ),
    "half a pair in a key of arguments": (
        rb'{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"\udc00": 1}}]}]}'
    ),
    "half a pair in tools": rb'{"prompt": "q", "completion": "a", "tools": [{"x": ["\ud800"]}]}',
    "half a pair in a tool's name": (
        rb'{"messages": [{"role": "assistant", "tool_calls": [{"name": "\ud800", "arguments": {}}]}]}'
    ),
    "a role of a megabyte": b'{"messages": [{"role": "%s", "content": "q"}]}' % (b"r" * 1_000_000),
    "a line of 50 MB": b"x" * 50_000_000,
    "a row of 50 MB": b'{"prompt": "q", "completion": "%s"}' % (b"word " * 10_000_000),
    **{
        f"role {role!r}": json.dumps({"messages": [{"role": role, "content": "q"}]}).encode()
        for role in ("", "User", "ASSISTANTS", "user ", "developer", "ipython", "\x1b[2J", "\u202e", "\0", "роль", "🙂")
    },
    **dict(wrong_types()),
}
FILES: dict[str, bytes] = {
    "empty": b"",
    "a byte order mark alone": b"\xef\xbb\xbf",
    "lone CRs alone": b"\r\r\r",
    "form feeds": b"\f\v\n",
    "a JSON array without an end": b"[\n" + GOOD + b"\n",
    "half a gzip": gzip.compress(GOOD, mtime=0)[:-12],
    "zip": b"PK\x03\x04" + bytes(range(256)),
    "UTF-16 without a mark": GOOD.decode().encode("utf-16-le"),
    "Parquet": b"PAR1" + bytes(range(256)) + b"PAR1",
}


def encode(path: Path, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> EncodedFile:
    arguments: dict[str, Any] = {"max_seq_length": 512, "cache_dir": path.parent / "cache", **changes}
    return encode_file(path, tokenizer, **arguments)


def is_printable(text: str) -> bool:
    return all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.parametrize("name", LINES)
def test_a_malformed_row_is_named_with_file_and_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + LINES[name])
    with pytest.raises(DataError) as caught:
        encode(path, tokenizer)
    text = str(caught.value)
    # UTF-32 and UTF-16 hold line breaks of their own.
    assert f"{path}:2: " in text
    assert is_printable(text)
    assert len(text) < 3_000


def test_malformed_rows_are_skipped_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [line for line in LINES.values() if b"\n" not in line]
    path.write_bytes(b"\n".join([GOOD, *lines, GOOD]))
    counts = encode(path, tokenizer, on_bad_row="skip").counts
    assert (counts.read, counts.kept, counts.dropped_bad) == (len(lines) + 2, 2, len(lines))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_holds_no_rows_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    path = tmp_path / "rows.bin"
    path.write_bytes(FILES[name])
    with pytest.raises(DataError) as caught:
        encode(path, tokenizer)
    assert str(path) in str(caught.value)
    assert is_printable(str(caught.value))


def test_folders_pipes_and_devices_are_not_files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(DataError, match=r"no data file in this folder|is not a regular file"):
            encode_file(path, tokenizer, max_seq_length=8, cache_dir=tmp_path)
        with pytest.raises(ConfigError, match=r"data\.chat_template=.*not a file"):
            load_tokenizer(ModelConfig(name_or_path=str(_model_folder(tmp_path))), DataConfig(chat_template=str(path)))


def _model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    if not folder.exists():
        make_tokenizer().save_pretrained(folder)
    return folder


def test_a_row_behind_64_spaces_is_a_row(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b" " * 100 + GOOD + b"\n" + b" " * 100 + b"\n")
    assert encode(path, tokenizer).counts.read == 1


def test_there_are_at_least_200_malformed_files() -> None:
    assert len(LINES) + len(FILES) >= 200


def test_rows_made_to_take_long_do_not(tokenizer: PreTrainedTokenizerFast) -> None:
    markers = "TurnMarker0x" + "x" * 200_000
    many_turns = chat(*["q", "a"] * 5_000)
    many_specials = chat("<|im_end|>" * 3_000, *["a", "q"] * 200, "a")
    started = time.process_time()
    for row in (chat(markers, "a"), chat("TurnMarker" * 20_000, markers), many_turns, many_specials):
        encoded = encode_chat(tokenizer, row["messages"])
        assert sum(encoded.loss_mask) >= len(row["messages"]) // 2
    assert time.process_time() - started < 30


# ---------------------------------------------------------------------------------------------------------------
# Configurations

ODD = [
    "null",
    "~",
    "1e999",
    ".inf",
    "0x" + "f" * 5000,
    "9" * 5000,
    "2024-99-99",
    "!!bool x",
    "!!int ''",
    "!!timestamp x",
]
ODD += [
    "*a",
    "&a [*a]",
    "<<",
    "\x00",
    "\x1b[2J",
    "\ud800",
    "{[1]: 2}",
    "!!python/object/apply:os.system [ls]",
    "?",
    "- -",
]
ODD_TEXTS = st.text(max_size=6) | st.sampled_from(ODD)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ODD_TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ODD_TEXTS, inner, max_size=3),
    max_leaves=4,
)
keys = st.sampled_from([*config_keys(), "train", "model", "extends", "x", "a/b", "model.y"]) | ODD_TEXTS
sections = st.dictionaries(
    st.sampled_from(["model", "lora", "data", "train", "preflight"]) | keys,
    json_values
    | st.dictionaries(st.sampled_from([key.split(".")[-1] for key in config_keys()]), json_values, max_size=3),
    max_size=4,
)
# Written out as YAML, as the lines that they say, or any text at all.
files = (
    sections.map(lambda value: yaml.safe_dump(value, allow_unicode=True))
    | st.lists(st.tuples(keys, ODD_TEXTS).map(": ".join), max_size=4).map("\n".join)
    | st.text(alphabet="ab:-?[]{}&*!|>'\"%@#,\n\t 1.~\\\x00", max_size=30)
)


@settings(max_examples=2_000, suppress_health_check=list(HealthCheck))
@given(files, st.lists(st.tuples(keys, ODD_TEXTS | json_values.map(yaml.safe_dump)).map("=".join), max_size=3))
def test_any_configuration_is_valid_or_gets_one_clear_error(text: str, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
        try:
            config = load_config(path, overrides)
        except ConfigError as error:
            assert is_printable(str(error))  # noqa: PT017
            return
        path.write_text(config.to_yaml(), encoding="utf-8")
        assert load_config(path) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]", "an alias"),
        ("model: &m {name_or_path: x}\nlora: *m", "an alias"),
        ("train: {seed: 0x%s}" % ("f" * 5000), "more than 64 bits"),
        ('data: {train_file: "a\\0b"}', "holds a control character"),
        ('lora: {target_modules: ["q\\e[2J"]}', "holds a control character"),
        ("x" * 1_100_000, "at most 1,000,000 characters"),
        ("[" * 10_000, "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("extends: ../secret.yaml", "must be in the folder of this file"),
        ("extends: /etc/passwd", "must be in the folder of this file"),
        ("extends: link.yaml", "must be in the folder of this file"),
    ],
)
def test_hostile_configurations(tmp_path: Path, text: str, expected: str) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    (tmp_path / "secret.yaml").write_text("password: hunter2")
    (folder / "link.yaml").symlink_to(tmp_path / "secret.yaml")
    (folder / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(folder / "run.yaml")
    assert "hunter2" not in str(caught.value)
    assert len(str(caught.value)) < 2_000


# ---------------------------------------------------------------------------------------------------------------
# Chat templates

FOR_EVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
END = "{% endfor %}{% endfor %}{% endfor %}"
DOUBLE = "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}"
RUNAWAYS: dict[str, str] = {
    "nested loops": FOR_EVER + END,
    "nested loops that write": FOR_EVER + "x" + END,
    "a loop after a good row": "{% if messages[0].content == 'question' %}"
    + CHATML
    + "{% else %}"
    + FOR_EVER
    + END
    + "{% endif %}",
    "a large text": "{{ 'x' * 10**10 }}",
    "a large text, never shown": "{% set x = 'x' * 10**10 %}" + CHATML,
    "a large text from the row": "{{ messages[0].content * 10**10 }}",
    "a large list": "{{ [1] * 10**10 }}",
    "a wide number": "{{ '%1000000000d' % 1 }}",
    "a wide format": "{{ '{:>1000000000}'.format(1) }}",
    "a centred text": "{{ 'x' | center(10**9) }}",
    "doubled in a loop": DOUBLE,
    "a megabyte": "{{ 'x' * 10**6 }}",
    "a large power": "{% set x = 10 ** (10 ** 10) %}",
    "a power of the row": "{% set n = messages | length + 8 %}{% set x = n ** (n ** n) %}",
    "a large join": "{{ (range(99999) | list * 9999) | join('x' * 9999) }}",
    "backtracking in urlize": "{{ ('(' * 50000 ~ 'a.com') | urlize }}" * 2000,
}
REFUSED: dict[str, str] = {
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attributes by filter": "{{ (''|attr('__class__')).__mro__ }}",
    "attributes by format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "globals of a function": "{{ raise_exception.__globals__.os }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m._func.__globals__['__builtins__'] }}",
    "a range too long": "{% for i in range(10**9) %}{% endfor %}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}",
    "extends": "{% extends '/etc/passwd' %}",
    "a changed row": "{% set x = messages.append({}) %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "half a surrogate pair": "{{ '\\ud800' }}",
    "an error with colours": "{{ raise_exception('\x1b[2J' ~ 'x' * 10**5) }}",
}


@pytest.mark.parametrize("name", RUNAWAYS)
def test_a_runaway_template_is_stopped(
    tmp_path: Path, write_rows: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(lora_core.encoding.template, "_TEMPLATE_SECONDS", 1.0)
    path = write_rows([chat("question", "answer"), chat("another", "answer")])
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    with pytest.raises(
        ConfigError, match=r"in lines 1 to 2: the chat template of .* fix: data\.chat_template"
    ) as caught:
        encode(path, make_tokenizer(RUNAWAYS[name]), on_bad_row="skip")
    assert caught.value.finding_id == "template_runaway"
    assert time.monotonic() - started < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib < 2**20
    # What was lowered is as it was.
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGVTALRM) == signal.SIG_DFL
    soft_limits = [resource.getrlimit(what)[0] for what in (resource.RLIMIT_AS, resource.RLIMIT_CPU)]
    assert soft_limits == [resource.RLIM_INFINITY] * 2


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_reaches_out_is_refused(write_rows: Any, name: str) -> None:
    path = write_rows([chat("question", "answer")])
    with pytest.raises(DataError) as caught:
        encode(path, make_tokenizer(REFUSED[name] + CHATML))
    text = str(caught.value)
    assert f"{path}:1: the chat template refuses it" in text
    assert is_printable(text)
    assert "root:" not in text
    assert len(text) < 2_000


def test_a_template_that_hangs_inside_one_instruction_ends_its_process(tmp_path: Path, write_rows: Any) -> None:
    # The hash of a tuple of two, of two, of two ...: nothing interrupts that.
    template = (
        "{% set n = namespace(x=(1,)) %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% endfor %}{{ {n.x: 1} }}"
    )
    path = write_rows([chat("question", "answer"), chat("question", "answer")])
    code = f"""
import sys
import lora_core.encoding.template
from lora_core.data.encoded import encode_file
from lora_core.errors import DataError
from tests.conftest import make_tokenizer
lora_core.encoding.template._TEMPLATE_SECONDS = 0.3
try:
    encode_file({str(path)!r}, make_tokenizer({template!r}), max_seq_length=8, cache_dir={str(tmp_path)!r},
                num_proc=int(sys.argv[1]))
except DataError as error:
    print(error)
"""
    alone, workers = (python("-c", code, n) for n in "12")
    assert alone.returncode == -signal.SIGXCPU
    assert workers.returncode == 0, workers.stderr
    assert "its chat template did not end" in workers.stdout


def test_a_tool_schema_indented_by_the_template_is_within_its_limits(tokenizer: PreTrainedTokenizerFast) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(20):
        schema = {"type": "object", "properties": {"x": schema, "y": {"type": "string"}}}
    template = make_tokenizer("{{ tools | tojson(indent=4) }}" + CHATML)
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}] * 50
    assert sum(encode_chat(template, chat("q", "a")["messages"], tools).loss_mask) == 2


def test_other_renderings_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_core.encoding.template, "_TEMPLATE_SECONDS", 1.0)
    with pytest.raises(ConfigError, match="ran for more than 1 s"):
        render_chat(make_tokenizer(FOR_EVER + END), chat("q")["messages"])
    with pytest.raises(ChatTemplateError, match="refuses it"):
        render_chat(make_tokenizer("{{ ''.__class__.x }}"), chat("q")["messages"])


# ---------------------------------------------------------------------------------------------------------------
# Model repositories


@pytest.mark.parametrize("model_type", ["evil", "qwen2"])
@pytest.mark.parametrize("load", [load_tokenizer, load_model_config])
def test_code_from_a_model_repository_never_runs(tmp_path: Path, model_type: str, load: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nclass C: pass\n"
    )
    auto_map = {"AutoConfig": "evil.C", "AutoTokenizer": ["evil.C", "evil.C"], "AutoModelForCausalLM": "evil.C"}
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "auto_map": auto_map}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": auto_map}))
    config = ModelConfig(name_or_path=str(folder))
    started = time.monotonic()
    if model_type == "evil":
        with pytest.raises(ConfigError, match="lora_core runs no such code; fix: a model of a family") as caught:
            load(config)
        assert caught.value.finding_id == "model_needs_code"
    else:  # transformers holds the family; there is no tokenizer in the folder
        with contextlib.suppress(ConfigError):
            load(config)
    assert not (tmp_path / "ran").exists()
    assert time.monotonic() - started < 15  # nobody was asked on the terminal


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"model_type": 3}', b'{"model_type": "qwen2", "hidden_size": "x"}'],
)
def test_broken_model_files_are_a_sentence(tmp_path: Path, tiny_model_dir: Path, name: str, content: bytes) -> None:
    for file in tiny_model_dir.iterdir():
        if file.suffix in (".json", ".jinja") and file.name != name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes(content)
    config = ModelConfig(name_or_path=str(tmp_path))
    for load in (load_tokenizer, load_model_config):
        try:
            load(config)
        except LoraCoreError as error:
            assert "model.name_or_path=" in str(error)  # noqa: PT017


def test_nothing_is_unpickled(tmp_path: Path, tiny_model_dir: Path) -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "lora_core").rglob("*.py")]
    assert not [word for word in ("import pickle", "torch.load(", "import joblib") if any(word in s for s in sources)]
    for file in tiny_model_dir.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(str(tmp_path / "ran"))))
    with pytest.raises(ConfigError, match="the model cannot be loaded"):
        load_base_model(ModelConfig(name_or_path=str(tmp_path)), torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


def test_a_checkpoint_names_only_files_of_its_own_folder(tmp_path: Path) -> None:
    folder = tmp_path / "step-000001"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(b"x")
    names = ("adapter.safetensors", "optimizer.safetensors", "state.json")
    for name in names:
        (folder / name).write_bytes(b"x")
    identity = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    for outside in ("../outside", str(tmp_path / "outside"), "../step-000001/state.json"):
        manifest = {**dict.fromkeys(names, identity), outside: identity}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ConfigError, match=r"manifest\.json is not as it was written"):
            find_checkpoint(tmp_path, folder, print, may_rename=False)


# ---------------------------------------------------------------------------------------------------------------
# Names and secrets

NASTY = "\x1b[2J\x1b]0;owned\x07\r\x9b31m\u202e\x00"


def test_errors_reach_the_terminal_escaped_and_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwx")
    text = str(ConfigError(f"a\n{NASTY} hf_abcdefghijklmnopqrstuvwx"))
    assert text == "a\n\\x1b[2J\\x1b]0;owned\\x07\\r\\x9b31m\\u202e\\x00 [secret]"


def test_a_hostile_name_is_text_in_the_model_card() -> None:
    name = '<script>alert(1)</script>: "x" # - [y]'
    config = RunConfig.model_validate({"model": {"name_or_path": name}, "lora": {"target_modules": ["<img src=x>"]}})
    _, front_matter, body = model_card(config, RowCounts(*[0] * 10), {}).split("---\n", 2)
    assert "base_model" not in yaml.safe_load(front_matter)
    assert "<script>" not in body
    assert "<img" not in body
    assert yaml.safe_load(config.to_yaml())["model"]["name_or_path"] == name


SHAPED = ["hf_" + "a1B2" * 8, "sk-proj-" + "a1B2" * 8, "ghp_" + "a1B2" * 9, "github_pat_" + "a1B2_" * 6]


@pytest.mark.parametrize("secret", SHAPED)
def test_what_looks_like_a_token_is_left_out(secret: str) -> None:
    assert without_secrets(f"x={secret}, {secret}") == "x=[secret], [secret]"
    assert without_secrets("https://me:pass@host/x") == "https://[secret]@host/x"


def test_words_are_no_secrets() -> None:
    text = "task-specific sk-learn-like-names-of-packages https://host:8080/a@b hf_hub http://x a:b@c ghp_short"
    assert without_secrets(text) == text


@pytest.mark.parametrize("secret", ['pass"word\\1', "p<a>ss & word", "pässwörd 1", "line\nbreak"])
def test_secrets_are_left_out_however_a_file_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv("MY_PASSWORD", secret)
    write_json(tmp_path / "a.json", {"a": [secret, (secret,)]})
    write_text(tmp_path / "b.txt", f"x {secret} y")
    metrics = MetricsFile(tmp_path / "metrics.jsonl", is_main=True)
    metrics.write("sample", prompt=secret)
    metrics.close()
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": ["[secret]", ["[secret]"]]}
    assert (tmp_path / "b.txt").read_text() == "x [secret] y"
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"event": "sample", "prompt": "[secret]"}
    assert showable(secret) == "[secret]"


def test_a_run_keeps_no_secret_anywhere(tmp_path: Path, tiny_model_dir: Path, write_rows: Any) -> None:
    secrets = {"HF_TOKEN": "hf_" + "s3cR" * 6, "WANDB_API_KEY": "0123456789abcdef" * 2, "DB_PASSWORD": "corr/ect-horse"}
    token, key, password = secrets.values()
    model = tmp_path / token / "model"
    model.mkdir(parents=True)
    for file in tiny_model_dir.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    rows = write_rows([chat(f"is {key} {password} {i} a key?", f"{token} {NASTY} {i}") for i in range(6)])
    command = [
        *("launch/train.py", "--cfg", "demo", f"model.name_or_path={model}", f"data.train_file={rows}"),
        *(
            "data.eval_file=null",
            "data.eval_fraction=0.3",
            f"data.cache_dir={tmp_path / key}",
            f"output_dir={tmp_path / 'run'}",
        ),
        *(
            "train.max_steps=2",
            "train.save_steps=1",
            "train.num_train_epochs=1",
            "train.warmup_ratio=0",
            "train.logging_steps=1",
        ),
    ]
    done = python(*command, environment=secrets)
    assert done.returncode == 0, done.stderr
    resumed = python(*command, "--resume", environment=secrets)  # the settings are the same, secrets and all
    assert resumed.returncode == 0, resumed.stderr
    refused = python(*command, f"train.lr={token}", "--no-such-option", password, environment=secrets)
    assert refused.returncode == 2
    outputs = {
        f"{name} of {what.args[-1]}": getattr(what, name)
        for what in (done, resumed, refused)
        for name in ("stdout", "stderr")
    }
    files = {str(path): path.read_bytes().decode("latin-1") for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"config.yaml", "preflight.json", "rows.json", "metrics.jsonl", "summary.json", "report.html"} <= {
        Path(name).name for name in files
    }
    leaks = [
        (name, secret) for name, text in {**files, **outputs}.items() for secret in secrets.values() if secret in text
    ]
    assert leaks == []
    assert all(is_printable(text) for text in outputs.values())
    assert "[secret]" in files[str(tmp_path / "run/summary.json")]
