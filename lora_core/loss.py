"""Cross-entropy on supervised positions only -> sums, never means.

A mean of micro-batch means weighs a token by the company it keeps. Sums can be added over micro-batches and ranks
and divided once, so one optimizer step has the same loss and gradient however it is cut.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_core.errors import TrainingError


class LossSums(NamedTuple):
    """Scalars over the supervised tokens of one micro-batch."""

    loss_sum: Tensor
    """Cross-entropy in nats, summed, float32; carries the gradient."""
    num_tokens: Tensor
    num_correct: Tensor
    """Tokens whose most likely prediction was right."""


class CausalLMLoss(nn.Module):
    """A causal LM that returns its loss. The vocabulary projection runs for supervised positions only.

    As a module, so that what wraps a model for several devices (DDP, FSDP) wraps the whole computation.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor) -> LossSums:
        """(B, T) ids, attention mask (1 is a real token) and loss mask (True is supervised) -> sums.

        The prediction for position t is made at t - 1, so the loss mask is read one place to the right.
        """
        hidden = _decoder(self.model)(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        supervised = loss_mask[:, 1:]
        logits = project(self.model, hidden[:, :-1][supervised])  # (N, vocabulary)
        targets = input_ids[:, 1:][supervised]  # (N,)
        if targets.numel() == 0:
            # A filler micro-batch: still a function of the parameters, so that ranks can synchronise.
            zero = torch.zeros((), dtype=torch.long, device=targets.device)
            return LossSums(hidden.float().sum() * 0.0, zero, zero)
        loss_sum = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        with torch.no_grad():
            num_correct = (logits.argmax(dim=-1) == targets).sum()
        return LossSums(loss_sum, torch.tensor(targets.numel(), device=targets.device), num_correct)


def _causal_lm(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def _decoder(model: nn.Module) -> Any:
    return _causal_lm(model).get_decoder()


def project(model: nn.Module, hidden: Tensor) -> Tensor:
    """Hidden states (N, H) -> logits (N, vocabulary), with the scaling that some families apply to logits."""
    causal_lm = _causal_lm(model)
    logits: Tensor = causal_lm.get_output_embeddings()(hidden)
    config = causal_lm.config
    if scale := getattr(config, "logit_scale", None):  # Cohere multiplies
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):  # Granite divides
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2 and 3
        logits = torch.tanh(logits / cap) * cap
    return logits


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Check that `project` gives the model's own logits, on eight tokens. Some families do more after the decoder.

    Raises:
        TrainingError: it does not; training would minimise the loss of another model.
    """
    causal_lm = _causal_lm(model)
    was_training = model.training
    model.eval()
    device = causal_lm.get_input_embeddings().weight.device
    input_ids = torch.arange(1, 9, device=device)[None]
    own = causal_lm(input_ids=input_ids, use_cache=False).logits[0].float()
    ours = project(model, _decoder(model)(input_ids=input_ids, use_cache=False).last_hidden_state[0]).float()
    model.train(was_training)
    difference = (own - ours).abs().max().item()
    if not difference <= 1e-3 * max(1.0, own.abs().max().item()):
        raise TrainingError(
            f"{type(causal_lm).__name__} computes its logits in a way that lora_core does not know: they differ by "
            f"{difference:.3g} from its output embedding's. Training would go wrong, so it stops here; "
            "please report the model"
        )
