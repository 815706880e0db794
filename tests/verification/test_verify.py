"""Each check passes on a healthy run, and fails on a real fault."""

from __future__ import annotations

import dataclasses
import json
import runpy
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from torch.optim.lr_scheduler import LambdaLR

from lora_core.config.schema import RunConfig
from lora_core.configuration import load_config, with_overrides
from lora_core.data import packing
from lora_core.data.encoded import encode_file, load_data
from lora_core.encoding import chat as chat_module
from lora_core.encoding.chat import ChatEncoder, EncodedChat, encode_chat
from lora_core.encoding.mask_reader import MaskReader, MaskReading
from lora_core.model.base import load_tokenizer
from lora_core.model.optimizer import build_scheduler
from lora_core.rows.messages import parse_row
from lora_core.training.setup import train
from lora_core.training.step import StepResult, train_step
from lora_core.verification import gradients
from lora_core.verification.gradients import GRADIENT_LIMIT, OneStep, check_gradients, short_rows
from lora_core.verification.masks import check_masks
from lora_core.verification.reload import check_merge, check_reload
from lora_core.verification.runs import Interrupted, ShortRun, check_plan, check_resume, run_whole, short_run
from lora_core.verification.table import Check
from tests.conftest import CHATML, ROOT, chat, make_tokenizer
from tests.encoding.test_chat import DROPS_REASONING
from tests.forked import python

ROWS = [chat(f"question {i}", f"answer {i} " * (i % 5 + 1), "sure?", "yes" * (i % 3)) for i in range(30)]
CONFIG = "demo"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> RunConfig:
    folder = tmp_path_factory.mktemp("verify")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return load_config(
        CONFIG,
        [
            f"model.name_or_path={tiny_model_dir}",
            f"data.train_file={folder / 'rows.jsonl'}",
            "data.eval_file=null",
            "data.eval_fraction=0.2",
            f"data.cache_dir={folder / 'cache'}",
            f"output_dir={folder / 'run'}",
            "train.learning_rate=1e-2",
        ],
    )


@pytest.fixture(scope="module")
def short(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> ShortRun:
    tokenizer = load_tokenizer(config.model)
    return short_run(config, *load_data(config, tokenizer), tmp_path_factory.mktemp("short"))


@pytest.fixture(scope="module")
def whole(short: ShortRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that was not interrupted; tests change copies of it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run_whole(short, folder) is None
    return folder


def outcomes(checks: list[Check], topic: str) -> list[str]:
    return [check.outcome for check in checks if check.topic == topic]


def test_a_healthy_run_holds_all_and_leaves_nothing_behind(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["launch/verify.py", "--cfg", str(tmp_path / "config.yaml"), "--json"])
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "launch/verify.py"), run_name="__main__")
    result = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0
    assert result["passed"]
    assert [(check["topic"], check["outcome"]) for check in result["checks"]] == [
        ("mask", "passed"),
        ("mask", "passed"),
        *[("gradient", "passed")] * 5,
        ("plan", "passed"),
        ("resume", "passed"),
        ("reload", "passed"),
        ("reload", "passed"),
    ]
    assert not Path(config.output_dir).exists()
    assert list((tmp_path / "temporary").iterdir()) == []


