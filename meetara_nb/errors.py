"""The one exception that reaches a user: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        what: What is wrong, in a few words.
        where: File, key or value it concerns; empty where `what` says it.
        remedy: What the reader can do about it.
    """

    what: str
    where: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f" -> {self.remedy}" if self.remedy else ""
        return f"{place}{self.what}{advice}"


class MeetaraError(Exception):
    """Everything a user can cause or mend. It prints as one line a fault, never as a traceback."""

    def __init__(self, what: str, *, where: object = "", remedy: str = "") -> None:
        self.faults: tuple[Fault, ...] = (Fault(what, str(where) if where else "", remedy),)
        super().__init__(str(self.faults[0]))

    @classmethod
    def of(cls, faults: Iterable[Fault]) -> MeetaraError:
        """One error for many faults, so that a person mends them in one go."""
        error = cls("no fault given")
        error.faults = tuple(faults)
        error.args = ("\n".join(str(fault) for fault in error.faults),)
        return error

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback."""
        return [f"error: {fault}" for fault in self.faults]


def nearest(name: str, known: Iterable[str], most: int = 3) -> str:
    """A remedy for a name that is not known: the closest known ones, or all if there are few."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=most, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    if len(known) <= 12:
        return "known: " + ", ".join(known)
    return f"{len(known)} are known, for example {', '.join(known[:most])}"
