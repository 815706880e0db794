"""examples/count_exact.py counts the replies that are exactly right, before and after."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.configuration import load_config
from lora_core.errors import ConfigError
from lora_core.evaluation.replies import sample_reply
from lora_core.model.base import add_adapter, load_base_model, load_tokenizer
from tests.conftest import CHATML, ROOT, chat


def test_replies_are_counted_for_the_base_model_and_for_the_adapter(
    tmp_path: Path, tiny_model_dir: Path, write_rows: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    settings = [
        f"model.name_or_path={tiny_model_dir}",
        "model.dtype=float32",
        "train.bf16=false",
        "train.sample_max_new_tokens=8",
    ]
    # An untrained model repeats the token before its reply: let that be something that can be seen.
    template = tmp_path / "template.jinja"
    template.write_text(CHATML.replace("assistant\n", "assistant:"), encoding="utf-8")
    settings.append(f"data.chat_template={template}")
    config = load_config("demo", settings)
    tokenizer = load_tokenizer(config.model, config.data)
    base = load_base_model(config.model, torch.device("cpu"), config.data.packing)
    questions = ["When?", "Where to?", "Who said so?", "Why not?"]
    asked = [(tokenizer, chat(question)["messages"], None, 8) for question in questions]
    untrained = [sample_reply(base, *each) for each in asked]
    model = add_adapter(base, config.lora, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(str(tmp_path / "adapter"))
    trained = [sample_reply(model, *each) for each in asked]
    assert all(old and new and old != new for old, new in zip(untrained, trained, strict=True))

    # Right before, right after twice (a second turn is not asked for), and never right.
    expected = [untrained[0], trained[1], trained[2], f"{trained[3]}!"]
    rows = [chat(question, reply) for question, reply in zip(questions, expected, strict=True)]
    rows[2]["messages"] += chat("And then?", "Nothing.")["messages"]
    script = runpy.run_path(str(ROOT / "examples/count_exact.py"))
    settings += [f"data.eval_file={write_rows(rows)}"]
    monkeypatch.setattr(
        sys, "argv", ["count_exact.py", "--cfg", "demo", f"--adapter={tmp_path / 'adapter'}", *settings]
    )
    script["main"]()
    printed = capsys.readouterr().out
    assert printed.endswith("exact replies: 1 of 4 before, 2 of 4 after\n")
    assert f"expected: {expected[3]}\n  before: {untrained[3]!r}\n   after: {trained[3]!r}\n" in printed
    with pytest.raises(ConfigError, match="no eval set"):
        script["count_exact"](load_config("demo", [*settings, "data.eval_file=null"]), tmp_path / "adapter")
