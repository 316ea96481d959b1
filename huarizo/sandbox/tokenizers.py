"""Tries out a tokenizer.json: does it load, and do its patterns finish on some difficult texts?"""

from tokenizers import Tokenizer

PROBES = ("The quick brown fox, 123.\n\n가나다 🙂", "a" * 500 + "!", " " * 500 + "\n", "0" * 500 + "x", "<>" * 200, "")


def check(path: str) -> None:
    """Load a tokenizer.json and encode the PROBES; raises whatever the library raises."""
    tokenizer = Tokenizer.from_file(path)
    for probe in PROBES:
        tokenizer.encode(probe)


JOBS = {"check": check}
