"""What a file of one JSON object is: the holder of its rows, a row itself, or a table by columns.

{"data": [{...}, {...}]}                                       holds its rows under a key
{"messages": [...]}, {"question": "...", "answers": [{...}]}   is a row
{"prompt": ["a", "b"], "completion": ["c", "d"]}               a table: refused, with the command that writes rows
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from lora_core.sources.json_stream import JsonStream
from lora_core.untrusted.text import quoted

# Keys of a row whose values are lists of objects; an object that has one is a row, and not a holder of rows.
_ROW_KEYS = {
    "messages",
    "contents",
    "conversations",
    "conversation",
    "dialog",
    "turns",
    "history",
    "tools",
    "functions",
}
_ROW_KEYS |= {"prompt", "completion", "chosen", "rejected", "tool_calls"}
_ROW_KEYS |= {"instruction", "output", "question", "answer", "query", "response", "text"}
TURN_KEYS = {"role", "from", "content", "value"}
_CHAT_KEYS = {"messages", "conversations", "conversation"}
# What the list of rows is called in an object that says more: of other names, it is as likely a row with a list.
_HOLDERS = {"data", "rows", "train", "training", "examples", "instances", "items", "records", "samples", "dataset"}
_HOLDERS |= {"chats", "dialogues", "dialogs", "test", "validation", "dev", "eval"}
# Objects of a row that may well have the same keys.
_PARTS = {"prompt", "completion", "input", "output", "inputs", "outputs", "request", "response", "question", "answer"}
# How pandas calls the parts of a table that is written with orient="split".
_SPLIT = ({"columns", "data"}, {"columns", "index", "data"})


@dataclass(frozen=True)
class NotRead:
    """An object that is refused: what it is, and how its rows are had of it."""

    what: str
    rows: str
    """In Python, where `c` is the object and `sys.argv[1]` the argument."""
    argument: str = ""


@dataclass
class OneObject:
    """What stands under the keys of an object, as far as it says where rows are."""

    is_row: bool = False
    rows: list[str] = field(default_factory=list)
    """Keys of lists of objects."""
    of_chats: list[str] = field(default_factory=list)
    """Those of them whose objects hold turns, and so are rows: `{"conversations": [{"messages": ...`."""
    lists: dict[str, int] = field(default_factory=dict)
    """Keys of other lists, with the number of items."""
    holds_lists: bool = False
    """The first item of one of those is a list of objects."""
    numbered: dict[str, list[str]] = field(default_factory=dict)
    """Keys of objects whose keys are numbers, with those: a column as pandas writes it."""
    objects: dict[str, set[str]] = field(default_factory=dict)
    """Keys of other objects, with theirs."""
    others: list[str] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        """Of lists of rows; none where the object is a row itself, or may be."""
        if self.is_row or len(self.rows) == self._num_keys:
            return [] if self.is_row else self.rows
        return [key for key in self.rows if key.lower() in _HOLDERS]

    @property
    def beside(self) -> str:
        """The keys that are not those of rows, for a message."""
        everything = [*self.rows, *self.lists, *self.numbered, *self.objects, *self.others]
        names = [key for key in everything if key not in (self.keys or self.rows[:1])]
        return ", ".join(map(quoted, names[:5])) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")

    @property
    def _num_keys(self) -> int:
        return sum(map(len, (self.rows, self.lists, self.numbered, self.objects, self.others)))

    def refusal(self) -> NotRead | None:
        """Why its rows are not read, where they are not."""
        if len(self.keys) > 1:
            names = ", ".join(map(quoted, self.keys))
            what = f"one JSON object with lists of rows under {len(self.keys)} keys ({names}), and 1 is read"
            return NotRead(what, "c[sys.argv[1]]", self.keys[0])
        if self.rows and not self.keys and not self.is_row:
            what = f"one JSON object with a list of objects under {quoted(self.rows[0])}, beside other keys"
            return NotRead(f"{what} ({self.beside})", "c[sys.argv[1]]", self.rows[0])
        return None if self.is_row or self.rows or self.others else self._table()

    def _table(self) -> NotRead | None:
        if {*self.lists} in _SPLIT and self._num_keys == len(self.lists):
            rows = "[dict(zip(c['columns'], r)) for r in c['data']]"
            return NotRead("one JSON object with a table in parts: columns, and data", rows)
        lengths, columns = {*self.lists.values()}, [*self.numbered.values()]
        is_table = len(self.lists) > 1 or self.holds_lists
        if is_table and self._num_keys == len(self.lists) and len(lengths) == 1 and lengths != {0}:
            return NotRead("one JSON object of columns, each a list", "[dict(zip(c, r)) for r in zip(*c.values())]")
        if columns and self._num_keys == len(columns) and all(column == columns[0] for column in columns):
            rows = "[{k: c[k][i] for k in c} for i in next(iter(c.values()))]"
            return NotRead("one JSON object of columns, each an object with a number for each row", rows)
        inner = [*self.objects.values()]
        if len(inner) == self._num_keys > 1 and all(key.isdecimal() for key in self.objects):
            return NotRead("one JSON object with a number for each row", "c.values()")
        if (
            len(inner) == self._num_keys > 1
            and all(keys == inner[0] for keys in inner)
            and not _PARTS & {*self.objects}
        ):
            return NotRead("one JSON object with a name for each row", "c.values()")
        return None


def one_object(stream: JsonStream) -> OneObject:
    """Go through one object.

    Raises:
        JsonProblem: it is not valid JSON.
    """
    found = OneObject()
    row_keys = []
    stream.take("{")
    while stream.peek() != "}":
        key = json.loads(stream.value())
        if not isinstance(key, str):
            raise stream.problem("a key must be a string")
        stream.take(":")
        row_keys += [key] if key in _ROW_KEYS else []
        following = stream.peek()
        if following == "[":
            _look_into_list(stream, key, found)
        elif following == "{":
            inner = [*json.loads(stream.value(), parse_int=str)]
            if inner and all(name.isdecimal() for name in inner):
                found.numbered[key] = inner
            else:
                found.objects[key] = {*inner}
        else:
            stream.value()
            found.others.append(key)
        if stream.peek() != "}":
            stream.take(",")
    stream.take("}")
    is_named_so = any(key not in found.of_chats for key in row_keys)
    found.is_row |= is_named_so and bool(found.rows or found.others)  # a table has these names too
    return found


def _look_into_list(stream: JsonStream, key: str, found: OneObject) -> None:
    num_items, num_objects, first = 0, 0, ""
    for _, item in stream.items():
        first = first or item
        num_items += 1
        num_objects += item.startswith("{")
    if num_items and num_items == num_objects:
        keys = set(json.loads(first, parse_int=str))
        found.rows.append(key)
        found.of_chats += [key] if keys & _CHAT_KEYS else []
        found.is_row |= len(TURN_KEYS & keys) >= 2
    else:
        found.lists[key] = num_items
        found.holds_lists |= first.startswith("[") and first[1:].lstrip().startswith("{")
