"""What the tests share: quiet libraries, the tiny model and the demo's, rows in a file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from transformers import PreTrainedTokenizerFast

from lora_core.commands.command_line import quiet_libraries
from lora_core.config.schema import RunConfig
from lora_core.configuration import load_config
from lora_core.memory.simulate import live_at_peak
from lora_core.model.heap import keep_freed_memory
from lora_core.training.setup import train
from tests.tiny import CHATML, ROOT, chat, make_model, make_tokenizer, save_tiny_model, write_jsonl

__all__ = ["CHATML", "DEMO_MODEL", "ROOT", "chat", "make_model", "make_tokenizer"]

DEMO_MODEL = Path("~/.cache/lora_core/models/SmolLM2-135M-Instruct").expanduser()

# The same examples in each run of the suite, so that what passes here passes in CI; `make properties` draws others.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.register_profile("search", derandomize=False, deadline=None, max_examples=1_000)
settings.load_profile("suite")

quiet_libraries()
keep_freed_memory()


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


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """The folder of a run that knows half of its eval set by heart; with checkpoints of steps 10, 20 and 30 of 30."""
    folder = tmp_path_factory.mktemp("finished")
    asked = [("red", "stop"), ("green", "go on"), ("amber", "wait")]
    rows = write_jsonl(folder / "train.jsonl", [chat(*asked[i % 3]) for i in range(24)])
    held_out = write_jsonl(folder / "eval.jsonl", [chat(*pair) for pair in (*asked, ("blue", "x y"), ("grey", "z"))])
    settings = [
        f"model.name_or_path={tiny_model_dir}",
        "model.dtype=float32",
        f"data.train_file={rows}",
        f"data.eval_file={held_out}",
        f"data.cache_dir={folder / 'cache'}",
        f"output_dir={folder / 'run'}",
        "train.bf16=false",
        "train.max_steps=30",
        "train.eval_steps=10",
        "train.save_steps=10",
        "train.save_total_limit=3",
        "train.learning_rate=5e-3",
        "train.num_sample_replies=5",
        "train.sample_max_new_tokens=8",
        "lora.dropout=0",
    ]
    train(load_config("demo", settings))
    return folder / "run"


@pytest.fixture
def without_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that end draw no page, which takes longer than to train them; tests/report/ holds what is on it, and
    tests/training/test_train.py that each run has one."""
    monkeypatch.setattr("lora_core.training.finish.write_report", lambda folder: folder)


# What a simulated step does not look at: rows to steps to rates, what is logged and kept, and when.
_NOT_SIMULATED = {
    *("num_train_epochs", "max_steps", "gradient_accumulation_steps", "learning_rate", "warmup_steps", "warmup_ratio"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "logging_steps", "eval_steps", "save_steps", "save_total_limit"),
}
_simulated: dict[str, Any] = {}


@pytest.fixture
def simulated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step of a run is simulated once for the same model, settings and micro-batches, which takes longer than all
    else that preflight does; tests/memory/ holds what it tells."""

    def remembered(config: RunConfig, *batches: Any) -> Any:
        settings = (config.model, config.lora, config.train.model_dump(exclude=_NOT_SIMULATED))
        model = Path(config.model.name_or_path) / "config.json"
        key = repr((settings, batches, model.read_bytes() if model.is_file() else None))
        if key not in _simulated:
            _simulated[key] = live_at_peak(config, *batches)
        return copy.deepcopy(_simulated[key])

    monkeypatch.setattr("lora_core.memory.plan.live_at_peak", remembered)


@pytest.fixture
def write_rows(tmp_path: Path) -> Any:
    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        return write_jsonl(tmp_path / name, rows)

    return write
