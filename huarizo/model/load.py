"""Loads a frozen model and its tokenizer from a local folder.

Only registered architectures are accepted, only safetensors are read, and no code of a model ever runs.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from huarizo.errors import MachineError, ModelError
from huarizo.hub.model_files import quantised
from huarizo.machine import spread
from huarizo.model.architectures.architecture import Architecture
from huarizo.model.architectures.registry import architecture_of
from huarizo.model.attention import NAME as PACKED_ATTENTION
from huarizo.model.frozen.storages import STORAGES
from huarizo.model.weights import (
    NO_ROOM,
    check_weights,
    class_of,
    config_of,
    reading,
    tensors_of,
    within_memory,
)
from huarizo.sandbox.reading import read_json, without_panics
from huarizo.sandbox.worker import FailedError, TooCostlyError, Worker
from huarizo.wording import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from huarizo.data.templates import Tokenizer

TOKENIZER_TIME, TOKENIZER_MEMORY = 60.0, 4 * 2**30  # seconds and bytes, for tokenizer.json
_TOKENIZERS = Worker("tokenizers", TOKENIZER_MEMORY)
OR_INT8 = ", or train with precision=int8"
LIMITS = {"head_dim": 2**16, "max_position_embeddings": 2**31, "num_labels": 10_000}
"""Largest values of other sizes in config.json: Transformers makes a table of `num_labels` names."""


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a model folder and check that the architecture is supported.

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
    architecture = architecture_of(config, folder)
    if problem := quantised(folder, folder.name):
        raise ModelError(f"{folder}: {problem}")
    _check_sizes(path, config, architecture)
    return config


def _check_sizes(path: Path, config: dict[str, Any], architecture: Architecture) -> None:
    """Check that the sizes are whole numbers, and that the weight files are large enough for them."""
    wrong = [name for name in architecture.sizes if type(config.get(name)) is not int or not 0 < config[name] < 2**31]
    shared = config.get("num_key_value_heads")
    if wrong or (shared is not None and (type(shared) is not int or not 0 < shared <= config["num_attention_heads"])):
        raise ModelError(f"{path}: {(wrong or ['num_key_value_heads'])[0]} is not a valid size")
    expected = weight_bytes(config, "int8", torch.float16) // 2
    there = sum(file.stat().st_size for file in path.parent.glob("*.safetensors"))
    if expected > there:
        raise ModelError(f"{path}: a model of these sizes has more weights than fit in the {there:,} bytes beside it")
    for name, most in LIMITS.items():
        value = config.get(name)
        if value is not None and (type(value) is not int or not 0 < value <= most):
            raise ModelError(f"{path}: {name} is not a valid size")
    _check_layers(path, config, architecture.layers + ".")


def positions(config: dict[str, Any]) -> int:
    """The longest text that a model supports, in tokens. With linear, dynamic or yarn scaling of rope,
    `max_position_embeddings` is the length before scaling; with any other it includes the scaling."""
    most, rope = config.get("max_position_embeddings"), config.get("rope_parameters") or config.get("rope_scaling")
    most = most if isinstance(most, int) else 2048  # Transformers' default
    if not isinstance(rope, dict):
        return most
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    original = rope.get("original_max_position_embeddings")
    if kind not in ("linear", "dynamic", "yarn") or not isinstance(factor, int | float) or not 1 <= factor < 1e6:
        return most
    return int(factor * (original if kind == "yarn" and isinstance(original, int) else most))


def _check_layers(path: Path, config: dict[str, Any], prefix: str) -> None:
    """Check that the weights have as many layers as the config; `check_weights` compares the rest, layer by layer."""
    names = (name for tensors in tensors_of(path.parent).values() for name in tensors)
    layers = {name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)}
    if len(layers) < config["num_hidden_layers"]:
        raise ModelError(f"{path}: it has {config['num_hidden_layers']:,} layers, but the weights have {len(layers):,}")


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

    Compiled layers need less than half of that.
    """
    size = torch.finfo(dtype).bits // 8
    return config["num_hidden_layers"] * architecture_of(config).layer_activation_bytes(config, size)


def checkpoint_bytes_per_token(config: dict[str, Any], dtype: torch.dtype) -> int:
    """As `activation_bytes_per_token`, with activation checkpointing: each layer's input, and one layer in full."""
    layers, size = config["num_hidden_layers"], torch.finfo(dtype).bits // 8
    return layers * config["hidden_size"] * size + activation_bytes_per_token(config, dtype) // layers


def weight_bytes(config: dict[str, Any], precision: str, dtype: torch.dtype) -> int:
    """Memory of the frozen base in bytes: linears in `precision`, the embedding in `dtype`.

    A head tied to the embedding takes none, unless it is quantised and therefore a copy.
    """
    size = torch.finfo(dtype).bits // 8
    stored = STORAGES.get(precision)
    linear_size = stored.bytes_per_weight if stored else size
    embedding = config["vocab_size"] * config["hidden_size"]
    head = embedding * linear_size if stored or not config.get("tie_word_embeddings") else 0
    layers = config["num_hidden_layers"] * architecture_of(config).layer_weights(config)
    return int(layers * linear_size + embedding * size + head)
