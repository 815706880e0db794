"""Cross-entropy on loss tokens only -> sums, never means.

A mean of micro-batch means weighs a token by the company it keeps. Sums can be added over micro-batches and ranks
and divided once, so one optimizer step has the same loss and gradient however it is divided into micro-batches.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_core.config.schema import TrainConfig
from lora_core.model.attention import causal_lm_of, decoder_of
from lora_core.model.decoder import check_positions, decoder_layers
from lora_core.model.head import Head, check_head, head_of, parameters_of
from lora_core.model.packing_check import check_packing


def logits_per_chunk(device_kind: str) -> int:
    """How many logits are in memory at a time: 32 MiB in float32 on a CPU, 55 positions of Qwen2.5's vocabulary.

    On a GPU 256 MiB: there, each chunk waits for some twenty kernels to start, and one of 512 positions in place of 55
    made a whole step of Qwen2.5-0.5B's shape a seventh faster.
    """
    return 2**26 if device_kind == "cuda" else 2**23


class LossSums(NamedTuple):
    """Scalars over the loss tokens of one micro-batch."""

    loss_sum: Tensor
    """Cross-entropy (smoothed, where that is asked for), times the loss weights if there are any, summed, float32;
    carries the gradient."""
    num_tokens: Tensor
    num_correct: Tensor
    """Tokens whose most likely prediction was right."""
    token_losses: Tensor
    """(N,) the cross-entropy of each loss token, neither smoothed nor weighted, float32, row by row; carries no
    gradient."""


class CausalLMLoss(nn.Module):
    """A causal LM that returns its loss. The vocabulary projection runs only where loss tokens are predicted.

    As a module, so that what wraps a model for several devices (DDP, FSDP) wraps the whole computation.
    """

    def __init__(self, model: nn.Module, device_kind: str | None = None, config: TrainConfig | None = None) -> None:
        """As the model's own device, or as another kind ("cuda", "cpu") would compute it.

        Args:
            config: for `label_smoothing_factor`, `neftune_noise_alpha` and `fp16`; None is without.
        """
        super().__init__()
        self.model = model
        self._head: Head | None = None
        self._logits_per_chunk = logits_per_chunk(device_kind or next(model.parameters()).device.type)
        self._smoothing = 0.0 if config is None else config.label_smoothing_factor
        self._fp16 = config is not None and config.fp16
        self._noise = None
        if config is not None and config.neftune_noise_alpha is not None:
            self._noise = EmbeddingNoise(causal_lm_of(model).get_input_embeddings(), config.neftune_noise_alpha)

    def autocast(self) -> AbstractContextManager[Any]:
        """float16 where `train.fp16` says so; bfloat16 is Accelerate's, around all of this."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, torch.float16) if self._fp16 else nullcontext()

    @property
    def _no_split_modules(self) -> list[str]:
        """Class names of the decoder layers: Accelerate's FSDP reads this, and gathers one layer at a time."""
        named = causal_lm_of(self.model)._no_split_modules or ()
        # Not BERT's embeddings, which it names too: they may be tied to the head, which is gathered with the whole.
        return sorted({type(layer).__name__ for layer in decoder_layers(self.model)} & set(named))

    @property
    def generation_config(self) -> Any:
        """The model's own: it says, among others, which tokens end a reply."""
        return self.model.generation_config

    def generate(self, **inputs: Any) -> Tensor:
        """transformers' `generate`, of the model inside; (1, T) ids of prompt and reply."""
        model: Any = self.model
        ids: Tensor = model.generate(**inputs)
        return ids

    def check_weights(self, packing: bool) -> str | None:
        """Check the model inside, as it is checked where it is loaded whole; returns what `check_head` does.

        Raises:
            ConfigError, TrainingError: as `check_packing` and `check_head`.
        """
        if packing:
            check_packing(self.model)
            check_positions(self.model)
        return check_head(self.model)

    def forward(
        self, input_ids: Tensor, loss_mask: Tensor, loss_weights: Tensor | None = None, **inputs: Any
    ) -> LossSums:
        """One micro-batch, as `packing` makes them -> sums; see `_sums`."""
        if self._noise is not None:
            self._noise.measure(input_ids, **inputs)
        with self.autocast():
            return self._sums(input_ids, loss_mask, loss_weights, inputs)

    def _sums(
        self, input_ids: Tensor, loss_mask: Tensor, loss_weights: Tensor | None, inputs: dict[str, Any]
    ) -> LossSums:
        """One micro-batch -> sums.

        Args:
            input_ids: (B, T).
            loss_mask: (B, T), True for loss tokens. The prediction for position t is made at t - 1, so the mask is read
                one place to the right.
            loss_weights: (B, T), float32; None is 1 for all.
            inputs: for the decoder: attention_mask for padded rows; position_ids and segment_lengths for packed ones.
        """
        decoder = decoder_of(self.model)
        output = decoder(input_ids=input_ids, use_cache=False, **inputs)
        hidden = output.last_hidden_state
        if self._head is None:
            self._head = head_of(self.model, output)
        # One look at the mask: on a GPU each costs a wait for the device.
        row, position = loss_mask[:, 1:].nonzero(as_tuple=True)  # (N,) each
        targets = input_ids[row, position + 1]  # (N,)
        if targets.numel() == 0:
            # A filler micro-batch: still a function of all parameters, so that ranks can synchronise.
            zero = torch.zeros((), dtype=torch.long, device=targets.device)
            reached = self._head(hidden[:1, 0]) if self._head_trains(self._head) else hidden
            return LossSums(reached.float().sum() * 0.0, zero, zero, torch.zeros(0, device=targets.device))
        weights = None if loss_weights is None else loss_weights[row, position + 1]  # (N,)
        states = hidden[row, position]  # (N, H)
        if self._head_trains(self._head):
            # A head that trains needs its own gradient, so all logits are kept.
            logits = self._head(states).float()
            losses = nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=self._smoothing)
            loss_sum, token_losses = (losses if weights is None else losses * weights).sum(), losses.detach()
            if self._smoothing:
                token_losses = nn.functional.cross_entropy(logits.detach(), targets, reduction="none")
            num_correct = (logits.detach().argmax(dim=-1) == targets).sum()
        else:
            apply: Any = _HeadLoss.apply
            vocab_size = causal_lm_of(self.model).config.get_text_config().vocab_size
            positions = max(1, self._logits_per_chunk // vocab_size)
            loss_sum, num_correct, token_losses = apply(
                states, targets, weights, self._smoothing, self._head, positions
            )
        num_tokens = torch.tensor(targets.numel(), device=targets.device)
        return LossSums(loss_sum, num_tokens, num_correct, token_losses)

    def _head_trains(self, head: Head) -> bool:
        return any(parameter.requires_grad for parameter in parameters_of(head, self.model))


class _HeadLoss(torch.autograd.Function):
    """Projection and cross-entropy in chunks of positions, whose logits are gone before the next chunk.

    The head is frozen, so all that the backward needs is the gradient to the hidden states, and that is known as soon
    as the chunk's loss is: it is computed in the forward and scaled in the backward. Memory: one chunk of logits,
    whatever the number of tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        smoothing: float,
        head: Head,
        positions_per_chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(N, H) hidden states, (N,) targets, weights -> (summed loss, number of right first guesses, (N,) losses).

        Smoothed by e, a token's loss is (1 - e) times its cross-entropy plus e times the mean over the vocabulary of
        -log p, as transformers' `LabelSmoother` has it (Szegedy et al. 2015, https://arxiv.org/abs/1512.00567).
        """
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needs_gradient else None
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        num_correct = torch.zeros((), dtype=torch.long, device=hidden.device)
        token_losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), positions_per_chunk):
            part = slice(start, start + positions_per_chunk)
            with torch.set_grad_enabled(needs_gradient):
                chunk = hidden[part].detach().requires_grad_(needs_gradient)
                logits = head(chunk)
            target = targets[part, None]  # (P, 1)
            values = logits.detach()
            probabilities = values.softmax(dim=-1, dtype=torch.float32)  # (P, V)
            best = probabilities.argmax(dim=-1, keepdim=True)
            # From the most likely token, whose probability is at least 1 / V, so that its logarithm is exact.
            log_probability = values.gather(1, target).float() - values.gather(1, best).float()
            log_probability += probabilities.gather(1, best).log()
            weight = None if weights is None else weights[part, None]  # (P, 1)
            token_losses[part] = -log_probability[:, 0]
            losses = -log_probability
            if smoothing:
                normalizer = values.gather(1, target).float() - log_probability  # log of the sum of exponentials
                uniform = normalizer - values.mean(dim=-1, keepdim=True, dtype=torch.float32)
                losses = (1 - smoothing) * losses + smoothing * uniform
            loss_sum += (losses if weight is None else losses * weight).sum()
            num_correct += (best == target).sum()
            if gradient is not None:
                # d loss / d logits = probabilities - one-hot target, in the memory of the probabilities
                to_logits = probabilities.scatter_(1, target, log_probability.exp() - 1)
                if smoothing:  # probabilities - ((1 - e) one-hot target + e / V)
                    to_logits.sub_(smoothing / values.shape[-1])
                    to_logits.scatter_add_(1, target, torch.full_like(log_probability, smoothing))
                to_logits = to_logits if weight is None else to_logits.mul_(weight)
                (gradient[part],) = torch.autograd.grad(logits, chunk, to_logits.to(logits.dtype))
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(num_correct, token_losses)
        return loss_sum, num_correct, token_losses

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None, None, None


