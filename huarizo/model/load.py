"""Loads a frozen model and its tokenizer from a local folder.

Any causal language model of Transformers is accepted, only safetensors are read, and no code of a model ever runs.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from huarizo.errors import MachineError, ModelError
from huarizo.hub.model_files import quantised
from huarizo.hub.model_types import unsuitable
from huarizo.machine import spread
from huarizo.model.architectures.registry import architecture_of
from huarizo.model.attention import NAME as PACKED_ATTENTION
from huarizo.model.frozen.storages import STORAGES
from huarizo.model.skeleton import Seen, class_of, config_of, configuration, largest, seen_in
from huarizo.model.weights import NO_ROOM, check_weights, count_tensors, reading, tensors_of, within_memory
from huarizo.sandbox.reading import read_json, without_panics
from huarizo.sandbox.worker import FailedError, TooCostlyError, Worker
from huarizo.wording import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from huarizo.data.templates import Tokenizer

TOKENIZER_TIME, TOKENIZER_MEMORY = 60.0, 4 * 2**30  # seconds and bytes, for tokenizer.json
_TOKENIZERS = Worker("tokenizers", TOKENIZER_MEMORY)
OR_INT8 = ", or train with precision=int8"
SIZE = re.compile(r"(^n_\w+|^(?!mscale)(\w+_)?(size|dim|layers?|heads?|experts|labels|embeddings|positions))$")
"""Names of the sizes in config.json; `mscale_all_dim` is a factor of rope."""
LIMITS = {"labels": 10_000, "layers": 10_000, "layer": 10_000, "heads": 10_000, "head": 10_000, "experts": 10_000,
          "dim": 2**16}  # fmt: skip
"""Largest sizes by the last part of their names; Transformers makes a table or a list of some. Of others: 2^31 - 1."""
POSITIVE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a model folder and check that the model can be trained and its sizes are plausible.

    Returns:
        Its content, with `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `vocab_size` and
        `tie_word_embeddings` under these names, where the file has others or leaves them to Transformers' defaults.

    Raises:
        ModelError: config.json is missing or broken, the architecture is not supported, or the weights are quantised.
    """
    path = folder / "config.json"
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise ModelError(f"{folder}: no config.json here, so this is not a model folder") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: can't be read: {error}") from None
    if problem := unsuitable(config) or quantised(folder, folder.name):
        raise ModelError(f"{folder}: {problem}")
    if wrong := next(_wrong_sizes(config), None):
        raise ModelError(f"{path}: {wrong} is not a valid size")
    config = _completed(path, config)
    seen = seen_in(config, path)
    expected = weight_bytes(config, "int8", torch.float16) // 2
    there = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if expected > there:
        raise ModelError(f"{path}: a model of these sizes has more weights than fit in the {there:,} bytes beside it")
    _check_layers(path, seen)
    return config


def _wrong_sizes(config: dict[str, Any]) -> Iterator[str]:
    """The names of sizes, at any depth, that are not whole numbers or exceed their limits. None and lists are left to
    Transformers."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _wrong_sizes(value)
        elif SIZE.search(name) and value is not None and not isinstance(value, bool | list):
            last = name.rpartition("_")[2]
            most = LIMITS[last] if last in LIMITS else 2**31 - 1
            if type(value) is not int or not int(name in POSITIVE) <= value <= most:
                yield name


def _completed(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the sizes that Transformers reads from it, under Transformers' common names.

    Raises:
        ModelError: one is not positive, or there are more layers than weights.
    """
    try:
        known = configuration(config).get_text_config(decoder=True)
    except Exception as error:  # anything that a broken configuration causes
        raise ModelError(f"{path}: no model can be made from it: {first_line(error)}") from None
    sizes = {name: largest(known, name) for name in POSITIVE}
    shared, heads = largest(known, "num_key_value_heads"), sizes["num_attention_heads"]
    if type(shared) is int and type(heads) is int and not 0 < shared <= heads:
        raise ModelError(f"{path}: num_key_value_heads is not a valid size")
    for name, value in sizes.items():
        if (value is None and name != "num_attention_heads") or (type(value) is int and value < 1):
            raise ModelError(f"{path}: {name} is not a valid size")
    if known.num_hidden_layers > (count := count_tensors(path.parent)):  # no more layers are made than there can be
        raise ModelError(f"{path}: it has {known.num_hidden_layers:,} layers, but the weights have {count:,} tensors")
    if getattr(known, "tie_word_embeddings", False):
        sizes["tie_word_embeddings"] = True
    return config | {name: value for name, value in sizes.items() if value is not None and name not in config}


def positions(config: dict[str, Any]) -> int:
    """The longest text that a model supports, in tokens. With linear, dynamic or yarn scaling of rope,
    `max_position_embeddings` is the length before scaling; with any other it includes the scaling."""
    most, rope = config.get("max_position_embeddings"), config.get("rope_parameters") or config.get("rope_scaling")
    most = config.get("n_positions") if most is None else most  # GPT-2's name
    most = most if isinstance(most, int) else 2048  # Transformers' default
    if not isinstance(rope, dict):
        return most
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    original = rope.get("original_max_position_embeddings")
    if kind not in ("linear", "dynamic", "yarn") or not isinstance(factor, int | float) or not 1 <= factor < 1e6:
        return most
    return int(factor * (original if kind == "yarn" and isinstance(original, int) else most))


