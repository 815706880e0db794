"""`lora-core runs`: every run folder is found, told by what became of it, filtered and compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_core.commands.main import main
from lora_core.report.page import write_report
from lora_core.runtime.run_state import write_state
from tests.report.test_report import HOSTILE, make_run


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs"
    (folder / "sweep").mkdir(parents=True)
    make_run(folder / "old")
    write_state(make_run(folder / "sweep/done", lora={"rank": 8}), "finished")
    failed = make_run(folder / "sweep/failed", lora={"rank": 32})
    (failed / "summary.json").unlink()
    write_state(failed, "failed", "stopped by an alarm")
    (folder / "configs").mkdir()
    (folder / "configs/config.yaml").write_text("no: run", encoding="utf-8")
    return folder


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    assert main(["runs", *arguments, "--json"]) == 0
    found: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return found


def test_runs_are_found_and_told_by_what_became_of_them(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {Path(str(entry["run"])).name: entry for entry in listed(capsys)}
    assert {name: entry["state"] for name, entry in found.items()} == {
        "old": "finished",
        "done": "finished",
        "failed": "failed",
    }
    assert found["failed"]["reason"] == "stopped by an alarm"
    done = found["done"]
    assert (done["eval_loss_before"], done["eval_loss_after"], done["steps"], done["planned_steps"]) == (3.0, 2.5, 4, 4)
    assert str(done["verdict"]).startswith("learned: eval loss 3.00 -> 2.50")
    assert listed(capsys, str(outputs / "old"))[0]["verdict_kind"] == "poor"


def test_runs_are_filtered_by_state_and_by_any_key(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def names(*conditions: str) -> list[str]:
        where = [part for condition in conditions for part in ("--where", condition)]
        return sorted(Path(str(entry["run"])).name for entry in listed(capsys, *where))

    assert names("state=finished") == ["done", "old"]
    assert names("state=finished", "lora.rank=8") == ["done"]
    assert names("lora.rank=7") == []
    for condition, said in (("nothing", "must be KEY=VALUE"), ("lora.rnk=8", "no run has it")):
        assert main(["runs", "--where", condition]) == 2
        assert said in capsys.readouterr().err
    assert main(["runs", "nowhere"]) == 2
    assert "nowhere: no such folder; fix:" in capsys.readouterr().err


def test_the_table_and_the_comparison_are_for_a_terminal(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--compare"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0].split() == ["run", "state", "steps", "eval", "loss", "change", "date", "model"]
    assert "failed: stopped by an alarm" in said
    assert "\x1b" not in said
    table = said[said.index("\nkey") :].split("\n")
    rank = next(line.split() for line in table if line.startswith("lora.rank"))
    heads = table[1].split()
    assert dict(zip(heads[1:], rank[1:], strict=True)) == {"old": "16", "done": "8", "failed": "32"}


def test_alarms_and_the_film_of_a_reply_are_text_on_the_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    alarm = {
        "event": "alarm",
        "step": 3,
        "id": "loss_rising",
        "severity": "warning",
        "message": HOSTILE,
        "fix": HOSTILE,
    }
    film = [
        {"event": "reply", "step": step, "number": 0, "prompt": HOSTILE, "reply": f"{step}{HOSTILE}", "ended": step < 4}
        for step in (0, 2, 4)
    ]
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(event) + "\n" for event in [alarm, *film])
    page = write_report(folder).read_text(encoding="utf-8")
    assert HOSTILE not in page
    assert page.index("Alarms while it ran") < page.index(">Loss</h3>") < page.index("One prompt over the run")
    assert [page.index(f"step {step}, eval loss") for step in (0, 2, 4)] == sorted(
        page.index(f"step {step}, eval loss") for step in (0, 2, 4)
    )
    film_of_page = page[page.index("One prompt over the run") : page.index("<h2>Figures</h2>")]
    assert film_of_page.count("(cut off)") == 1
