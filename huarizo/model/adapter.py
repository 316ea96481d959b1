"""Loads an adapter folder from any source onto a model.

The configuration is untrusted: PEFT would import modules that it names and compile regular expressions that it holds.
Only the fields that describe a plain LoRA are accepted; any other that is set is refused by name. Only safetensors are
read.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from huarizo.errors import ModelError
from huarizo.files import fault_in, manifest_of
from huarizo.hub.model_files import tensors_in
from huarizo.model.added_tokens import lengthen, lengthened, size_of
from huarizo.model.architectures.registry import EMBEDDINGS, HEADS
from huarizo.model.float_lora import register
from huarizo.model.load import load_tokenizer
from huarizo.sandbox.reading import odd_entry, read_json, without_panics
from huarizo.wording import first_line

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from huarizo.data.templates import Tokenizer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LARGEST_CONFIG = 1_000_000  # bytes
LARGEST_RANK = 4096
PREFIX = "base_model.model."  # of the tensor names in an adapter file
BASE_LAYER = ".base_layer.weight"
"""Suffix of an embedding or head that has a LoRA: PEFT saves the base's own weight with the adapter."""
VOCABULARY_SIDE = {
    ".weight": 0, BASE_LAYER: 0, ".lora_embedding_A": 1, ".lora_B.weight": 0,
}  # fmt: skip
"""Suffixes of the tensors of embedding and head with one entry per token, and the dimension that counts the tokens."""
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
"""Suffix of the trained rows of single tokens; the configuration lists their ids."""
PLAIN_NAME = re.compile(r"[\w.]{1,200}")
OF_TRANSFORMERS = re.compile(r"(transformers|unsloth)\.[\w.]{1,200}$")
REWRITING = re.compile(r"olora|pissa")
INITS = re.compile(r"gaussian|olora|orthogonal|pissa(_niter_\d{1,2})?")
"""Initialisations that need neither code nor data; on loading an adapter they change the base model or do nothing."""


def load_adapter(model: "PreTrainedModel", folder: Path) -> "PeftModel":
    """Put the adapter of a folder on `model`, for inference. If the adapter has rows for more tokens than the model,
    the model's embedding and head are extended.

    Raises:
        ModelError: the folder has no adapter, or one that doesn't fit the model or is more than a plain LoRA.
    """
    from peft import PeftModel, get_peft_model_state_dict

    config = register(check_adapter(folder))
    lengthen(model, rows_with(folder, model.config.vocab_size))
    made_for = config.base_model_name_or_path or "a model that it does not name"
    wrong_base = f"{folder}: this adapter was made for {made_for}, not for {model.name_or_path}"
    try:
        with without_panics():
            tuned = PeftModel.from_pretrained(model, str(folder), config=config).eval()
    except Exception as error:  # anything that a broken or unknown adapter causes
        if "size mismatch" in str(error):
            raise ModelError(f"{wrong_base}: the sizes of its layers differ") from None
        raise ModelError(f"{folder}: the adapter can't be loaded: {first_line(error)}") from None
    given = {name for name in tensors_in(folder / WEIGHTS) if not is_of_the_base(name, config)}
    if unused := given ^ set(get_peft_model_state_dict(tuned, save_embedding_layers=False)):
        raise ModelError(f"{wrong_base}: {sorted(unused)[0]} has no counterpart")
    return tuned


def rewritten_weights(model: "PreTrainedModel", folder: Path) -> dict[str, torch.Tensor]:
    """Copy the base weights that loading this adapter changes, by name, with as many rows as they have afterwards.

    PiSSA and OLoRA move a part of the weight into A and B and leave the rest in the base; an adapter that was saved
    with the base's embedding or head replaces it. {} for every other LoRA.

    Raises:
        ModelError: the folder has no adapter or no plain LoRA, or no tokenizer that names the adapter's tokens.
    """
    config = check_adapter(folder)
    shapes = _shapes(folder, config)
    names = {layer_of(name) + ".weight" for name in shapes if is_of_the_base(name, config)}
    if _moves_a_part(config):
        names |= {f"{module}.weight" for module in _targets(folder, shapes)}
    rows, parameters = rows_with(folder, model.config.vocab_size), dict(model.named_parameters(remove_duplicate=False))
    copies = {name: parameters[name].detach() for name in sorted(names) if name in parameters}
    return {n: lengthened(w, rows) if _is_vocabulary(n) else w.clone() for n, w in copies.items()}


