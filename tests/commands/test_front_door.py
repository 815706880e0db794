"""What is there after `pip install`: a command, its configurations and the demo's rows, outside any checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# What another machine's Python does not have, or has not installed.
NOT_ON_WINDOWS = ("resource", "fcntl", "pwd", "grp", "termios")


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the built wheel was installed. What it depends on is taken from the test's environment."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    ignored = shutil.ignore_patterns(".git", ".venv*", "outputs", "build", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    built = run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(work), "."], source)
    assert built.returncode == 0, built.stderr
    (wheel,) = work.glob("*.whl")
    target = work / "installed"
    assert run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], work).returncode == 0
    return target


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_the_wheel_trains_the_demos_first_steps_in_an_empty_folder(installed: Path, empty: Path) -> None:
    short = ["train.max_steps=2", "train.num_sample_replies=0", "data.eval_file=null", f"data.cache_dir={empty}/cache"]
    short += ["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=1"]
    command = [sys.executable, str(installed / "bin/lora-core"), "demo", *short]
    done = run(command, empty, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert "demo rows: wrote examples/train.jsonl" in done.stdout
    assert "step 2/2" in done.stdout
    assert (empty / "outputs/demo/adapter/adapter_model.safetensors").is_file()
    assert (empty / "examples/train.jsonl").read_bytes() == (ROOT / "examples/train.jsonl").read_bytes()


def test_shipped_configurations_are_the_ones_at_the_top_of_the_checkout(installed: Path, empty: Path) -> None:
    ours = sorted(path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.*"))
    shipped = installed / "lora_core/configs"
    assert sorted(path.relative_to(shipped) for path in shipped.rglob("*.*")) == ours
    assert all((shipped / name).read_bytes() == (ROOT / "configs" / name).read_bytes() for name in ours)
    assert (ROOT / "lora_core/configs").resolve() == ROOT / "configs"
    code = "import lora_core; c = lora_core.load_config('qwen7b'); print(lora_core.__file__, c.model.name_or_path)"
    done = run([sys.executable, "-c", code], empty, PYTHONPATH=str(installed))
    assert done.stdout.split() == [str(installed / "lora_core/__init__.py"), "Qwen/Qwen2.5-7B-Instruct"]


def test_the_named_templates_are_in_the_wheel(installed: Path) -> None:
    names = {path.name for path in (ROOT / "lora_core/encoding/templates").iterdir()}
    assert {path.name for path in (installed / "lora_core/encoding/templates").iterdir()} == names


def test_python_m_is_the_command(empty: Path) -> None:
    done = run([sys.executable, "-m", "lora_core", "--version"], empty, PYTHONPATH=str(ROOT))
    assert done.stdout.startswith("lora-core ")
    done = run([sys.executable, "-m", "lora_core", "trian"], empty, PYTHONPATH=str(ROOT))
    assert done.returncode == 2
    assert "choose from" in done.stderr
    assert "'train', 'preflight', 'prescribe', 'find-lr', 'verify', 'evaluate', 'chat'" in done.stderr


def test_the_demo_leaves_rows_that_are_there_alone(empty: Path) -> None:
    from lora_core.commands.demo import write_rows

    (empty / "train.jsonl").write_text("mine", encoding="utf-8")
    write_rows(empty)
    assert (empty / "train.jsonl").read_text(encoding="utf-8") == "mine"
    assert len((empty / "eval.jsonl").read_text(encoding="utf-8").splitlines()) == 26


def test_every_module_imports_without_what_only_unix_has() -> None:
    names = ", ".join(map(repr, NOT_ON_WINDOWS))
    code = (
        f"import sys, importlib, pkgutil, torch, transformers, datasets, accelerate, peft, bitsandbytes\n"
        f"for name in ({names}): sys.modules[name] = None\n"
        "import lora_core\n"
        "for module in pkgutil.walk_packages(lora_core.__path__, 'lora_core.'): importlib.import_module(module.name)\n"
    )
    done = run([sys.executable, "-c", code], ROOT)
    assert done.returncode == 0, done.stderr


def test_a_refusal_under_accelerate_launch_ends_with_its_sentence() -> None:
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml"]
    done = run([*accelerate, "launch/train.py", "--cfg", "demo", "train.lr=1"], ROOT)
    assert done.returncode != 0
    assert done.stderr.rstrip().splitlines()[-1].startswith("  command line  train.lr = 1: unknown key")
    assert "Traceback" not in done.stderr
    assert "values were not passed" not in done.stderr


THREADS = "from lora_core.runtime.launcher import omp_num_threads; print(omp_num_threads())"


@pytest.mark.parametrize(("exported", "expected"), [("3", "3"), (None, "None")])
@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--nproc_per_node", "1", "--no-python"]])
def test_an_exported_number_of_threads_is_told_from_a_launchers(
    launcher: list[str], exported: str | None, expected: str, empty: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if exported is not None:
        environment["OMP_NUM_THREADS"] = exported
    command = [sys.executable, *launcher, *([sys.executable] if launcher else []), "-c", THREADS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [expected], done.stderr


def test_threads_wait_passively_unless_the_user_said_how(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_core.commands.main import wait_passively

    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_the_files_for_several_devices_are_written_where_there_is_no_checkout(installed: Path, empty: Path) -> None:
    command = [sys.executable, str(installed / "bin/lora-core"), "launch-files"]
    done = run(command, empty, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    written = sorted(path.relative_to(empty) for path in empty.rglob("*.*"))
    ours = [
        *(ROOT / "configs/accelerate").iterdir(),
        *(ROOT / "launch").glob("*.py"),
        *(ROOT / "launch/jobs").glob("*.*"),
    ]
    assert written == sorted(path.relative_to(ROOT) for path in ours)
    assert all((empty / name).read_bytes() == (ROOT / name).read_bytes() for name in written)
    again = run(command, empty, PYTHONPATH=str(installed))
    assert f"{len(ours)} files are there already, the same" in again.stdout
    (empty / "configs/accelerate/ddp.yaml").write_text("mine: true\n", encoding="utf-8")
    refused = run(command, empty, PYTHONPATH=str(installed))
    assert refused.returncode == 2
    assert "configs/accelerate/ddp.yaml: exists, and holds something else" in refused.stderr
    assert (empty / "configs/accelerate/ddp.yaml").read_text(encoding="utf-8") == "mine: true\n"
    fix = refused.stderr.strip().rpartition("Fix: lora-core ")[2].split()
    assert run([*command[:2], *fix], empty, PYTHONPATH=str(installed)).returncode == 0
    assert (empty / fix[1] / "launch/train.py").is_file()