def _check_layers(path: Path, seen: Seen) -> None:
    """Check that the weights have as many layers as the config; `check_weights` compares the rest, layer by layer."""
    prefix = f"{seen.structure.layers}."
    names = (name for tensors in tensors_of(path.parent, seen.model).values() for name in tensors)
    layers = {name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)}
    if len(layers) < seen.sizes.layers:
        raise ModelError(f"{path}: it has {seen.sizes.layers:,} layers, but the weights have {len(layers):,}")


def load_tokenizer(folder: Path) -> "Tokenizer":
    """Load the model's tokenizer. Of several chat templates only the default one is kept, so that all code uses it.

    Raises:
        ModelError: it is missing or broken.
    """
    from transformers import AutoTokenizer

    file = folder / "tokenizer.json"
    try:
        if file.is_file():
            _TOKENIZERS.call("check", TOKENIZER_TIME, path=str(file.absolute()))
    except TooCostlyError as error:
        raise ModelError(f"{file}: reading and trying it takes {error}. Fetch or save the model again") from None
    except FailedError as error:
        raise ModelError(f"{file}: the tokenizer can't be loaded: {error}") from None
    try:
        with without_panics():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # anything that a broken tokenizer file causes
        raise ModelError(f"{folder}: the tokenizer can't be loaded: {first_line(error)}") from None
    tokenizer.chat_template = default_template(tokenizer.chat_template)
    return tokenizer


def default_template(found: object) -> str | None:
    """The chat template to use. found: what the tokenizer has, a text or several by name, as a list or a mapping."""
    if isinstance(found, list):
        found = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
    if isinstance(found, dict):
        found = found.get("default", next(iter(found.values())) if len(found) == 1 else None)
    return found if isinstance(found, str) else None


def load_base(
    folder: Path, dtype: torch.dtype, device: torch.device, over_all: bool | None = None
) -> "PreTrainedModel":
    """Load the frozen base model in `dtype` on `device`, with packed attention where its architecture `packs`.

    generation_config.json is not read, so that the base's beams, penalties and stop strings have no effect.
    over_all: whether to spread it over all GPUs (Accelerate's `device_map="auto"`); None: if one can't hold it.

    Raises:
        MachineError: there is not enough memory for it.
        ModelError: the architecture is not supported; the weights are missing, broken, pickled, or don't match
            config.json.
    """
    from transformers import GenerationConfig

    config_json = read_config(folder)
    check_weights(folder)
    if over_all is None:
        over_all = spread(weight_bytes(config_json, "float", dtype), device)
    config = config_of(folder)
    with within_memory(folder, OR_INT8), reading(folder):
        model = class_of(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map="auto" if over_all else {"": device},
            attn_implementation=PACKED_ATTENTION if architecture_of(config).packs else None,
            use_safetensors=True,
            generation_config=GenerationConfig(),
            local_files_only=True,
        )
    if not {"cpu", "disk"}.isdisjoint(map(str, getattr(model, "hf_device_map", {}).values())) and device.type == "cuda":
        raise MachineError(f"{folder}: {NO_ROOM}{OR_INT8}")
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def activation_bytes_per_token(config: dict[str, Any], dtype: torch.dtype) -> int:
    """Estimate of the memory that one token needs for the backward pass, in bytes, uncompiled, with LoRA everywhere.

    In each layer the norms store their input and its fp32 copy (12 hidden sizes in all); attention stores q, k, v, the
    output and rope's products (8 times the queries' channels); the MLP stores gate, up, silu and their product (6 times
    the inner channels); LoRA stores fp32 inputs (8 hidden sizes). Compiled layers need less than half of that.
    """
    size, sizes = torch.finfo(dtype).bits // 8, seen_in(config).sizes
    layer = (12 * sizes.hidden + 8 * sizes.attention + 6 * sizes.inner) * size + 8 * sizes.hidden * 4
    return sizes.layers * layer


def checkpoint_bytes_per_token(config: dict[str, Any], dtype: torch.dtype) -> int:
    """As `activation_bytes_per_token`, with activation checkpointing: each layer's input, and one layer in full."""
    size, sizes = torch.finfo(dtype).bits // 8, seen_in(config).sizes
    return sizes.layers * sizes.hidden * size + activation_bytes_per_token(config, dtype) // sizes.layers


def weight_bytes(config: dict[str, Any], precision: str, dtype: torch.dtype) -> int:
    """Memory of the frozen base in bytes: linears in `precision`, all else in `dtype`.

    A head tied to the embedding takes none, unless it is quantised and therefore a copy.
    """
    size, sizes = torch.finfo(dtype).bits // 8, seen_in(config).sizes
    stored = STORAGES.get(precision)
    linear_size = stored.bytes_per_weight if stored else size
    head = sizes.head * linear_size if stored or not sizes.tied else 0
    return int(sizes.in_layers * linear_size + (sizes.embedding + sizes.others) * size + head)
