"""Checks lora_core on your own model and rows: python launch/verify.py --cfg NAME [key=value ...]"""

import sys

from lora_core.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
