"""What users get wrong, by the dozen: each broken configuration or file gets its finding, none a traceback; and what is
right gets no warning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_core.configuration import load_config
from lora_core.errors import LoraCoreError
from lora_core.model.base import cannot_load
from lora_core.preflight.findings import Finding
from lora_core.preflight.preflight import finding_of, look_at_run, run_checks
from tests.conftest import CHATML, chat

pytestmark = pytest.mark.usefixtures("simulated_once")

ROWS = [chat(f"question {i}", f"answer {i}") for i in range(78)]
GOOD = "".join(json.dumps(row) + "\n" for row in ROWS)
LINE = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}\n'

# name -> (text of the YAML file, overrides): all of them config_invalid
CONFIGS: dict[str, tuple[str, list[str]]] = {
    "unknown key": ("train: {learning_rte: 1e-4}", []),
    "unknown section": ("trainer: {epochs: 3}", []),
    "key in the wrong section": ("lora: {learning_rate: 1e-4}", []),
    "section as a value": ("train: 3", []),
    "text for a number": ("train: {num_train_epochs: three}", []),
    "number as text": ('train: {learning_rate: "1e-4"}', []),
    "truth as text": ('train: {bf16: "no"}', []),
    "fraction of an epoch": ("train: {num_train_epochs: 0.5}", []),
    "no epochs": ("train: {num_train_epochs: 0}", []),
    "negative learning rate": ("train: {learning_rate: -1e-4}", []),
    "learning rate over 1": ("train: {learning_rate: 2}", []),
    "learning rate not a number": ("train: {learning_rate: .nan}", []),
    "negative warmup": ("train: {warmup_steps: -1}", []),
    "both warmups": ("train: {warmup_steps: 5, warmup_ratio: 0.1}", []),
    "rank zero": ("lora: {rank: 0}", []),
    "dropout over 1": ("lora: {dropout: 1.5}", []),
    "targets not a list": ("lora: {target_modules: 7}", []),
    "unknown quantization": ("model: {quantization: int4}", []),
    "unknown dtype": ("model: {dtype: bf16}", []),
    "unknown optimizer": ("train: {optim: adam}", []),
    "two eval sets": ("data: {eval_file: a.jsonl, eval_fraction: 0.1}", []),
    "the whole file as eval set": ("data: {eval_file: null, eval_fraction: 1.0}", []),
    "duplicate key": ("train: {seed: 1, seed: 2}", []),
    "not a mapping": ("- train", []),
    "not YAML": ("train: [1, 2", []),
    "tabs": ("train:\n\tseed: 1", []),
    "extends nothing": ("extends: nowhere.yaml", []),
    "extends itself": ("extends: run.yaml", []),
    "override without value": ("", ["train.seed"]),
    "override of a section": ("", ["train={seed: 1}"]),
    "override unknown": ("", ["train.lr=1e-4"]),
}

# name -> (bytes of the training file, the finding)
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "data_file_empty"),
    "blank lines": (b"\n  \n", "data_file_empty"),
    "one JSON array": (b'[{"prompt": "a", "completion": "b"}, {"prompt": "a"}]', "rows_unreadable"),
    "an open JSON array": (b'[{"prompt": "a", "completion": "b"},', "data_not_json"),
    "one object of columns": (json.dumps({"text": [ROWS[0]["messages"]]}, indent=1).encode(), "data_kind_unknown"),
    "CSV": (b"left,right\nHi,Ho\n", "rows_unreadable"),
    "CSV with a cell too few": (b"prompt,completion\nHi\n", "data_not_table"),
    "a zip archive": (b"PK\x03\x04", "data_kind_unknown"),
    "not JSON": (LINE.encode() + b"{'a': 1}\n", "rows_unreadable"),
    "NaN": (b'{"prompt": "a", "completion": NaN}\n', "rows_unreadable"),
    "a key twice": (b'{"prompt": "a", "prompt": "b", "completion": "c"}\n', "rows_unreadable"),
    "text in quotes": (b'"Hi"\n', "rows_unreadable"),
    "a number": (b"17\n", "rows_unreadable"),
    "no known keys": (b'{"texts": "Hi"}\n', "rows_unreadable"),
    "no turns": (b'{"messages": []}\n', "rows_unreadable"),
    "turns not a list": (b'{"messages": "Hi"}\n', "rows_unreadable"),
    "turn not an object": (b'{"messages": ["Hi"]}\n', "rows_unreadable"),
    "unknown role": (b'{"messages": [{"role": "robot", "content": "Hi"}]}\n', "rows_unreadable"),
    "no role": (b'{"messages": [{"content": "Hi"}]}\n', "rows_unreadable"),
    "no assistant": (b'{"messages": [{"role": "user", "content": "Hi"}]}\n', "rows_unreadable"),
    "content null": (b'{"prompt": "a", "completion": null}\n', "rows_unreadable"),
    "content a number": (b'{"prompt": "a", "completion": 3}\n', "rows_unreadable"),
    "half a surrogate pair": (b'{"prompt": "a", "completion": "\\ud800"}\n', "rows_unreadable"),
    "not UTF-8": (b'{"prompt": "a", "completion": "caf\xe9"}\n', "rows_unreadable"),
    "UTF-16": (LINE.encode("utf-16"), "data_kind_unknown"),
    "nested too deep": (b'{"prompt": ' + b"[" * 100_000 + b"\n", "rows_unreadable"),
    "two systems": (
        b'{"system": "a", "messages": [{"role": "system", "content": "b"}, {"role": "assistant", "content": "c"}]}\n',
        "rows_unreadable",
    ),
    "a user calls tools": (
        b'{"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}\n',
        "rows_unreadable",
    ),
    "tools not JSON": (b'{"prompt": "a", "completion": "b", "tools": "search"}\n', "rows_unreadable"),
    "copies": (GOOD.encode() + LINE.encode() * 2, "rows_duplicated"),
    "an empty answer": (GOOD.encode() + b'{"prompt": "a", "completion": ""}\n', "replies_empty"),
    "rendered already": (
        GOOD.encode() + b'{"prompt": "<|im_start|>user", "completion": "b"}\n',
        "special_tokens_in_text",
    ),
}

# name -> (overrides, the finding)
SETTINGS: dict[str, tuple[list[str], str]] = {
    "no such file": (["data.train_file=missing.jsonl"], "data_file_missing"),
    "no such eval file": (["data.eval_file=missing.jsonl"], "data_file_missing"),
    "a folder with the eval set in it": (["data.train_file=."], "eval_overlap"),
    "no such model folder": (["model.name_or_path=./missing"], "model_unreadable"),
    "a folder without a model": (["model.name_or_path=."], "model_unreadable"),
    "no such template": (["data.chat_template=missing.jinja"], "template_unreadable"),
    "every answer cut off": (["data.max_seq_length=8"], "no_rows_left"),
    "the failure": (["train.warmup_steps=100", "train.num_train_epochs=1"], "warmup_past_end"),
    "stopped in its warmup": (["train.max_steps=4", "train.warmup_steps=5"], "warmup_past_end"),
    "half of it warmup": (["train.warmup_ratio=0.5"], "warmup_long"),
    "one epoch": (["train.num_train_epochs=1"], "few_steps"),
    "three steps": (["train.max_steps=3"], "few_steps"),
    "a batch of 256": (["train.per_device_train_batch_size=256"], "batch_larger_than_data"),
    "logs every 100": (["train.logging_steps=100"], "logging_steps_past_end"),
    "q and v": (["lora.target_modules=[q_proj, v_proj]"], "targets_q_v_only"),
    "names of another family": (["lora.target_modules=[c_attn]"], "targets_missing"),
    "no targets": (["lora.target_modules=[]"], "targets_missing"),
    "the head too": (["lora.target_modules=[q_proj, lm_head]"], "targets_head"),
    "alpha 16 times the rank": (["lora.rank=4", "lora.alpha=64"], "alpha_unusual"),
    "a rate for pretraining": (["train.learning_rate=0.1"], "learning_rate_unusual"),
    "a rate for nothing": (["train.learning_rate=1e-7"], "learning_rate_unusual"),
    "cut short": (["data.max_seq_length=25"], "rows_truncated"),
    "a taken folder": (["output_dir=."], "output_dir_taken"),
}

TEMPLATES: dict[str, tuple[str, str]] = {
    "not Jinja": ("{% for %}", "rows_unreadable"),
    "refuses": ("{{ raise_exception('no') }}", "rows_unreadable"),
    "wants a system turn": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}" + CHATML,
        "rows_unreadable",
    ),
    "leaves turns open": (CHATML.replace("<|im_end|>", ""), "rows_unreadable"),
    "ends turns with another token": (CHATML.replace("<|im_end|>", "<|endoftext|>"), "turn_end_not_eos"),
    "leaves the answers out": ("{% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}", "rows_unreadable"),
}


@pytest.fixture
def look(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Findings of a run, the way launch/preflight.py comes by them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(GOOD, encoding="utf-8")
    (tmp_path / "eval.jsonl").write_text(LINE, encoding="utf-8")
    base = {
        "model.name_or_path": str(tiny_model_dir),
        "data.train_file": "rows.jsonl",
        "data.eval_file": "eval.jsonl",
        "data.cache_dir": str(tmp_path / "cache"),
        "output_dir": "run",
        "train.num_train_epochs": "5",
        "train.optim": "adamw_8bit",
    }

    def run(*overrides: str, config: str | None = None, leave_out: tuple[str, ...] = ()) -> dict[str, Finding]:
        given = {override.split("=")[0] for override in overrides} | set(leave_out)
        (tmp_path / "run.yaml").write_text(config or "", encoding="utf-8")
        settings = [f"{key}={value}" for key, value in base.items() if key not in given]
        try:
            loaded = load_config("run.yaml", [*settings, *overrides])
            facts = look_at_run(loaded, 1)
            environment = replace(facts.environment, bf16="native", asked_processes=None)
            return {finding.id: finding for finding in run_checks(replace(facts, environment=environment))}
        except LoraCoreError as error:
            return {error.finding_id: finding_of(error)}

    return run


@pytest.mark.parametrize("name", CONFIGS)
def test_broken_configurations(look: Any, name: str) -> None:
    config, overrides = CONFIGS[name]
    found = look(*overrides, config=config, leave_out=("train.num_train_epochs", "data.eval_file", "train.optim"))
    assert list(found) == ["config_invalid"]


@pytest.mark.parametrize("name", FILES)
def test_broken_files(look: Any, tmp_path: Path, name: str) -> None:
    content, expected = FILES[name]
    (tmp_path / "broken.jsonl").write_bytes(content)
    found = look("data.train_file=broken.jsonl")
    assert expected in found
    if expected == "rows_unreadable":
        assert "broken.jsonl:" in found[expected].message


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_go_wrong(look: Any, name: str) -> None:
    overrides, expected = SETTINGS[name]
    assert expected in look(*overrides)


@pytest.mark.parametrize("name", TEMPLATES)
def test_broken_templates(look: Any, tmp_path: Path, name: str) -> None:
    template, expected = TEMPLATES[name]
    (tmp_path / "broken.jinja").write_text(template, encoding="utf-8")
    assert expected in look("data.chat_template=broken.jinja")


HEALTHY_FILES: dict[str, bytes] = {
    "messages": GOOD.encode(),
    "byte order mark": b"\xef\xbb\xbf" + GOOD.encode(),
    "Windows line ends": GOOD.replace("\n", "\r\n").encode(),
    "blank lines between": GOOD.replace("\n", "\n\n").encode(),
    "no newline at the end": GOOD.rstrip("\n").encode(),
    "ShareGPT": "".join(
        json.dumps({"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"a{i}"}]}) + "\n"
        for i in range(78)
    ).encode(),
    "prompt and completion": "".join(
        json.dumps({"prompt": f"q{i}", "completion": f"a{i}", "id": i}) + "\n" for i in range(78)
    ).encode(),
    "Alpaca": "".join(
        json.dumps({"instruction": f"q{i}", "input": "x" * (i % 2), "output": f"a{i}"}) + "\n" for i in range(78)
    ).encode(),
    "several turns and a system": "".join(
        json.dumps({"system": "Be brief.", **chat(f"q{i}", f"a{i}", f"and {i}?", f"b{i}")}) + "\n" for i in range(78)
    ).encode(),
    "Chinese and emoji": "".join(
        json.dumps(chat(f"你好{i}", f"再见{i} 😀"), ensure_ascii=False) + "\n" for i in range(78)
    ).encode(),
}
HEALTHY_SETTINGS = [
    [],
    ["data.packing=false"],
    ["data.eval_file=null", "data.eval_fraction=0.2"],
    ["train.warmup_steps=5"],
    ["train.warmup_steps=0"],
    ["train.optim=adamw_torch"],
    ["train.optim=paged_adamw_8bit"],
    ["lora.target_modules=all-linear"],
    ["lora.rank=8", "lora.alpha=16"],
    ["lora.rank=64", "lora.alpha=1024", "lora.use_rslora=true"],
    ["model.quantization=nf4", "train.gradient_checkpointing=true"],
    ["train.bf16=false", "model.dtype=float32"],
    ["train.max_steps=60", "train.save_steps=20", "train.eval_steps=10"],
]


@pytest.mark.parametrize("name", HEALTHY_FILES)
def test_healthy_files_get_no_warning(look: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "healthy.jsonl").write_bytes(HEALTHY_FILES[name])
    found = look("data.train_file=healthy.jsonl")
    assert [finding for finding in found.values() if finding.severity != "note"] == []


@pytest.mark.parametrize("overrides", HEALTHY_SETTINGS)
def test_healthy_settings_get_no_warning(look: Any, overrides: list[str]) -> None:
    found = look(*overrides)
    assert [finding for finding in found.values() if finding.severity != "note"] == []


def test_a_gated_model_is_told_apart() -> None:
    # What transformers raises; there is no hub here to say it.
    said = OSError(
        "You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/m."
    )
    error = cannot_load("tokenizer", "meta-llama/Llama-3.2-1B", said)
    assert error.finding_id == "model_gated"
    assert "https://huggingface.co/meta-llama/Llama-3.2-1B" in str(error)


def test_the_corpus_is_as_large_as_it_is_said_to_be() -> None:
    assert len(CONFIGS) + len(FILES) + len(SETTINGS) + len(TEMPLATES) >= 60
    assert len(HEALTHY_FILES) + len(HEALTHY_SETTINGS) >= 20
