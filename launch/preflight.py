"""Would it learn? python launch/preflight.py --cfg NAME [key=value ...]"""

import sys

from lora_core.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["preflight", *sys.argv[1:]]))
