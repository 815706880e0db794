"""JSON values one after another from a text of any length, each as it is written, with the line that it begins in.

Values are not parsed into objects: the text of each goes on to the JSONL, so that numbers keep their digits, and what
`messages` refuses (NaN, a key twice) is refused there with its place. Memory is bounded by the longest value.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import BinaryIO

from lora_core.errors import DataError

MAX_VALUE_CHARACTERS = 10_000_000
_CHUNK = 1 << 20
# Only where a value ends is asked of it, so nothing is converted: int() refuses thousands of digits.
_DECODER = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=str)


class JsonProblem(DataError):
    """The text is not JSON; says in which line."""


class JsonStream:
    """A reader of one file."""

    def __init__(self, file: BinaryIO, shown: str) -> None:
        """
        Args:
            file: bytes of UTF-8 text.
            shown: what messages call the file.
        """
        self._file = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        self._shown = shown
        self._text = ""
        self._at = 0
        self.line = 1
        """1-based line of what comes next."""

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            rest = self._text[self._at : self._at + 1]
            if rest and rest not in " \t\r\n":
                return rest
            if rest:
                # In slices: most gaps are short, and some files are indented by megabytes.
                piece = self._text[self._at : self._at + 4096]
                self._advance(self._at + len(piece) - len(piece.lstrip(" \t\r\n")))
            elif not self._fill():
                return ""

    def take(self, character: str) -> None:
        """Go past this character.

        Raises:
            JsonProblem: another one comes next.
        """
        found = self.peek()
        if found != character:
            raise self.problem(f"needs {character!r} here, not {repr(found) if found else 'the end of the file'}")
        self._advance(self._at + 1)

    def value(self) -> str:
        """The next value, as it is written.

        Raises:
            JsonProblem: it is not valid JSON, or too long.
        """
        self.peek()
        while True:
            reason = None
            try:
                _, end = _DECODER.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise self.problem("JSON nested too deeply to read") from error
            except json.JSONDecodeError as error:
                line = self.line + self._text.count("\n", self._at, error.pos)
                reason = f"{self._shown}:{line}: not valid JSON: {error.msg}"
                end = len(self._text)
            # What is wrong so far, or a number at the end, may only be cut off there.
            if reason is not None or (end == len(self._text) and self._text[-1:] not in '}]"'):
                if len(self._text) - self._at > MAX_VALUE_CHARACTERS:
                    raise self.problem(
                        f"the value that begins here has more than {MAX_VALUE_CHARACTERS:,} characters"
                        + (f", or {reason}" if reason else "")
                    )
                if self._fill():
                    continue
            if reason is not None:
                raise JsonProblem(reason, "data_not_json")
            text = self._text[self._at : end]
            self._advance(end)
            return text

    def items(self) -> Iterator[tuple[int, str]]:
        """(line, text) of each item of the list that comes next.

        Raises:
            JsonProblem: it is not a list, or not valid JSON.
        """
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            self.peek()
            line = self.line
            yield line, self.value()
            if self.peek() == "]":
                self.take("]")
                return
            if not self.peek():
                raise self.problem("the list has no end, so the file was cut off; fix: fetch or write the file anew")
            self.take(",")
            if self.peek() == "]":
                raise self.problem("a comma without an item after it; fix: leave the last comma out")

    def problem(self, what: str) -> JsonProblem:
        """To raise: `what`, with file and line."""
        return JsonProblem(f"{self._shown}:{self.line}: {what}", "data_not_json")

    def _advance(self, to: int) -> None:
        self.line += self._text.count("\n", self._at, to)
        self._at = to

    def _fill(self) -> bool:
        """Read on; False at the end. As much as there is already, so that a long value is tried few times."""
        try:
            more = self._file.read(max(_CHUNK, len(self._text) - self._at))
        except UnicodeDecodeError as error:
            raise self.problem(f"not UTF-8 here or after; fix: save the file as UTF-8 ({error.reason})") from error
        self._text = self._text[self._at :] + more
        self._at = 0
        return bool(more)


def on_one_line(text: str) -> bytes:
    """The same JSON without line breaks: in JSON they stand between values only."""
    pieces = text.replace("\r", "\n").split("\n")
    return " ".join(filter(None, (piece.strip(" \t") for piece in pieces))).encode("utf-8")
