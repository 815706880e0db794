"""`data.chat_template=NAME`, `data.chat_template_kwargs` and `data.fold_system`."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lora_core.config.schema import DataConfig, ModelConfig, RunConfig
from lora_core.configuration import load_config, with_overrides
from lora_core.data.encoded import encode_file
from lora_core.encoding.chat import encode_chat
from lora_core.encoding.named_templates import FOLDER, NAMED_TEMPLATES, folds_system, set_template, with_arguments
from lora_core.encoding.template import render_chat
from lora_core.errors import ChatTemplateError, ConfigError
from lora_core.model.base import load_tokenizer
from lora_core.preflight.preflight import look_at_run, run_checks
from tests.conftest import CHATML, chat, make_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
]
WITHOUT_SYSTEM = CHAT[1:]
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "Zürich"}}}
TOOL_USE: list[dict[str, Any]] = [
    {"role": "user", "content": "What time is it?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "12:00"},
    {"role": "assistant", "content": "Noon."},
]
TOOLS_OF_QWEN = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\n<tools>\n" + json.dumps(TOOLS[0]) + "\n</tools>\n\nFor each function "
    "call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
CALL_OF_QWEN = '<tool_call>\n{"name": "clock", "arguments": {"zone": "Zürich"}}\n</tool_call>'

# What each family documents: special tokens, BOS (None: its tokenizer adds none), EOS, CHAT with the generation prompt.
CHATML_TEXT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
)
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
FAMILIES: dict[str, tuple[list[str], str | None, str, str]] = {
    "chatml": (["<|im_start|>", "<|im_end|>"], None, "<|im_end|>", CHATML_TEXT),
    "qwen3": (["<|im_start|>", "<|im_end|>"], None, "<|im_end|>", CHATML_TEXT),
    "llama3": (
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "gemma": (
        ["<start_of_turn>", "<end_of_turn>"],
        "<bos>",
        "<eos>",
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
    ),
    "mistral": ([], "<s>", "</s>", "<s>[INST] Be brief.\n\nHi [/INST] Hello!</s>[INST] Bye [/INST]"),
    "phi3": (
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        None,
        "<|endoftext|>",
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello!<|end|>\n<|user|>\nBye<|end|>\n"
        "<|assistant|>\n",
    ),
    "zephyr": (
        [],
        "<s>",
        "</s>",
        "<s><|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello!</s>\n<|user|>\nBye</s>\n<|assistant|>\n",
    ),
    "alpaca": (
        [],
        "<s>",
        "</s>",
        "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello!</s>\n\n### Instruction:\nBye\n\n### Response:\n",
    ),
    "vicuna": ([], "<s>", "</s>", "<s>Be brief. USER: Hi ASSISTANT: Hello!</s>USER: Bye ASSISTANT:"),
}
WITH_TOOLS = ("chatml", "llama3", "qwen3")
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
DROPS_SYSTEM = "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}" + CHATML


def plain_tokenizer(specials: list[str], bos: str | None, eos: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with these special tokens; it puts `bos` in front of each text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokens = [*specials, *(token for token in (bos, eos) if token is not None)]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


def of_family(name: str, **settings: Any) -> PreTrainedTokenizerFast:
    specials, bos, eos, _ = FAMILIES[name]
    tokenizer = plain_tokenizer(specials, bos, eos)
    set_template(tokenizer, DataConfig(chat_template=name, **settings))
    return tokenizer


def of_other_family(name: str) -> PreTrainedTokenizerFast:
    """Without the tokens that the template writes, and without a BOS."""
    tokenizer = plain_tokenizer([], None, "<|stop|>")
    set_template(tokenizer, DataConfig(chat_template=name))
    return tokenizer


def trained_text(tokenizer: PreTrainedTokenizerFast, messages: list[Any], tools: Any = None) -> str:
    encoded = encode_chat(tokenizer, messages, tools)
    ids = [token for token, flag in zip(encoded.input_ids, encoded.loss_mask, strict=True) if flag]
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def test_every_template_has_a_name_and_a_family() -> None:
    assert {path.stem for path in FOLDER.glob("*.jinja")} == set(NAMED_TEMPLATES) == set(FAMILIES)
    for name, token in NAMED_TEMPLATES.items():
        text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
        assert ("eos_token" in text) == (token is None)
        assert f"end_of_turn | default('{token}')" in text or token is None


@pytest.mark.parametrize("name", FAMILIES)
def test_a_template_writes_what_its_family_documents(name: str) -> None:
    assert render_chat(of_family(name), CHAT, add_generation_prompt=True) == FAMILIES[name][3]


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_system_turn(name: str) -> None:
    with_system, without = (render_chat(of_family(name), rows) for rows in (CHAT, WITHOUT_SYSTEM))
    bos = FAMILIES[name][1] or ""
    if name == "alpaca":
        preamble = (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        )
        assert without == with_system.replace("Be brief.", preamble)
    elif name == "vicuna":
        assert without == with_system.replace("Be brief.", VICUNA_SYSTEM)
    else:
        assert without.startswith(bos)
        assert "system" not in without
        assert with_system.endswith(without[without.index("Hi") :])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_tokens_are_the_answers_and_the_end_of_the_turn(name: str) -> None:
    row = [*CHAT, {"role": "assistant", "content": "Ciao, été 😀"}]
    space = " " if name in ("mistral", "vicuna") else ""  # after [/INST] and ASSISTANT: it is the model's to write
    end = NAMED_TEMPLATES[name] or FAMILIES[name][2]
    # The prompt ends before it, so the model has to write that it does not think.
    think = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    assert trained_text(of_family(name), row) == f"{space}Hello!{end}{space}{think}Ciao, été 😀{end}"
    assert trained_text(of_other_family(name), row) == f"{space}Hello!<|stop|>{space}{think}Ciao, été 😀<|stop|>"


@pytest.mark.parametrize("name", FAMILIES)
def test_another_familys_tokenizer_ends_turns_with_its_eos_and_gets_no_bos(name: str) -> None:
    _, bos, eos, expected = FAMILIES[name]
    expected = expected.removeprefix(bos or "").replace(NAMED_TEMPLATES[name] or eos, "<|stop|>")
    assert render_chat(of_other_family(name), CHAT, add_generation_prompt=True) == expected


def test_a_bos_token_that_the_tokenizer_never_writes_is_not_written() -> None:
    tokenizer = plain_tokenizer(["<|im_end|>"], None, "<|im_end|>")
    tokenizer.bos_token = "<|im_start|>"  # as in SmolLM2
    set_template(tokenizer, DataConfig(chat_template="chatml"))
    assert render_chat(tokenizer, CHAT, add_generation_prompt=True) == CHATML_TEXT


@pytest.mark.parametrize("name", ["chatml", "alpaca"])
def test_a_tokenizer_with_no_end_at_all_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"an EOS token to end|no EOS token to end") as caught:
        set_template(plain_tokenizer([], None, None), DataConfig(chat_template=name))
    assert caught.value.finding_id == "template_end_token"


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(WITH_TOOLS)))
def test_a_family_without_tools_refuses_them(name: str) -> None:
    fix = rf"the {name} template cannot show tools; fix: data\.chat_template=chatml"
    with pytest.raises(ChatTemplateError, match=fix):
        render_chat(of_family(name), WITHOUT_SYSTEM, TOOLS)
    for messages in (TOOL_USE[:2], [TOOL_USE[0], TOOL_USE[2]]):
        with pytest.raises(ChatTemplateError, match=f"the {name} template cannot show tool calls"):
            render_chat(of_family(name), messages)


@pytest.mark.parametrize("name", ["chatml", "qwen3"])
def test_tools_in_chatml(name: str) -> None:
    think = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    expected = (
        f"<|im_start|>system\n{TOOLS_OF_QWEN}<|im_end|>\n<|im_start|>user\nWhat time is it?<|im_end|>\n"
        f"<|im_start|>assistant\n{CALL_OF_QWEN}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n12:00\n</tool_response><|im_end|>\n"
        f"<|im_start|>assistant\n{think}Noon.<|im_end|>\n"
    )
    assert render_chat(of_family(name), TOOL_USE, TOOLS) == expected
    assert trained_text(of_family(name), TOOL_USE, TOOLS) == f"{CALL_OF_QWEN}<|im_end|>{think}Noon.<|im_end|>"
    with_system = render_chat(of_family(name), [CHAT[0], *TOOL_USE], TOOLS)
    assert with_system == expected.replace("system\n", "system\nBe brief.\n\n", 1)
    twice = [TOOL_USE[0], {"role": "assistant", "content": "Two.", "tool_calls": [CALL, CALL]}, *[TOOL_USE[2]] * 2]
    shown = render_chat(of_family(name), twice, TOOLS)
    assert f"assistant\nTwo.\n{CALL_OF_QWEN}\n{CALL_OF_QWEN}<|im_end|>" in shown
    answer = "\n<tool_response>\n12:00\n</tool_response>"
    assert shown.endswith(f"<|im_start|>user{answer}{answer}<|im_end|>\n")


def test_tools_in_llama3() -> None:
    call = '{"name": "clock", "parameters": {"zone": "Zürich"}}'
    shown = render_chat(of_family("llama3"), [CHAT[0], *TOOL_USE], TOOLS)
    system, rest = shown.split("<|eot_id|>", 1)
    assert system.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n")
    assert system.endswith(json.dumps(TOOLS[0], indent=4) + "\n\nBe brief.")
    assert rest == (
        "<|start_header_id|>user<|end_header_id|>\n\nWhat time is it?<|eot_id|>"
        f"<|start_header_id|>assistant<|end_header_id|>\n\n{call}<|eot_id|>"
        "<|start_header_id|>ipython<|end_header_id|>\n\n12:00<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nNoon.<|eot_id|>"
    )
    assert trained_text(of_family("llama3"), TOOL_USE, TOOLS) == f"{call}<|eot_id|>Noon.<|eot_id|>"
    twice = [TOOL_USE[0], {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}]
    with pytest.raises(ChatTemplateError, match="one tool call a turn"):
        render_chat(of_family("llama3"), twice, TOOLS)


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_a_system_text_is_refused_where_no_user_turn_can_take_it(name: str) -> None:
    for messages in ([CHAT[0], CHAT[2]], [*CHAT, CHAT[0]]):
        with pytest.raises(ChatTemplateError, match="a system turn at the start only"):
            render_chat(of_family(name), messages)


def test_reasoning_in_qwen3() -> None:
    answer = {"role": "assistant", "content": "Ciao", "reasoning_content": "A farewell."}
    inline = {"role": "assistant", "content": "<think>\nA farewell.\n</think>\n\nCiao"}
    text = CHATML_TEXT + "<think>\nA farewell.\n</think>\n\nCiao<|im_end|>\n"
    tokenizer = of_family("qwen3")
    assert render_chat(tokenizer, [*CHAT, answer]) == render_chat(tokenizer, [*CHAT, inline]) == text
    assert trained_text(tokenizer, [CHAT[1], inline]) == inline["content"] + "<|im_end|>"
    # After a later question it is not shown.
    later = render_chat(tokenizer, [*CHAT, inline, {"role": "user", "content": "?"}])
    assert later == CHATML_TEXT + "Ciao<|im_end|>\n<|im_start|>user\n?<|im_end|>\n"
    without = of_family("qwen3", chat_template_kwargs={"enable_thinking": False})
    assert render_chat(without, CHAT, add_generation_prompt=True) == CHATML_TEXT + "<think>\n\n</think>\n\n"
    assert trained_text(without, [*CHAT, {"role": "assistant", "content": "Ciao"}]) == "Hello!<|im_end|>Ciao<|im_end|>"


# ----- names and files


def test_a_file_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    (tmp_path / "chatml").write_text("mine", encoding="utf-8")
    set_template(tokenizer, DataConfig(chat_template="chatml"))
    assert tokenizer.chat_template == "mine"
    (tmp_path / "gemma").mkdir()
    set_template(tokenizer, DataConfig(chat_template="gemma"))
    assert "start_of_turn" in str(tokenizer.chat_template)


def test_an_unknown_name_lists_the_known_ones() -> None:
    names = ", ".join(NAMED_TEMPLATES)
    with pytest.raises(ConfigError, match=rf"\(there are: {names}\); fix: data\.chat_template=llama3$"):
        set_template(make_tokenizer(), DataConfig(chat_template="llama-3"))


def test_a_tokenizer_without_a_template_is_refused_with_a_name_that_works() -> None:
    tokenizer = make_tokenizer(chat_template="")
    with pytest.raises(ChatTemplateError, match=r"fix: data\.chat_template=chatml "):
        encode_chat(tokenizer, chat("q", "a")["messages"])
    set_template(tokenizer, DataConfig(chat_template="chatml"))
    assert trained_text(tokenizer, chat("q", "a")["messages"]) == "a<|im_end|>"


# ----- arguments

names = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


@given(value=values)
def test_any_json_value_reaches_the_template(value: Any) -> None:
    tokenizer = plain_tokenizer([], None, "</s>")
    tokenizer.chat_template = with_arguments("\n  {{ value | tojson }}", {"value": value})
    shown = str(tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False))
    assert shown.startswith("\n  ")
    assert json.loads(shown) == value


SHOWS = (
    "{% macro shown() %}{{ mood }}{% endmacro %}{% for m in messages %}[{{ shown() }}{{ mood | tojson }}]{% endfor %}"
)


def test_an_argument_reaches_every_rendering_and_the_saved_tokenizer(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ mood }}" + CHATML, encoding="utf-8")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    kwargs = {"mood": "kind %} {{ 'é' }} \\ \""}
    data = DataConfig(chat_template=str(template), chat_template_kwargs=kwargs)
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(tmp_path / "model")), data)
    expected = kwargs["mood"] + "<|im_start|>user\nHi<|im_end|>\n"
    messages = WITHOUT_SYSTEM[:1]
    assert render_chat(tokenizer, messages) == expected
    assert render_chat(pickle.loads(pickle.dumps(tokenizer)), messages) == expected
    tokenizer.save_pretrained(tmp_path / "adapter")
    again = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert again.apply_chat_template(messages, tokenize=False) == expected
    # Another value that is passed on purpose goes before it.
    assert again.apply_chat_template(messages, tokenize=False, mood="") == expected.removeprefix(kwargs["mood"])


def test_an_argument_reaches_macros_and_loops() -> None:
    tokenizer = make_tokenizer(with_arguments(SHOWS, {"mood": "glad"}))
    assert render_chat(tokenizer, WITHOUT_SYSTEM[:2]) == '[glad"glad"][glad"glad"]'


def test_arguments_reach_both_templates_of_a_tokenizer_that_has_two() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": "d{{ mood }}", "tool_use": "t{{ mood }}"}
    set_template(tokenizer, DataConfig(chat_template_kwargs={"mood": 1}))
    assert render_chat(tokenizer, CHAT) == "d1"
    assert render_chat(tokenizer, CHAT, TOOLS) == "t1"


def test_an_argument_that_the_template_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no 'enable_thinkin'.* fix: data\.chat_template_kwargs='\{\}'") as caught:
        of_family("qwen3", chat_template_kwargs={"enable_thinkin": False})
    assert caught.value.finding_id == "template_argument_unknown"


def test_other_arguments_are_encoded_anew(tmp_path: Path, write_rows: Any) -> None:
    path = write_rows([chat("q", "a")])
    lengths = [
        encode_file(path, of_family("qwen3", **settings), max_seq_length=99, cache_dir=tmp_path / "cache").lengths[0]
        for settings in ({}, {"chat_template_kwargs": {"enable_thinking": False}})
    ]
    assert lengths[0] == lengths[1]  # the prompt's empty reasoning is in the text of both
    assert len(list((tmp_path / "cache").glob("*/rows.arrow"))) == 2


def test_arguments_in_yaml_and_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("data:\n  chat_template_kwargs:\n    enable_thinking: false\n    levels: {low: [1, 2]}\n")
    config = load_config(file)
    assert config.data.chat_template_kwargs == {"enable_thinking": False, "levels": {"low": [1, 2]}}
    (tmp_path / "again.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml").data == config.data
    override = "data.chat_template_kwargs={enable_thinking: true}"
    assert load_config(file, [override]).data.chat_template_kwargs == {"enable_thinking": True}
    assert with_overrides(config, [override]).data.chat_template_kwargs == {"enable_thinking": True}
    assert load_config(file, ["data.chat_template_kwargs={}"]).data.chat_template_kwargs == {}


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("{messages: 1}", "chat_template_kwargs cannot set 'messages'"),
        ("{a-b: 1}", "cannot set 'a-b'"),
        ("{a: .nan}", "must hold JSON values"),
        ("{a: 2024-01-01}", "must be a dict"),
        ("{1: 2}", "must be a dict"),
        ("[1]", "must be a dict"),
    ],
)
def test_wrong_arguments_are_refused(value: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_config("demo", [f"data.chat_template_kwargs={value}"])


def test_an_argument_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data:\n  chat_template_kwargs:\n    a: 1\n    a: 2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data\.chat_template_kwargs\.a: set twice"):
        load_config(tmp_path / "c.yaml")


# ----- a template without a system turn


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, DROPS_SYSTEM])
def test_a_system_text_is_folded_where_the_template_has_no_such_turn(template: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template)
    set_template(tokenizer, DataConfig(fold_system=True))
    assert folds_system(tokenizer)
    row = [*CHAT, {"role": "assistant", "content": "Ciao"}]
    assert render_chat(tokenizer, row).startswith("<|im_start|>user\nBe brief.\n\nHi<|im_end|>\n<|im_start|>assistant")
    assert trained_text(tokenizer, row) == "Hello!<|im_end|>Ciao<|im_end|>"
    assert render_chat(tokenizer, row[1:]).startswith("<|im_start|>user\nHi<|im_end|>\n")
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.apply_chat_template(row, tokenize=False) == render_chat(tokenizer, row)


def test_nothing_is_folded_where_it_need_not_or_cannot_be() -> None:
    for template in (CHATML, "{{ raise_exception('never') }}"):
        tokenizer = make_tokenizer(template)
        set_template(tokenizer, DataConfig(fold_system=True))
        assert tokenizer.chat_template == template
    tokenizer = make_tokenizer(REFUSES_SYSTEM)
    set_template(tokenizer, DataConfig())
    with pytest.raises(ChatTemplateError, match="no system"):
        render_chat(tokenizer, CHAT)


# ----- what preflight says


def findings_of(model: Path, rows: Path, cache: Path, **data: Any) -> dict[str, str]:
    settings = {"train_file": str(rows), "cache_dir": str(cache), **data}
    config = RunConfig(model=ModelConfig(name_or_path=str(model)), data=DataConfig(**settings))
    return {finding.id: finding.message for finding in run_checks(look_at_run(config, 1))}


def test_preflight_says_which_token_ends_turns_and_how_many_system_texts_were_folded(
    tiny_model_dir: Path, tmp_path: Path, write_rows: Any
) -> None:
    rows = write_rows([{"messages": CHAT[:3]}, *(chat(f"q{i}", f"a{i}") for i in range(9))])
    found = findings_of(tiny_model_dir, rows, tmp_path, chat_template="llama3")
    assert found["template_end_token"] == (
        "the tokenizer has no '<|eot_id|>', which data.chat_template=llama3 ends turns with; its EOS '<|im_end|>' ends "
        "them instead"
    )
    (tmp_path / "t.jinja").write_text(REFUSES_SYSTEM, encoding="utf-8")
    found = findings_of(tiny_model_dir, rows, tmp_path, chat_template=str(tmp_path / "t.jinja"), fold_system=True)
    assert "in 1 of 10 rows" in found["system_folded"]
    found = findings_of(tiny_model_dir, rows, tmp_path, chat_template="chatml", fold_system=True)
    assert not {"template_end_token", "system_folded"} & set(found)
