"""Every check: something that trips it, and a healthy run that trips none."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers.normalizers import NFC, Lowercase, Normalizer, Prepend, Replace, Sequence
from transformers import PreTrainedTokenizerFast

from lora_core.config.schema import ALL_SEVEN_PROJECTIONS
from lora_core.configuration import load_config, with_overrides
from lora_core.data.encoded import load_data
from lora_core.errors import ConfigError, PreflightError
from lora_core.preflight.catalogue import CHECKS, ERROR_IDS, documentation
from lora_core.preflight.findings import Facts, Finding
from lora_core.preflight.plan import plan_for
from lora_core.preflight.preflight import apply_fixes, gather_facts, refuse_errors, run_checks
from lora_core.preflight.schedule import (
    check_batch_large_for_rows,
    check_batch_larger_than_data,
    check_few_steps,
    check_single_pass,
)
from lora_core.runtime.devices import DeviceMemory, look_around
from tests.conftest import CHATML, ROOT, chat, make_tokenizer
from tests.forked import python
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.usefixtures("simulated_once")

TRAIN = [chat(f"question {i}", f"answer {i}") for i in range(78)]
HELD_OUT = [chat(f"another {i}", f"answer {i}") for i in range(10)]

# id -> (severity, overrides that trip it on 78 short rows, the fix)
TRIPS = {
    "warmup_past_end": ("error", ["train.warmup_steps=50"], "train.warmup_steps=5"),
    "warmup_long": ("warning", ["train.warmup_steps=16"], "train.warmup_steps=5"),
    "decay_past_end": (
        "error",
        ["train.lr_scheduler_type=warmup_stable_decay", "train.lr_scheduler_kwargs={num_decay_steps: 46}"],
        "'train.lr_scheduler_kwargs={num_decay_steps: 10}'",
    ),
    "few_steps": ("warning", ["train.num_train_epochs=2"], "train.gradient_accumulation_steps=2"),
    "single_pass": (
        "warning",
        ["train.num_train_epochs=1", "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=1"],
        "train.num_train_epochs=3",
    ),
    "batch_larger_than_data": (
        "warning",
        ["train.gradient_accumulation_steps=40", "train.num_train_epochs=30"],
        "train.gradient_accumulation_steps=9",
    ),
    "batch_large_for_rows": (
        "warning",
        ["train.gradient_accumulation_steps=12", "train.num_train_epochs=10"],
        "train.gradient_accumulation_steps=9",
    ),
    "small_last_step": ("note", ["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=11"], None),
    "logging_steps_past_end": ("warning", ["train.logging_steps=51"], "train.logging_steps=5"),
    "eval_steps_past_end": ("warning", ["train.eval_steps=51"], "train.eval_steps=5"),
    "save_steps_past_end": ("warning", ["train.save_steps=51"], "train.save_steps=5"),
    "targets_q_v_only": (
        "warning",
        ["lora.target_modules=[q_proj,v_proj]"],
        "lora.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
    ),
    "targets_missing": (
        "error",
        ["lora.target_modules=[q_proj,k_proj,c_attn]"],
        "lora.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
    ),
    "targets_head": (
        "warning",
        ["lora.target_modules=[q_proj,k_proj,lm_head]"],
        "lora.target_modules=[q_proj,k_proj]",
    ),
    "lora_names_missing": ("error", ["lora.rank_pattern={fc1: 4}"], "lora.rank_pattern={}"),
    "trains_head": ("note", ["lora.modules_to_save=[lm_head]"], None),
    "dora_costs": ("note", ["lora.use_dora=true"], None),
    "attention_unknown": ("error", ["model.attn_implementation=flash"], "model.attn_implementation=sdpa"),
    "attention_missing": ("error", ["model.attn_implementation=flash_attention_3"], "model.attn_implementation=sdpa"),
    "alpha_unusual": ("warning", ["lora.alpha=80"], "lora.alpha=32"),
    "learning_rate_unusual": ("warning", ["train.learning_rate=5e-3"], "train.learning_rate=0.00075"),
    "rows_truncated": ("warning", ["data.max_seq_length=24"], "data.max_seq_length=26"),
    "learning_rate_differs": ("note", ["train.learning_rate=5e-5"], None),
    "no_held_out_rows": ("note", ["data.eval_file=null"], "data.eval_fraction=0.1"),
}

# On two processes, with as many steps as on one.
ON_TWO = ["train.optim=adamw_torch", "train.num_train_epochs=10"]

# id -> (severity, what to change in the environment, overrides, the fix)
AROUND: dict[str, tuple[str, dict[str, Any], list[str], str | None]] = {
    "memory_too_small": ("error", {"device": DeviceMemory("cuda", 10**6)}, [], None),
    "world_size_differs": ("error", {"asked_processes": 2}, [], None),
    "bf16_unsupported": ("error", {"bf16": "none"}, ["train.bf16=true"], "train.bf16=false model.dtype=float32"),
    "bf16_slow": ("warning", {"bf16": "emulated"}, ["train.bf16=true"], "train.bf16=auto"),
    "fp16_slow": (
        "warning",
        {"device": DeviceMemory("cpu", 2**34)},
        ["train.fp16=true", "train.bf16=false"],
        "train.fp16=false train.bf16=auto",
    ),
    "fp16_unsupported": (
        "error",
        {"sharding": "fsdp"},
        ["train.fp16=true", "train.bf16=false", "train.optim=adamw_torch"],
        "train.fp16=false train.bf16=auto",
    ),
    "float16_unscaled": (
        "error",
        {"device": DeviceMemory("cuda", 2**34)},
        ["model.dtype=float16", "train.bf16=false"],
        "train.fp16=true",
    ),
    "bitsandbytes_missing": ("error", {"has_bitsandbytes": False}, [], "train.optim=adamw_torch"),
    "schedulefree_missing": (
        "error",
        {"has_schedulefree": False},
        ["train.optim=schedule_free_adamw", "train.lr_scheduler_type=constant_with_warmup"],
        "train.optim=adamw_torch",
    ),
    "disk_too_small": ("error", {"free_disk_bytes": 10**6}, [], None),
    "output_dir_taken": (
        "error",
        {"output_dir_problem": "output_dir=run: holds an earlier run; fix: x", "free_output_dir": "run-2"},
        [],
        "output_dir=run-2",
    ),
    "optimizer_cannot_run": ("error", {"sharding": "fsdp"}, [], "train.optim=adamw_torch"),
    "ddp_fits": ("note", {"sharding": "fsdp", "num_processes": 2}, ON_TWO, None),
    "optimizer_not_paged": ("note", {}, ["train.optim=paged_adamw_8bit"], "train.optim=adamw_torch"),
    "fsdp_quant_storage": (
        "error",
        {"sharding": "fsdp"},
        ["train.optim=adamw_torch", "model.quantization=nf4"],
        "model.quant_storage=bfloat16",
    ),
}

# id -> (rows that trip it, the lines that it names)
ROWS: dict[str, tuple[list[Any], str]] = {
    "rows_duplicated": ([*TRAIN, TRAIN[3], TRAIN[70]], "2 duplicate rows (lines 79, 80)"),
    "replies_empty": ([*TRAIN, chat("question", " ")], "line 79"),
    "special_tokens_in_text": ([chat("what is <|im_end|> for?", "it ends a turn"), *TRAIN], "line 1"),
    "eval_overlap": (
        [*TRAIN, HELD_OUT[0], chat("ANOTHER, 1", "answer: 1!")],
        "2 training rows are also in the eval set (lines 79, 80; 1 in other case",
    ),
    "last_turn_unanswered": (
        [*TRAIN, chat("question", "answer", "and then?")],
        "1 row whose last turn is the user's",
    ),
    "replies_repeat_prompt": (
        [*TRAIN, chat("What is the name of this town?", "what is the name of this town: it is Ely")],
        "line 79",
    ),
    "placeholders_in_replies": (
        [*TRAIN, chat("who?", "Dear {{ name }},"), chat("and?", "[Your Name]")],
        "lines 79, 80",
    ),
    "replies_start_alike": (
        [*TRAIN, *(chat(f"ask {i}", f"Sure! Here is the {i}") for i in range(90))],
        "90 of 168 rows have a reply that starts with the same four words",
    ),
    "scripts_differ": ([*TRAIN, chat("What is the town called?", "Город называется Эли.")], "line 79"),
    "rows_alike": (
        [*TRAIN, *(chat("the cows are moved to the hill in spring", f"until the river falls again {i}") for i in "ab")],
        "1 row that almost repeats an earlier row (line 80)",
    ),
    "rows_unreadable": ([*TRAIN, {"body": "no chat"}], "line 79"),
    "parts_left_out": (
        [{**TRAIN[0], "id": 1, "source": "web"}, {**TRAIN[1], "id": 2}, *TRAIN[2:]],
        "not shown to the model: id (2 rows), source (1 row)",
    ),
}


@pytest.fixture(scope="module")
def one_layer_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The tiny model with one layer in place of two: each look at a run predicts its memory, layer by layer."""
    folder = tmp_path_factory.mktemp("tiny-qwen2-of-one-layer")
    save_tiny_model(folder, tokenizer, num_layers=1)
    return folder


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of encoded rows: most tests look at the same ones."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def base(tmp_path: Path, one_layer_dir: Path, write_rows: Any, cache_dir: Path) -> list[str]:
    return [
        f"model.name_or_path={one_layer_dir}",
        f"data.train_file={write_rows(TRAIN)}",
        f"data.eval_file={write_rows(HELD_OUT, 'eval.jsonl')}",
        f"data.cache_dir={cache_dir}",
        f"output_dir={tmp_path / 'run'}",
        # A run about which nothing is to be said: an optimizer and a precision for every device, a rate for 50 steps.
        "train.bf16=auto",
        "train.optim=adamw_8bit",
        "train.learning_rate=3.5e-4",
    ]