def rewrites_base(folder: Path) -> bool:
    """Whether loading the adapter of a folder changes weights of the base, which are then copied in floating point.

    Raises:
        ModelError: as `rewritten_weights`.
    """
    config = check_adapter(folder)
    return _moves_a_part(config) or any(is_of_the_base(name, config) for name in _shapes(folder, config))


def _moves_a_part(config: "LoraConfig") -> bool:
    return isinstance(config.init_lora_weights, str) and bool(REWRITING.match(config.init_lora_weights))


@contextmanager
def without_adapter(tuned: "PeftModel", rewritten: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside the block a PeftModel computes what its base does. `rewritten`: from `rewritten_weights`."""
    layers = dict(tuned.get_base_model().named_modules())
    swapped = {name: _base_weight(layers[name.removesuffix(".weight")]) for name in rewritten}
    own = {name: weight.data for name, weight in swapped.items()}
    with tuned.disable_adapter():
        try:
            for name, weight in swapped.items():
                weight.data = rewritten[name]
            yield
        finally:
            for name, weight in swapped.items():
                weight.data = own[name]


def _base_weight(layer: Any) -> torch.Tensor:  # layer: any module; PEFT's wrappers have no common type
    """The base's weight in a layer, inside any PEFT wrapper."""
    if hasattr(layer, "token_adapter"):
        layer = layer.token_adapter
    return (layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer).weight


def is_of_the_base(name: str, config: "LoraConfig") -> bool:
    """Whether a tensor of an adapter file is the base's own embedding or head, saved with the adapter."""
    layer = layer_of(name).rpartition(".")[2]
    return name.endswith(BASE_LAYER) or (
        name.endswith(f".{layer}.weight") and _is_vocabulary(name) and layer not in (config.modules_to_save or ())
    )


def layer_of(name: str) -> str:
    """The layer that a tensor of an adapter file belongs to, by its name in the base."""
    name = name.removeprefix(PREFIX).partition(".lora_")[0]
    return name.removesuffix(TOKEN_ROWS).removesuffix(".weight").removesuffix(".base_layer")


def _is_vocabulary(name: str) -> bool:
    return layer_of(name).rpartition(".")[2] in EMBEDDINGS | HEADS


def rows_with(folder: Path, rows: int) -> int:
    """The number of embedding rows that a base of `rows` rows needs for the adapter of a folder.

    Raises:
        ModelError: the folder has no adapter; or the adapter has rows for more tokens than the base, and no tokenizer
            beside it names these tokens.
    """
    config = check_adapter(folder)
    whole = max((_places(name, shape) for name, shape in _shapes(folder, config).items()), default=0)
    trained = 1 + max((number for numbers in trained_rows(config).values() for number in numbers), default=-1)
    if max(whole, trained) <= rows:
        return rows
    problem = f"{folder / (WEIGHTS if whole > rows else CONFIG)}: it has rows for {max(whole, trained):,} tokens"
    problem = f"{problem}, the base for {rows:,}"
    remedy = "that the adapter was trained with (tokenizer.save_pretrained), or give its own base as --base-model"
    if not _has_tokenizer(folder):
        raise ModelError(f"{problem}, and there is no tokenizer beside it. Put the tokenizer there {remedy}")
    tokens = size_of(load_tokenizer(folder))
    if not (rows < tokens and trained <= tokens and (not whole or max(tokens, trained) <= whole)):
        raise ModelError(f"{problem}, and the tokenizer beside it has {tokens:,}. Put the tokenizer there {remedy}")
    return whole or tokens


def _places(name: str, shape: list[int]) -> int:
    """The number of tokens that a tensor of an adapter file has entries for; 0 if it is not of embedding or head."""
    side = VOCABULARY_SIDE.get(name.removeprefix(PREFIX).removeprefix(layer_of(name)))
    return shape[side] if _is_vocabulary(name) and side is not None and side < len(shape) else 0


def trained_rows(config: "LoraConfig") -> dict[str, list[int]]:
    """The ids of the tokens whose single rows an adapter holds, by the last part of the layer's name."""
    found = config.trainable_token_indices or {}
    found = found if isinstance(found, dict) else dict.fromkeys(EMBEDDINGS, found)
    return {name.rpartition(".")[2]: numbers for name, numbers in found.items()}


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def tokenizer_beside(folder: Path, base: "Tokenizer", rows: int) -> "Tokenizer | None":
    """The adapter folder's tokenizer, if it has tokens that the base's lacks and the embedding has rows for them.

    base: the base's tokenizer; rows: of the base's embedding.

    Raises:
        ModelError: as `rows_with`; or the adapter's rows need this tokenizer, and it can't be loaded.
    """
    longer = rows_with(folder, rows)
    needed = longer > rows or bool(trained_rows(check_adapter(folder)))
    if not _has_tokenizer(folder):
        return None
    try:
        brought = load_tokenizer(folder)
    except ModelError:
        if needed:
            raise
        return None
    return brought if (needed or size_of(brought) > size_of(base)) and size_of(brought) <= longer else None


def check_adapter(folder: Path) -> "LoraConfig":
    """Check that an adapter is complete and a plain LoRA, and return its LoraConfig.

    Raises:
        ModelError: it is not; the message says why.
    """
    if not (folder / WEIGHTS).is_file():
        pickled = [name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).is_file()]
        if pickled:
            raise ModelError(
                f"{folder}: the adapter is a pickle ({pickled[0]}), which is never read. If you trust it, load it "
                "once with PEFT and call save_pretrained, which writes safetensors"
            )
        raise ModelError(f"{folder}: no adapter here ({WEIGHTS})")
    if odd := odd_entry(folder):
        raise ModelError(f"{folder}: {odd}")
    try:
        fault = fault_in(folder, manifest_of(folder))
    except ValueError as error:
        fault = str(error)
    if fault:
        raise ModelError(f"{folder}: {fault}. Make it again from the last checkpoint, or put a complete copy there")
    config = _read_config(folder)
    shapes = _shapes(folder, config)
    if config.target_modules is None:
        config.target_modules = _targets(folder, shapes)
    return config


