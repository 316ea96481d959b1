"""Checks that a folder is a model that can be trained: configuration, weights in safetensors, tokenizer.

Input is the file names of a folder or hub repository, or the folder itself; output is a sentence that says what is
missing or broken and how to fix it, or None. Nothing is loaded, so a wrong folder is reported within milliseconds.
Pickles (`*.bin`, `*.pt`) are never opened, because opening one can run any code.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from huarizo.sandbox.reading import MOST_JSON, odd_entry, open_file, read_json

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    INDEX,
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Patterns of the files that are downloaded and used: no code, no pickles."""
TEMPLATES = ("chat_template.jinja", "tokenizer_config.json")
"""Files that may hold a chat template, in order of precedence."""
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
CARD = "README.md"
BESIDE = (CARD, *LICENCES)
"""Patterns of files about a model's origin and licence. Downloaded with it but not pinned, as they affect no result."""
EXCEPT_FILES = ("*/*", "consolidated*", "adapter_model.safetensors")
"""Patterns of weights that FILES matches but that are not the model in Transformers' format."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
FORBIDDEN = ("auto_map", "custom_pipelines", "_attn_implementation_internal", "custom_generate")
"""Fields by which a configuration names code to run."""
HARMLESS_PATHS = ("special_tokens_map_file", "name_or_path")
"""Ends of the names of fields in which tools used to write their own paths, and which nothing reads."""
LARGEST_HEADER = MOST_JSON  # bytes, of a safetensors file's header; TinyLlama's has 23,000
LARGEST = {"tokenizer.json": 200_000_000, "tokenizer.model": 100_000_000, INDEX: 50_000_000}  # bytes
LARGEST_OTHER = MOST_JSON  # bytes; TinyLlama's others have under 2,000
DTYPE = re.compile(r"(BOOL|(?:BF|C|F|I|U)(\d+)(?:_\w+)?)")
"""A tensor's dtype in safetensors; the number is its size in bits."""
LARGEST_CARD = 100_000  # bytes of a card that are read
QUANTISED_NAME = re.compile(
    r"([-_.](unsloth|bnb|nf4|gptq|awq|hqq|eetq|aqlm|exl2|marlin|quantized|dynamic|nv?fp[48]|mxfp4|fp8|int[48]|[2-8]-?bits?|"
    r"w\d+a\d+|\d+g|v\d+-gptq))+$",
    re.IGNORECASE,
)
"""What tools append to a model's name when they quantise it."""
BASE_MODEL = re.compile(r"^base_model:\s*(?:-\s*)?[\"']?([\w.-]+/[\w.-]+)", re.MULTILINE)  # of a card's front matter
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"


class Tensor(NamedTuple):
    """A tensor by the header of a safetensors file; `dtype` is F32, BF16 and so on."""

    shape: list[int]
    dtype: str


def weight_files(folder: Path) -> list[str]:
    """The names of the files with a model's weights: the single file, or those that its index names.

    Raises:
        ValueError: there are none, or the index can't be read, or names a file that is not next to it.
    """
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if not (folder / INDEX).exists():
        raise ValueError(lacking(file.name for file in folder.iterdir()))
    try:
        parts = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
        if not all(isinstance(part, str) and part for part in parts):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{INDEX} can't be read as JSON with a `weight_map`. Fetch or save the model again") from None
    missing = [part for part in parts if Path(part).name != part or not (folder / part).exists()]
    if missing:
        raise ValueError(
            f"weights are missing: {', '.join(missing[:5])} (named in {INDEX}). Fetch or save the model again"
        )
    return parts


