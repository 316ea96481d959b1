"""Recognises by its own definition how a byte-level tokenizer splits a text before BPE, and gives llama.cpp's name.

llama.cpp has each way as code of its own under a name, so an unknown one is an error.
"""

from pathlib import Path
from typing import Any

from huarizo.errors import ModelError

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {LLAMA3: "llama-bpe"}
"""Regular expressions that split a text -> llama.cpp's names."""


def pre_tokenizer(folder: Path, spec: dict[str, Any]) -> str:
    """llama.cpp's name for the way the tokenizer splits a text before BPE. spec: the content of its tokenizer.json."""
    pre = spec.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    if spec.get("normalizer") or any(step.get("add_prefix_space") for step in steps):
        raise ModelError(f"{folder}: this tokenizer rewrites texts before it splits them, which llama.cpp does not")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and (name := SPLITS.get(steps[0].get("pattern", {}).get("Regex"))):
        return name
    raise ModelError(f"{folder}: llama.cpp has no known name for this tokenizer's pre-tokenizer ({kinds})")
