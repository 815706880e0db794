"""`lora-core evaluate`: one model, two, and their table."""

from __future__ import annotations

import json
import re
import signal
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.commands.main import main
from lora_core.configuration import load_config
from lora_core.evaluation.evaluate import evaluate_adapter
from tests.conftest import chat
from tests.forked import python
from tests.tiny import write_jsonl


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


def test_memory_that_runs_out_is_a_sentence(evaluate: Any, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("evaluation.evaluate_examples", "opened.load_adapter"):
        monkeypatch.setattr(f"lora_core.inference.{place}", lambda *_: torch.empty(2**50))
        code, _, err = evaluate("--adapter", str(finished_run))
        assert code == 1
        assert re.match(r"\nerror: out of memory on cpu \(rank 0\): .*; fix: .*per_device_eval_batch_size=1", err)


def test_replies_is_a_number_or_all(evaluate: Any, finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluate("--adapter", str(finished_run), "--replies", "some")
    assert "must be an int of 0 or more, or all: 'some'" in capsys.readouterr().err


# Two ranks of each case, forked from a process that has imported everything; each prints into a file of its own.
RANKS = textwrap.dedent("""
    import json, multiprocessing, os, signal, sys
    from pathlib import Path
    from lora_core.commands.main import main
    from lora_core.inference import evaluation
    from lora_core.runtime import faults, ranks
    from tests.equivalence.forked_ranks import free_port

    faults._SECONDS_TO_ANSWER = ranks._SECONDS_TO_SPEAK = 2.0

    def rank_main(rank, port, folder, case):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{case['name']}-{rank}.{name}", os.O_CREAT | os.O_WRONLY), number)
        if case["is_killed"] and rank == 1:
            evaluation.evaluate_examples = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        sys.exit(main(["evaluate", *case["arguments"], *(case["of_rank_1"] if rank else [])]))

    folder = Path(sys.argv[1])
    forks = multiprocessing.get_context("fork")
    started = []
    for case in json.loads((folder / "cases.json").read_text()):
        port = free_port()
        started.append([forks.Process(target=rank_main, args=(rank, port, folder, case)) for rank in range(2)])
        for process in started[-1]:
            process.start()
    for processes in started:
        for process in processes:
            process.join(120)
            process.kill()
    print(json.dumps([[process.exitcode for process in processes] for processes in started]))
""")


@pytest.fixture(scope="module")
def on_two_ranks(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By case: the exit codes of two ranks, what each printed on stdout, and on stderr."""
    folder = tmp_path_factory.mktemp("evaluated")
    arguments = ["--adapter", str(finished_run), "--against", "none", "--replies", "all", "--json"]
    other = ["--adapter", str(finished_run / "checkpoints/step-000010")]
    fewer = write_jsonl(folder / "fewer.jsonl", [chat("red", "stop")])
    of_rank_1: dict[str, list[str]] = {
        "same": [],
        "killed": [],
        "no file": ["data.eval_file=nowhere.jsonl"],
        "other model": other,
        "other rows": [f"data.eval_file={fewer}"],
    }
    cases = [
        {"name": name, "arguments": arguments, "of_rank_1": more, "is_killed": name == "killed"}
        for name, more in of_rank_1.items()
    ]
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    done = python("-c", RANKS, str(folder))
    printed = {
        name: [
            [(folder / f"{name}-{rank}.{kind}").read_text(encoding="utf-8") for rank in (0, 1)]
            for kind in ("out", "err")
        ]
        for name in of_rank_1
    }
    return {name: (codes, *printed[name]) for name, codes in zip(of_rank_1, json.loads(done.stdout), strict=True)}


def test_two_ranks_measure_what_one_does_and_one_speaks(on_two_ranks: Any, evaluate: Any, finished_run: Path) -> None:
    codes, (said, silent), err = on_two_ranks["same"]
    assert (codes, silent, err) == ([0, 0], "", ["", ""])
    _, alone, _ = evaluate("--adapter", str(finished_run), "--against", "none", "--replies", "all", "--json")
    ours, theirs = json.loads(said), json.loads(alone)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert ours["against"]["loss"] == pytest.approx(theirs["against"]["loss"], rel=1e-6)
    assert ours["difference"]["exact"] == theirs["difference"]["exact"]


def test_a_rank_that_is_lost_is_named_with_a_fix_that_evaluate_has(on_two_ranks: Any) -> None:
    codes, _, err = on_two_ranks["killed"]
    assert codes == [1, -signal.SIGKILL]
    assert "\nerror: rank 1 of 2 died or did not answer within 1800 s (train.rank_timeout_s), so rank 0 stops" in err[0]
    assert err[0].endswith("fix: read the lost rank's output above, then evaluate again\n")
    assert "Traceback" not in err[0]


def test_a_mistake_of_one_rank_is_said_by_that_rank(on_two_ranks: Any) -> None:
    codes, _, err = on_two_ranks["no file"]
    assert codes == [1, 2]
    assert "\nerror: rank 1: nowhere.jsonl: no such file" in err[1]
    assert "\nerror: rank 1 of 2 died or did not answer" in err[0]
    assert "Traceback" not in "".join(err)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("other model", "model.name_or_path: rank 1 has loaded other weights than rank 0"),
        ("other rows", "fewer.jsonl: rank 1 has other rows than rank 0"),
    ],
)
def test_ranks_that_would_measure_something_else_are_refused(on_two_ranks: Any, case: str, said: str) -> None:
    codes, out, err = on_two_ranks[case]
    assert (codes, out) == ([2, 2], ["", ""])
    assert said in err[0]