def lacking(names: Iterable[str]) -> str | None:
    """What is missing from a model, with the remedy; None if nothing is.

    Args:
        names: of the files in the model's top folder.
    """
    present = set(names)
    if "config.json" not in present and "adapter_config.json" in present:
        return (
            "this is a LoRA adapter, not a model. Give the model that it was trained on "
            "(`base_model_name_or_path` in its adapter_config.json)"
        )
    if INDEX not in present and WEIGHTS not in present:
        return _no_safetensors(present)
    if "config.json" not in present:
        return "config.json is missing. Save the model with `model.save_pretrained(folder)`, which writes it"
    if not {"tokenizer.json", "tokenizer.model"} & present and not {"vocab.json", "merges.txt"} <= present:
        return (
            "the tokenizer is missing (tokenizer.json, or tokenizer.model, or vocab.json and merges.txt). "
            "Save it into the same folder with `tokenizer.save_pretrained(folder)`"
        )
    return None


def _no_safetensors(present: set[str]) -> str:
    if any(name.endswith(PICKLES) for name in present):
        return (
            "its weights are there only as pickle (pytorch_model.bin or the like), which Huarizo never reads, because "
            "opening a pickle can run any code. Where you trust it, convert it once in Python: "
            "`from transformers import AutoModelForCausalLM, AutoTokenizer; "
            "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW); "
            "AutoTokenizer.from_pretrained(OLD).save_pretrained(NEW)`, and give the folder NEW"
        )
    if any(name.endswith(".gguf") for name in present):
        return "it holds GGUF files, which are for running, not training. Give the original model in safetensors"
    return f"it has no weights ({WEIGHTS}, or {INDEX} with its parts). Give a folder in Transformers' format"


def broken(folder: Path) -> str | None:
    """What is wrong with a model folder on disk, with the remedy; None if all parts are present and whole."""
    problem = lacking(file.name for file in folder.iterdir()) or hostile(folder)
    if problem:
        return problem
    try:
        tensors_of(folder)
    except ValueError as error:
        return str(error)
    return None


def quantised(folder: Path, name: str) -> str | None:
    """Why a model can't be trained because it is quantised, with the name of the float model if it can be found.

    None if the weights are floats. name: what the user calls the model.
    """
    try:
        config = read_json(folder / "config.json")
        found = config.get("quantization_config") or config.get("compression_config")
    except (OSError, ValueError, AttributeError):
        return None  # reported where it is read
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else None
    if isinstance(found, dict) and method is None:
        method = "bitsandbytes" if found.get("load_in_4bit") or found.get("load_in_8bit") else None
    original = _float_name(folder, name, config)
    return (
        f"its weights are quantised already ({method or 'quantization_config in config.json'}), and LoRA is trained on "
        f"and added to float weights. Give the original model{f', {original}' if original else ''}; Huarizo quantises "
        "it by itself with precision=int8"
    )


