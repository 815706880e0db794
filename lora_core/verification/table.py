"""The table of checks: what was compared, the limit, what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lora_core.errors import CheckFailed, counted

Outcome = Literal["passed", "failed", "not applicable"]


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    topic: str
    compared: str
    limit: str
    measured: str
    outcome: Outcome
    reason: str | None = None
    """Why it does not apply, or what exactly failed."""

    @classmethod
    def judged(cls, topic: str, compared: str, limit: str, measured: str, problem: str | None = None) -> Check:
        return cls(topic, compared, limit, measured, "failed" if problem else "passed", problem)

    @classmethod
    def not_applicable(cls, topic: str, compared: str, reason: str) -> Check:
        return cls(topic, compared, "-", "-", "not applicable", reason)


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    settings: list[str]
    """Which rows were checked, and what was changed for the checks."""
    checks: list[Check]
    wall_time_s: float

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.outcome == "failed"]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": not self.failed}

    def __str__(self) -> str:
        return "\n".join([*self.settings, "", *table(self.checks), f"{self.wall_time_s:.0f} s"])

    def refuse_failed(self) -> None:
        """
        Raises:
            CheckFailed: lists each check that failed.
        """
        if self.failed:
            lines = [f"  {check.topic}: {check.compared}: {check.reason}" for check in self.failed]
            number = counted(len(self.checks), "check")
            raise CheckFailed("\n".join([f"{len(self.failed)} of {number} failed:", *lines]))


def table(checks: Sequence[Check]) -> list[str]:
    """Aligned columns, one line per check; below each that failed or does not apply, why."""
    rows = [("check", "compared", "limit", "measured", "")]
    rows += [(check.topic, check.compared, check.limit, check.measured, check.outcome) for check in checks]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    reasons = [None, *(check.reason for check in checks)]
    lines = []
    for row, reason in zip(rows, reasons, strict=True):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if reason is not None:
            lines.append(f"{' ' * widths[0]}  {reason}")
    return lines
