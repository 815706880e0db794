"""`python -m lora_core` is `lora-core`."""

import sys

from lora_core.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
