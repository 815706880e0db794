"""Qwen2.5-7B's architecture with random weights, in 4 bits on a CPU: two optimizer steps, saved, and read again.

    python -m tests.seven_billion FOLDER [--layers 28]

FOLDER needs 16 GB of disk; the model there is made once. It is trained by the command, `lora-core train --cfg qwen7b`,
with a micro-batch of one row of 256 tokens. Computed in float32: a CPU without bfloat16 instructions takes five times
as long in bfloat16. Prints time, peak memory and predicted peak; exit code 1 if the adapter is not read as saved.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Config

from lora_core.checkpoints.adapter_folder import adapter_on
from lora_core.configuration import load_config
from lora_core.model.base import load_base_model
from tests.tiny import ROOT, make_tokenizer, write_jsonl

# https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/config.json
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 3584, 18944, 28, 152064
HEADS, KEY_HEADS, HEAD = 28, 4, 128
LENGTH = 256
GIB = 2**30


def make_model(folder: Path, num_layers: int) -> None:
    """Random weights, a file a layer, so that one layer is in memory at a time."""
    config = Qwen2Config(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=num_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["Qwen2ForCausalLM"],
    )
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}

    def save(file: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        save(f"{name}.safetensors", {name: random_weight(VOCABULARY, HIDDEN)})
    save("norm.safetensors", {"model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)})
    layer = random_layer()
    for index in range(num_layers):
        # Other numbers in each, without drawing them all.
        rolled = {name: tensor.roll(index, 0) for name, tensor in layer.items()}
        save(f"layer-{index:02d}.safetensors", {f"model.layers.{index}.{name}": t for name, t in rolled.items()})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8"
    )


def random_weight(rows: int, columns: int) -> Tensor:
    """As the model's config initializes it."""
    return torch.randn(rows, columns).mul_(0.02).to(torch.bfloat16)


def random_layer() -> dict[str, Tensor]:
    """The tensors of one decoder layer."""
    widths = {"q_proj": HEADS * HEAD, "k_proj": KEY_HEADS * HEAD, "v_proj": KEY_HEADS * HEAD}
    layer = {f"self_attn.{name}.weight": random_weight(width, HIDDEN) for name, width in widths.items()}
    layer |= {f"self_attn.{name}.bias": torch.zeros(width, dtype=torch.bfloat16) for name, width in widths.items()}
    layer["self_attn.o_proj.weight"] = random_weight(HIDDEN, HEADS * HEAD)
    layer |= {f"mlp.{name}.weight": random_weight(INTERMEDIATE, HIDDEN) for name in ("gate_proj", "up_proj")}
    layer["mlp.down_proj.weight"] = random_weight(HIDDEN, INTERMEDIATE)
    norms = ("input_layernorm", "post_attention_layernorm")
    return layer | {f"{name}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16) for name in norms}


def settings_of(folder: Path) -> list[str]:
    """What differs from configs/qwen7b.yaml."""
    tokenizer = make_tokenizer()
    words = tokenizer.decode(tokenizer(" word reply question answer" * LENGTH)["input_ids"][: LENGTH - 20])
    row = {"messages": [{"role": "user", "content": words}, {"role": "assistant", "content": "answer"}]}
    rows = [json.loads(json.dumps(row).replace("answer", answer)) for answer in ("answer", "reply")]
    return [
        f"model.name_or_path={folder / 'model'}",
        f"data.train_file={write_jsonl(folder / 'rows.jsonl', rows)}",
        f"data.cache_dir={folder / 'cache'}",
        f"data.max_seq_length={LENGTH}",
        "train.max_steps=2",
        "train.warmup_steps=0",
        "train.gradient_accumulation_steps=1",
        "train.num_sample_replies=0",
        "train.bf16=false",
        "model.dtype=float32",
        f"output_dir={folder / 'run'}",
        "overwrite_output_dir=true",
    ]


def peak_of(command: list[str]) -> int:
    """Run a command to its end; the most bytes of its own that it held, looked at once a second.

    Without pages of mapped files: Linux counts the weights' files as resident while they are read, up to all of them.
    """
    peak = 0
    with subprocess.Popen(command, cwd=ROOT) as process:
        while process.poll() is None:
            own = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text(encoding="ascii"))
            peak = max(peak, int(own.group(1)) * 1024 if own else 0)
            time.sleep(1)
    if process.returncode:
        sys.exit(process.returncode)
    return peak


def read_again(folder: Path, settings: list[str]) -> int:
    """Tensors of the adapter as PEFT reads it; 0 where one is not as the last step left it.

    Raises:
        ConfigError: PEFT does not find all of them for this architecture.
    """
    path = folder / "run/adapter"
    adapter_on(load_base_model(load_config("qwen7b", settings).model, torch.device("meta")), path)
    read = {
        f"model.{name.replace('.weight', '.default.weight')}": tensor
        for name, tensor in peft.utils.load_peft_weights(str(path), device="cpu").items()
    }
    (checkpoint,) = (folder / "run/checkpoints").glob("step-000002")
    left = load_file(checkpoint / "adapter.safetensors")
    moved = any(bool(tensor.any()) for name, tensor in left.items() if "lora_B" in name)
    same = read.keys() == left.keys() and all(torch.equal(read[name], tensor) for name, tensor in left.items())
    return len(read) if same and moved else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    arguments = parser.parse_args()
    folder: Path = arguments.folder.absolute()
    if not (folder / "model/model.safetensors.index.json").is_file():
        print("writing the model ...", flush=True)
        (folder / "model").mkdir(parents=True, exist_ok=True)
        make_model(folder / "model", arguments.layers)
    settings = settings_of(folder)
    started = time.monotonic()
    peak = peak_of([sys.executable, "launch/train.py", "--cfg", "qwen7b", *settings])
    seconds = time.monotonic() - started
    summary = json.loads((folder / "run/summary.json").read_text(encoding="utf-8"))
    predicted = json.loads((folder / "run/preflight.json").read_text(encoding="utf-8"))["memory"]["total_bytes"]
    num_tensors = read_again(folder, settings)
    print(
        f"{arguments.layers} layers: {seconds:.0f} s, of which two steps {summary['train_time_s']:.0f} s; peak memory "
        f"{peak / GIB:.1f} GiB, predicted {predicted / GIB:.1f} GiB; "
        f"{num_tensors} tensors of the adapter read again as they were"
    )
    sys.exit(0 if num_tensors else 1)


if __name__ == "__main__":
    main()
