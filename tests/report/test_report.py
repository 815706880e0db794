"""The page of a run: every number that matters, nothing that its texts could do, and a page for broken runs too."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from lora_core.errors import ConfigError
from lora_core.report.page import compare_reports, write_report
from lora_core.report.plots import PLOTS as PLOT_OF
from lora_core.report.read import read_run
from lora_core.report.verdict import outcome_of
from lora_core.runtime.run_folder import write_json
from tests.conftest import ROOT

HOSTILE = "<script>alert(1)</script></details></mark>\"' onload=x <img src=http://evil.example/x.png>"
UNSEEN = "\x1b[31m\u202e\x00\ud800\u2028"  # a terminal's colour, a change of direction, half a character, a line's end
EVALS = {0: 3.0, 2: 2.0, 4: 2.5}
PLOTS = ["Loss", "Learning rate", "Gradient norm", "Speed, tokens/s", "Example lengths", "Memory"]


def make_run(folder: Path, **config: Any) -> Path:
    """A finished run of four steps; every text in it is hostile. JSON is YAML, so it also serves as config.yaml."""
    folder.mkdir()
    text = HOSTILE + UNSEEN
    settings = {"model": {"name_or_path": HOSTILE}, "lora": {"rank": 16, "target_modules": ["q_proj", HOSTILE]}}
    settings |= {"data": {"train_file": HOSTILE, "max_seq_length": 96}, "train": {"max_grad_norm": 1.0}, **config}
    counts = {"read": 81, "kept": 78, "dropped_bad": 2, "dropped_unsupervised": 1, "truncated": 7, "tokens": 5149}
    lengths = {"p50": 61, "p90": 83, "p99": 95, "max": 96, "histogram": {"edges": [0, 48, 96], "counts": [30, 48]}}
    rates = [0.0, 1e-4, 6e-5, 3e-5]
    files = {
        "config.yaml": settings,
        "preflight.json": {
            "plan": {"num_rows": 78, "total_optimizer_steps": 4, "learning_rates": rates},
            "data": {"train": {"file": text, "counts": counts, "lengths": lengths}, "eval": None},
            "memory": {"components": {"weights": 2**30, "logits": 2**29}, "total_bytes": 3 * 2**29},
            "findings": [{"id": "few_steps", "severity": HOSTILE, "message": text, "fix": "train.max_steps=30"}],
        },
        "rows.json": [
            {
                "line": 3,
                "num_tokens": 503,
                "num_supervised": 2,
                "spans": [["<|user|>\n", False], [text, True], ["long " * 500, False]],
            }
        ],
        "summary.json": {
            "total_optimizer_steps": 4,
            "num_train_conversations": 78,
            "eval_loss_before": 3.0,
            "eval_loss_after": 2.5,
            "train_time_s": 140.2,
            "tokens_per_s": 1234.5,
            "peak_memory_bytes": 5 * 2**29,
            "verdict": text,  # the page says its own
            "date": text,
            "hardware": text,
            "data_hash": "0123abcd",
            "working_dir": text,
            "adapter_dir": text,
            "adapter_norm": 1.25,
            "adapter_step": 4,
            "learning_rate": 1e-4,
            "peak_learning_rate": 1e-4,
            "num_supervised_tokens": 2464,
            "eval_loss_change_error": 0.03,
            "num_eval_examples": 26,
            "num_eval_examples_better": 25,
            "num_eval_examples_worse": 1,
            "versions": {"torch": HOSTILE},
            "command": f"accelerate launch {text}",
        },
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    events: list[dict[str, Any]] = [{"event": "eval", "step": step, "loss": loss} for step, loss in EVALS.items()]
    for step, rate in enumerate(rates, start=1):
        values = {"loss": 3 - step / 2, "learning_rate": rate, "grad_norm": 1.5, "tokens_per_s": 1200.0}
        events.append({"event": "train", "step": step, **values})
    # As the run writes it: U+2028 stands in the file as it is.
    events.append(
        {
            "event": "sample",
            "prompt": HOSTILE,
            "before": "before\u2028",
            "before_ended": False,
            "after": HOSTILE,
            "after_ended": True,
            "expected": f"expected {HOSTILE}",
        }
    )
    lines = [json.dumps(event, ensure_ascii=False) + "\n" for event in events]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hostile_text_is_text_and_the_page_asks_for_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    other = make_run(tmp_path / "b", output_dir=HOSTILE, seed=HOSTILE)
    for path in (write_report(run), compare_reports([run, other], tmp_path / "compare.html")):
        page = Page(path)
        assert HOSTILE in page.text
        assert HOSTILE not in page.source
        assert not {"script", "img", "link", "iframe", "object", "base"} & set(page.tags)
        assert not [name for name, _ in page.attributes if name.startswith("on")]
        urls = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action")]
        assert all(url.startswith("#") for url in urls)
        assert not re.search(r"@import|url\((?!#)", page.source)
        assert r"\x1b[31m\u202e\x00\ud800\u2028" in page.text or path.name == "compare.html"
        assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e\u2028\ud800]", page.source)


def test_the_numbers_that_matter_are_on_the_page(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run")))
    words = " ".join(page.text.split())
    for expected in (
        "learned: eval loss 3.00 -> 2.50 (-16.7% ± 1.0%), better on 25 of 26 examples; it over-fitted after step 2",
        "eval loss 2.5000 before: 3.0000 (-16.7%)",
        "eval examples 25 better of 26; ± is the standard error over them",
        "training time 2 min 20 s",
        "tokens/s 1,234",
        "peak memory 2.5 GiB predicted: 1.5 GiB",
        "training examples 78 loss tokens trained on 2,464 optimizer steps 4 of 4 learning rate 1e-4, peak 1e-4 (100%)",
        f"LoRA rank 16, on q_proj, {HOSTILE} norm of the adapter's update 1.25, from 0 adapter {HOSTILE}",
        "data hash 0123abcd",
        "predicted 1.5 GiB, measured 2.5 GiB",
        "rows read 81 examples kept 78 rows dropped, unreadable 2 rows dropped, no loss tokens 1",
        "length p50, tokens 61 length p90, tokens 83 length p99, tokens 95 length max, tokens 96",
        "truncated to 96 tokens",
        "train.max_steps=30 [few_steps]",
        "line 3 503 tokens, 2 loss tokens",
    ):
        assert expected in words
    assert "metrics.jsonl" not in words  # every line of it was read


def test_the_page_says_first_whether_it_worked_then_shows_loss_then_replies(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    heads = [*PLOTS[:1], "Replies before, after, and as expected", "Figures", "Next", "Findings of preflight", "Plots"]
    places = [page.index('<p class="verdict poor">learned: '), *(page.index(f">{head}</h") for head in heads)]
    assert places == sorted(places)
    replies = page[places[2] : places[3]]
    assert re.findall(r'<h3 class="side">(\w+)</h3><div class="text">([^\s]{6})', replies) == [
        ("before", "before"),
        ("after", "&lt;sc"),
        ("expected", "expect"),
    ]
    assert replies.count(" … (cut off)</div>") == 1
    assert replies.index("(cut off)") < replies.index(">after<")


def test_loss_tokens_are_marked_and_the_examples_are_folded(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    rows = page[page.index("<details>\n<summary>The first training examples") : page.index("<h2>Configuration")]
    assert "<details>\n<summary>line 3" in rows
    assert re.search(r'<div class="text">&lt;\|user\|&gt;↵\n<mark>&lt;script&gt;[^<]*</mark>long ', rows)


def test_all_plots_are_there_with_ids_of_their_own_and_colours_of_the_page(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run")))
    assert [value for name, value in page.attributes if name == "aria-label" and value in PLOTS] == PLOTS
    assert (page.tags.count("svg"), page.tags.count("style")) == (len(PLOTS), 1)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 50
    used = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', page.source)
    assert {link or clip for link, clip in used} <= set(ids)
    drawn = page.source[page.source.index("<svg") : page.source.rindex("</svg>")]
    assert re.findall(r"#[0-9a-f]{6}\b", drawn) == []


def test_over_fitting_is_said_only_where_training_loss_still_fell(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    said = " ".join(Page(write_report(folder)).text.split())
    assert "lowest at step 2 (2.0000) and rose to 2.5000 by step 4" in said
    assert "1.0000 to 1.7500" not in said
    assert "fix: train.keep_adapter=best, or train.max_steps=2 " in said
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    extra = {"adapter_step": 2, "eval_loss_after": 2.0, "stopped_early_at_step": 3, "num_skipped_steps": 1}
    write_json(folder / "summary.json", summary | extra)
    page = Page(write_report(folder))
    assert "; adapter/ is that of step 2" in page.text
    assert ("class", "verdict good") in page.attributes
    for expected in ("3 of 4, 1 not applied", "(of step 2)", "1 of 3 optimizer steps were not applied"):
        assert expected in page.text
    metrics = folder / "metrics.jsonl"
    rising = metrics.read_text(encoding="utf-8").replace('"step": 4, "loss": 1.0', '"step": 4, "loss": 9.0')
    metrics.write_text(rising, encoding="utf-8")
    assert outcome_of(read_run(folder)).over_fitting is None


def test_an_unfinished_or_broken_run_still_gives_a_page_that_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "summary.json").unlink()
    (folder / "rows.json").write_text("[{", encoding="utf-8")
    metrics = folder / "metrics.jsonl"
    metrics.write_text("\n".join(metrics.read_text(encoding="utf-8").split("\n")[:6]) + '\n{"event": "tra', "utf-8")
    text = Page(write_report(folder)).text
    seen = "not finished: 3 of 4 optimizer steps seen; eval loss so far 3.00 -> 2.50; training loss 2.50 -> 1.50"
    assert f"{seen}; 1,200 tokens/s" in text
    assert "--resume" in text
    assert "metrics.jsonl ends in the middle of line 7" in text
    assert "rows.json cannot be read" in text
    for path in folder.iterdir():
        if path.name != "config.yaml":
            path.unlink()
    assert Page(write_report(folder)).text.count("Nothing recorded.") == len(PLOTS)
    assert "preflight.json is missing" in Page(write_report(folder)).text
    # A summary that holds nothing that can be used: no figure, no fault.
    write_json(folder / "summary.json", {"eval_loss_before": 0, "eval_loss_after": "1", "versions": None})
    (folder / "metrics.jsonl").write_text('{"event": "train", "step": 1, "loss": NaN}\n{"event": "sample"}', "utf-8")
    text = Page(write_report(folder)).text
    assert "no loss was recorded, so it cannot be said what this run learned" in text
    assert "summary.json is of an earlier version: it has no verdict, date, hardware," in text


def test_a_change_next_to_nothing_is_no_slope_on_the_plot(tmp_path: Path) -> None:
    def height(values: dict[int, float]) -> float:
        """Of the eval loss's line, as a share of the plot's height."""
        run = replace(
            read_run(folder),
            train_events=[],
            eval_events=[{"step": step, "loss": loss} for step, loss in values.items()],
        )
        axes = Figure().subplots()
        PLOT_OF["Loss"](run, axes)
        low, high = axes.get_ylim()
        return (max(values.values()) - min(values.values())) / (high - low)

    folder = make_run(tmp_path / "run")
    assert height({0: 3.000, 10: 2.997}) < 0.01
    assert 0.5 < height({0: 3.0, 10: 2.0}) < 1
    assert height({0: 9.0, 10: 0.1}) < 1


def test_a_comparison_shows_only_the_keys_that_differ(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", seed=1, same=5)
    second = make_run(tmp_path / "b", seed=2, same=5)
    text = " ".join(Page(compare_reports([first, second], tmp_path / "c.html")).text.split())
    assert "run 1 run 2 seed 1 2 Figures" in text


def test_equal_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert write_report(folder).read_bytes() == write_report(folder, tmp_path / "again.html").read_bytes()


def test_mistakes_are_named_with_their_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.yaml, so it is no run; fix: name the output_dir"):
        write_report(tmp_path)
    folder = make_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="run: cannot be written: is a folder; fix: --output"):
        write_report(folder, folder)
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match="is no report, and would be lost; fix: --output"):
        write_report(folder, tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_text() == "{}"
    assert write_report(folder, write_report(folder)) == folder / "report.html"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"fix: pip install 'lora_core\[report\]'"):
        write_report(folder)


def test_the_command_prints_the_path_and_loads_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    command = [sys.executable, "-X", "importtime", str(ROOT / "launch/report.py")]
    for arguments, code, path in (
        ([str(run)], 0, str(run / "report.html")),
        ([str(run), str(run)], 0, "report.html"),
        ([str(run / "missing")], 2, ""),
    ):
        done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout.strip()) == (code, path)
        assert not re.search(r"\| +(torch|transformers|peft|datasets)$", done.stderr, re.MULTILINE)
    assert "missing: no such folder; fix:" in done.stderr
