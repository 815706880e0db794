"""A run as one HTML page, several as a comparison: python launch/report.py RUN [RUN ...]"""

import sys

from lora_core.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
