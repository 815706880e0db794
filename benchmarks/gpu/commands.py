"""The checks that run the command as a user does: two optimizers, a 7B in 4 bits, under launchers, beside TRL."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from setting import GIB, LORA_RANK, ROOT, Setting, run_limited, set_up_process

from lora_core.config.schema import ALL_SEVEN_PROJECTIONS, LoraConfig, ModelConfig
from lora_core.model.base import add_adapter, load_base_model
from lora_core.model.loss import check_head
from lora_core.report.read import Run, read_run

STEPS = 8
SECONDS_ALLOWED = 180
"""For one command."""
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1")
CHAT_TEMPLATE = ROOT / "benchmarks" / "peers" / "smollm2_training.jinja"
TRAINING_ONLY = {"data.eval_file": "null", "train.num_sample_replies": 0}


@dataclass(frozen=True)
class Finished:
    """A run of the command that ended well."""

    folder: Path
    run: Run
    seconds: float
    """Of the whole command."""

    @property
    def peak_bytes(self) -> float:
        """What the GPU's allocator gave out."""
        return self.run.number("summary", "peak_memory_bytes") or 0.0

    def __str__(self) -> str:
        """Predicted memory is without `process`, the CUDA context: no allocator counts it."""
        losses = [event["loss"] for event in self.run.train_events]
        predicted = dict(self.run.get("preflight", "memory", "components") or {})
        predicted.pop("process", None)
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in predicted.items() if size)
        return (
            f"{self.seconds:.1f} s, {self.run.number('summary', 'tokens_per_s') or 0:,.0f} tokens/s, peak memory "
            f"{self.peak_bytes / GIB:.2f} GiB, predicted {sum(predicted.values()) / GIB:.2f} ({parts}), "
            f"loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last"
        )


def train(
    setting: Setting,
    name: str,
    settings: Mapping[str, Any],
    *,
    model: Path | None = None,
    launcher: Sequence[str] = (sys.executable,),
    resume: bool = False,
) -> Finished | None:
    """`launch/train.py`, its log in `NAME.log`. Prints what became of it; None where it failed."""
    folder = setting.scratch / "runs" / name
    values = {
        "model.name_or_path": model or setting.model_folder("0.5b"),
        "data.train_file": setting.rows,
        "data.eval_file": setting.rows,
        "data.cache_dir": setting.scratch / "encoded",
        "train.max_steps": STEPS,
        "train.eval_steps": 100,
        "train.save_steps": STEPS // 2,
        "train.num_sample_replies": 2,
        "train.sample_max_new_tokens": 16,
        "train.per_device_eval_batch_size": 4,
        "output_dir": folder,
        "overwrite_output_dir": "true",
        **settings,
    }
    command = [*launcher, str(ROOT / "launch" / "train.py"), "--cfg", str(ROOT / "configs" / "base.yaml")]
    command += [f"{key}={value}" for key, value in values.items()] + ["--resume"] * resume
    seconds = run_logged(setting, command, setting.output / f"{name}.log", SECONDS_ALLOWED)
    if seconds is None:
        return None
    finished = Finished(folder, read_run(folder), seconds)
    print(f"{name}: {finished}")
    return finished


