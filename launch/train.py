"""Fine-tune: accelerate launch launch/train.py --cfg NAME [--resume [CHECKPOINT]] [key=value ...]"""

import sys

from lora_core.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