@pytest.fixture
def look(base: list[str], tokenizer: PreTrainedTokenizerFast) -> Any:
    def run(
        *overrides: str,
        cfg: str = "qwen0.5b",
        num_processes: int = 1,
        template: str = "",
        normalizer: Normalizer | None = None,
        **around: Any,
    ) -> Facts:
        config = load_config(cfg, [*base, *overrides])
        with_template = make_tokenizer(template or CHATML) if template or normalizer else tokenizer
        if normalizer is not None:
            with_template.backend_tokenizer.normalizer = normalizer
        train_data, eval_data = load_data(config, with_template)
        environment = replace(look_around(config, num_processes), bf16="native", asked_processes=None)
        return gather_facts(config, replace(environment, **around), with_template, train_data, eval_data)

    return run


@pytest.fixture
def find(look: Any) -> Any:
    def run(*overrides: str, **settings: Any) -> dict[str, Finding]:
        return {finding.id: finding for finding in run_checks(look(*overrides, **settings))}

    return run


@pytest.mark.parametrize("cfg", ["qwen0.5b", "qwen1.5b", "qwen7b"])
def test_the_shipped_configs_find_nothing_on_78_rows_but_that_the_rate_is_low(find: Any, cfg: str) -> None:
    assert find(cfg=cfg) == {}
    shipped = load_config(cfg).train.learning_rate
    assert [f.severity for f in find(f"train.learning_rate={shipped}", cfg=cfg).values()] == ["note"]


