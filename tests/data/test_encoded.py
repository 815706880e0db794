"""Contract 6: every row is accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lora_core.data.counts import EncodedFile
from lora_core.data.encoded import encode_file
from lora_core.data.split import hold_out
from lora_core.encoding.chat import ChatEncoder, EncodedChat, encode_chat
from lora_core.encoding.mask_reader import MaskReader
from lora_core.errors import DataError
from lora_core.rows.messages import RowShape, parse_row
from tests.conftest import chat, make_tokenizer
from tests.encoding.test_chat import DROPS_REASONING


def encode(path: Path, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> EncodedFile:
    arguments: dict[str, Any] = {"max_seq_length": 512, "cache_dir": path.parent / "cache", **changes}
    return encode_file(path, tokenizer, **arguments)


def test_rows_come_back_as_encode_chat_gives_them(write_rows: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [chat("q", "a"), chat("你好", "再见", "q", "a " * 20), chat("x<|im_end|>", "y")]
    encoded = encode(write_rows(rows), tokenizer)
    for got, row in zip(encoded.dataset, rows, strict=True):
        one = encode_chat(tokenizer, row["messages"])
        assert (got["input_ids"], got["loss_mask"]) == (one.input_ids, one.loss_mask)
    assert encoded.lengths.tolist() == [len(row["input_ids"]) for row in encoded.dataset]
    assert encoded.dataset["line"][:] == [1, 2, 3]


def test_several_processes_give_the_same_rows_in_order(write_rows: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_rows([chat(f"question {i}", f"answer {i}") for i in range(1200)])
    one = encode(path, tokenizer, num_proc=1)
    two = encode(path, tokenizer, num_proc=2, cache_dir=path.parent / "another")
    assert len(list((path.parent / "another").glob("*/*.arrow"))) == 2
    assert one.dataset.to_dict() == two.dataset.to_dict()
    assert one.counts == two.counts


def test_every_row_is_counted(write_rows: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [chat("q", "a"), chat("q", "long " * 30), chat("a very long question " * 30, "a"), {"nothing": "known"}]
    encoded = encode(write_rows(rows), tokenizer, max_seq_length=40, on_bad_row="skip")
    counts = encoded.counts
    assert (counts.read, counts.kept, counts.dropped_bad, counts.dropped_unsupervised) == (4, 2, 1, 1)
    assert counts.read == counts.kept + counts.dropped
    full = [encode_chat(tokenizer, row["messages"]) for row in rows[:3]]
    assert counts.truncated == 2
    assert counts.truncated_tokens == sum(max(0, len(one.input_ids) - 40) for one in full)
    assert counts.truncated_supervised_tokens == sum(sum(one.loss_mask[40:]) for one in full)
    assert counts.tokens == len(full[0].input_ids) + 40 == encoded.lengths.sum()
    assert counts.supervised_tokens == sum(sum(one.loss_mask[:40]) for one in full[:2])
    assert encoded.dataset["line"][:] == [1, 2]
    assert "4 rows read, 2 kept, 1 dropped as unreadable, 1 dropped without loss tokens" in str(counts)
    assert "2 rows truncated, losing" in str(counts)


def test_bad_rows_are_listed_as_file_and_line_with_one_line_for_each_problem(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(chat("q", "a")).encode()
    path.write_bytes(b"\n".join([b"\xef\xbb\xbf" + good, b"", b"  \r", good + b"\r", b"\xff\xfe", *[b"{}"] * 30]))
    with pytest.raises(DataError) as caught:
        encode(path, tokenizer)
    text = str(caught.value)
    title, not_utf8, no_keys, fix = text.splitlines()
    assert "31 of 33 rows cannot be used" in title
    assert not_utf8.startswith(f"  {path}:5: not UTF-8 at byte 0 of the line")
    assert no_keys.startswith(f"  {path}:6: 30 rows: has the keys (none)")
    assert no_keys.endswith("(lines 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, ... and 20 more)")
    assert "data.on_bad_row=skip" in fix
    assert encode(path, tokenizer, on_bad_row="skip").counts.dropped_bad == 31


def test_no_more_than_twenty_problems_are_listed(write_rows: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError) as caught:
        encode(write_rows([{f"key {i}": i} for i in range(30)]), tokenizer)
    assert str(caught.value).count("rows.jsonl:") == 21  # with the title
    assert "  ... and 10 more\n" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b"\n \n", "every line is blank"),
        (b"\n[]", "holds no rows"),
    ],
)
def test_files_that_hold_no_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, content: bytes | None, expected: str
) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=expected):
        encode(path, tokenizer)


def test_no_row_left_names_the_limit(write_rows: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"max_seq_length is 4; fix: a larger data\.max_seq_length"):
        encode(write_rows([chat("question", "answer")]), tokenizer, max_seq_length=4)


def test_a_second_start_reuses_the_encoded_rows_and_any_change_does_not(
    write_rows: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows([chat("q", "a")])
    first = encode(path, tokenizer)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("encoded again")

    with monkeypatch.context() as patch:
        patch.setattr("lora_core.encoding.chat.ChatEncoder.encode_batch", never)
        assert encode(path, tokenizer).dataset.to_dict() == first.dataset.to_dict()
    cached = len(list((path.parent / "cache").iterdir()))
    encode(path, tokenizer, max_seq_length=100)
    encode(path, make_tokenizer("x" + str(tokenizer.chat_template)))
    path.write_text(path.read_text() * 2)
    assert encode(path, tokenizer).counts.read == 2
    assert len(list((path.parent / "cache").iterdir())) == cached + 3


def three_lengths(write_rows: Any, tokenizer: PreTrainedTokenizerFast) -> tuple[Path, int]:
    """A row that is short, one of a long reply and one of a long question; and the tokens of the longest."""
    rows = [chat("q", "a"), chat("q", "long " * 30), chat("a very long question " * 30, "a")]
    longest = max(len(encode_chat(tokenizer, row["messages"]).input_ids) for row in rows)
    return write_rows(rows), longest


def test_rows_longer_than_the_limit_are_dropped_and_counted(
    write_rows: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    path, longest = three_lengths(write_rows, tokenizer)
    encoded = encode(path, tokenizer, max_seq_length=40, truncation="drop")
    counts = encoded.counts
    assert (counts.read, counts.kept, counts.dropped_too_long, counts.dropped_unsupervised) == (3, 1, 2, 0)
    assert counts.read == counts.kept + counts.dropped
    assert (counts.truncated, counts.truncated_tokens, counts.truncated_supervised_tokens) == (0, 0, 0)
    assert (counts.longest, encoded.dataset["line"][:]) == (longest, [1])
    assert "3 rows read, 1 kept, 2 dropped as longer than max_seq_length; 12 tokens" in str(counts)
    assert "truncated" not in str(counts)
    whole = encode(path, tokenizer, max_seq_length=longest, truncation="drop").counts
    assert (whole.kept, whole.dropped) == (3, 0)


def test_rows_longer_than_the_limit_stop_the_run_where_asked(
    write_rows: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    path, longest = three_lengths(write_rows, tokenizer)
    with pytest.raises(DataError) as caught:
        encode(path, tokenizer, max_seq_length=40, truncation="error")
    assert str(caught.value) == (
        f"{path}: 2 rows longer than data.max_seq_length=40 (lines 2, 3); fix: data.max_seq_length={longest}, or "
        "data.truncation=drop"
    )
    assert encode(path, tokenizer, max_seq_length=longest, truncation="error").counts.kept == 3


def test_what_no_token_says_is_listed_by_key_with_its_lines(
    write_rows: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    named = {"messages": [{"role": "user", "content": "q", "name": "Ann"}, {"role": "assistant", "content": "a"}]}
    rows = [
        {**chat("q", "a"), "id": 1},
        chat("q", "a"),
        {**named, "id": 2, "source": "web"},
        {**chat("q", "a"), "id": ""},
    ]
    encoded = encode(write_rows(rows), tokenizer)
    assert encoded.left_out == {"id": [1, 3], "messages.name": [3], "source": [3]}


def test_a_change_of_what_is_read_or_trained_is_encoded_anew(
    write_rows: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows([chat("q", "one", "q", "two")])
    every = encode(path, tokenizer).counts.supervised_tokens
    assert encode(path, tokenizer, train_on="last_assistant").counts.supervised_tokens < every
    swapped = encode(path, tokenizer, shape=RowShape(roles={"user": "assistant", "assistant": "user"}))
    assert swapped.dataset["loss_mask"][0] != encode(path, tokenizer).dataset["loss_mask"][0]


def test_each_reply_can_be_an_example_of_its_own(write_rows: Any) -> None:
    tokenizer = make_tokenizer(DROPS_REASONING)
    rows = [chat("q", "<think>r</think>a", "q", "<think>s</think>b"), chat("q", "c")]
    data = encode(write_rows(rows), tokenizer, split_turns=True)
    trained = [
        tokenizer.decode([t for t, flag in zip(row["input_ids"], row["loss_mask"], strict=True) if flag])
        for row in data.dataset
    ]
    assert trained == ["<think>r</think>a<|im_end|>", "<think>s</think>b<|im_end|>", "c<|im_end|>"]
    assert (data.dataset["line"][:], data.dataset["reply"][:]) == ([1, 1, 2], [1, 3, 1])
    assert str(data.counts).startswith("2 rows read, split into 3 examples, 3 kept;")
    train, held_out = hold_out(data, 0.34, 0)  # those of one row stay together
    assert {*train.dataset["line"]} & {*held_out.dataset["line"]} == set()


def test_everything_is_trained_but_replies_of_weight_0(write_rows: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    row = chat("q", "no", "p", "half")
    row["messages"][1]["weight"], row["messages"][3]["weight"] = 0, 0.5
    (encoded,) = encode(write_rows([row]), tokenizer, train_on="everything").dataset
    ids, weights = encoded["input_ids"], encoded["loss_weights"]
    assert tokenizer.decode([t for t, w in zip(ids, weights, strict=True) if w == 0.5]) == "half<|im_end|>"
    left = tokenizer.decode([t for t, flag in zip(ids[1:], encoded["loss_mask"][1:], strict=True) if not flag])
    assert left == "no<|im_end|>"
    reader, conversation = MaskReader(tokenizer, "everything"), parse_row(row)
    (whole,) = ChatEncoder(tokenizer, "everything").encode_batch([conversation])
    assert isinstance(whole, EncodedChat)
    assert reader.read(conversation, whole).problem is None
    for mask in ([True] * len(ids), [False] * len(ids)):
        assert reader.read(conversation, EncodedChat(whole.input_ids, mask)).problem is not None
