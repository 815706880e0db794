"""`lora-core evaluate`: one model, two, and their table."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_core.commands.main import main
from lora_core.configuration import load_config
from lora_core.evaluation.evaluate import evaluate_adapter


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command's exit code, and what it printed."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # commands set their own

    def call(*arguments: str) -> tuple[int, str, str]:
        return main(["evaluate", *arguments]), *capsys.readouterr()

    return call


def test_a_configuration_alone_means_the_adapter_of_its_run(evaluate: Any, finished_run: Path) -> None:
    cfg = str(finished_run / "config.yaml")
    code, out, _ = evaluate("--cfg", cfg, "--json")
    expected = evaluate_adapter(load_config(cfg), finished_run / "adapter").to_dict()
    assert code == 0
    assert json.loads(out).items() >= expected.items()
    assert json.loads(evaluate("--adapter", str(finished_run), "--json")[1]).items() >= expected.items()
    # The loss that the run measured last.
    summary = json.loads((finished_run / "summary.json").read_text(encoding="utf-8"))
    assert expected["loss"] == pytest.approx(summary["eval_loss_after"], abs=1e-5)


def test_base_model_checkpoint_and_model_folder(evaluate: Any, finished_run: Path, tiny_model_dir: Path) -> None:
    cfg = ("--cfg", str(finished_run / "config.yaml"), "--json")
    base = json.loads(evaluate(*cfg, "--adapter", "none")[1])
    folder = json.loads(evaluate(*cfg, "--adapter", str(tiny_model_dir))[1])
    checkpoint = json.loads(evaluate(*cfg, "--adapter", str(finished_run / "checkpoints/step-000010"))[1])
    summary = json.loads((finished_run / "summary.json").read_text(encoding="utf-8"))
    assert base["loss"] == folder["loss"] == pytest.approx(summary["eval_loss_before"], abs=1e-5)
    assert summary["eval_loss_after"] < checkpoint["loss"] < base["loss"]


def test_two_models_side_by_side_with_a_table(evaluate: Any, finished_run: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    arguments = ("--adapter", str(finished_run), "--against", "none", "--replies", "all")
    code, out, _ = evaluate(*arguments, "--output", str(table))
    assert code == 0
    assert f"\nmodel {load_config(finished_run / 'config.yaml').model.name_or_path}\n  loss " in out
    assert "\n  exact replies: 3 of 5 (60.0%)" in out
    assert "\n  loss -" in out
    assert "95% interval -" in out
    assert re.search(r" \(lower on \d of 5 examples, higher on \d\)", out)
    assert "exact replies 3 and 0 of 5: 3 by the first alone, 0 by the second alone (McNemar's exact test: p = " in out
    assert out.endswith(f"table of examples: {table}\n")
    rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    assert [row["reply"] for row in rows][:3] == ["stop", "go on", "wait"]
    assert [row["against_exact"] for row in rows] == [False] * 5
    values = json.loads(evaluate(*arguments, "--json")[1])
    assert values["difference"]["exact"]["only_first"] == 3
    low, high = values["difference"]["loss"]["interval_95"]
    assert low < values["loss"] - values["against"]["loss"] < high
    mean = sum(row["against_loss"] * row["num_tokens"] for row in rows) / sum(row["num_tokens"] for row in rows)
    assert mean == pytest.approx(values["against"]["loss"], abs=1e-6)


def test_another_file_and_fewer_replies(evaluate: Any, finished_run: Path, write_rows: Any) -> None:
    pair = [{"prompt": "green", "completion": "go on"}, {"prompt": "red", "completion": "halt"}]
    path = write_rows(pair)
    code, out, _ = evaluate("--adapter", str(finished_run), f"data.eval_file={path}", "--replies", "1")
    assert (code, "(2 examples, " in out, "exact replies: 1 of 1 (100.0%)" in out) == (0, True, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "which model? fix: --cfg NAME, or --adapter RUN with a run's folder"),
        (["--adapter", "none"], "which model? fix: --cfg NAME"),
        (
            ["--cfg", "demo", "output_dir=nowhere"],
            "no adapter yet; fix: lora-core train --cfg demo output_dir=nowhere",
        ),
        (["--adapter", "RUN", "data.eval_file=null"], "there is no eval set; fix: data.eval_file=PATH"),
        (["--adapter", "RUN", "--max-new-tokens", "0"], "--max-new-tokens 0: must be 1 or more"),
        (["--adapter", "RUN", "--output", "nowhere/x.jsonl"], "no folder nowhere; fix: make it first"),
        (["--adapter", "RUN", "--against", "/nowhere"], "/nowhere: no such folder"),
    ],
)
def test_what_cannot_be_is_refused_with_a_fix(
    evaluate: Any, finished_run: Path, arguments: list[str], said: str
) -> None:
    code, out, err = evaluate(*[str(finished_run) if word == "RUN" else word for word in arguments])
    assert (code, out) == (2, "")
    assert said in err


def test_replies_is_a_number_or_all(evaluate: Any, finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluate("--adapter", str(finished_run), "--replies", "some")
    assert "must be an int of 0 or more, or all: 'some'" in capsys.readouterr().err
