"""From the last hidden states to logits: by the output embedding, or by what the model itself does there.

Nearly all models multiply by their output embedding, and scale: `project` does that alone. Others have layers in
between (BERT and its kin), or scale in a way of their own. Then the model's own forward runs on the hidden states of
loss tokens, its decoder left out: as exact, and no more logits at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lora_core.errors import ConfigError, LoraCoreError, TrainingError
from lora_core.model.attention import causal_lm_of, decoder_of
from lora_core.model.out_of_memory import is_out_of_memory
from lora_core.model.packing_check import rounds_by_other_tokens

Head = Callable[[Tensor], Tensor]
"""Hidden states (N, H) -> logits (N, vocabulary)."""


def project(model: nn.Module, hidden: Tensor) -> Tensor:
    """Hidden states (N, H) -> logits (N, vocabulary), with the scaling that some families apply to logits."""
    causal_lm = causal_lm_of(model)
    embedding = causal_lm.get_output_embeddings()
    weight = embedding.weight
    if weight.is_floating_point() and not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(weight.dtype)  # FalconMamba keeps its states in float32
    logits: Tensor = embedding(hidden)
    if scale := getattr(causal_lm.config, "logit_scale", None):  # Cohere multiplies, but not in models that see
        logits = logits * scale
    config = causal_lm.config.get_text_config()
    if scaling := getattr(config, "logits_scaling", None):  # Granite divides
        logits = logits / scaling
    # Gemma 2 and 3, RecurrentGemma, xLSTM
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        if cap := getattr(config, name, None):
            logits = torch.tanh(logits / cap) * cap
    return logits


class OwnHead:
    """The model's own forward from the last hidden states on: for the call, its decoder gives what it is given."""

    def __init__(self, model: nn.Module, output: Any) -> None:
        """`output`: what the decoder gives; another of its kind is what the model is handed."""
        self._model = model
        self._output_class = type(output)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states (N, H) -> logits (N, vocabulary)."""
        decoder = decoder_of(self._model)
        given = self._output_class(last_hidden_state=hidden[None])
        patched = vars(decoder).get("forward")
        decoder.forward = lambda *_, **__: given
        try:
            ids = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
            logits: Tensor = causal_lm_of(self._model)(input_ids=ids, use_cache=False).logits[0]
        finally:
            if patched is None:
                del decoder.forward
            else:
                decoder.forward = patched
        return logits


@torch.no_grad()
def head_of(model: nn.Module, output: Any) -> Head:
    """`project` where it gives the model's own logits to the last bit, on eight made-up states; else `OwnHead`.

    Without values, as where memory is predicted, it is `project`: what a chunk of states takes in layers of a head is
    little beside its logits.

    Args:
        output: what the decoder gave, for the type, width and device of its states.

    Raises:
        TrainingError: the model's own forward wants more of its decoder than the last hidden states.
    """
    hidden = output.last_hidden_state
    plain = partial(project, model)
    if isinstance(hidden, FakeTensor) or hidden.device.type == "meta":
        return plain
    width = hidden.shape[-1]
    states = torch.arange(8 * width, dtype=torch.float32, device=hidden.device).sin().view(8, width).to(hidden.dtype)
    own = OwnHead(model, output)
    was_training = model.training
    model.eval()
    try:
        wanted = own(states)
    except Exception as error:  # each family's code misses something else
        if is_out_of_memory(error):  # says nothing of the model
            raise
        raise TrainingError(
            f"{type(causal_lm_of(model)).__name__} computes its logits from more than its decoder's last hidden "
            f"states ({type(error).__name__}), which lora_core does not support; fix: another model.name_or_path"
        ) from error
    finally:
        model.train(was_training)
    return plain if torch.equal(plain(states[None])[0].float(), wanted.float()) else own


def parameters_of(head: Head, model: nn.Module) -> Iterator[nn.Parameter]:
    """What a head multiplies by: the output embedding, and for `OwnHead` all else outside the decoder."""
    causal_lm = causal_lm_of(model)
    yield from causal_lm.get_output_embeddings().parameters()
    if isinstance(head, OwnHead):
        inside = {id(parameter) for parameter in decoder_of(model).parameters()}
        yield from (parameter for parameter in causal_lm.parameters() if id(parameter) not in inside)


@torch.no_grad()
def check_head(model: nn.Module) -> str | None:
    """Check on eight tokens that the loss is that of the model's own logits, and that these know no later token.

    Call it under the autocast that the run computes under.

    Returns:
        What to say of a head that is not the output embedding alone; None for all others.

    Raises:
        ConfigError: a token's logits change with the token after it, which is what they should predict.
        TrainingError: the logits differ; training would minimise the loss of another model.
    """
    causal_lm = causal_lm_of(model)
    name = type(causal_lm).__name__
    was_training = model.training
    model.eval()
    is_quantized = getattr(causal_lm, "is_quantized", False)
    device = causal_lm.get_input_embeddings().weight.device
    input_ids = torch.arange(1, 9, device=device)[None]
    other_end = torch.cat([input_ids[:, :-1], input_ids[:, :1]], dim=1)
    try:
        own, after_another = (
            causal_lm(input_ids=ids, use_cache=False).logits[0].float() for ids in (input_ids, other_end)
        )
        output = decoder_of(causal_lm)(input_ids=input_ids, use_cache=False)
        if is_quantized:
            _train_mode_runs(causal_lm, input_ids)
    except Exception as error:  # each family's code wants something else
        if isinstance(error, LoraCoreError) or is_out_of_memory(error):  # says nothing of the model's forward
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        how, fix = "on tokens alone", "another model.name_or_path"
        if is_quantized:  # some families use a layer's weight as a matrix, beside calling the layer
            how, fix = "on quantized weights", "model.quantization=none"
        elif _runs_without_autocast(causal_lm, input_ids):  # DBRX adds up in a tensor of another type
            how, fix = "under bfloat16 autocast", "train.bf16=false model.dtype=float32"
        raise TrainingError(f"{name} does not run {how} ({type(error).__name__}: {reason}); fix: {fix}") from error
    head = head_of(model, output)
    ours = head(output.last_hidden_state[0]).float()
    model.train(was_training)
    if not bool(own.isfinite().all()):
        raise TrainingError(
            f"{name} gives values that are not finite: its weights are damaged or do not suit the precision; fix: "
            "another model.name_or_path or model.dtype"
        )
    seen = float((own[:-1] - after_another[:-1]).norm() / own[:-1].norm())
    # Experts multiply as many tokens at a time as were sent to them, and that decides how they are rounded.
    rounds = (
        causal_lm.dtype != torch.float32 or torch.is_autocast_enabled(device.type) or rounds_by_other_tokens(causal_lm)
    )
    if not seen <= (0.05 if rounds else 1e-5):
        raise ConfigError(
            f"{name} sees later tokens: with another last token, the logits before it change by {seen:.2g} of their "
            'size. It would learn to copy what it should predict; fix: another model.name_or_path, or "is_decoder": '
            "true in config.json, in a copy of a model of BERT's kind",
            "not_causal",
        )
    difference = (own - ours).abs().max().item()
    if not difference <= 1e-3 * max(1.0, own.abs().max().item()):
        raise TrainingError(
            f"{name} computes its logits in a way that lora_core does not support: they differ by {difference:.3g} "
            "from those of its decoder's last hidden states. Training would minimise another loss, so it stops here; "
            "fix: another model.name_or_path, and please report this model"
        )
    if isinstance(head, OwnHead):
        return f"{name} has more than an output embedding after its decoder: its own forward gives the logits"
    return None


def _runs_without_autocast(causal_lm: nn.Module, input_ids: Tensor) -> bool:
    """Whether autocast alone is in the way."""
    kind = input_ids.device.type
    if not torch.is_autocast_enabled(kind):
        return False
    try:
        with torch.autocast(kind, enabled=False):
            causal_lm(input_ids=input_ids, use_cache=False)
    except Exception:  # noqa: BLE001  # what it is has been seen already, under autocast
        return False
    return True


def _train_mode_runs(causal_lm: nn.Module, input_ids: Tensor) -> None:
    """Run as in training, where Gemma 3n clamps weights in place; draws no random number of the run."""
    with torch.random.fork_rng(devices=[input_ids.device] if input_ids.device.type == "cuda" else []):
        causal_lm.train()
        causal_lm(input_ids=input_ids, use_cache=False)
        causal_lm.eval()