@pytest.mark.parametrize("name", TRIPS)
def test_each_check_trips_alone_and_its_fix_removes_it(find: Any, name: str) -> None:
    severity, overrides, fix = TRIPS[name]
    findings = find(*overrides)
    assert list(findings) == [name]
    found = findings[name]
    assert found.severity == severity
    assert (severity == "error") == (name in ERROR_IDS)
    assert found.fix == fix
    if found.fix:
        assert find(*overrides, *shlex.split(found.fix)) == {}


@pytest.mark.parametrize("name", AROUND)
def test_each_check_of_the_environment_trips_alone(find: Any, name: str) -> None:
    severity, around, overrides, fix = AROUND[name]
    findings = find(*overrides, **around)
    assert list(findings) == [name]
    assert findings[name].severity == severity
    assert findings[name].fix == fix or name == "memory_too_small"
    assert (severity == "error") == (name in ERROR_IDS)


@pytest.mark.parametrize("name", ROWS)
def test_each_check_of_rows_names_their_lines(find: Any, write_rows: Any, name: str) -> None:
    rows, lines = ROWS[name]
    findings = find(f"data.train_file={write_rows(rows, 'other.jsonl')}", "data.on_bad_row=skip")
    assert list(findings) == [name]
    assert lines in findings[name].message


