"""Tries a tokenizer.json: whether it loads, and whether its patterns come to an end on some texts."""

from tokenizers import Tokenizer

PROBES = ("The quick brown fox, 123.\n\n가나다 🙂", "a" * 500 + "!", " " * 500 + "\n", "0" * 500 + "x", "<>" * 200, "")


def check(path: str) -> None:
    tokenizer = Tokenizer.from_file(path)
    for probe in PROBES:
        tokenizer.encode(probe)


JOBS = {"check": check}
