"""The trackers whose packages are too large for every test run, with these packages, offline: `make trackers`."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import pytest

from lora_core import train
from lora_core.config.schema import RunConfig
from tests.watch.test_trackers import SECRETS, config, events

__all__ = ["config"]  # a fixture

OFFLINE = {
    "COMET_START_ONLINE": "0",
    "SWANLAB_MODE": "offline",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_ALLOW_FILE_STORE": "true",
}
# Of a run folder, by lora_core.
OWN = {"adapter", "checkpoints", "config.yaml", "eval_examples.json", "metrics.jsonl", "preflight.json", "report.html"}
OWN |= {"rows.json", "run.log", "summary.json"}
FOLDERS = {"MLFLOW_TRACKING_URI": "mlruns", "TRACKIO_DIR": "trackio", "SWANLAB_LOG_DIR": "swanlog", "HOME": "home"}


def written_by_tracker(folder: Path) -> bytes:
    """All files below a folder but the run's own and its inputs; what is in zip archives too."""
    contents = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        first, *rest = path.relative_to(folder).parts
        if not rest or first == SECRETS["TEAM_PASSWORD"] or (first == "run" and rest[0] in OWN):
            continue
        contents.append(path.read_bytes())
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                contents += [archive.read(name) for name in archive.namelist()]
    return b"\n".join(contents)


@pytest.mark.parametrize("name", ["mlflow", "trackio", "comet_ml", "swanlab"])
def test_a_tracker_gets_every_figure_and_no_secret(
    name: str, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in OFFLINE.items():
        monkeypatch.setenv(variable, value)
    for variable, folder in FOLDERS.items():
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / folder))
    summary = train(config.model_copy(update={"train": config.train.model_copy(update={"report_to": name})}))
    assert summary.tracker_failures == {}
    written = written_by_tracker(tmp_path)
    losses = [event["loss"] for kind in ("train", "eval") for event in events(tmp_path / "run", kind)]
    forms = [(loss, json.dumps(loss).encode(), struct.pack("<d", loss)) for loss in losses]  # as text, or in protobuf
    assert [loss for loss, text, binary in forms if text not in written and binary not in written] == []
    assert summary.data_hash.encode() in written
    assert [secret for secret in SECRETS.values() if secret.encode() in written] == []