def test_eval_rows_that_almost_repeat_training_rows_are_counted(find: Any, write_rows: Any) -> None:
    almost = [chat("the cows are moved to the hill in spring", f"until the river falls again {i}") for i in "abcd"]
    rows = write_rows([*TRAIN, *almost[:2]], "other.jsonl")
    eval_rows = write_rows([*HELD_OUT, *almost[2:]], "other_eval.jsonl")
    found = find(f"data.train_file={rows}", f"data.eval_file={eval_rows}")
    assert list(found) == ["rows_alike", "eval_alike"]
    assert "2 of 12 eval rows almost repeat a training row (lines 11, 12); eval loss" in found["eval_alike"].message
    # In one file, near-copies are on one side; unless most rows are of their form.
    share = ["data.eval_file=null", "data.eval_fraction=0.1"]
    found = find(f"data.train_file={rows}", *share)
    assert list(found) == ["rows_alike"]
    assert "(line 80); data.eval_fraction keeps near-copies on one side" in found["rows_alike"].message
    form = [chat("please sort this letter into one of the five boxes of the hall", f"box {i}") for i in range(80)]
    found = find(f"data.train_file={write_rows([*form, *TRAIN], 'form.jsonl')}", *share)
    assert "more than half of all rows are of such forms" in found["eval_alike"].message


def test_rows_truncated_before_their_first_loss_token_are_named(find: Any, write_rows: Any) -> None:
    rows = write_rows([*TRAIN, chat("word " * 60, "yes")], "long.jsonl")
    finding = find(f"data.train_file={rows}", "data.max_seq_length=40")["rows_unsupervised"]
    assert "1 of 79 rows has no loss token in the first 40 tokens and is dropped (line 79)" in finding.message
    assert find(f"data.train_file={rows}", str(finding.fix)) == {}


def test_parts_that_are_left_out_are_counted_by_key(find: Any, write_rows: Any) -> None:
    rows = [{**row, **{f"key {number:02}": "x" for number in range(25)}} for row in TRAIN]
    finding = find(f"data.train_file={write_rows(rows, 'many.jsonl')}")["parts_left_out"]
    assert finding.severity == "note"
    assert finding.message.endswith("key 19 (78 rows), and 5 more keys")
    assert finding.value == {f"key {number:02}": 78 for number in range(25)}


def test_replies_that_lose_their_end_are_counted_and_can_be_dropped(find: Any, write_rows: Any) -> None:
    rows = f"data.train_file={write_rows([*TRAIN, chat('question', 'word ' * 60)], 'long.jsonl')}"
    finding = find(rows, "data.max_seq_length=40")["rows_truncated"]
    assert "; 1 reply without an end (data.truncation=drop drops such rows); " in finding.message
    assert find(rows, "data.max_seq_length=40", "data.truncation=drop") == {}
    several = find("data.max_seq_length=24")["rows_truncated"]
    assert "replies without an end" in several.message


def test_templates_that_teach_something_odd_are_told(find: Any) -> None:
    assert "<|endoftext|>" in find(template=CHATML.replace("<|im_end|>", "<|endoftext|>"))["turn_end_not_eos"].message
    assert list(find(template="{{ strftime_now('%d %b %Y') }}" + CHATML)) == ["template_uses_date"]


