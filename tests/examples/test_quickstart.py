"""The notebook runs from its first cell to its last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.conftest import ROOT, make_tokenizer
from tests.tiny import save_tiny_model


def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = nbformat.read(ROOT / "examples/quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    save_tiny_model(tmp_path / "tiny", make_tokenizer())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # A tiny model in place of the demo's: the cells are what is tried here, not what it learns.
            source = cell.source.replace("settings = [", f'settings = ["model.name_or_path={tmp_path / "tiny"}", ')
            exec(compile(source, str(cell.id), "exec"), names)
    assert names["plan"].total_optimizer_steps == 20
    assert len(names["losses"]) == 20
    assert names["losses"][-1] < names["losses"][0]
    assert (tmp_path / "outputs/notebook/adapter/adapter_config.json").is_file()
    assert all(not cell.get("outputs") for cell in notebook.cells)  # committed without
    assert "loss " in capsys.readouterr().out