def _float_name(folder: Path, name: str, config: Mapping[str, object]) -> str | None:
    """The model from which a quantised one was made, by its card, its config.json or its name."""
    card, plain = folder / CARD, name.partition("@")[0]
    text = ""
    if card.is_file():
        with open_file(card) as file:
            text = file.read(LARGEST_CARD).decode("utf-8", "replace")
    front = text.split("---")[1] if text.startswith("---") else ""
    candidates = [match[1] for match in BASE_MODEL.finditer(front)]
    written = config.get("_name_or_path")
    candidates += [written] if isinstance(written, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", written) else []
    candidates += [QUANTISED_NAME.sub("", plain)]
    return next((other for other in candidates if other != plain and not QUANTISED_NAME.search(other)), None)


def hostile(folder: Path) -> str | None:
    """What in a model's configuration would run code or read outside its folder, with the remedy; None if nothing."""
    if odd := odd_entry(folder):
        return odd
    for file in sorted(folder.iterdir()):
        if file.is_dir():
            if any(fnmatch(file.name, pattern) for pattern in FILES):
                return f"{file.name} is a folder, not a file. Fetch or save the model again"
            continue
        if file.suffix not in (".json", ".model", ".txt", ".jinja"):
            continue
        if file.stat().st_size > LARGEST.get(file.name, LARGEST_OTHER):
            return f"{file.name} has {file.stat().st_size:,} bytes, too many for it. Fetch or save the model again"
        if file.suffix != ".json" or file.name in (*LARGEST, INDEX, "vocab.json", "added_tokens.json"):
            continue
        if problem := names_code(file):
            return problem
    return None


def names_code(file: Path) -> str | None:
    """What in a JSON file would run code or read outside its folder, with the remedy; None if nothing."""
    try:
        found = _forbidden(read_json(file))
    except ValueError:
        return None  # reported where it is read
    except RecursionError:
        return f"{file.name} is nested too deeply. Fetch or save the model again"
    except OSError as error:
        return f"{file.name} can't be read: {error.strerror or error}"
    return (
        f"{file.name} sets {found}. Huarizo runs no code of a model; where you trust it, delete that field"
        if found
        else None
    )


def _forbidden(value: object) -> str | None:
    """The first field of a configuration, at any depth, that names code or a path; None if there is none."""
    if isinstance(value, list):
        return next((found for inner in value if (found := _forbidden(inner))), None)
    if not isinstance(value, dict):
        return None
    for key, inner in value.items():
        if key in FORBIDDEN and inner:
            return f"{key}, which names code to run"
        if "attn_implementation" in key and isinstance(inner, str) and "/" in inner:
            return f"{key} to {inner!r}, which is code on the hub"
        is_path = key.endswith(("_file", "_path")) and not key.endswith(HARMLESS_PATHS)
        if is_path and isinstance(inner, str) and inner:
            return f"{key} to {inner!r}: a path in a foreign configuration is never followed"
        if found := _forbidden(inner):
            return found
    return None


def tensors_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    """File -> name -> tensor, for a model's weight files. Reads only their headers and sizes.

    Raises:
        ValueError: a file is missing, is not safetensors, or is cut off; the message names it.
    """
    return {file: tensors_in(folder / file) for file in weight_files(folder)}


def tensors_in(file: Path) -> dict[str, Tensor]:
    """Name -> tensor, for a safetensors file: 8 bytes of header length, a JSON header, and the data.

    Raises:
        ValueError: it can't be read, or its size does not match its header; the message names it.
    """
    try:
        return _tensors(file)
    except OSError as error:
        raise ValueError(f"{file.name} can't be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{file.name} {error}. Fetch or save the model again") from None


def _tensors(file: Path) -> dict[str, Tensor]:
    not_whole = ValueError("is not a whole safetensors file")
    with open_file(file) as handle:
        start = handle.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise ValueError("is only a Git LFS pointer, not the weights: run `git lfs pull` in that folder")
        handle.seek(8)
        length = int.from_bytes(start[:8], "little")
        size = os.fstat(handle.fileno()).st_size
        try:
            header = json.loads(handle.read(length) if length < min(size, LARGEST_HEADER) else b"")
            header.pop("__metadata__", None)
            spans = sorted(_span(tensor) for tensor in header.values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise not_whole from None
    end = 0
    for first, last in spans:
        if first != end:
            raise not_whole
        end = last
    if size != 8 + length + end:
        raise ValueError(f"has {size:,} bytes instead of {8 + length + end:,}: it was cut off")
    return {name: Tensor(tensor["shape"], tensor["dtype"]) for name, tensor in header.items()}


def _span(tensor: Any) -> tuple[int, int]:  # any JSON value; the caller catches what a wrong one raises
    """(begin, end) of a tensor's bytes after the header. Raises ValueError if its shape and dtype need another size."""
    first, last = tensor["data_offsets"]
    shape, bits = tensor["shape"], DTYPE.fullmatch(tensor["dtype"])
    numbers = [first, last, *shape]
    if not bits or not isinstance(shape, list) or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
        raise ValueError
    if math.prod(shape) * (8 if bits[1] == "BOOL" else int(bits[2])) != 8 * (last - first):
        raise ValueError
    return first, last
