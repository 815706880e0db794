"""Settings in another tool's words -> ours: each key is taken, not offered or unknown, and each is accounted for.

A tool is described by tables (`trainer_keys.py`, `llama_factory.py`, `axolotl.py`): what its keys become here, what it
takes where its file says nothing, what has no counterpart. `translate` applies them and guesses nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import yaml

from lora_core.config.layers import Setting
from lora_core.config.schema import RunConfig
from lora_core.untrusted.text import quoted

Values = Mapping[str, Any]
"""The tool's keys with their values: from its file, else the tool's own defaults."""
Outcome = Literal["taken", "as here", "not offered", "unknown"]


class NotOffered(Exception):
    """A value without a counterpart here; the text says why, and what happens instead."""


@dataclass(frozen=True)
class Rule:
    """What some keys of a tool, read together, become."""

    keys: tuple[str, ...]
    make: Callable[[Values], dict[str, Any]]
    """Our dotted keys with values; nothing where the tool does as we do. May raise `NotOffered`."""


@dataclass(frozen=True)
class Tool:
    """A tool whose files are read."""

    name: str
    """With the version whose defaults are meant, such as `TRL 1.16`."""
    rules: Sequence[Rule]
    defaults: Values
    """What the tool takes where its file says nothing, of the keys that decide what is learned."""
    not_offered: Mapping[str, str]
    """Keys without a counterpart, with the reason; nested keys by their first part."""
    refusals: Callable[[Values], Iterable[str]] = lambda values: ()
    """Sentences on what the file asks for and lora_core does not do at all, such as full fine-tuning."""
    remarks: Callable[[Values], Iterable[str]] = lambda values: ()
    """Sentences on what the tool does otherwise, whatever the file says."""


@dataclass(frozen=True)
class Reading:
    """What became of one key of the file."""

    key: str
    value: Any
    source: str
    outcome: Outcome
    note: str
    """Our settings where it is taken; the reason where it is not."""

    def __str__(self) -> str:
        arrow = " -> " if self.outcome == "taken" else ": "
        return f"{self.source}  {self.key} = {quoted(self.value)}" + (f"{arrow}{self.note}" if self.note else "")


@dataclass(frozen=True)
class Translation:
    """A file of another tool, in our words."""

    file: str
    tool: str
    settings: Mapping[str, Setting]
    """Ours, by dotted key, each with the place that it came from."""
    readings: Sequence[Reading]
    refusals: Sequence[str] = ()
    remarks: Sequence[str] = field(default_factory=list)
    """On the file as a whole, such as which other file it was read with."""

    def of(self, *outcomes: Outcome) -> list[Reading]:
        return [reading for reading in self.readings if reading.outcome in outcomes]

    def from_defaults(self) -> list[str]:
        """`train.warmup_steps=0`, of each setting that the file leaves to its tool."""
        return [f"{key}={short(s.value)}" for key, s in self.settings.items() if s.source == default_of(self.tool)]

    def from_ours(self) -> list[str]:
        """`train.learning_rate=5e-05`, of each setting that decides what is learned and that is ours."""
        said = {*self.settings}
        for either in _EITHER:
            said |= either if either & said else set()
        default = RunConfig()
        return [
            f"{key}={short(getattr(getattr(default, section), name))}"
            for key in _DECIDE
            for section, name in [key.split(".")]
            if key not in said
        ]

    def to_dict(self) -> dict[str, Any]:
        """For `preflight --json`."""
        return {
            "file": self.file,
            "tool": self.tool,
            "keys": [
                {"key": r.key, "value": r.value, "place": r.source, "outcome": r.outcome, "note": r.note}
                for r in self.readings
            ],
            "from_the_tools_defaults": self.from_defaults(),
            "from_our_defaults": self.from_ours(),
            "remarks": [*self.remarks],
        }

    def __str__(self) -> str:
        lines = [f"{self.file}: {self.tool}", *(f"  {remark}" for remark in self.remarks)]
        for outcome, title in (
            ("taken", "taken:"),
            ("as here", "nothing to take, as it is so here too:"),
            ("not offered", "not offered, and not taken over:"),
            ("unknown", "unknown, and not taken over:"),
        ):
            some = self.of(outcome)  # type: ignore[arg-type]
            lines += [f"  {title}", *(f"    {reading}" for reading in some)] if some else []
        if self.from_defaults():
            lines.append(f"  by default of {self.tool}: {', '.join(self.from_defaults())}")
        if self.from_ours():
            lines.append(f"  by default of lora_core, as neither says: {', '.join(self.from_ours())}")
        return "\n".join(lines)


# Where one is set, the others are not looked at.
_EITHER = (
    {"train.warmup_steps", "train.warmup_ratio", "train.max_steps", "train.num_train_epochs"},
    {"data.train_file", "data.train_files"},
)
# Keys that decide what is learned, or what fits.
_DECIDE = (
    "model.name_or_path",
    "model.quantization",
    "lora.rank",
    "lora.alpha",
    "lora.dropout",
    "lora.target_modules",
    "data.train_file",
    "data.max_seq_length",
    "train.num_train_epochs",
    "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
    "train.learning_rate",
    "train.warmup_ratio",
    "train.weight_decay",
    "train.optim",
    "train.bf16",
    "train.gradient_checkpointing",
    "train.logging_steps",
)


def default_of(tool: str) -> str:
    """The place of a setting that the file leaves to its tool."""
    return f"default of {tool}"


def short(value: Any) -> str:
    """As the command line takes it."""
    if isinstance(value, float):
        return f"{value:g}"
    return yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n")[0]


def renamed(**ours: str) -> list[Rule]:
    """Rules for keys whose values are taken as they are: `renamed(lora_dropout="lora.dropout")`."""

    def rule(theirs: str, key: str) -> Rule:
        return Rule((theirs,), lambda values: {} if values[theirs] is None else {key: values[theirs]})

    return [rule(theirs, key) for theirs, key in ours.items()]


def translate(file: str, tool: Tool, given: Mapping[str, Setting], remarks: Sequence[str] = ()) -> Translation:
    """Say a file's settings in our words.

    Args:
        given: the file's settings by its tool's keys, nested ones dotted.
        remarks: what else is to be said of the file.
    """
    given = _with_whole_mappings(given)
    values = {**tool.defaults, **{key: setting.value for key, setting in given.items()}}
    settings: dict[str, Setting] = {}
    readings: dict[str, Reading] = {}
    said = [*remarks, *tool.remarks(values)]
    for rule in tool.rules:
        written = [key for key in rule.keys if key in given]
        if not written and not any(key in values for key in rule.keys):
            continue
        try:
            made = rule.make(dict.fromkeys(rule.keys) | values)
            outcome: Outcome = "taken" if made else "as here"
            note = " ".join(f"{key}={short(value)}" for key, value in made.items())
        except (TypeError, ValueError, AttributeError):  # nobody has checked the types in the file
            made, outcome, note = {}, "not offered", f"no value that {tool.name} takes"
        except NotOffered as reason:
            made, outcome, note = {}, "not offered", str(reason)
            if not written:
                asked = " ".join(f"{key}={short(values[key])}" for key in rule.keys if key in values)
                said.append(f"by default of {tool.name} {asked}, not taken over: {reason}")
        source = given[written[0]].source if written else default_of(tool.name)
        settings |= {key: Setting(value, source) for key, value in made.items()}
        for key in written:
            reading = Reading(key, given[key].value, given[key].source, outcome, note)
            readings[key] = _both(readings[key], reading) if key in readings else reading
    for key, setting in given.items():
        if key not in readings:
            readings[key] = _not_taken(key, setting, tool)
    in_order = [readings[key] for key in given]
    return Translation(file, tool.name, settings, in_order, [*tool.refusals(values)], said)


# Keys whose values are mappings with keys of the user's.
_MAPPINGS = ("rank_pattern", "alpha_pattern", "lora_rank_pattern", "lora_alpha_pattern", "chat_template_kwargs")


def _with_whole_mappings(given: Mapping[str, Setting]) -> dict[str, Setting]:
    """`rank_pattern.q_proj` and `rank_pattern.v_proj`, as a file is read, made `rank_pattern` again."""
    whole: dict[str, Setting] = {}
    for key, setting in given.items():
        name, _, inside = key.partition(".")
        if not inside or name not in _MAPPINGS:
            whole[key] = setting
            continue
        earlier = whole.get(name, Setting({}, setting.source))
        whole[name] = Setting({**earlier.value, inside: setting.value}, earlier.source)
    return whole


def _both(first: Reading, second: Reading) -> Reading:
    """What two rules made of one key: what either takes is taken."""
    if "taken" not in (first.outcome, second.outcome):
        return first if first.outcome == "not offered" else second
    taken = [reading for reading in (first, second) if reading.outcome == "taken"]
    return replace(taken[0], note=" ".join(dict.fromkeys(reading.note for reading in taken)))


# Values by which a key says that nothing of it is wanted.
_OFF: tuple[Any, ...] = (None, False, 0, "", "none", "no", "off", "null", "disabled")


def _not_taken(key: str, setting: Setting, tool: Tool) -> Reading:
    reason = tool.not_offered.get(key, tool.not_offered.get(key.split(".")[0]))
    if reason is None:
        known = {*tool.not_offered, *(name for rule in tool.rules for name in rule.keys)}
        near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.8)
        note = f"no key of {tool.name} that is known here{f'; nearest: {near[0]}' if near else ''}"
        return Reading(key, setting.value, setting.source, "unknown", note)
    is_off = setting.value in ([], {}) or any(setting.value == off for off in _OFF)
    return Reading(key, setting.value, setting.source, "as here" if is_off else "not offered", "" if is_off else reason)


def whole(key: str, value: Any) -> int:
    """3 for 3 and 3.0.

    Raises:
        NotOffered: it is no int.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer():
        return int(value)
    raise NotOffered(f"{key} must be an int here")


def several(groups: Mapping[str, str]) -> dict[str, str]:
    """`{"key_a key_b": reason}` -> `{"key_a": reason, "key_b": reason}`."""
    return {key: reason for keys, reason in groups.items() for key in keys.split()}
