"""Tasks of EleutherAI's lm-evaluation-harness (the package lm-eval) on a model that is loaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_core.errors import ConfigError
from lora_core.inference.opened import LoadedModel
from lora_core.model.decoder import padding_masked
from lora_core.runtime.launcher import refuse_several

Scores = dict[str, dict[str, float]]
"""Task -> measure, as lm-eval names both -> value."""


def check_harness() -> None:
    """Refuse where the package is missing, or a launcher started several processes.

    Raises:
        ConfigError: it is, or did.
    """
    refuse_several("--lm-eval")
    if find_spec("lm_eval") is None:
        raise ConfigError("--lm-eval: the package lm-eval is not installed; fix: pip install 'lora-core[lm-eval]'")


def run_tasks(loaded: LoadedModel, names: str) -> Scores:
    """Scores of the tasks, as lm-eval computes them: prompts as the tasks write them, without the chat template.

    Args:
        names: tasks, groups or patterns of lm-eval, or YAML files of tasks, with commas between them.

    Raises:
        ConfigError: the package is missing, there is no such task, or several processes were started.
    """
    check_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    tasks = _tasks(names, manager)
    model = HFLM(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        batch_size=loaded.config.train.per_device_eval_batch_size,
    )
    with loaded.accelerator.autocast(), padding_masked(loaded.model):
        results = simple_evaluate(model=model, tasks=tasks, task_manager=manager, log_samples=False)
    return {task: _numbers(scores) for task, scores in results["results"].items()}


def _tasks(names: str, manager: Any) -> list[str]:
    """What lm-eval takes: names of tasks, and paths of YAML files."""
    tasks: list[str] = []
    for name in filter(None, map(str.strip, names.split(","))):
        path = Path(name).expanduser()
        if path.is_file():
            tasks.append(str(path))
            continue
        found = manager.match_tasks([name])
        if not found:
            raise ConfigError(f"--lm-eval {name}: lm-eval has no such task; fix: a name that `lm-eval ls tasks` lists")
        tasks += found
    if not tasks:
        raise ConfigError(f"--lm-eval {names!r}: names no task; fix: --lm-eval arc_easy")
    return tasks


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    """The measures, which are called `acc,none`: the name and that of a filter. Other keys are counts and names."""
    return {name: float(value) for name, value in scores.items() if "," in name and isinstance(value, (int, float))}
