"""Checks of what a checkpoint has beside the loss of tokens through its decoder, and what is not trained here."""

from __future__ import annotations

from collections.abc import Iterator

from lora_core.preflight.findings import Facts, Finding


def check_towers(facts: Facts) -> Iterator[Finding]:
    """The checkpoint also sees or hears: its towers are not loaded, and its language part is trained.

    Rows here are text, which passes no tower, so that loss and gradients are those of the whole model. The adapter has
    the names of the whole checkpoint, and its `exclude_modules` keep adapters out of the towers wherever it is loaded.

    No action is needed: load the adapter on the whole checkpoint, as its card says.
    """
    towers = facts.model.towers
    if towers:
        yield Finding(
            "towers_left_out",
            "note",
            f"{', '.join(towers)}: not loaded, as text does not pass there; the language part is trained, and the "
            "adapter has the whole checkpoint's names",
            len(towers),
            0,
            None,
        )


def check_without_adapter(facts: Facts) -> Iterator[Finding]:
    """Much of the decoder's layers gets no adapter, though `lora.target_modules: auto` is all of their linear layers.

    PEFT reaches linear layers, and stacked experts as parameters. DBRX reads its experts past the module that holds
    them. In DeepSeek's, GLM's and Qwen3-Next's mixtures, PEFT takes gate_proj, up_proj and down_proj for the experts'
    alone: dense layers and shared experts of these names are reached as parameters, but not in 4 or 8 bits.

    No action is needed: what has no adapter stays as it is. A larger `lora.rank` gives the others more room.
    """
    left = dict(facts.model.without_adapter)
    if left:
        yield Finding(
            "without_adapter",
            "note",
            f"{', '.join(left)}: no adapter, as PEFT does not reach them in this family; they are "
            f"{sum(left.values()):.2g} of the decoder layers' parameters and stay as they are",
            list(left),
            [],
            None,
        )


def check_router_loss(facts: Facts) -> Iterator[Finding]:
    """The model's config asks for the auxiliary loss of its experts' routers, which is not computed here.

    It is a product of two means over a micro-batch (the share of tokens that go to an expert, and its mean probability;
    Fedus et al. 2021, https://arxiv.org/abs/2101.03961). Such products do not add up: a step's gradient would depend on
    how its examples are divided into micro-batches and processes. It is there to balance routers while they train, and
    routers get no adapter.

    No action is needed.
    """
    coefficient = facts.model.router_loss
    if coefficient:
        yield Finding(
            "router_loss_off",
            "note",
            f"output_router_logits=true in the model's config asks for {coefficient:g} times its routers' auxiliary "
            "loss; what is trained is the loss of tokens alone, as that loss would depend on how a step is divided",
            coefficient,
            0,
            None,
        )
