"""Whole runs of small random families, as a user has them: trained, stopped and resumed, asked for replies, measured.

    python -m tests.families.runs [--bf16] [NAME ...]

prints a JSON object for each family; without names, for all of them (some hours on two cores). In float32, unless
`--bf16` is given; on the GPU, where there is one. `sweep.py` compares one step of each with plain transformers and
PEFT; this is about all that surrounds it.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch

from lora_core.configuration import load_config
from lora_core.errors import LoraCoreError
from lora_core.evaluation.generation import encode_prompt, generate_reply, stop_ids
from lora_core.inference.evaluation import evaluate_loaded
from lora_core.inference.opened import load_opened, open_model
from lora_core.training.setup import train
from tests.families.build import families, tiny_model
from tests.families.sweep import quiet
from tests.tiny import chat, make_tokenizer, write_jsonl

NEW_TOKENS = 6


def outcome_of_run(family: str, folder: Path, bf16: bool = False) -> dict[str, Any]:
    """{family, why, ...}: `why` is empty where all of it ran, and a sentence where something is refused.

    `traceback` holds an error that is not a sentence. Of a run that ended: is its resumed adapter the same to the bit
    (`resumes`), how far is the loss that `evaluate` measures from the run's own (`loss_difference`), how many of its
    replies generated together differ from those generated alone, and without the cache (`replies`, `cached`).
    """
    result: dict[str, Any] = {"family": family, "why": ""}
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            tokenizer = make_tokenizer()
            try:
                tiny_model(family, len(tokenizer)).save_pretrained(folder / "model")
            except Exception as error:  # noqa: BLE001  # a family's config has its own idea of what is small
                return result | {"why": f"not built: {type(error).__name__}"}
            tokenizer.save_pretrained(folder / "model")
            result |= _run(folder, bf16)
    except LoraCoreError as error:
        result["why"] = str(error).splitlines()[0].replace(str(folder), "FOLDER")
    except Exception as error:  # noqa: BLE001  # what this is here to find
        result["why"] = f"{type(error).__name__}: {str(error)[:300]}"
        result["traceback"] = "".join(traceback.format_exception(error)[-6:])
    return result


def _run(folder: Path, bf16: bool) -> dict[str, Any]:
    rows = write_jsonl(folder / "train.jsonl", [chat(f"question {i}", f"answer {i % 5}") for i in range(16)])
    held_out = write_jsonl(folder / "eval.jsonl", [chat(f"a question {i}", f"answer {i}") for i in range(3)])
    settings = [
        *(f"model.name_or_path={folder / 'model'}", f"train.bf16={str(bf16).lower()}"),
        f"model.dtype={'bfloat16' if bf16 else 'float32'}",
        *(f"data.train_file={rows}", f"data.eval_file={held_out}", f"data.cache_dir={folder / 'cache'}"),
        *("train.optim=adamw_torch", "train.learning_rate=2e-3", "train.max_steps=4", "train.save_steps=2"),
        *("train.num_sample_replies=2", f"train.sample_max_new_tokens={NEW_TOKENS}"),
        *(f"output_dir={folder / 'run'}", "overwrite_output_dir=true"),
    ]
    config = load_config("base", settings)
    summary = train(config)
    file = folder / "run/adapter/adapter_model.safetensors"
    whole = file.read_bytes()
    train(config, folder / "run/checkpoints/step-000002")
    result: dict[str, Any] = {"resumes": file.read_bytes() == whole}
    loaded = load_opened(open_model(str(folder / "run")))
    measured = evaluate_loaded(loaded, None, NEW_TOKENS, print)
    assert summary.eval_loss_after is not None
    result["loss_difference"] = abs(measured.result.loss - summary.eval_loss_after)
    loaded.model.eval()
    together = {index: answered.reply for index, answered in measured.replies.items()}
    alone, without_cache = {}, {}
    for index, answered in measured.replies.items():
        prompt = encode_prompt(loaded.tokenizer, answered.question.asked)
        alone[index] = generate_reply(loaded.model, loaded.tokenizer, prompt, NEW_TOKENS).text
        without_cache[index] = _greedy(loaded.model, loaded.tokenizer, prompt)
    result["replies"] = sum(alone[index] != together[index] for index in together)
    result["cached"] = sum(alone[index] != without_cache[index] for index in together)
    return result


@torch.no_grad()
def _greedy(model: Any, tokenizer: Any, prompt: torch.Tensor) -> str:
    """A reply by the model's logits alone, with no cache: all tokens pass again for each new one."""
    stops, ids = stop_ids(model, tokenizer), prompt.to(model.device)
    for _ in range(NEW_TOKENS):
        new = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
        ids = torch.cat([ids, new[None, None]], dim=1)
        if int(new) in stops:
            break
    return str(tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    quiet()
    names = [word for word in sys.argv[1:] if word != "--bf16"]
    for family in names or families():
        with tempfile.TemporaryDirectory() as temporary:
            print(json.dumps(outcome_of_run(family, Path(temporary), "--bf16" in sys.argv)), flush=True)