def _read_config(folder: Path) -> "LoraConfig":
    """A LoraConfig from adapter_config.json, for inference. `target_modules` is None if it is a pattern or missing.

    Raises:
        ModelError: it is missing, broken, or not a plain LoRA; the message names the field.
    """
    from peft import LoraConfig

    path = folder / CONFIG
    try:
        values = read_json(path, LARGEST_CONFIG)
        if not isinstance(values, dict):
            raise ValueError("it is not an object")
    except FileNotFoundError:
        raise ModelError(f"{folder}: {CONFIG} is missing") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: can't be read: {error}") from None
    defaults = dataclasses.asdict(LoraConfig())
    for name, value in values.items():
        if name in CHECKS:
            if not CHECKS[name](value):
                raise ModelError(f"{path}: {name} is {json.dumps(value)[:80]}, which no plain LoRA has")
        elif value and value != defaults.get(name):
            raise ModelError(f"{path}: it sets {name}. Huarizo loads plain LoRA adapters only, and those don't set it")
    accepted = {name: value for name, value in values.items() if name in CHECKS and value is not None}
    if isinstance(accepted.get("target_modules"), str):
        del accepted["target_modules"]  # the matrices in the file say the same, and no pattern is compiled
    for name in ("peft_type", "task_type", "auto_mapping"):
        accepted.pop(name, None)
    accepted |= {"task_type": "CAUSAL_LM", "inference_mode": True}
    try:
        return LoraConfig(**accepted)  # pyright: ignore[reportArgumentType]
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path}: peft refuses these settings: {first_line(error)}") from None


def _is_names(value: object) -> bool:
    names = [value] if isinstance(value, str) else value
    return value is None or (
        isinstance(names, list)
        and len(names) < 2000
        and all(isinstance(n, str) and PLAIN_NAME.fullmatch(n) for n in names)
    )


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value <= LARGEST_RANK


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e6


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_flag(value: object) -> bool:
    return type(value) is bool


