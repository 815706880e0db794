"""Freed memory: given back while weights are loaded, kept while a model computes."""

from __future__ import annotations

import subprocess
import sys

# As weights that are made small one after the other: each is freed, and a little of it stays.
LOAD = """
import sys
import numpy as np
import psutil
from lora_core.model import heap

process = psutil.Process()
before = process.memory_info().rss
getattr(heap, sys.argv[1])()
kept = []
for index in range(24):
    layer = np.ones((16 + index) * 2**20, dtype=np.uint8)
    kept.append(layer[: 2 * 2**20].copy())
    del layer
print(process.memory_info().rss - before)
"""


def test_what_is_freed_while_loading_goes_back_to_the_system() -> None:
    def grown(setting: str) -> float:
        done = subprocess.run([sys.executable, "-c", LOAD, setting], capture_output=True, text=True, check=True)
        return int(done.stdout) / 2**20

    assert 48 <= grown("give_back_freed_memory") < 60  # MiB: what stays is 24 times 2
    assert grown("keep_freed_memory") > 90
