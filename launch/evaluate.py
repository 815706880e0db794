"""Eval loss of an adapter: accelerate launch launch/evaluate.py --cfg NAME [--adapter DIR] [key=value ...]"""

import sys

from lora_core.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
