"""The same run on one rank and on two, with copies of the model (DDP) and with shares of it (FSDP2): the same steps and
the same adapter, also where it is stopped on one kind and resumed on another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_core.configuration import load_config
from lora_core.training.setup import train
from tests.conftest import chat
from tests.equivalence.test_gradient import on_two_ranks

STEPS = 9


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> tuple[Path, list[str]]:
    """(folder, settings): 22 examples, 8 an optimizer step on one rank."""
    folder = tmp_path_factory.mktemp("ranks")
    rows = [chat(f"question {i} " + "word " * (i % 7 * 5), f"answer {i} " + "reply " * (i % 5 * 4)) for i in range(22)]
    rows[3]["messages"][1]["weight"] = 0.3  # no exact value in bfloat16
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder, [
        f"model.name_or_path={tiny_model_dir}",
        f"data.train_file={folder / 'rows.jsonl'}",
        f"data.eval_file={folder / 'rows.jsonl'}",
        f"data.cache_dir={folder / 'cache'}",
        "train.bf16=false",
        "model.dtype=float32",
        "lora.dropout=0",
        "train.num_sample_replies=2",
        "train.sample_max_new_tokens=3",
        "train.num_train_epochs=3",
        "train.learning_rate=1e-3",
        "train.save_steps=2",
        "train.save_total_limit=9",
        "train.per_device_train_batch_size=2",
    ]


@pytest.fixture(scope="module")
def runs(base: tuple[Path, list[str]]) -> Path:
    """A folder of runs, named in `TWO_RANKS`: all those on two ranks in one launch, which costs some seconds."""
    folder, settings = base
    train(load_config("demo", [*settings, "train.gradient_accumulation_steps=4", f"output_dir={folder / 'one'}"]))

    def two(name: str, sharding: str, *more: str, copy: str | None = None, resume: int | None = None) -> dict[str, Any]:
        own = [*settings, "train.gradient_accumulation_steps=2", f"output_dir={folder / name}", *more]
        return {
            "sharding": sharding,
            "settings": own,
            "copy": None if copy is None else str(folder / copy),
            "resume": resume,
        }

    short = ("lora.dropout=0.1", "train.max_steps=4", "train.num_sample_replies=0")
    in_bf16 = ("train.bf16=true", "model.dtype=bfloat16")
    from_adapter = (*short, f"model.adapter={folder / 'one'}")
    with_embedding = (*in_bf16, "train.max_steps=2", "lora.modules_to_save=[embed_tokens]")  # which is tied to the head
    by_one = "fsdp2, loaded by one"
    (folder / "runs.json").write_text(
        json.dumps(
            [
                two("ddp", "ddp"),
                two("fsdp2", "fsdp2"),
                two("ddp-to-fsdp2", "fsdp2", copy="ddp", resume=4),
                two("fsdp2-to-ddp", "ddp", copy="fsdp2", resume=4),
                two("one-to-ddp", "ddp", "train.gradient_accumulation_steps=4", copy="one", resume=4),
                two("dropout", "fsdp2", *from_adapter),
                two("dropout-resumed", "fsdp2", *from_adapter, copy="dropout", resume=2),
                two("checkpointing", "fsdp2", *from_adapter, "train.gradient_checkpointing=true"),
                two("bf16", "fsdp2", *in_bf16, "train.num_sample_replies=0"),
                two("embedding", "fsdp2", *with_embedding),
                two("dropout-loaded-by-one", by_one, *from_adapter),
                two("embedding-loaded-by-one", by_one, *with_embedding),
            ]
        )
    )
    on_two_ranks("-m", "tests.equivalence.one_rank", str(folder / "runs.json"))
    return folder


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [event for event in lines if event["event"] == kind]


def losses(folder: Path) -> list[float]:
    return [event["loss"] for kind in ("train", "eval") for event in events(folder, kind)]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter/adapter_model.safetensors")


def assert_same_run(got: Path, wanted: Path, rel: float = 1e-5) -> None:
    assert losses(got) == pytest.approx(losses(wanted), rel=rel)
    assert [e["grad_norm"] for e in events(got, "train")] == pytest.approx(
        [e["grad_norm"] for e in events(wanted, "train")], rel=10 * rel
    )
    ours, theirs = adapter(got), adapter(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=rel, atol=rel * float(theirs[name].abs().max()))


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "ddp-to-fsdp2", "fsdp2-to-ddp", "one-to-ddp"])
def test_two_ranks_take_the_steps_of_one(runs: Path, name: str) -> None:
    assert len(events(runs / "one", "train")) == STEPS
    assert_same_run(runs / name, runs / "one")


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_run_on_two_ranks_goes_on_with_one(
    runs: Path, base: tuple[Path, list[str]], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, settings = base
    own = [*settings, "train.gradient_accumulation_steps=2", f"output_dir={runs / name}"]
    checkpoint = runs / name / "checkpoints/step-000004"
    train(load_config("demo", own), checkpoint)
    said = capsys.readouterr().out
    assert "resume: 4 accumulation steps in place of 2 on 1 process, so that an optimizer step has 8 examples" in said
    assert "(2 per device x 4 accumulation steps x 1 process) = 3 optimizer steps per epoch, 9 in all" in said
    assert_same_run(runs / name, runs / "one")


def test_fsdp2_resumes_bit_for_bit_and_draws_the_same_dropout_when_it_recomputes(runs: Path) -> None:
    assert losses(runs / "dropout-resumed") == losses(runs / "dropout")
    assert_same_run(runs / "checkpointing", runs / "dropout")
    whole, resumed = (runs / name / "adapter/adapter_model.safetensors" for name in ("dropout", "dropout-resumed"))
    assert whole.read_bytes() == resumed.read_bytes()


@pytest.mark.parametrize("name", ["dropout", "embedding"])
def test_weights_that_rank_0_alone_loads_give_the_same_bits(runs: Path, name: str) -> None:
    everywhere, by_one = runs / name, runs / f"{name}-loaded-by-one"
    assert losses(by_one) == losses(everywhere)
    for kind in ("sample", "eval"):
        assert len(events(by_one, kind)) == len(events(everywhere, kind))
    assert [e["before"] for e in events(by_one, "sample")] == [e["before"] for e in events(everywhere, "sample")]
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (by_one / "adapter" / file).read_bytes() == (everywhere / "adapter" / file).read_bytes()


@pytest.mark.parametrize("name", ["embedding", "embedding-loaded-by-one"])
def test_a_checkpoint_after_an_evaluation_holds_the_state_of_a_trained_embedding(runs: Path, name: str) -> None:
    # Its unit is gathered for the evaluation, in tensors that the optimizer does not know.
    checkpoint = runs / name / "checkpoints/step-000002"
    state = {key.rsplit("/", 1)[0] for key in load_file(checkpoint / "optimizer.safetensors")}
    assert state == load_file(checkpoint / "adapter.safetensors").keys()
    assert any("embed_tokens" in key for key in state)


def test_the_other_rank_holds_no_frozen_weight_before_its_share_comes(runs: Path) -> None:
    held = {
        (name, rank): json.loads((runs / f"{name}-rank-{rank}.json").read_text())
        for name in ("dropout", "dropout-loaded-by-one")
        for rank in (0, 1)
    }
    whole = held["dropout", 1]
    assert whole["frozen"] > 3 * whole["trained"] > 0
    # In rank 0 too: the weights that it read are outside of what is shared out, on the CPU.
    for rank in (0, 1):
        assert held["dropout-loaded-by-one", rank] == {"frozen": 0, "trained": whole["trained"]}


def test_fsdp2_in_bfloat16_does_not_round_the_loss(runs: Path) -> None:
    # A sum of losses in bfloat16 has three digits, and so has a weight of 0.3.
    assert losses(runs / "bf16") == pytest.approx(losses(runs / "one"), rel=1e-3)


def test_the_adapter_of_fsdp2_is_whole_and_loads_with_peft_alone(runs: Path, tiny_model_dir: Path) -> None:
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), runs / "fsdp2/adapter")
    saved = adapter(runs / "fsdp2")
    loaded = {n.replace(".default.", "."): p for n, p in model.named_parameters() if "lora_" in n}
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())


def test_only_the_first_rank_needs_the_run_folder(runs: Path) -> None:
    assert not (runs / "elsewhere").exists()


def test_sample_replies_of_fsdp2_are_those_of_one_rank(runs: Path) -> None:
    replies = [[e["before"] for e in events(runs / name, "sample")] for name in ("one", "fsdp2", "ddp")]
    assert replies[0] == replies[1] == replies[2]
    assert len(replies[0]) == 2
