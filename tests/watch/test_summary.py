"""The command that a summary quotes starts the run again."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from lora_core.config.schema import RunConfig
from lora_core.watch import summary
from lora_core.watch.summary import command_again, without_resume


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (
            ["launch/train.py", "--cfg", "demo", "a.b=[x, y]"],
            [sys.executable, "launch/train.py", "--cfg", "demo", "a.b=[x, y]"],
        ),
        (["/usr/bin/lora-core", "train", "--cfg", "demo"], ["lora-core", "train", "--cfg", "demo"]),
        (
            ["/x/lora_core/__main__.py", "train", "--cfg", "demo"],
            [sys.executable, "-m", "lora_core", "train", "--cfg", "demo"],
        ),
        (["launch/train.py", "--resume", "--cfg", "demo"], [sys.executable, "launch/train.py", "--cfg", "demo"]),
        (["-c"], ["lora-core", "train", "--cfg", "outputs/a b/config.yaml"]),
        (["/x/ipykernel_launcher.py", "-f", "kernel.json"], ["lora-core", "train", "--cfg", "outputs/a b/config.yaml"]),
    ],
)
def test_each_front_gives_a_command_for_a_shell(
    argv: list[str], command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(summary, "_launcher", lambda: None)
    config = RunConfig(output_dir="outputs/a b")
    # An earlier run may not be replaced, so the next one goes beside it.
    cd, folder, both, *words = shlex.split(command_again(argv, config))
    assert (cd, folder, both) == ("cd", str(tmp_path), "&&")
    assert words == [*command, "output_dir=outputs/a b-again"]
    replaces = config.model_copy(update={"overwrite_output_dir": True})
    assert shlex.split(command_again(argv, replaces))[3:] == command
    own = command_again(["my script.py", "--resume", "x"], config)
    assert shlex.split(own)[3:] == [sys.executable, "my script.py", "--resume", "x"]


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ("--cfg demo --resume", "--cfg demo"),
        ("--resume outputs/demo/checkpoints/step-000010 --cfg demo", "--cfg demo"),
        ("--resume=newest --cfg demo a=1", "--cfg demo a=1"),
        ("--cfg demo --resume a=1 --model x", "--cfg demo a=1 --model x"),
    ],
)
def test_a_run_started_again_is_not_resumed(arguments: str, kept: str) -> None:
    assert without_resume(arguments.split()) == kept.split()
