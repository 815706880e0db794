"""The tests. Threads wait as they do in the commands, which must be said before torch is imported."""

from lora_core.commands.main import wait_passively

wait_passively()
