"""The table of checks: what was compared, the limit, what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lora_core.errors import ContractBroken, counted

Outcome = Literal["held", "broken", "not applicable"]


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    contract: str
    compared: str
    limit: str
    measured: str
    outcome: Outcome
    reason: str | None = None
    """Why it does not apply, or what exactly broke."""

    @classmethod
    def judged(cls, contract: str, compared: str, limit: str, measured: str, problem: str | None = None) -> Check:
        return cls(contract, compared, limit, measured, "broken" if problem else "held", problem)

    @classmethod
    def not_applicable(cls, contract: str, compared: str, reason: str) -> Check:
        return cls(contract, compared, "-", "-", "not applicable", reason)


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    settings: list[str]
    """Which rows were taken and what was changed for the checks."""
    checks: list[Check]
    wall_time_s: float

    @property
    def broken(self) -> list[Check]:
        return [check for check in self.checks if check.outcome == "broken"]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "held": not self.broken}

    def __str__(self) -> str:
        return "\n".join([*self.settings, "", *table(self.checks), f"{self.wall_time_s:.0f} s"])

    def refuse_broken(self) -> None:
        """
        Raises:
            ContractBroken: a check did not hold; lists each.
        """
        if self.broken:
            lines = [f"  {check.contract}: {check.compared}: {check.reason}" for check in self.broken]
            number = counted(len(self.broken), "check")
            raise ContractBroken("\n".join([f"{number} of {len(self.checks)} did not hold:", *lines]))


def table(checks: Sequence[Check]) -> list[str]:
    """Aligned columns, one line a check; below each that did not hold or does not apply, why."""
    rows = [("contract", "compared", "limit", "measured", "")]
    rows += [(check.contract, check.compared, check.limit, check.measured, check.outcome) for check in checks]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    reasons = [None, *(check.reason for check in checks)]
    lines = []
    for row, reason in zip(rows, reasons, strict=True):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if reason is not None:
            lines.append(f"{' ' * widths[0]}  {reason}")
    return lines
