"""A figure: what was measured, what it should be, and how both stand in a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Goal:
    """A bound that a figure should keep."""

    kind: Literal["at least", "at most"]
    bound: float

    def holds(self, value: float) -> bool:
        """Whether a value keeps the bound; NaN does not."""
        return value >= self.bound if self.kind == "at least" else value <= self.bound

    def __str__(self) -> str:
        return f"{self.kind} {self.bound:g}"


@dataclass(frozen=True)
class Figure:
    """One measured number; `goal` None: it is reported and not judged. `detail` says of what it was made."""

    name: str
    value: float
    goal: Goal | None
    detail: str

    @property
    def holds(self) -> bool | None:
        """Whether the goal is met; None without one."""
        return None if self.goal is None else self.goal.holds(self.value)

    def as_json(self) -> dict[str, Any]:
        """`{name, value, goal, holds, detail}`; `goal` is the bound."""
        bound = None if self.goal is None else self.goal.bound
        return {"name": self.name, "value": self.value, "goal": bound, "holds": self.holds, "detail": self.detail}


def markdown_table(figures: Sequence[Figure]) -> str:
    """The figures as a table in markdown."""
    lines = ["| figure | value | goal | holds | detail |", "|---|---|---|---|---|"]
    for figure in figures:
        goal = "reported" if figure.goal is None else str(figure.goal)
        holds = {None: "", True: "yes", False: "**no**"}[figure.holds]
        lines.append(f"| {figure.name} | {figure.value:.4g} | {goal} | {holds} | {figure.detail} |")
    return "\n".join(lines)
