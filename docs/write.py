"""Writes docs/preflight.md from the checks' docstrings: python docs/write.py"""

from pathlib import Path

from lora_core.checks import documentation
from lora_core.run_folder import write_text

if __name__ == "__main__":
    write_text(Path(__file__).with_name("preflight.md"), documentation())
