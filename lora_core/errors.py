"""What lora_core raises when the user, the data or the run is at fault.

Each message stands on its own: it names the value, the limit and the fix. The commands print the
message without a traceback and exit with `exit_code`; anything else that escapes is a fault in lora_core itself.
Messages quote values that nobody has looked at, so secrets are left out of them and control characters escaped.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_core.untrusted.text import showable


class LoraCoreError(Exception):
    """Base of every error that lora_core raises on purpose. Exit code 1: a fault while running."""

    exit_code = 1
    finding_id = "run_failed"
    """What preflight calls it in its list of findings."""
    only_rank: int | None = None
    """The rank that alone found it, where a run has several and the first of its machine would speak for all."""

    def __init__(self, message: str, finding_id: str | None = None) -> None:
        super().__init__(showable(message))
        if finding_id is not None:
            self.finding_id = finding_id


class ConfigError(LoraCoreError):
    """A configuration that cannot be used; lists every problem found. Exit code 2."""

    exit_code = 2
    finding_id = "config_invalid"


class SimulationError(LoraCoreError):
    """A training step of this model cannot run on tensors without values: its memory is not known. Exit code 1."""


class DataError(LoraCoreError):
    """Rows or files that cannot be used; lists them as file:line. Exit code 2."""

    exit_code = 2
    finding_id = "data_invalid"


class RowError(LoraCoreError):
    """One row that cannot be used. Callers that know the row's place turn it into a `DataError`."""

    exit_code = 2


class ChatTemplateError(RowError):
    """The chat template cannot show this row, or its mask would not be exact."""


class PreflightError(LoraCoreError):
    """A run that would not learn; lists every error found, each with its fix. Exit code 2."""

    exit_code = 2


class TrainingError(LoraCoreError):
    """The run could not continue, for example because a loss is not finite. Exit code 1."""


class RankFault(TrainingError):
    """What happened to one rank. Each rank that raises it prints it: the others may be gone. Exit code 1."""


class CheckFailed(LoraCoreError):
    """`verify`: a check failed on this model and these rows; lists each. Exit code 3."""

    exit_code = 3


class RunStopped(LoraCoreError):
    """A signal stopped the run; its state is in a checkpoint. Exit code 75, which schedulers read as "try again"."""

    exit_code = 75


def counted(number: int, noun: str, several: str | None = None) -> str:
    """`1 row`, `2 rows`; `several` for a plural without s."""
    return f"{number:,} {noun if number == 1 else several or f'{noun}s'}"


def lines_of(lines: Sequence[int], unit: str = "line") -> str:
    """`line 4`, `lines 4, 71`; past 10 only how many more. `unit` is what a place in the file is called."""
    shown = ", ".join(map(str, lines[:10])) + (f", ... and {len(lines) - 10:,} more" if len(lines) > 10 else "")
    return f"{unit}{'' if len(lines) == 1 else 's'} {shown}"


def problem_list(title: str, problems: Sequence[str], limit: int = 20) -> str:
    """`title` and one indented line per problem; past `limit` only their number, so that nothing is hidden."""
    lines = [title, *(f"  {problem}" for problem in problems[:limit])]
    if len(problems) > limit:
        lines.append(f"  ... and {len(problems) - limit:,} more")
    return "\n".join(lines)
