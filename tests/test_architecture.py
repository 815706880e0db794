"""Data flows one way: a folder imports only from folders above it, and inside a folder a module from those above."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import lora_core
from tests.conftest import ROOT

PACKAGE = ROOT / "lora_core"
# Folders (and the modules beside them) in the order that data flows, each with its modules in that order.
ORDER: dict[str, list[str]] = {
    "_version": [],
    "untrusted": ["text", "limits"],
    "errors": [],
    "schedule": [],
    "learning_rate": [],
    "config": [
        "adapter_schema",
        "data_schema",
        "schema",
        "keys",
        "synonyms",
        "layers",
        "legacy",
    ],
    "other_tools": [
        "translation",
        "not_offered",
        "trainer_keys",
        "llama_factory_rows",
        "llama_factory",
        "axolotl_rows",
        "axolotl",
        "scripts",
        "reader",
    ],
    "configuration": [],
    "sources": ["places", "json_stream", "json_object", "not_rows", "kinds", "readers", "hub", "files"],
    "rows": [
        "json_values",
        "keyed_parts",
        "columns",
        "turn_lists",
        "reshape",
        "tool_use",
        "refusals",
        "suggestions",
        "pairs",
        "logged_calls",
        "other_shapes",
        "turns",
        "messages",
    ],
    "encoding": [
        "template",
        "named_templates",
        "provenance",
        "forms",
        "prompts",
        "spans",
        "reasoning",
        "chat",
        "mask_reader",
    ],
    "data": ["counts", "packing", "alike", "split", "cache", "row_text", "encoded", "in_memory"],
    "model": [
        "heap",
        "out_of_memory",
        "attention",
        "language_part",
        "packing_check",
        "decoder",
        "lora_linear",
        "targets",
        "lora_settings",
        "base",
        "head",
        "loss",
        "optimizer",
        "starting_adapter",
    ],
    "runtime": ["run_folder", "run_state", "console", "launcher", "ranks", "sharding", "devices", "faults"],
    "memory": ["micro_batch", "live_bytes", "without_storage", "simulate", "plan"],
    "preflight": [
        "plan",
        "model_facts",
        "findings",
        "schedule",
        "rows",
        "replies",
        "template",
        "serving",
        "adapter",
        "memory",
        "environment",
        "launch",
        "ranks",
        "untrained",
        "catalogue",
        "preflight",
        "prescribe",
    ],
    "report": ["read", "words", "verdict", "plots", "page", "folders"],
    "checkpoints": ["card", "adapter_folder", "checkpoint", "resume"],
    "evaluation": ["evaluate", "leak", "generation", "replies"],
    "watch": ["summary", "callbacks", "trackers", "journal", "alarms", "progress", "pace"],
    "training": ["alike", "build", "step", "lookout", "loop", "finish", "end", "setup"],
    "rate_search": ["budget", "choice", "trials", "search", "page", "config_file"],
    "inference": ["opened", "chat", "questions", "paired", "evaluation", "harness"],
    "export": [
        "as_adapter",
        "base_files",
        "streamed",
        "compare",
        "merge",
        "gguf_tokenizer",
        "gguf",
        "modelfile",
        "ollama",
        "hub",
    ],
    "verification": ["table", "masks", "gradients", "runs", "reload", "contracts"],
    "commands": [
        "command_line",
        "several",
        "train",
        "preflight",
        "prescribe",
        "find_lr",
        "verify",
        "evaluate",
        "chat",
        "report",
        "runs",
        "rows",
        "convert",
        "demo",
        "launch_files",
        "merge",
        "export",
        "push",
        "main",
    ],
    "__main__": [],
}
MODULES = [f"{room}.{module}" if modules else room for room, modules in ORDER.items() for module in modules or [""]]
# What needs torch when it is imported; every other module must load without it.
NEEDS_TORCH = {
    "model",
    "memory",
    "runtime.sharding",
    "runtime.ranks",
    "runtime.devices",
    "runtime.faults",
    "preflight.model_facts",
    "checkpoints",
    "evaluation",
    "watch",
    "training",
    "rate_search.trials",
    "rate_search.search",
    "rate_search.page",
    "inference",
    "export",
    "verification",
}
MOST_LINES = 400


def path_of(module: str) -> Path:
    return PACKAGE / f"{module.replace('.', '/')}.py"


def imported_modules(path: Path) -> set[str]:
    """The modules of lora_core that a file imports, wherever in it, as `data.chat`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lora_core":
            inside = str(node.module).split(".")[1:]
            as_modules = {".".join([*inside, alias.name]) for alias in node.names}
            names |= (as_modules & set(MODULES)) or {".".join(inside)}
    return names - {""}


def test_every_module_has_its_place() -> None:
    files = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    assert {name for name in files if not name.endswith("__init__")} == set(MODULES)


def test_a_module_imports_only_from_above() -> None:
    for place, module in enumerate(MODULES):
        below = imported_modules(path_of(module)) - set(MODULES[:place])
        assert not below, f"{module} imports {below}"


def test_no_module_is_long() -> None:
    lengths = {module: len(path_of(module).read_text(encoding="utf-8").splitlines()) for module in MODULES}
    assert {module: length for module, length in lengths.items() if length > MOST_LINES} == {}


def test_no_folder_has_the_name_of_a_public_function() -> None:
    assert set(ORDER) & set(lora_core.__all__) == set()


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_contributors_are_told_every_folder_in_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE) == [room for room, modules in ORDER.items() if modules]


def test_importing_the_package_and_its_light_modules_pulls_in_no_torch() -> None:
    light = [name for name in MODULES if not {name, name.split(".")[0]} & NEEDS_TORCH]
    modules = "; ".join(f"import lora_core.{name}" for name in light)
    heavy = "print([m for m in ('torch', 'transformers', 'datasets', 'peft') if m in sys.modules])"
    assert run_python(f"import sys, lora_core; {modules}; {heavy}") == "[]"


def test_every_public_name_loads_and_stays_what_it_is() -> None:
    code = (
        "import lora_core, lora_core.training.setup, lora_core.evaluation.evaluate\n"
        "from lora_core.training.step import train_step\n"
        "print([n for n in lora_core.__all__ if not hasattr(lora_core, n)], callable(lora_core.train), "
        "callable(lora_core.evaluate), lora_core.train_step is train_step)"
    )
    assert run_python(code) == "[] True True True"
    assert set(lora_core._MODULE_OF) | {"__version__"} == set(lora_core.__all__)
