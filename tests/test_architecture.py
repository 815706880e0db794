"""A module imports only from lines above it, so data flows one way; and `import lora_core` is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import lora_core

from .conftest import ROOT

ORDER = [
    "_version",
    "safe_text",
    "errors",
    "limits",
    "config",
    "schedule",
    "messages",
    "chat",
    "packing",
    "data",
    "attention",
    "lora_linear",
    "model",
    "loss",
    "optimizer",
    "run_folder",
    "devices",
    "checkpoint",
    "evaluate",
    "faults",
    "memory",
    "checks",
    "preflight",
    "report",
    "train",
    "verify",
    "cli",
]
NEEDS_TORCH = {
    "attention",
    "lora_linear",
    "checkpoint",
    "model",
    "loss",
    "optimizer",
    "devices",
    "evaluate",
    "faults",
    "memory",
    "train",
    "verify",
}


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "lora_core":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_core."):
            names.add(str(node.module).split(".")[1])
    return names


def test_every_module_has_its_place_and_imports_only_from_above() -> None:
    modules = {path.stem for path in (ROOT / "lora_core").glob("*.py")} - {"__init__"}
    assert modules == set(ORDER)
    for place, module in enumerate(ORDER):
        below = imported_modules(ROOT / f"lora_core/{module}.py") - set(ORDER[:place])
        assert not below, f"{module} imports {below}"


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_and_its_light_modules_pulls_in_no_torch() -> None:
    modules = "; ".join(f"import lora_core.{name}" for name in ORDER if name not in NEEDS_TORCH)
    heavy = "print([m for m in ('torch', 'transformers', 'datasets', 'peft') if m in sys.modules])"
    assert run_python(f"import sys, lora_core; {modules}; {heavy}") == "[]"


def test_every_public_name_loads_and_stays_what_it_is() -> None:
    code = (
        "import lora_core, lora_core.train, lora_core.evaluate\n"
        "from lora_core.train import train_step\n"
        "print([n for n in lora_core.__all__ if not hasattr(lora_core, n)], callable(lora_core.train), "
        "callable(lora_core.evaluate), lora_core.train_step is train_step)"
    )
    assert run_python(code) == "[] True True True"
    assert set(lora_core._MODULE_OF) | {"__version__"} == set(lora_core.__all__)