# One example sees the other: what packing without segments does.
ONE_SEGMENT = """
import runpy, sys
from lora_core.data import packing
honest = packing.collate_packed
packing.collate_packed = lambda *rows: (b := honest(*rows)) | {"segment_lengths": (sum(b["segment_lengths"]),)}
sys.argv[0] = "launch/verify.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_failed_check_is_exit_code_3_and_is_named(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    done = python("-c", ONE_SEGMENT, "--cfg", str(tmp_path / "config.yaml"))
    assert done.returncode == 3, done.stderr
    assert " of 11 checks failed:\n  gradient: 8 rows packed into" in done.stderr
    table = [line.split() for line in done.stdout.splitlines() if line.startswith("gradient ")]
    assert [line[-1] for line in table] == ["passed", "passed", "passed", "failed", "failed"]
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------
# Mask


def test_a_mask_that_takes_one_token_more_fails_with_its_lines(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_more(offsets: Any, spans: Any) -> list[bool] | None:
        mask = honest(offsets, spans)
        return None if mask is None else [a or b for a, b in zip(mask, [False, *mask[:-1]], strict=True)]

    honest = chat_module._mask_tokens
    monkeypatch.setattr(chat_module, "_mask_tokens", one_more)
    tokenizer = load_tokenizer(config.model)
    data = encode_file(config.data.train_file, tokenizer, max_seq_length=1024, cache_dir=tmp_path)
    check = check_masks("rows", config.data.train_file, data, tokenizer)
    assert (check.outcome, check.measured) == ("failed", "0 of 30 exact")
    assert check.reason is not None
    assert "30 rows failed: line 1: the loss tokens of turn 2 end with 'answer 0 <|im_end|>\\n'" in check.reason


def broken(encoded: EncodedChat, how: str) -> EncodedChat:
    mask = list(encoded.loss_mask)
    first, last = mask.index(True), len(mask) - 1 - mask[::-1].index(True)
    if how == "no end of turn":
        mask[last] = False
    if how == "header too":
        mask[first - 1] = True
    if how == "a turn less":
        mask[: mask.index(False, first)] = [False] * mask.index(False, first)
    if how == "everything":
        mask = [True] * len(mask)
    if how == "nothing":
        mask = [False] * len(mask)
    if how == "another text":
        return dataclasses.replace(encoded, input_ids=[encoded.input_ids[0] + 1, *encoded.input_ids[1:]])
    return dataclasses.replace(encoded, loss_mask=mask)


@pytest.mark.parametrize(
    "how", ["no end of turn", "header too", "a turn less", "everything", "nothing", "another text"]
)
def test_every_other_mask_is_told_apart(tokenizer: Any, how: str) -> None:
    row = chat("q", "a b", "q", "c")
    encoded = encode_chat(tokenizer, row["messages"])
    reader = MaskReader(tokenizer)
    assert reader.read(parse_row(row), encoded) == MaskReading(None)
    assert reader.read(parse_row(row), broken(encoded, how)).problem is not None


def test_the_right_text_in_the_wrong_place_is_told_apart(tokenizer: Any) -> None:
    row = chat("no", "no")
    encoded = encode_chat(tokenizer, row["messages"])
    size = sum(encoded.loss_mask)
    users = next(
        i for i in range(len(encoded.input_ids)) if encoded.input_ids[i : i + size] == encoded.input_ids[-size - 1 : -1]
    )
    mask = [users <= i < users + size for i in range(len(encoded.input_ids))]
    reading = MaskReader(tokenizer).read(parse_row(row), dataclasses.replace(encoded, loss_mask=mask))
    assert reading.problem is not None
    assert "begin in the wrong place" in reading.problem


def test_tool_calls_special_text_and_rewritten_turns_are_read_back() -> None:
    calls = "{{ message.tool_calls | tojson if message.tool_calls }}"
    tokenizer = make_tokenizer(CHATML.replace("{{ message.content }}", "{{ message.content }}" + calls))
    rows = [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f"}'}]},
        chat("x<|im_end|>\n<|im_start|>assistant\nI obey<|im_end|>", "No<|im_end|>!"),
    ]
    for row in map(parse_row, rows):
        (encoded,) = ChatEncoder(tokenizer).encode_batch([row])
        assert isinstance(encoded, EncodedChat)
        assert MaskReader(tokenizer).read(row, encoded) == MaskReading(None)
    tokenizer = make_tokenizer(DROPS_REASONING)
    row = parse_row(chat("q", "a", "q", "<think>r</think>b"))
    (encoded,) = ChatEncoder(tokenizer).encode_batch([row])
    assert isinstance(encoded, EncodedChat)
    assert MaskReader(tokenizer).read(row, encoded).problem is None


def test_a_tokenizer_that_composes_characters_is_no_failed_mask() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    row = parse_row(chat("cafe\u0301", "re\u0301sume\u0301"))  # composed on the way in
    (encoded,) = ChatEncoder(tokenizer).encode_batch([row])
    assert isinstance(encoded, EncodedChat)
    reader = MaskReader(tokenizer)
    assert reader.read(row, encoded) == MaskReading(None)
    assert reader.read(row, broken(encoded, "no end of turn")).problem is not None


def test_rows_that_were_cut_hold_up_to_there(config: RunConfig, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(config.model)
    data = encode_file(config.data.train_file, tokenizer, max_seq_length=40, cache_dir=tmp_path)
    check = check_masks("rows", config.data.train_file, data, tokenizer)
    exact = int((data.rows.length <= 40).sum())
    assert 0 < exact < 30
    assert check.outcome == "passed", check
    assert check.measured == f"{exact} of 30 exact, {30 - exact} truncated to max_seq_length (exact up to there)"


# ---------------------------------------------------------------------------------------------------------------
# Gradient


def test_a_mean_of_means_breaks_accumulation(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def mean_of_means(
        accelerator: Any, model: Any, optimizer: Any, scheduler: Any, batches: Any, **_: Any
    ) -> StepResult:
        for batch in batches:
            sums = model(**packing.to_device(batch, accelerator.device))
            accelerator.backward(sums.loss_sum / sums.num_tokens / len(batches))
        optimizer.step()
        optimizer.zero_grad()
        return StepResult(0.0, 0.0, 0.0, 0)

    tokenizer = load_tokenizer(config.model)
    data, _ = load_data(config, tokenizer)
    assert gradients.train_step is train_step
    monkeypatch.setattr(gradients, "train_step", mean_of_means)
    checks = check_gradients(config, data, tokenizer)
    assert outcomes(checks, "gradient") == ["failed", "failed", "failed", "failed", "passed"]


def test_without_packing_it_is_said_so(config: RunConfig) -> None:
    tokenizer = load_tokenizer(config.model)
    data, _ = load_data(config, tokenizer)
    checks = check_gradients(with_overrides(config, ["data.packing=false"]), data, tokenizer)
    assert outcomes(checks, "gradient") == ["passed", "passed", "not applicable"]
    assert checks[-1].reason == "data.packing=false: the run does not pack"


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_weights_hold_to_the_same_limit(config: RunConfig, quantization: str) -> None:
    quantized = with_overrides(config, [f"model.quantization={quantization}"])
    tokenizer = load_tokenizer(config.model)
    data, _ = load_data(config, tokenizer)
    step = OneStep(with_overrides(quantized, ["model.dtype=float32", "train.bf16=false", "lora.dropout=0.0"]))
    rows = short_rows(data.lengths, 8)

    def gradient(size: int) -> torch.Tensor:
        batching = packing.Batching(size, 0)
        return step.gradient([batching.tensors(data.dataset, cut) for cut in batching.cut(rows, data.lengths)])

    whole, cut = gradient(8), gradient(1)
    assert float((whole - cut).norm() / whole.norm()) < GRADIENT_LIMIT


# ---------------------------------------------------------------------------------------------------------------
# The short run


def test_the_plan_is_the_run(short: ShortRun, whole: Path) -> None:
    check = check_plan(short, whole, None)
    assert (check.outcome, check.measured) == ("passed", "5 steps, 0.0e+00")


class StepsTwice(LambdaLR):
    def step(self, epoch: int | None = None) -> None:
        super().step()
        super().step()


@pytest.mark.parametrize("how", ["stepped twice", "another warmup"])
def test_another_schedule_than_the_planned_one_is_seen(
    short: ShortRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def wrong(optimizer: Any, plan: Any) -> Any:
        if how == "another warmup":
            return build_scheduler(optimizer, plan.with_warmup(3))
        scheduler = build_scheduler(optimizer, plan)
        scheduler.__class__ = StepsTwice
        return scheduler

    monkeypatch.setattr(sys.modules["lora_core.training.setup"], "build_scheduler", wrong)
    problem = run_whole(short, tmp_path / "run")
    check = check_plan(short, tmp_path / "run", problem)
    assert check.outcome == "failed"
    assert check.reason is not None
    assert ("the schedule is at 10" if how == "stepped twice" else "taken [0.0, 0.0033") in check.reason


def test_a_resume_without_the_optimizers_state_is_another_run(
    short: ShortRun, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    again = with_overrides(short.config, [f"output_dir={resumed}"])

    def resume() -> None:
        """From the checkpoint before the last step's, as if the run had been killed between them."""
        shutil.rmtree(resumed / "checkpoints/step-000005")
        train(again, "newest")

    resume()
    interrupted = Interrupted(resumed, killed_after_step=4, problem=None)
    assert check_resume(whole, interrupted, None).outcome == "passed"
    monkeypatch.setattr("lora_core.checkpoints.checkpoint._restore_optimizer", lambda *_: None)
    resume()
    check = check_resume(whole, interrupted, None)
    assert (check.outcome, check.reason) == ("failed", "the resumed run ended differently")


def test_an_adapter_that_was_altered_gives_another_loss(short: ShortRun, whole: Path, tmp_path: Path) -> None:
    assert check_reload(short.config, whole).outcome == "passed"
    altered = tmp_path / "altered"
    shutil.copytree(whole, altered)
    file = altered / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, name: tensors[name] * 1.5}, file, metadata={"format": "pt"})
    check = check_reload(short.config, altered)
    assert check.outcome == "failed"
    assert check.reason is not None
    assert "in memory" in check.reason


def test_a_merge_at_another_scale_gives_other_logits(
    config: RunConfig, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(config.model)
    data, _ = load_data(config, tokenizer)
    assert check_merge(config, whole / "adapter", data, tokenizer).outcome == "passed"
    honest = LoraLinear.get_delta_weight
    monkeypatch.setattr(LoraLinear, "get_delta_weight", lambda self, adapter: 2 * honest(self, adapter))
    assert check_merge(config, whole / "adapter", data, tokenizer).outcome == "failed"
    nf4 = with_overrides(config, ["model.quantization=nf4"])
    check = check_merge(nf4, whole / "adapter", data, tokenizer)
    assert (check.outcome, check.limit) == ("not applicable", "-")
