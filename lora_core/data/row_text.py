"""What of a row's text is kept beside its tokens: its words, and signs of rows that are not what they should be."""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from lora_core.rows.json_values import strings
from lora_core.rows.messages import Conversation

if TYPE_CHECKING:
    from tokenizers.normalizers import Normalizer

_WORD = re.compile(r"\w+")
# A template that nobody filled in: {{name}}, ${name}, [INSERT NAME], [Your Name], <INSERT NAME>.
_PLACEHOLDER = re.compile(
    r"\{\{\s*[A-Za-z_][\w. ]{0,40}\}\}|\$\{[A-Za-z_]\w{0,40}\}|[\[<](?:INSERT|YOUR|Insert|Your)[ _][\w ]{1,40}[\]>]"
)
# What a normalizer may write in another way and mean the same: SentencePiece's ▁ is a space.
_ASCII = re.compile(r"[\x00-\x7f▁]+")
_NAME_OF_A_SCHEMA = re.compile(r"""["']name["']\s*:\s*["']([\w.-]{1,64})["']""")
_ANSWER_TAG = "<tool_response>"
_WORDS_OF_A_START = 4
# A shorter question is repeated by good replies too.
_WORDS_REPEATED = 6
# Letters that are looked at in a text, the fewest that tell its script, and the share of them that must be of it.
_LETTERS, _FEWEST_LETTERS, _MOST_OF_THEM = 400, 8, 0.7
# Of a row's sequences of so many words, the sketch holds so many hashes.
_WORDS_OF_A_SEQUENCE, SKETCH = 5, 8
_ODD = np.uint64(0x9E3779B97F4A7C15)
"""2^64 divided by the golden ratio, as in Fibonacci hashing (Knuth, The Art of Computer Programming 3, 6.4)."""


def key(content: bytes) -> int:
    """A 64-bit hash, the same in every process."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def signs(conversation: Conversation | None) -> dict[str, bool | int]:
    """Columns of `RowFacts`; of no row, none is there."""
    if conversation is None:
        conversation = Conversation([])
    start = start_of_reply(conversation)
    return {
        "has_empty_reply": has_empty_reply(conversation),
        "has_system_turn": has_system_turn(conversation),
        "has_placeholder": has_placeholder(conversation),
        "repeats_prompt": repeats_prompt(conversation),
        "ends_unanswered": ends_unanswered(conversation),
        "changes_script": changes_script(conversation),
        "has_tools": bool(conversation.tools),
        "lists_tools_twice": lists_tools_twice(conversation),
        "wraps_answers": wraps_answers(conversation),
        "reply_start": key(start.encode()) if start else 0,
    }


def has_empty_reply(conversation: Conversation) -> bool:
    """An assistant turn without text and without tool calls."""
    return any(
        message["role"] == "assistant" and not message["content"].strip() and "tool_calls" not in message
        for message in conversation.messages
    )


def has_system_turn(conversation: Conversation) -> bool:
    return any(message["role"] == "system" for message in conversation.messages)


def has_placeholder(conversation: Conversation) -> bool:
    """In a reply."""
    return any(_PLACEHOLDER.search(reply) for reply in _replies(conversation))


def repeats_prompt(conversation: Conversation) -> bool:
    """A reply that begins with all words of the turn before it."""
    for before, message in itertools.pairwise(conversation.messages):
        if (before["role"], message["role"]) == ("user", "assistant"):
            asked, said = before["content"], _words_of(message["content"])
            is_long = len([*itertools.islice(_words_of(asked), _WORDS_REPEATED)]) == _WORDS_REPEATED
            if is_long and all(next(said, None) == word for word in _words_of(asked)):
                return True
    return False


def ends_unanswered(conversation: Conversation) -> bool:
    """The last turn is the user's, so that nothing of it is trained."""
    return bool(conversation.messages) and conversation.messages[-1]["role"] == "user"


def changes_script(conversation: Conversation) -> bool:
    """A reply that is written in other letters than the turn before it: Latin after Cyrillic, say."""
    for before, message in itertools.pairwise(conversation.messages):
        if (before["role"], message["role"]) == ("user", "assistant"):
            asked, said = script_of(before["content"]), script_of(message["content"])
            if asked and said and asked != said:
                return True
    return False


