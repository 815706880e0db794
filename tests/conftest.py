"""What the tests share: quiet libraries, the tiny model and the demo's, rows in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lora_core.commands.command_line import quiet_libraries
from lora_core.runtime.devices import reuse_freed_memory
from tests.tiny import CHATML, ROOT, chat, make_model, make_tokenizer, save_tiny_model, write_jsonl

__all__ = ["CHATML", "DEMO_MODEL", "ROOT", "chat", "make_model", "make_tokenizer"]

DEMO_MODEL = Path("~/.cache/lora_core/models/SmolLM2-135M-Instruct").expanduser()

quiet_libraries()
reuse_freed_memory()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("tiny-qwen2")
    save_tiny_model(folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    assert (DEMO_MODEL / "model.safetensors").is_file(), "fix: python examples/fetch_demo_model.py"
    return DEMO_MODEL


@pytest.fixture
def write_rows(tmp_path: Path) -> Any:
    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        return write_jsonl(tmp_path / name, rows)

    return write
