"""What a user should know of rows that can be trained on, each said once and with the rows' numbers.

In go rows as they are read; out come a few lines for the beginning of a run. None of it is an error.
"""

from dataclasses import dataclass, field

MAX_PLACES = 10  # rows named in a note


@dataclass
class Places:
    """Rows in which the same thing was met."""

    count: int = 0
    first: dict[str, list[int]] = field(default_factory=dict)
    """File -> row numbers, of the first MAX_PLACES rows."""

    def add(self, file: str, number: int) -> None:
        self.count += 1
        if self.count <= MAX_PLACES:
            self.first.setdefault(file, []).append(number)

    def __str__(self) -> str:
        named = "; ".join(
            f"{file}, row{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
            for file, numbers in self.first.items()
        )
        return named + (f" and {self.count - MAX_PLACES} more" if self.count > MAX_PLACES else "")


@dataclass
class Notes:
    """What was met while rows were read. said: what some rows do, as a verb phrase -> these rows."""

    said: dict[str, Places] = field(default_factory=dict)

    def say(self, what: str, file: str, number: int) -> None:
        self.said.setdefault(what, Places()).add(file, number)

    def told(self) -> list[str]:
        return [f"{_rows(places)}: {what}" for what, places in self.said.items()]


def _rows(places: Places) -> str:
    return f"{places.count} row{'s' if places.count > 1 else ''} ({places})"