def run_logged(
    setting: Setting,
    command: Sequence[str],
    log: Path,
    seconds_allowed: float,
    environment: Mapping[str, str] | None = None,
) -> float | None:
    """Run a command -> its seconds. None where it failed or took too long; the end of its log is printed then."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        status = run_limited(command, seconds_allowed, {"PYTHONPATH": path, **(environment or {})}, output)
    seconds = time.monotonic() - started
    if status == 0:
        return seconds
    how = f"cut off after {seconds:.0f} s" if status is None else f"exit code {status}"
    print(log.read_text(encoding="utf-8", errors="replace")[-3000:])
    setting.fail(f"{log.stem}: {how}; all that it said is in {log}")
    return None


def compare_adapters(setting: Setting, what: str, one: Finished | None, other: Finished | None) -> None:
    """Two adapters must be the same to the last bit."""
    if one is None or other is None:
        return
    first, second = (run.folder / "adapter" / "adapter_model.safetensors" for run in (one, other))
    if first.read_bytes() == second.read_bytes():
        print(f"{what}: the same adapter to the last bit")
    else:
        setting.fail(f"{what}: another adapter")


def command(setting: Setting) -> None:
    """With two optimizers: a run, the same again, and the same resumed at half; evaluation; accelerate launch."""
    for optimizer in ("paged_adamw_8bit", "adamw_torch"):
        settings = {**TRAINING_ONLY, "train.optim": optimizer}
        whole = train(setting, f"{optimizer}-whole", settings)
        again = train(setting, f"{optimizer}-again", settings)
        compare_adapters(setting, f"{optimizer}, the same again", whole, again)
        if whole is not None:
            resumed = train_from_half(setting, whole, f"{optimizer}-resumed", settings)
            compare_adapters(setting, f"{optimizer}, resumed at half", whole, resumed)
    train(setting, "with-evaluation-and-replies", {"train.optim": "adamw_torch"})
    # Without a configuration of its own, accelerate takes what it finds on the machine.
    train(setting, "accelerate-launch", {"train.optim": "adamw_torch", "train.max_steps": 2}, launcher=ACCELERATE)


def train_from_half(
    setting: Setting,
    whole: Finished,
    name: str,
    settings: Mapping[str, Any],
    launcher: Sequence[str] = (sys.executable,),
) -> Finished | None:
    """Resume a copy of a run, which has a checkpoint at half and none at its end."""
    folder = setting.scratch / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole.folder, folder)
    shutil.rmtree(folder / "adapter")  # so that what is compared is what the resumed run saves
    return train(setting, name, settings, launcher=launcher, resume=True)


def nf4(setting: Setting) -> None:
    """A 7B in 4 bits: memory while it is loaded, the check of its head, generation; and a run as qwen7b.yaml has it."""
    set_up_process()
    with setting.attempt("7B in this process"):
        load_and_generate(setting)
    setting.free_memory()
    settings = {
        **TRAINING_ONLY,
        "model.quantization": "nf4",
        "lora.rank": LORA_RANK["7b"],
        "lora.alpha": 2 * LORA_RANK["7b"],
        "train.gradient_checkpointing": "true",
        "train.per_device_train_batch_size": 1,
        "train.max_steps": 6,
    }
    train(setting, "nf4-as-in-qwen7b.yaml", settings, model=setting.model_folder("7b"))


def load_and_generate(setting: Setting) -> None:
    started = time.monotonic()
    config = ModelConfig(name_or_path=str(setting.model_folder("7b")), quantization="nf4")
    base = load_base_model(config, setting.device, packing=True)
    setting.synchronize()
    print(f"loaded in {time.monotonic() - started:.1f} s; {setting.memory()}")
    model = add_adapter(base, LoraConfig(rank=LORA_RANK["7b"], alpha=2 * LORA_RANK["7b"]), 0, True)
    started = time.monotonic()
    check_head(model)
    print(f"head checked in {time.monotonic() - started:.2f} s")
    model.eval()
    seconds = {number: seconds_to_generate(setting, model, number) for number in (4, 32)}  # the first warms up
    print(f"generation: {32 / seconds[32]:.1f} tokens/s")


@torch.no_grad()
def seconds_to_generate(setting: Setting, model: Any, number: int) -> float:
    prompt = torch.randint(1, 600, (1, 64), device=setting.device)
    started = time.monotonic()
    with torch.autocast(setting.device.type, torch.bfloat16):
        model.generate(input_ids=prompt, max_new_tokens=number, min_new_tokens=number, use_cache=True, pad_token_id=0)
    setting.synchronize()
    return time.monotonic() - started


def distributed(setting: Setting) -> None:
    """FSDP2 and DDP over NCCL with one rank: does it train, write a checkpoint, resume? Two ranks want two GPUs."""
    config = setting.scratch / "fsdp.yaml"
    config.write_text(yaml.safe_dump(FSDP2), encoding="utf-8")
    fsdp = (*ACCELERATE, "--config_file", str(config))
    settings = {**TRAINING_ONLY, "train.optim": "adamw_torch", "train.max_steps": 4}
    at_half = {**settings, "train.save_steps": 2}
    train(setting, "fsdp2", {**settings, "train.save_steps": 100}, launcher=fsdp)
    saved = train(setting, "fsdp2-with-checkpoint", at_half, launcher=fsdp)
    if saved is not None:
        compare_adapters(
            setting, "FSDP2, resumed at half", saved, train_from_half(setting, saved, "fsdp2-resumed", at_half, fsdp)
        )
    train(setting, "ddp-by-torchrun", settings, launcher=TORCHRUN)


FSDP2 = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "machine_rank": 0,
    "num_machines": 1,
    "num_processes": 1,
    "gpu_ids": "all",
    "mixed_precision": "no",  # train.bf16 decides
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": "Qwen2DecoderLayer",
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_reshard_after_forward": True,
        "fsdp_offload_params": False,
    },
}


# ---------------------------------------------------------------------------------------------------------------
# Beside TRL


TRL_VARIANTS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "without checkpointing": {"gradient_checkpointing": False},
}
WARM_UP_STEPS = 3
TRL_SECONDS_ALLOWED = 120


def trl(setting: Setting) -> None:
    """The same rows in the same order through TRL's SFTTrainer, without dropout so that the losses can be compared."""
    if find_spec("trl") is None:
        setting.fail("TRL is not installed; fix: pip install -r benchmarks/requirements.txt")
        return
    sys.path.insert(0, str(ROOT / "benchmarks"))
    vs_trl: Any = import_module("vs_trl")
    model = model_with_template(setting)
    steps = WARM_UP_STEPS + (1 if setting.dry_run else 9)
    for per_step in (4,) if setting.dry_run else (8, 32):
        vs_trl.CONVERSATIONS_PER_STEP = per_step  # which `prepare` goes by
        folder = setting.scratch / f"trl-{per_step}"
        work = vs_trl.prepare(str(model), setting.rows, steps, Path(sys.executable), vs_trl.new_folder(folder))
        print(f"{per_step} examples a step, {work.mean_tokens:.0f} tokens each")
        ours = steps_of_ours(setting, work, per_step, vs_trl)
        for name, changes in TRL_VARIANTS.items():
            theirs = steps_of_trl(setting, work, per_step, vs_trl, name, changes)
            if ours is not None and theirs is not None:
                compare_losses(setting, ours, theirs, vs_trl.LOSS_TOLERANCE)