def lists_tools_twice(conversation: Conversation) -> bool:
    """A system text that lists tools of the row too, as rows of Hermes do: `"name": "clock"`."""
    names = {tool["function"].get("name") for tool in conversation.tools or ()}
    systems = [message["content"] for message in conversation.messages if message["role"] == "system"] if names else []
    return any(not names.isdisjoint(_NAME_OF_A_SCHEMA.findall(text)) for text in systems)


def wraps_answers(conversation: Conversation) -> bool:
    """A tool's answer in the tags that templates write around it."""
    answers = (message["content"] for message in conversation.messages if message["role"] == "tool")
    return any(answer.lstrip().startswith(_ANSWER_TAG) for answer in answers)


def is_changed_by(normalizer: Normalizer | None, conversation: Conversation) -> bool:
    """Whether a tokenizer changes letters beyond ASCII before it encodes a row: NFC makes one é of e and an accent."""
    if normalizer is None:
        return False
    texts = strings([conversation.messages, conversation.tools, conversation.text])
    beyond = (text for text in texts if not text.isascii())
    return any(_ASCII.sub("", text) != _ASCII.sub("", normalizer.normalize_str(text)) for text in beyond)


def script_of(text: str) -> str:
    """LATIN, CYRILLIC, CJK, ...: what most letters of a text are; empty where there are few, or it is mixed.

    The first word of a letter's name in Unicode. Japanese is written in three of them, and counts as CJK.
    """
    letters = [*itertools.islice(filter(str.isalpha, text), _FEWEST_LETTERS if text.isascii() else _LETTERS)]
    counts = Counter(map(_script_of_letter, letters))
    script, number = counts.most_common(1)[0] if counts else ("", 0)
    return script if len(letters) >= _FEWEST_LETTERS and number >= _MOST_OF_THEM * len(letters) else ""


@lru_cache(maxsize=4096)
def _script_of_letter(letter: str) -> str:
    name = unicodedata.name(letter, "").split(" ")[0]
    return "CJK" if name in ("HIRAGANA", "KATAKANA") else name


def start_of_reply(conversation: Conversation) -> str:
    """The first words of the first reply; empty where it has fewer."""
    reply = next(iter(_replies(conversation)), "")
    words = [*itertools.islice(_words_of(reply), _WORDS_OF_A_START)]
    return " ".join(words) if len(words) == _WORDS_OF_A_START else ""


def sketch(conversation: Conversation) -> list[int]:
    """(8,) the smallest hashes of the row's sequences of five words, without system turns; 0 where there are fewer.

    Two rows share the more of them the more sequences they share: Broder 1997, "On the resemblance and containment of
    documents".
    """
    texts = [message["content"] for message in conversation.messages if message["role"] != "system"]
    spoken = _WORD.findall("\n".join(texts).casefold())
    words = np.array([zlib.crc32(word.encode()) for word in spoken], dtype=np.uint64)
    if len(words) < _WORDS_OF_A_SEQUENCE:
        return [0] * SKETCH
    # A polynomial in the words of each sequence, modulo 2^64, and its bits spread by a last product.
    hashes = np.zeros(len(words) - _WORDS_OF_A_SEQUENCE + 1, dtype=np.uint64)
    for place in range(_WORDS_OF_A_SEQUENCE):
        hashes = hashes * _ODD + words[place : place + len(hashes)]
    hashes ^= hashes >> np.uint64(32)
    smallest = np.unique((hashes * _ODD).view(np.int64))[:SKETCH]
    return [*smallest.tolist(), *[0] * (SKETCH - len(smallest))]


def _words_of(text: str) -> Iterator[str]:
    """Its words without case, one after the other: most rows are told by their first ones."""
    return (match.group().casefold() for match in _WORD.finditer(text))


def _replies(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages if message["role"] == "assistant"]


def words(conversation: Conversation) -> str:
    """A row's text without case, white space and punctuation: what near duplicates have in common.

    A turn without a word, such as one of emoji or a call alone, counts with all that it holds.
    """
    turns = []
    for message in conversation.messages:
        calls = " ".join(strings(message["tool_calls"])) if "tool_calls" in message else ""
        text = f"{message['content']} {calls}".casefold()
        turns.append(f"{message['role']} {' '.join(_WORD.findall(text)) or text.strip()}")
    return "\n".join(turns)