class EmbeddingNoise:
    """NEFTune, Jain et al. 2023, https://arxiv.org/abs/2310.05914: noise on the embeddings while training.

    Each value gets alpha / sqrt(L H) times a draw from [-1, 1), for an example of L tokens and H values a token.
    transformers' hook takes for L the width of the batch: padding, and with packing all examples of a row, would then
    change the noise. Here L is the example's own.
    """

    def __init__(self, embedding: nn.Module, alpha: float) -> None:
        self._alpha = alpha
        self._lengths: Tensor | None = None
        embedding.register_forward_hook(self._add)

    def measure(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        segment_lengths: tuple[int, ...] | None = None,
        **_: Any,
    ) -> None:
        """Take the length of the example that each position of the next forward belongs to, (B, T)."""
        if segment_lengths is not None:
            lengths = torch.tensor(segment_lengths, device=input_ids.device)
            self._lengths = lengths.repeat_interleave(lengths, output_size=input_ids.shape[1])[None]
        elif attention_mask is not None:
            self._lengths = attention_mask.sum(dim=-1, keepdim=True).expand_as(input_ids)
        else:
            self._lengths = torch.full_like(input_ids, input_ids.shape[1])

    def _add(self, embedding: nn.Module, _: Any, embedded: Tensor) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        if not embedding.training or self._lengths is None or self._lengths.shape != embedded.shape[:2]:
            return embedded
        size = self._alpha / (self._lengths * embedded.shape[-1]).float().sqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * size[..., None].to(embedded.dtype)
