"""Held-out loss, perplexity and accuracy, weighted by token; and sample replies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lora_core.chat import render_chat
from lora_core.config import RunConfig
from lora_core.data import EncodedFile, load_data, pad_id
from lora_core.devices import build_accelerator
from lora_core.errors import ConfigError, DataError
from lora_core.lora_linear import use_lean_lora
from lora_core.loss import CausalLMLoss
from lora_core.messages import Message, parse_json_row
from lora_core.model import load_base_model, load_tokenizer
from lora_core.packing import Batching, eval_batching, to_device

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EvalResult:
    """Over all supervised tokens of the held-out rows."""

    loss: float
    """Mean cross-entropy, nats per supervised token."""
    perplexity: float
    """exp(loss)."""
    token_accuracy: float
    """Share of supervised tokens that were the model's first guess, 0 to 1."""
    num_tokens: int
    num_conversations: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f}, token accuracy {self.token_accuracy:.1%} "
            f"({self.num_conversations} conversations, {self.num_tokens:,} supervised tokens)"
        )


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, data: EncodedFile, batching: Batching) -> EvalResult:
    """Run the held-out rows through the model, shared out over the ranks. Leaves the model's mode as it was.

    Args:
        model: a `CausalLMLoss`, as `accelerator.prepare` returned it.
        batching: how the rows are cut.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    rows = np.arange(len(data.lengths))
    for cut in batching.cut(rows, data.lengths, accelerator.num_processes, accelerator.process_index):
        result = model(**to_device(batching.tensors(data.dataset, cut), accelerator.device))
        sums += torch.stack([value.detach().double().cpu() for value in result])
    sums = accelerator.reduce(sums.to(_reduce_device(accelerator)), "sum").cpu()
    model.train(was_training)
    loss_sum, num_tokens, num_correct = sums.tolist()
    loss = loss_sum / num_tokens
    return EvalResult(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        token_accuracy=num_correct / num_tokens,
        num_tokens=int(num_tokens),
        num_conversations=len(rows),
    )


def _reduce_device(accelerator: Accelerator) -> torch.device:
    # MPS has no float64; everything else reduces where the model is.
    return torch.device("cpu") if accelerator.device.type == "mps" else accelerator.device


def evaluate_adapter(config: RunConfig, adapter_dir: str | Path) -> EvalResult:
    """Held-out loss of a saved adapter, the way `train` measures it.

    Raises:
        ConfigError: there is no adapter in the folder, or the configuration names no held-out rows.
    """
    if not (Path(adapter_dir) / "adapter_config.json").is_file():
        raise ConfigError(
            f"{adapter_dir}: holds no adapter_config.json; fix: --adapter FOLDER, such as outputs/demo/adapter"
        )
    accelerator = build_accelerator(config)
    tokenizer = load_tokenizer(config.model, config.data.chat_template)
    with accelerator.main_process_first():
        _, eval_data = load_data(config, tokenizer)
    if eval_data is None:
        raise ConfigError("no held-out rows; fix: data.eval_file=PATH or data.eval_fraction=0.1")
    adapted = load_adapter(config, adapter_dir, accelerator.device)
    model = accelerator.prepare_model(CausalLMLoss(adapted), evaluation_mode=True)
    return evaluate(accelerator, model, eval_data, eval_batching(config, pad_id(tokenizer)))


def load_adapter(config: RunConfig, adapter_dir: str | Path, device: torch.device) -> PeftModel:
    """A saved adapter on a fresh base model, as PEFT loads it.

    Raises:
        ConfigError: the base model cannot be loaded.
    """
    import peft

    base = load_base_model(config.model, device, config.data.packing)
    model: PeftModel = peft.PeftModel.from_pretrained(base, str(adapter_dir))
    use_lean_lora(model)
    return model


@torch.no_grad()
def sample_reply(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Any,
    max_new_tokens: int,
) -> str:
    """The model's greedy reply to a conversation that ends with a user's turn."""
    was_training = model.training
    model.eval()
    text = render_chat(tokenizer, messages, tools, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        **prompt,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        use_cache=True,
        pad_token_id=pad_token_id,
    )
    model.train(was_training)
    reply = str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return reply.strip()


def sample_prompts(config: RunConfig, eval_data: EncodedFile | None) -> list[dict[str, Any]]:
    """The first held-out conversations that ask something, up to their first assistant turn."""
    if eval_data is None or config.train.num_sample_replies == 0:
        return []
    path = Path(config.data.eval_file or config.data.train_file)
    wanted = [int(line) for line in eval_data.dataset[: 4 * config.train.num_sample_replies]["line"]]
    by_line = _lines(path, set(wanted))
    prompts: list[dict[str, Any]] = []
    for line in wanted:
        conversation = parse_json_row(by_line[line])
        first = next(i for i, message in enumerate(conversation.messages) if message["role"] == "assistant")
        messages = conversation.messages[:first]
        if messages and messages[-1]["role"] == "user" and len(prompts) < config.train.num_sample_replies:
            prompts.append({"messages": messages, "tools": conversation.tools})
    return prompts


def _lines(path: Path, wanted: set[int]) -> dict[int, str]:
    """The lines with these 1-based numbers."""
    found: dict[int, str] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number in wanted:
                found[number] = raw.decode("utf-8-sig")
                if len(found) == len(wanted):
                    break
    if len(found) < len(wanted):
        raise DataError(f"{path}: changed while the run was starting; start it again")
    return found


def reply_to_all(
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[dict[str, Any]],
    max_new_tokens: int,
) -> list[str]:
    """Every rank answers its share; all get all answers, in order."""
    from accelerate.utils import gather_object

    if not prompts:
        return []
    adapted = accelerator.unwrap_model(model).model
    mine = range(accelerator.process_index, len(prompts), accelerator.num_processes)
    # Generation takes a token at a time and grows a cache: train.torch_compile would compile for that anew.
    with accelerator.autocast(), torch.compiler.set_stance("force_eager"):
        replies = [
            (i, sample_reply(adapted, tokenizer, prompts[i]["messages"], prompts[i]["tools"], max_new_tokens))
            for i in mine
        ]
    return [reply for _, reply in sorted(gather_object(replies))]
