"""Trackers (`train.report_to`) through Accelerate's own classes: a callback that no tracker can end a run with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from lora_core.config.schema import RunConfig, Tracker
from lora_core.errors import ConfigError, counted
from lora_core.runtime.console import Console
from lora_core.untrusted.text import values_without_secrets
from lora_core.watch.callbacks import Callback
from lora_core.watch.summary import git_commit, versions

# How a tracker is told to stay off the network, or off altogether: for the message where it cannot start.
_OFFLINE: dict[Tracker, str] = {
    "wandb": "WANDB_MODE=offline in the environment, or `wandb login`",
    "comet_ml": "COMET_START_ONLINE=0 in the environment, or `comet login`",
    "swanlab": "SWANLAB_MODE=offline in the environment, or `swanlab login`",
    "mlflow": "MLFLOW_TRACKING_URI in the environment, which says where it keeps runs",
}


class Trackers(Callback):
    """Hands each figure on to every tracker. What one of them raises is a warning once, and counted after that."""

    def __init__(self, trackers: Mapping[Tracker, GeneralTracker], console: Console) -> None:
        self._trackers = trackers
        self._console = console
        self.failures: dict[Tracker, int] = {}
        """Calls that a tracker failed at, of those with any."""

    def on_log(self, values: Mapping[str, Any]) -> None:
        self._log("train", values)

    def on_evaluate(self, values: Mapping[str, Any]) -> None:
        self._log("eval", values)

    def finish(self) -> None:
        """Close all of them, and say how often one failed."""
        for name, tracker in self._trackers.items():
            self._try(name, tracker.finish)
        for name, number in self.failures.items():
            self._console.say(f"warning: {name} failed at {counted(number, 'call')}; metrics.jsonl has all", "always")

    def _log(self, kind: str, values: Mapping[str, Any]) -> None:
        figures = {f"{kind}/{key}": value for key, value in values.items() if key != "step"}
        for name, tracker in self._trackers.items():
            self._try(name, partial(tracker.log, figures, step=values["step"]))

    def _try(self, name: Tracker, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001  # a full disk, a lost network, a fault of its own: none is the run's
            if name not in self.failures:
                self._console.say(
                    f"warning: {name} (train.report_to) failed: {_in_short(error)}; training continues, and "
                    "metrics.jsonl has every figure",
                    "always",
                )
            self.failures[name] = self.failures.get(name, 0) + 1


def start_trackers(
    config: RunConfig, folder: Path, data_hash: str, resumed_at_step: int | None, console: Console
) -> Trackers:
    """Start every tracker of `train.report_to`, in the main process, and tell it what run this is.

    Each gets the configuration, the data's hash, the git commit of the working folder and the versions, without
    secrets; what trackers collect by themselves (code, command line, environment) is switched off.

    Raises:
        ConfigError: one of them cannot start, for example because it wants to log in.
    """
    started: dict[Tracker, GeneralTracker] = {}
    for name in config.train.trackers:
        try:
            started[name] = _start(name, config, folder, resumed_at_step)
            started[name].store_init_configuration(_about_run(config, data_hash))
        except Exception as error:  # whatever a tracker raises, it is the user's to know
            fix = f"{_OFFLINE[name]}; or " if name in _OFFLINE else ""
            raise ConfigError(
                f"train.report_to={name} cannot start: {_in_short(error)}; fix: {fix}train.report_to=[]"
            ) from error
    return Trackers(started, console)


def _start(name: Tracker, config: RunConfig, folder: Path, resumed_at_step: int | None) -> GeneralTracker:
    make: Any = LOGGER_TYPE_TO_CLASS[name]
    project, run_name = config.train.tracker_project, folder.resolve().name
    if name == "tensorboard":
        # Of steps that are taken again after a resume, only the later ones are shown.
        purge = {} if resumed_at_step is None else {"purge_step": resumed_at_step + 1}
        tracker = make("tensorboard", folder, **purge)
    elif name == "mlflow":
        tracker = make(project, run_name=run_name)
    else:
        tracker = make(project, **_settings(name, run_name, folder))
    tracker.start()
    assert isinstance(tracker, GeneralTracker)
    return tracker


def _settings(name: Tracker, run_name: str, folder: Path) -> dict[str, Any]:
    """The run's name and folder, as each of them calls these; nothing collected but what is handed over."""
    if name == "wandb":
        import wandb

        quiet = wandb.Settings(console="off", disable_code=True, disable_git=True, x_disable_meta=True)
        return {"name": run_name, "dir": str(folder), "settings": quiet}
    if name == "comet_ml":
        import comet_ml

        collects = ("log_code", "log_git_metadata", "log_git_patch", "log_env_details", "parse_args")
        config = comet_ml.ExperimentConfig(
            name=run_name,
            offline_directory=str(folder / "comet"),
            auto_output_logging=False,
            **dict.fromkeys(collects, False),
        )
        return {"experiment_config": config}
    if name == "swanlab":
        import swanlab

        quiet = swanlab.Settings(
            probe={"runtime": False, "git": False, "requirements": False}, terminal={"proxy_type": "none"}
        )
        return {"name": run_name, "log_dir": str(folder / "swanlab"), "settings": quiet}
    return {"name": run_name}


def _about_run(config: RunConfig, data_hash: str) -> dict[str, Any]:
    """Flat and plain: the least that all of them take."""
    values: dict[str, Any] = {"data_hash": data_hash, "git_commit": git_commit() or "none"}
    values |= {f"version.{name}": version for name, version in versions().items()}
    for section, settings in config.to_dict().items():
        for key, value in settings.items() if isinstance(settings, dict) else [("", settings)]:
            plain = value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
            values[f"{section}.{key}" if key else section] = plain
    cleaned: dict[str, Any] = values_without_secrets(values)
    return cleaned


def _in_short(error: Exception) -> str:
    """The first line of what it says, and its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
