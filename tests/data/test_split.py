"""Contract 6 with an eval share: read = trained + eval + dropped, over the whole file, and no leak between the two."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lora_core.configuration import load_config
from lora_core.data.alike import SHARED, joined, near_pairs
from lora_core.data.counts import EncodedFile, account
from lora_core.data.encoded import encode_file, load_data
from lora_core.data.split import choose_groups, duplicate_groups, hold_out
from lora_core.errors import DataError
from lora_core.preflight.preflight import describe, gather_facts, report, run_checks
from lora_core.report.page import write_report
from lora_core.runtime.devices import look_around
from lora_core.sources.places import Places
from lora_core.training.setup import train
from tests.conftest import chat


def encode(path: Path, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> EncodedFile:
    arguments: dict[str, Any] = {"max_seq_length": 512, "cache_dir": path.parent / "cache", **changes}
    return encode_file(path, tokenizer, **arguments)


def file_of(rows: list[tuple[str, int, int]]) -> EncodedFile:
    """As `encode_file` gives it, of rows (what becomes of it, exact key, text key)."""
    num_tokens = [0 if fate == "bad" else 4 + number % 3 for number, (fate, _, _) in enumerate(rows)]
    supervised = [2 + number % 2 if fate == "kept" else 0 for number, (fate, _, _) in enumerate(rows)]
    no = [False] * len(rows)
    columns = {
        "input_ids": [list(range(n)) for n in num_tokens],
        "loss_mask": [[i >= n - s for i in range(n)] for n, s in zip(num_tokens, supervised, strict=True)],
        "line": list(range(1, len(rows) + 1)),
        "reply": [-1] * len(rows),
        "left_out": [""] * len(rows),
        "loss_weights": [[] for _ in rows],
        "num_supervised": supervised,
        "truncated_tokens": [n % 2 for n in num_tokens],
        "truncated_supervised": [n % 2 for n in num_tokens],
        **dict.fromkeys(("has_empty_reply", "holds_special_text", "cut_at_border", "has_doubled_bos"), no),
        **dict.fromkeys(("has_system_turn", "has_placeholder", "repeats_prompt", "ends_unanswered"), no),
        **dict.fromkeys(("changes_script", "has_tools", "lists_tools_twice", "wraps_answers", "is_normalized"), no),
        "sketch": [[0] * 8] * len(rows),
        "reply_start": [0] * len(rows),
        "exact_key": [exact for _, exact, _ in rows],
        "text_key": [text for _, _, text in rows],
    }
    problems = np.array(["broken" if fate == "bad" else "" for fate, _, _ in rows])
    places = Places.of_file(Path("rows.jsonl"))
    return account("rows.jsonl", places, Dataset.from_dict(columns), problems, "skip", 8)


FATES = st.sampled_from(["kept", "kept", "kept", "unsupervised", "bad"])
ROWS = st.lists(st.tuples(FATES, st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=14)


@settings(max_examples=100)
@given(rows=ROWS, fraction=st.floats(0.001, 0.999), seed=st.integers(0, 5))
def test_every_row_of_the_file_is_on_one_side_or_dropped_and_duplicates_stay_together(
    rows: list[tuple[str, int, int]], fraction: float, seed: int
) -> None:
    kept = [row for row in rows if row[0] == "kept"]
    if not kept:
        return
    # What duplicates are, worked out in another way: pairs, until nothing more comes together.
    together = [{number} for number in range(len(kept))]
    for a, b in itertools.combinations(range(len(kept)), 2):
        if kept[a][1] == kept[b][1] or kept[a][2] == kept[b][2]:
            joined = next(group for group in together if a in group) | next(group for group in together if b in group)
            together = [group for group in together if not group & joined] + [joined]
    whole = file_of(rows)
    if len(together) < 2:
        with pytest.raises(DataError, match=r"needs at least 2 .*fix: data\.eval_fraction=0"):
            hold_out(whole, fraction, seed)
        return
    trained, held_out = hold_out(whole, fraction, seed)
    assert trained.counts == held_out.counts
    counts = trained.counts
    fates = Counter(fate for fate, _, _ in rows)
    assert counts.read == len(rows) == len(trained.lengths) + counts.eval + counts.dropped
    assert (counts.eval, counts.dropped_bad) == (len(held_out.lengths), fates["bad"])
    assert counts.dropped_unsupervised == fates["unsupervised"]
    assert (counts.truncated, counts.truncated_tokens) == (whole.counts.truncated, whole.counts.truncated_tokens)
    assert trained.rows is whole.rows
    for part, tokens, loss_tokens in (
        (trained, counts.tokens - counts.eval_tokens, counts.supervised_tokens - counts.eval_supervised_tokens),
        (held_out, counts.eval_tokens, counts.eval_supervised_tokens),
    ):
        assert part.lengths.tolist() == [len(row["input_ids"]) for row in part.dataset]
        assert part.lengths.sum() == tokens
        assert part.num_supervised == loss_tokens == sum(sum(row["loss_mask"]) for row in part.dataset)
        assert part.dataset["line"][:] == part.rows.line[part.indices].tolist() == sorted(part.dataset["line"][:])
    lines = [line for part in (trained, held_out) for line in part.dataset["line"]]
    assert sorted(lines) == [line for line, row in enumerate(rows, start=1) if row[0] == "kept"]
    for key in ("exact_key", "text_key"):
        a, b = (getattr(part.rows, key)[part.indices] for part in (trained, held_out))
        assert not np.isin(a, b).any()
    # As near to the fraction as any choice of groups, apart from none and all.
    sizes = [len(group) for group in together]
    sums = {sum(c) for n in range(1, len(sizes)) for c in itertools.combinations(sizes, n)}
    wanted = min(len(kept) - 1, max(1, round(len(kept) * fraction)))
    assert abs(counts.eval - wanted) == min(abs(n - wanted) for n in sums)
    assert hold_out(whole, fraction, seed)[1].indices.tolist() == held_out.indices.tolist()


def test_without_duplicates_the_choice_is_the_one_that_earlier_versions_made() -> None:
    order = np.random.default_rng([7, 0xE7A1]).permutation(100)
    chosen = choose_groups(np.ones(100, dtype=np.int64), 0.1, seed=7)
    assert np.flatnonzero(chosen).tolist() == sorted(order[:10].tolist())


def test_groups_of_a_hundred_thousand_rows_take_a_moment() -> None:
    # One chain through all rows: each has the tokens of the one before it, or its words.
    chain = np.arange(100_000)
    rows = file_of([("kept", 0, 0)]).rows
    object.__setattr__(rows, "exact_key", chain // 2)
    object.__setattr__(rows, "text_key", (chain + 1) // 2)
    object.__setattr__(rows, "line", chain)
    assert not duplicate_groups(rows, chain).any()
    sizes = np.arange(1, 400, dtype=np.int64)
    assert sizes[choose_groups(sizes, 0.31, 0)].sum() == round(0.31 * sizes.sum())


# Sketches of four families of rows, the hashes of each replaced from the left: 0, 1 or 2 of them are near-copies of the
# family's first, 3 are not.
SKETCHES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=24)


def sketches_of(rows: list[tuple[int, int]]) -> np.ndarray[Any, Any]:
    family = [[100 * number + place for place in range(1, 9)] for number, _ in rows]
    own = [[100_000 + 10 * row + place for place in range(8)] for row in range(len(rows))]
    return np.array([[*own[row][:new], *family[row][new:]] for row, (_, new) in enumerate(rows)])


def file_with(sketches: np.ndarray[Any, Any]) -> EncodedFile:
    file = file_of([("kept", number, number) for number in range(len(sketches))])
    object.__setattr__(file.rows, "sketch", sketches)
    return file


@settings(max_examples=40)
@given(rows=SKETCHES, fraction=st.floats(0.001, 0.999), seed=st.integers(0, 5))
def test_near_copies_stay_on_one_side(rows: list[tuple[int, int]], fraction: float, seed: int) -> None:
    sketches = sketches_of(rows)
    pairs = near_pairs(sketches)
    together = joined(len(rows), pairs)
    wanted = min(len(rows) - 1, max(1, round(len(rows) * fraction)))
    sizes = Counter(together.tolist())
    in_large = sum(size for size in sizes.values() if size > max(1, wanted))
    whole = file_with(sketches)
    trained, held_out = hold_out(whole, fraction, seed)
    assert sorted([*trained.indices, *held_out.indices]) == [*range(len(rows))]
    assert hold_out(whole, fraction, seed)[1].indices.tolist() == held_out.indices.tolist()
    is_eval = np.isin(np.arange(len(rows)), held_out.indices)
    torn = {together[a] for a, b in pairs if is_eval[a] != is_eval[b]}
    if 2 * in_large <= len(rows):
        assert not torn
    else:  # rows of a form that most rows are of; smaller groups are still on one side
        assert all(sizes[int(group)] > wanted for group in torn)
        assert 0 < len(held_out.indices) < len(rows)


@settings(max_examples=200)
@given(rows=st.lists(st.lists(st.integers(0, 12), min_size=8, max_size=8, unique=True), max_size=6))
def test_pairs_of_near_copies_are_those_that_share_six_hashes(rows: list[list[int]]) -> None:
    sketches = np.array(rows, dtype=np.int64).reshape(-1, 8)
    expected = [
        [a, b] for a, b in itertools.combinations(range(len(rows)), 2) if len({*rows[a]} & {*rows[b]} - {0}) >= SHARED
    ]
    assert near_pairs(sketches).tolist() == expected


@given(pairs=st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30))
def test_groups_are_what_chains_of_pairs_reach(pairs: list[tuple[int, int]]) -> None:
    groups = [{number} for number in range(20)]
    for a, b in pairs:
        of_both = next(group for group in groups if a in group) | next(group for group in groups if b in group)
        groups = [group for group in groups if not group & of_both] + [of_both]
    lowest = joined(20, np.array(pairs, dtype=np.int64).reshape(-1, 2))
    assert {tuple(np.flatnonzero(lowest == number)) for number in lowest} == {tuple(sorted(group)) for group in groups}


def test_a_large_group_of_near_copies_is_trained_on_and_the_share_is_kept() -> None:
    rows = [(0, 0)] * 40 + [(1, 0)] * 5 + [(2, 3)] * 55  # 40 and 5 near-copies, and rows that are alike in five hashes
    sketches = sketches_of(rows)
    trained, held_out = hold_out(file_with(sketches), 0.2, 0)
    assert len(held_out.indices) == 20
    assert held_out.indices.min() >= 40
    assert len({*held_out.indices.tolist()} & {*range(40, 45)}) in (0, 5)
    # The other way about: of a form that most rows are of, both sides have some.
    trained, held_out = hold_out(file_with(sketches[:60]), 0.2, 0)
    assert len(held_out.indices) == 12
    assert held_out.indices.min() < 40 <= trained.indices.max()


def test_near_copies_of_a_hundred_thousand_rows_take_a_moment() -> None:
    random = np.random.default_rng(0)
    sketches = random.integers(1, 2**62, (100_000, 8))
    sketches[:, 0] = 7  # a sequence of words that all rows have
    sketches[1::1000] = sketches[::1000]
    pairs = near_pairs(sketches)
    assert sorted(pairs.tolist()) == [[row, row + 1] for row in range(0, 100_000, 1000)]
    chain = np.stack([np.arange(99_999), np.arange(1, 100_000)], axis=1)
    assert not joined(100_000, chain).any()


def test_near_copies_in_a_file_stay_on_one_side(write_rows: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    story = "the cows are moved to the hill in spring until the river falls again and the"
    rows = [chat(f"{story} gate of field {number // 3} is mended", f"by {number}") for number in range(60)]
    other = [chat(f"question {number}", f"answer {number}") for number in range(60)]
    encoded = encode(write_rows([*other, *rows[::3], *rows[1:4:2]]), tokenizer)
    held_out = hold_out(encoded, 0.25, 3)[1]
    near = near_pairs(encoded.rows.sketch)
    assert len(near)
    assert not any((a in held_out.indices) != (b in held_out.indices) for a, b in near)
    assert len(held_out.indices) == round(0.25 * len(encoded.lengths))


def test_rows_of_one_group_cannot_be_split(write_rows: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(write_rows([chat("A question?", "yes"), chat("a question", "Yes!")]), tokenizer)
    with pytest.raises(DataError, match=r"at least 2 different rows, and all 2 that were kept are duplicates"):
        hold_out(encoded, 0.5, 0)
    with pytest.raises(DataError, match=r"needs at least 2 rows, and 1 was kept"):
        hold_out(encode(write_rows([chat("q", "a")]), tokenizer), 0.5, 0)


def test_rows_without_words_are_duplicates_only_if_equal(write_rows: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    called = [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": name}}]}
        for name in ("on", "off")
    ]
    for call in called:
        call["tool_calls"][0]["function"]["arguments"] = {}  # type: ignore[index]
    user = {"role": "user", "content": "now"}
    rows = [chat("+", "-"), chat("-", "+"), chat("+", " - "), *({"messages": [user, call]} for call in called)]
    encoded = encode(write_rows(rows), tokenizer, on_bad_row="skip")
    a, b, c, on, off = encoded.rows.text_key.tolist()
    assert a == c
    assert len({a, b, on, off}) == 4


def test_copies_of_a_row_that_is_taken_more_than_once_stay_on_one_side(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, write_rows: Any
) -> None:
    path = write_rows([chat(f"question {i}", f"answer {i}") for i in range(20)])
    config = load_config(
        "demo",
        [
            f"data.train_files=[{{path: {path}, weight: 2.5}}]",
            "data.eval_file=null",
            "data.eval_fraction=0.2",
            f"data.cache_dir={tmp_path / 'cache'}",
        ],
    )
    train_data, eval_data = load_data(config, tokenizer)
    assert eval_data is not None
    trained, held_out = ({tuple(ids) for ids in data.dataset["input_ids"]} for data in (train_data, eval_data))
    assert (len(train_data.lengths) + len(eval_data.lengths), len(trained) + len(held_out)) == (50, 20)
    assert not trained & held_out


@pytest.fixture
def half_dropped(tmp_path: Path, tiny_model_dir: Path, write_rows: Any) -> list[str]:
    """50 rows to keep, of which 2 are duplicates, and 50 whose answers come after max_seq_length."""
    short = [chat(f"short question {i}", f"answer {i}") for i in range(49)]
    rows = [*short, chat("SHORT, question 3", "Answer 3!"), *(chat("word " * (90 + i), "late") for i in range(50))]
    return [
        f"model.name_or_path={tiny_model_dir}",
        f"data.train_file={write_rows(rows)}",
        "data.eval_file=null",
        "data.eval_fraction=0.1",
        "data.max_seq_length=64",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"output_dir={tmp_path / 'run'}",
        "train.bf16=false",
        "model.dtype=float32",
        "train.max_steps=2",
        "train.warmup_ratio=0",
        "train.num_sample_replies=0",
    ]


SAID = "100 rows read = 45 trained + 5 eval + 50 dropped without loss tokens; "


def test_preflight_looks_at_all_rows_whatever_share_is_held_out(
    half_dropped: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    def look(*overrides: str) -> Any:
        config = load_config("demo", [*half_dropped, *overrides])
        return gather_facts(config, look_around(config, 1), tokenizer, *load_data(config, tokenizer))

    facts, whole = look(), look("data.eval_fraction=0")
    found, found_whole = ({finding.id: finding for finding in run_checks(each)} for each in (facts, whole))
    of_rows = [name for name in found_whole if name.startswith("rows_")]
    assert of_rows == ["rows_unsupervised", "rows_truncated"]
    assert [found[name] for name in of_rows] == [found_whole[name] for name in of_rows]
    assert "50 of 100 rows have no loss token in the first 64 tokens and are dropped (lines 51, 52" in str(
        found["rows_unsupervised"]
    )
    assert "eval_overlap" not in found
    text = describe(facts)
    assert SAID in text
    assert "\neval:" not in text
    data = report(facts, [])["data"]
    assert (
        data["train"]["counts"].items() >= {"read": 100, "trained": 45, "eval": 5, "dropped_unsupervised": 50}.items()
    )
    assert data["train"]["lengths"] == report(whole, [])["data"]["train"]["lengths"]
    assert data["eval"]["examples"] == 5


def test_training_says_the_same_in_log_summary_report_and_model_card(
    half_dropped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = train(load_config("demo", half_dropped))
    log = capsys.readouterr().out
    assert SAID in log
    assert "50 of 100 rows have no loss token" in log
    assert (summary.num_train_conversations, summary.num_eval_examples) == (45, 5)
    assert summary.num_dropped_conversations == 50
    written = json.loads((tmp_path / "run/summary.json").read_text())
    assert (written["num_dropped_conversations"], written["train_rows"]["read"]) == (50, 100)
    assert written["eval_rows"] is None
    assert SAID in (tmp_path / "run/adapter/README.md").read_text()
    page = write_report(tmp_path / "run").read_text()
    for label, number in {
        "rows read": 100,
        "of them trained on": 45,
        "of them in the eval set": 5,
        "rows dropped, no loss tokens": 50,
    }.items():
        _, _, after = page.partition(label)
        assert f">{number}<" in after[:120], (label, after[:120])
    assert "50 of 100 rows have no loss token" in page
