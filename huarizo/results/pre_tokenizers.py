"""Recognises by its own definition how a byte-level tokenizer splits a text before BPE, and gives llama.cpp's name.

llama.cpp has each way as code of its own under a name, so an unknown one is an error.
"""

from pathlib import Path
from typing import Any

from huarizo.errors import ModelError

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
REST_WITH_SLASH = REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
LLAMA3 = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}"
TEKKEN = rf"{CASED[0]}|{CASED[1]}|\p{{N}}|{REST_WITH_SLASH}"
GPT4O = rf"{CASED[0]}{CONTRACTIONS}?|{CASED[1]}{CONTRACTIONS}?|\p{{N}}{{1,3}}|{REST_WITH_SLASH}"
SPLITS = {LLAMA3: "llama-bpe", QWEN2: "qwen2", TEKKEN: "tekken", GPT4O: "gpt-4o"}
"""Regular expressions that split a text -> llama.cpp's names. Llama 3's is also that of GLM-4, OLMo 2 and SmolLM3;
Qwen's that of StableLM 2; GPT-4o's that of Phi-4-mini. In tekken, which is Mistral's, and gpt-4o, which split between
cases, llama.cpp knows the cases of ASCII alone, and splits before combining marks."""
KEEPS_ALL = ("Isolated", False), ("Removed", True)
"""Of a split, the behaviour and whether the pattern is inverted: every piece that matches is kept."""


def pre_tokenizer(folder: Path, spec: dict[str, Any]) -> str:
    """llama.cpp's name for the way a tokenizer splits a text before BPE.

    NFC is passed over, as in llama.cpp: it changes only a text that has letters and their accents as two characters.
    spec: the content of the tokenizer.json.

    Raises:
        ModelError: llama.cpp has no such way.
    """
    pre, normalizer = spec.get("pre_tokenizer") or {}, spec.get("normalizer") or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    rewrites = [step for step in normalizer.get("normalizers", [normalizer]) if step.get("type") not in (None, "NFC")]
    if rewrites or any(step.get("add_prefix_space") for step in steps):
        raise ModelError(f"{folder}: this tokenizer rewrites texts before it splits them, which llama.cpp does not")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"  # also GPT-NeoX
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"  # also Granite and Command R
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        split = steps[0]
        name = SPLITS.get(split.get("pattern", {}).get("Regex"))
        if name and (split.get("behavior"), split.get("invert")) in KEEPS_ALL:
            return name
    raise ModelError(f"{folder}: llama.cpp has no known name for this tokenizer's pre-tokenizer ({kinds})")