def _is_pattern_of(kind: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: (
        value is None or (isinstance(value, dict) and _is_names(list(value)) and all(map(kind, value.values())))
    )


def _is_layers(value: object) -> bool:
    return value is None or type(value) is int or (isinstance(value, list) and all(type(n) is int for n in value))


def _is_tokens(value: object) -> bool:
    """Token ids: a list for the embedding, or lists for embedding and head by name."""
    numbers = list(value.values()) if isinstance(value, dict) else [value]
    names = [str(name).rpartition(".")[2] for name in value] if isinstance(value, dict) else []
    return value is None or (
        set(names) <= EMBEDDINGS | HEADS
        and len(set(names)) == len(names)
        and all(
            isinstance(each, list)
            and each
            and all(type(n) is int and 0 <= n < 2**31 for n in each)
            and len(set(each)) == len(each)
            for each in numbers
        )
    )


def _is_note_of_class(value: object) -> bool:
    """PEFT's record of the base's class, written if no task is set. The names in it are never imported."""
    return value is None or (
        isinstance(value, dict)
        and value.keys() <= {"base_model_class", "parent_library", "unsloth_fixed"}
        and bool(OF_TRANSFORMERS.match(str(value.get("parent_library"))))
        and all(isinstance(name, str | bool) for name in value.values())
    )


CHECKS = {
    "auto_mapping": _is_note_of_class,
    "peft_type": lambda value: value == "LORA",
    "task_type": lambda value: value in (None, "CAUSAL_LM"),
    "r": _is_rank,
    "lora_alpha": _is_number,
    "lora_dropout": lambda value: _is_number(value) and value < 1,
    "target_modules": lambda value: isinstance(value, str) or _is_names(value),
    "exclude_modules": _is_names,
    "modules_to_save": lambda value: _is_names(value) and not isinstance(value, str),
    "trainable_token_indices": _is_tokens,
    "layers_to_transform": _is_layers,
    "layers_pattern": _is_names,
    "rank_pattern": _is_pattern_of(_is_rank),
    "alpha_pattern": _is_pattern_of(_is_number),
    "bias": lambda value: value == "none",
    "fan_in_fan_out": _is_flag,
    "use_rslora": _is_flag,
    "use_dora": _is_flag,
    "lora_bias": _is_flag,
    "inference_mode": _is_flag,
    "init_lora_weights": lambda value: _is_flag(value) or (isinstance(value, str) and bool(INITS.fullmatch(value))),
    "base_model_name_or_path": _is_text,
    "revision": _is_text,
    "peft_version": _is_text,
}
"""The accepted fields, each with the check of its value."""


def _shapes(folder: Path, config: "LoraConfig") -> dict[str, list[int]]:
    """The shapes of the file's tensors, checked against the configuration's rank, so that PEFT allocates no more."""
    allowed = {config.r, *(config.rank_pattern or {}).values()}
    try:
        shapes = {name: tensor.shape for name, tensor in tensors_in(folder / WEIGHTS).items()}
    except ValueError as error:
        raise ModelError(f"{folder}: {error}") from None
    matrices = {name: shape for name, shape in shapes.items() if "lora_A" in name or "lora_embedding_A" in name}
    wrong = next((name for name, shape in matrices.items() if shape[:1] and shape[0] not in allowed), None)
    if wrong or not matrices:
        what = (
            f"{wrong} has the rank {matrices[wrong][0]}, not {config.r}" if wrong else "there is no LoRA matrix in it"
        )
        raise ModelError(f"{folder}: {what}, so {WEIGHTS} and {CONFIG} don't belong together")
    return shapes


def _targets(folder: Path, names: Iterable[str]) -> list[str]:
    """The modules for which the file has matrices."""
    found = sorted({name.removeprefix(PREFIX).partition(".lora_")[0] for name in names if ".lora_" in name})
    if not _is_names(found):
        raise ModelError(f"{folder / WEIGHTS}: it has matrices for modules that no plain LoRA has")
    return found
