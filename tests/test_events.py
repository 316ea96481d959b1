"""Events reach every listener, in order, and a file that can't be written costs one warning."""

import json
from pathlib import Path

import pytest

from huarizo.events import EventFile, Events, Noted, Saved, Skipped, UnwrittenError, Warned


def test_every_listener_hears_every_event_in_order() -> None:
    heard: list[tuple[int, object]] = []
    events = Events([lambda event, place=place: heard.append((place, event)) for place in range(2)])
    saved, skipped = Saved(step=3, seconds=0.5), Skipped(step=4, in_a_row=1)
    events.add(saved)
    events.add(skipped)
    assert heard == [(0, saved), (1, saved), (0, skipped), (1, skipped)]


def test_a_line_of_the_file_has_the_kind_the_time_and_the_fields(tmp_path: Path) -> None:
    events = Events([EventFile(tmp_path / "events.jsonl")])
    events.note("model", "Züri \u2028")
    events.add(Saved(step=3, seconds=0.5))
    first, second = (json.loads(line) for line in (tmp_path / "events.jsonl").read_text().split("\n")[:-1])
    assert first.pop("time").endswith("+00:00")
    assert first == {"event": "noted", "text": "Züri \u2028", "title": "model"}
    assert (second["event"], second["step"]) == ("saved", 3)


def test_a_file_that_can_not_be_written_is_reported_once_and_the_others_go_on(tmp_path: Path) -> None:
    heard = []
    events = Events([EventFile(tmp_path / "gone" / "events.jsonl"), heard.append])
    for step in range(3):
        events.add(Saved(step=step, seconds=0))
    warnings = [event for event in heard if isinstance(event, Warned)]
    assert len(heard) == 4 and len(warnings) == 1
    assert "gone/events.jsonl" in warnings[0].text and warnings[0].text.endswith("Continuing without it")


def test_a_fault_of_a_listener_is_not_hidden() -> None:
    def broken(event: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Events([broken]).add(Noted(text="anything"))
    assert issubclass(UnwrittenError, Exception) and not issubclass(ZeroDivisionError, UnwrittenError)
