"""The Dockerfiles, linted, and their steps run here, for there is no Docker where the tests run.

pip is told by its environment to install nothing but this project, into a folder: what it depends on is in the test's
environment. apt-get is recorded and not run.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """(name, rest of the line), comments left out and continued lines joined."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def test_there_is_one_for_cpus_and_one_for_cuda() -> None:
    assert [path.name for path in DOCKERFILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(dockerfile: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(hadolint), str(dockerfile)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_its_steps_give_the_command(dockerfile: Path, tmp_path: Path) -> None:
    image, installed, recorded = tmp_path / "image", tmp_path / "installed", tmp_path / "recorded"
    image.mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("apt-get", "rm"):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {recorded}\n')
        (tmp_path / "bin" / name).chmod(0o755)
    # What comes from torch's own index is recorded too: it would be downloaded again.
    record, install = f'echo pip "$@" >> {recorded}', f'exec {sys.executable} -m pip "$@"'
    (tmp_path / "bin/pip").write_text(f'#!/bin/sh\ncase "$*" in *--index-url*) {record};; *) {install};; esac\n')
    (tmp_path / "bin/pip").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it as a switch of build isolation: 0 is off
        "PIP_TARGET": str(installed),
    }
    folder, command = image, []
    for name, rest in instructions(dockerfile):
        if name == "WORKDIR":
            folder = image / rest.removeprefix("/")
            folder.mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, folder / target, symlinks=True, dirs_exist_ok=True)
                else:
                    shutil.copy(ROOT / source, folder / target)
        elif name == "RUN":
            done = subprocess.run(
                ["bash", "-o", "pipefail", "-c", rest], cwd=folder, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{rest}\n{done.stderr}"
        elif name == "ENTRYPOINT":
            command = json.loads(rest)
        elif name == "CMD":
            command += json.loads(rest)
        else:
            assert name in ("FROM", "ENV", "SHELL"), name
    assert command == ["lora-core", "--help"]
    done = subprocess.run(
        [sys.executable, str(installed / "bin" / command[0]), *command[1:]],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.startswith("usage: lora-core")
    assert (installed / "lora_core/configs/qwen7b.yaml").is_file()
    said = recorded.read_text(encoding="utf-8") if recorded.exists() else ""
    if dockerfile.name == "cpu.Dockerfile":
        constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        assert shlex.split(said)[-1] in [line for line in constraints if line.startswith("torch==")]
    else:
        assert said.startswith("apt-get update\napt-get install --yes --no-install-recommends gcc")