def compare_losses(setting: Setting, ours: Sequence[float], theirs: Sequence[float], limit: float) -> None:
    """Step by step: a comparison of programs that do not compute the same thing says nothing."""
    furthest = max(abs(one / other - 1) for one, other in zip(ours, theirs, strict=True))
    print(f"    losses at most {furthest:.3%} from lora_core's over {len(ours)} steps")
    if not furthest <= limit:
        setting.fail(f"the losses are more than {limit:.0%} apart: this comparison does not count")


def model_with_template(setting: Setting) -> Path:
    """The 0.5B as links, but with a chat template that marks the assistant's turns, as TRL needs it."""
    folder = setting.scratch / "0.5b-for-trl"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in setting.model_folder("0.5b").iterdir():
        (folder / file.name).symlink_to(file)
    template = folder / "chat_template.jinja"
    template.unlink()
    shutil.copy(CHAT_TEMPLATE, template)
    return folder


def steps_of_ours(setting: Setting, work: Any, per_step: int, vs_trl: Any) -> list[float] | None:
    """The loss of each step, after the figures are printed."""
    settings = {
        **TRAINING_ONLY,
        "train.optim": "adamw_torch",
        "train.per_device_train_batch_size": per_step,
        "train.gradient_accumulation_steps": 1,
        "lora.dropout": 0.0,
        "train.max_steps": work.steps,
        "train.warmup_steps": 0,
        "train.learning_rate": vs_trl.LEARNING_RATE,
        "train.save_steps": 100,
        "train.seed": vs_trl.SEED,
        "data.max_seq_length": vs_trl.MAX_SEQ_LENGTH,
    }
    finished = train(setting, f"beside-trl-{per_step}", settings, model=Path(work.model))
    if finished is None:
        return None
    events = finished.run.train_events
    seconds = [tokens / event["tokens_per_s"] for tokens, event in zip(work.tokens_per_step, events, strict=True)]
    print(f"    lora_core: {speed(work.tokens_per_step, seconds)}")
    return [event["loss"] for event in events]


def steps_of_trl(
    setting: Setting, work: Any, per_step: int, vs_trl: Any, name: str, changes: Mapping[str, Any]
) -> list[float] | None:
    """The loss of each step, after the figures are printed."""
    folder = setting.scratch / f"trl-{per_step}" / name.replace(" ", "-")
    folder.mkdir()
    settings = {
        "model": work.model,
        "rows": str(work.peer_rows),
        "chat_template": str(CHAT_TEMPLATE),
        "result_file": str(folder / "result.json"),
        "lora_config": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": ALL_SEVEN_PROJECTIONS},
        "sft_config": {
            "output_dir": str(folder / "run"),
            "max_length": vs_trl.MAX_SEQ_LENGTH,
            "max_steps": work.steps,
            "learning_rate": vs_trl.LEARNING_RATE,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0,
            "optim": "adamw_torch",
            "bf16": True,
            "seed": vs_trl.SEED,
            "per_device_train_batch_size": per_step,
            "train_sampling_strategy": "sequential",  # the file has lora_core's order
            **changes,
        },
    }
    (folder / "settings.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    command = [sys.executable, str(ROOT / "benchmarks" / "peers" / "trl_sft.py"), str(folder / "settings.json")]
    log = setting.output / f"trl-{per_step}-{folder.name}.log"
    seconds = run_logged(setting, command, log, TRL_SECONDS_ALLOWED, {"HF_DATASETS_CACHE": str(folder / "datasets")})
    if seconds is None:
        return None
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if result["step_tokens"] != work.tokens_per_step:
        setting.fail(f"TRL {name} counts {result['step_tokens']} tokens in its steps, not {work.tokens_per_step}")
    print(
        f"    TRL {name}: {speed(result['step_tokens'], result['step_s'])}, "
        f"peak memory {result['peak_gpu_bytes'] / GIB:.2f} GiB, whole command {seconds:.1f} s, "
        f"{result['versions']}"
    )
    losses: list[float] = result["losses"]
    return losses


def speed(tokens: Sequence[float], seconds: Sequence[float]) -> str:
    """Real tokens of the steps after the warm-up over their seconds."""
    per_s = sum(tokens[WARM_UP_STEPS:]) / sum(seconds[WARM_UP_STEPS:])
    return f"{per_s:,.0f} tokens/s, steps of {[round(each * 1e3) for each in seconds]} ms"