def test_a_system_turn_from_the_template_is_told_where_rows_have_none(find: Any, write_rows: Any) -> None:
    adds = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Pim<|im_end|>\n{% endif %}" + CHATML
    assert "a system turn to 78 of 78 rows: " in find(template=adds)["template_adds_system"].message
    with_system = [{"system": "Be brief.", **row} for row in TRAIN]
    assert find(f"data.train_file={write_rows(with_system, 'all.jsonl')}", template=adds) == {}
    some = find(f"data.train_file={write_rows([*with_system[:70], *TRAIN[70:]], 'some.jsonl')}", template=adds)
    assert "a system turn to 8 of 78 rows: " in some["template_adds_system"].message


def test_two_bos_tokens_are_counted(look: Any, find: Any) -> None:
    facts = look()
    facts.train_data.rows.has_doubled_bos[4] = True
    assert "(line 5)" in next(f for f in run_checks(facts) if f.id == "bos_doubled").message


def test_a_token_across_the_border_of_an_answer_is_a_note(look: Any) -> None:
    facts = look()
    facts.train_data.rows.cut_at_border[6] = True
    assert next(f for f in run_checks(facts) if f.id == "tokens_cut_at_border").severity == "note"


def test_what_does_not_fit_gets_the_cheapest_change_that_does(look: Any, find: Any, tiny_model_dir: Path) -> None:
    # Checkpointing saves nothing of a single layer.
    overrides = [
        f"model.name_or_path={tiny_model_dir}",
        "model.dtype=float32",
        "train.bf16=false",
        "data.eval_file=null",
        "data.eval_fraction=0",
    ]
    facts = look(*overrides)
    assert facts.memory is not None
    changed = facts.predict_memory(with_overrides(facts.config, ["train.gradient_checkpointing=true"]))
    device = replace(facts.environment.device, limit_bytes=(facts.memory.total_bytes + changed.total_bytes) // 2)
    found = find(*overrides, device=device)["memory_too_small"]
    assert found.fix == "train.gradient_checkpointing=true"
    assert "memory_too_small" not in find(*overrides, found.fix, device=device)


def test_where_no_copy_of_the_model_fits_and_a_share_does_fsdp_is_named(look: Any, find: Any) -> None:
    facts = look(*ON_TWO, num_processes=2)
    fsdp, ddp = (facts.predict_memory(facts.config, sharding) for sharding in ("fsdp", "ddp"))
    assert fsdp.total_bytes < ddp.total_bytes
    between = replace(facts.environment.device, limit_bytes=(fsdp.total_bytes + ddp.total_bytes) // 2)
    found = find(*ON_TWO, num_processes=2, device=between)
    assert "configs/accelerate/fsdp2.yaml" in found["fsdp_fits"].message
    assert "memory_too_small" in found
    # What FSDP cannot shard is said with it.
    paged = find("train.num_train_epochs=10", num_processes=2, device=between)["fsdp_fits"].message
    assert paged.endswith("fsdp2.yaml with train.optim=adamw_torch")
    assert find(*ON_TWO, num_processes=2) == find(*ON_TWO, num_processes=2, sharding="fsdp", device=between) == {}


@pytest.mark.parametrize("packing", ["true", "false"])
def test_with_auto_batch_size_smaller_micro_batches_are_noted_where_they_fit(
    look: Any, find: Any, packing: str
) -> None:
    overrides = ["data.eval_file=null", "data.eval_fraction=0", f"data.packing={packing}", "train.auto_batch_size=true"]
    facts = look(*overrides)
    assert facts.memory is not None
    one_row = [f"train.max_tokens_per_device_batch={facts.train_data.lengths.max()}"]
    if packing == "false":
        one_row = ["train.per_device_train_batch_size=1"]
    smallest = facts.predict_memory(with_overrides(facts.config, one_row))
    device = replace(facts.environment.device, limit_bytes=(facts.memory.total_bytes + smallest.total_bytes) // 2)
    found = find(*overrides, device=device)
    assert "memory_too_small" not in found
    assert found["micro_batches_smaller"].severity == "note"
    assert "a micro-batch has at most" in found["micro_batches_smaller"].message
    too_small = replace(device, limit_bytes=smallest.total_bytes // 2)
    assert "memory_too_small" in find(*overrides, device=too_small)


TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
WITH_TAGS = CHATML.replace(
    "{{ message.content }}",
    "{% if message.role == 'tool' %}<tool_response>{{ message.content }}</tool_response>"
    "{% else %}{{ message.content }}{% endif %}",
)


def with_tools(system: str, answer: str = "12:00") -> dict[str, Any]:
    turns = [("system", system), ("user", "what time is it?"), ("assistant", "let me see"), ("tool", answer)]
    messages = [{"role": role, "content": content} for role, content in [*turns, ("assistant", "noon")]]
    return {"messages": messages, "tools": [{"type": "function", "function": {"name": "clock"}}]}


def test_tools_that_are_shown_twice(find: Any, write_rows: Any) -> None:
    hermes = with_tools('<tools> [{"name": "clock", "parameters": {}}] </tools>')
    path = write_rows([*TRAIN, hermes, with_tools("{'name': 'clock'}")], "twice.jsonl")
    twice = find(f"data.train_file={path}", template=TOOLS + CHATML)["tools_shown_twice"]
    assert (twice.severity, twice.value) == ("warning", 2)
    assert "2 rows with tools that a system text lists too" in twice.message
    assert "lines 79, 80" in twice.message
    assert twice.fix is not None
    fixed = find(f"data.train_file={path}", *shlex.split(twice.fix), template=TOOLS + CHATML)
    assert "tools_shown_twice" not in fixed
    assert fixed["parts_left_out"].value == {"tools": 2}
    # Where some rows have them in the column alone, leaving it out would lose those.
    path = write_rows([*TRAIN, hermes, with_tools('Call "clock", and "name": no other.')], "once.jsonl")
    once = find(f"data.train_file={path}", template=TOOLS + CHATML)["tools_shown_twice"]
    assert (once.value, once.fix) == (1, None)


def test_answers_that_are_wrapped_twice(find: Any, write_rows: Any) -> None:
    rows = [with_tools("s", "<tool_response>\n12:00\n</tool_response>"), with_tools("t", "12:00")]
    given = f"data.train_file={write_rows([*TRAIN, *rows], 'wrapped.jsonl')}"
    wrapped = find(given, template=TOOLS + WITH_TAGS)["answers_wrapped_twice"]
    assert (wrapped.severity, wrapped.value) == ("warning", 1)
    assert "line 79" in wrapped.message
    assert "answers_wrapped_twice" not in find(given, template=TOOLS + CHATML)


def test_letters_that_the_tokenizer_changes_are_counted(find: Any, write_rows: Any) -> None:
    rows = [chat("who?", "Rene\u0301"), chat("where?", "Orl\u00e9ans"), chat("WHO?", "\u00c9mile")]
    given = f"data.train_file={write_rows([*TRAIN, *rows], 'accents.jsonl')}"
    found = find(given, normalizer=NFC())["text_normalized"]
    assert (found.severity, found.value, found.fix) == ("note", 1, None)
    assert (
        "1 row with letters that the tokenizer changes before it encodes them (its normalizer: NFC; " in found.message
    )
    assert "line 79" in found.message
    assert find(given, normalizer=Lowercase())["text_normalized"].value == 1
    spaces = Sequence([Prepend("\u2581"), Replace(" ", "\u2581")])  # how SentencePiece writes a space
    assert "text_normalized" not in {*find(given, normalizer=spaces), *find(given)}


def test_every_finding_that_a_check_may_yield_is_tripped_here() -> None:
    elsewhere = {
        # In tests/preflight/test_serving.py and tests/data/test_split.py.
        "serving_prompt",
        "eval_alike",
        "fsdp_fits",
        "micro_batches_smaller",
        "rows_unsupervised",
        "turn_end_not_eos",
        "template_adds_system",
        "template_uses_date",
        "tools_shown_twice",
        "answers_wrapped_twice",
        "text_normalized",
        "bos_doubled",
        "tokens_cut_at_border",
        # In tests/training/test_continue.py.
        "adapter_differs",
        # In tests/encoding/test_named_templates.py.
        "template_end_token",
        "system_folded",
        # In tests/watch/test_trackers.py.
        "tracker_missing",
        # In tests/preflight/test_replies.py.
        "adapter_small_for_rows",
        # In tests/preflight/test_families.py.
        "memory_unknown",
        "experts_dora",
        "experts_without_dropout",
        "not_causal",
        "adapter_idle",
        "checkpointing_missing",
        "packing_impossible",
        "packing_off",
        "towers_left_out",
        "without_adapter",
        "router_loss_off",
        "tokens_without_embedding",
    }
    assert {name for _, ids in CHECKS for name in ids} == {*TRIPS, *AROUND, *ROWS, *elsewhere}


def test_every_check_has_its_row_in_the_docs() -> None:
    assert (ROOT / "docs/preflight.md").read_text(encoding="utf-8") == documentation(), "fix: python docs/write.py"


def test_a_default_warmup_of_a_single_step_run_is_an_error_too(find: Any) -> None:
    # 10% of one step, rounded up, is that step: its learning rate would be 0.
    assert find("train.max_steps=1")["warmup_past_end"].fix == "train.warmup_steps=0"


def test_the_same_settings_on_eight_processes_are_few_steps(find: Any) -> None:
    assert find(num_processes=8)["few_steps"].value == 10


def test_errors_are_refused_together_unless_allowed_by_id(find: Any) -> None:
    findings = list(find("train.warmup_steps=100").values())
    with pytest.raises(PreflightError, match=r"preflight\.allow=\[warmup_past_end\]"):
        refuse_errors(findings, [])
    refuse_errors(findings, ["warmup_past_end"])
    with pytest.raises(ConfigError, match=r"not an error that can be allowed; fix: ids of warmup_past_end"):
        refuse_errors(findings, ["warmup"])


def test_the_old_settings_with_their_fixes_find_nothing(base: list[str], find: Any) -> None:
    old = [
        "train.num_train_epochs=1",
        "train.warmup_steps=100",
        "train.per_device_train_batch_size=8",
        "train.gradient_accumulation_steps=1",
        "train.logging_steps=20",
        "lora.target_modules=[q_proj,v_proj]",
    ]
    assert set(find(*old)) == {
        "warmup_past_end",
        "few_steps",
        "single_pass",
        "logging_steps_past_end",
        "targets_q_v_only",
    }
    config, applied = apply_fixes("qwen0.5b", [*base, *old], None, 1)
    # Three epochs are 30 steps, so that few_steps and the log interval have nothing left to fix.
    assert applied == [
        "train.warmup_steps=1",
        "train.num_train_epochs=3",
        f"lora.target_modules=[{','.join(ALL_SEVEN_PROJECTIONS)}]",
    ]
    assert config == load_config("qwen0.5b", [*base, *old, *applied])
    assert find(*old, *applied) == {}


def test_fixes_for_one_cause_do_not_add_up(base: list[str], find: Any, write_rows: Any) -> None:
    seven = [f"data.train_file={write_rows(TRAIN[:7], 'seven.jsonl')}", "train.num_train_epochs=1"]
    assert find(*seven)["few_steps"].fix == (
        "train.per_device_train_batch_size=1 train.gradient_accumulation_steps=1 train.num_train_epochs=5"
    )
    config, _ = apply_fixes("qwen0.5b", [*base, *seven], None, 1)
    train = config.train
    epochs_and_step = (train.num_train_epochs, train.per_device_train_batch_size, train.gradient_accumulation_steps)
    assert epochs_and_step == (5, 1, 1)  # 35 steps of one row, each row five times


@given(
    st.integers(1, 600),
    st.integers(1, 8),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 8),
    st.none() | st.integers(1, 60),
)
@example(2, 1, 1, 2, 1, 2)  # smaller steps make it a single pass
@example(5, 8, 1, 4, 1, None)  # no settings give each process an example
def test_the_fixes_of_one_plan_agree_and_pasted_together_leave_nothing_to_fix(
    num_rows: int, num_processes: int, batch_size: int, accumulation: int, epochs: int, max_steps: int | None
) -> None:
    checks = (check_single_pass, check_few_steps, check_batch_larger_than_data, check_batch_large_for_rows)
    settings = [
        f"train.per_device_train_batch_size={batch_size}",
        f"train.gradient_accumulation_steps={accumulation}",
        f"train.num_train_epochs={epochs}",
        *([f"train.max_steps={max_steps}"] if max_steps else []),
    ]

    def found(overrides: list[str]) -> list[Finding]:
        config = load_config("base", ["data.train_file=rows.jsonl", *overrides])
        facts = SimpleNamespace(config=config, plan=plan_for(config, num_rows, num_processes))
        return [finding for check in checks for finding in check(cast(Facts, facts))]

    assert all(finding.fix is None for finding in found(settings) if "whatever the settings" in finding.message)
    fixes = [part for finding in found(settings) for part in (finding.fix or "").split()]
    assert len({fix.partition("=")[0] for fix in fixes}) == len(set(fixes))
    left = found([*settings, *fixes])
    assert [finding for finding in left if finding.fix] == []
    assert all("needs more rows" in finding.message for finding in left if finding.id == "few_steps")


def test_more_epochs_than_usual_are_kept_where_smaller_steps_are_enough(find: Any, write_rows: Any) -> None:
    eight = [f"data.train_file={write_rows(TRAIN[:8], 'eight.jsonl')}", "train.num_train_epochs=8"]
    assert find(*eight)["few_steps"].fix == "train.gradient_accumulation_steps=1"


@pytest.mark.parametrize("length", ["train.num_train_epochs=1", "train.max_steps=3"])
def test_too_few_rows_for_enough_steps_are_said_to_be_too_few(find: Any, write_rows: Any, length: str) -> None:
    found = find(f"data.train_file={write_rows(TRAIN[:5], 'five.jsonl')}", length)["few_steps"]
    assert found.fix is None
    assert "5 examples give at most 25 in the usual 5 epochs: it needs more rows" in found.message


def test_steps_that_max_steps_limits_get_more_of_them(find: Any) -> None:
    found = find("train.max_steps=20")["few_steps"]
    assert found.fix == "train.max_steps=30"
    assert "fewer than 30 steps rarely change an adapter" in found.message


def test_the_command_prints_json_alone_and_exits_with_2_on_an_error(base: list[str], tmp_path: Path) -> None:
    fixed = tmp_path / "fixed.yaml"
    float32 = ["train.bf16=false", "model.dtype=float32"]  # this machine may have no bfloat16
    command = ["launch/preflight.py", "--cfg", "qwen0.5b", "--json", *base, *float32]
    done = python(*command, "train.warmup_steps=100", "--write", str(fixed))
    assert done.returncode == 2
    printed = json.loads(done.stdout)
    assert [finding["id"] for finding in printed["findings"]] == ["warmup_past_end"]
    assert printed["plan"]["total_optimizer_steps"] == 50
    assert printed["data"]["train"]["counts"]["read"] == 78
    assert "this run is not started" in done.stderr
    assert f"wrote {fixed}: train.warmup_steps=5\n" in done.stderr
    done = python(*(part for part in command if part != "--json"), "train.warmup_steps=100")
    assert (done.stdout + done.stderr).count("learn next to nothing") == 1  # once, as the reason not to start
    assert "nothing found" not in done.stdout
    done = python("launch/preflight.py", "--cfg", str(fixed), "--num-processes", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing found" in done.stdout
