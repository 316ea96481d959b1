"""The weights of a tuned model, one tensor at a time: the base's, with the adapter's change added.

The adapter is added to the original float weights in fp32, in whichever precision the base was trained. Only one tensor
of the model is in memory at a time. PEFT's own layer does the arithmetic, so every kind of LoRA is merged as PEFT
defines it.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from huarizo.errors import ModelError
from huarizo.hub.model_files import tensors_in
from huarizo.model.adapter import (
    CONFIG,
    PREFIX,
    TOKEN_ROWS,
    check_adapter,
    is_of_the_base,
    layer_of,
    rows_with,
    trained_rows,
)
from huarizo.model.adapter import WEIGHTS as ADAPTER_WEIGHTS
from huarizo.model.added_tokens import lengthened
from huarizo.model.architectures.registry import architecture_of
from huarizo.model.load import read_config
from huarizo.model.skeleton import seen_in
from huarizo.model.weights import FLOATS, Stored, check_weights, read_tensor, tensors_of
from huarizo.wording import first_line

if TYPE_CHECKING:
    from peft import LoraConfig

LINEAR_PARTS = {"lora_A.weight", "lora_B.weight"}
EMBEDDING_PARTS = {"lora_embedding_A", "lora_embedding_B"}
MAGNITUDE = "lora_magnitude_vector"  # of DoRA


class MergedWeights:
    """The tensors of a base model with an adapter added, by the base's names.

    base: a model's folder. adapter: a LoRA adapter's folder, or None for the base alone. `changes` holds the adapter's
    parts by module (`lora_A.weight` [r, in], `lora_B.weight` [out, r] ...), `replaced` the tensors that it replaces as
    a whole, `token_rows` its rows of single tokens by tensor, as ids and [ids, H], and `base_tensors` the embedding and
    head saved with the adapter, if they differ from the base's. Embedding and head have as many rows as the adapter
    needs. `transposed` names the modules whose weights are [in, out].

    Raises:
        ModelError: the base lacks weights; the adapter is broken, or of another model (the message names both).
    """

    def __init__(self, base: Path, adapter: Path | None) -> None:
        self.base, self.adapter = base, adapter
        self.config = read_config(base)
        self.architecture = architecture_of(self.config)
        model, self.structure, _ = seen_in(self.config, base)
        self.embedding, self.head = (f"{path}.weight" for path in (self.structure.embedding, self.structure.head))
        self.transposed = {path for path, module in model.named_modules() if isinstance(module, Conv1D)}
        check_weights(base)
        files = tensors_of(base, model)
        if self.config.get("tie_word_embeddings"):
            _leave_out_a_copy(base, files, self.head, self.embedding)
        self.shards = {file: list(tensors) for file, tensors in files.items()}
        self._file_of = {name: file for file, tensors in files.items() for name in tensors}
        self._headers = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
        self.changes: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        self.replaced: dict[str, torch.Tensor] = {}
        self.token_rows: dict[str, tuple[list[int], torch.Tensor]] = {}
        self.base_tensors: dict[str, torch.Tensor] = {}
        if adapter is not None:
            self._lora: LoraConfig = check_adapter(adapter)
            self._ids, self._lora.trainable_token_indices = trained_rows(self._lora), None  # `_added` leaves them out
            self.config["vocab_size"] = rows_with(adapter, self.config["vocab_size"])
            self._read_adapter(adapter)
        if self._changes_one_of_the_tied():
            if self.tied:
                self.shards[list(self.shards)[-1]].append(self.head)
            self.config["tie_word_embeddings"] = False

    @property
    def tied(self) -> bool:
        """Whether the head shares the embedding's tensor."""
        return self.head not in self._file_of

    def names(self) -> list[str]:
        """The names of all tensors, in the order of the base's files."""
        return [name for names in self.shards.values() for name in names]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of this tensor in the base."""
        return FLOATS[self._headers[self._source(name)].dtype]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape; unless the adapter replaces the tensor, only the file's header is read."""
        if name in self.replaced:
            return tuple(self.replaced[name].shape)
        source = self._source(name)
        if source in (self.embedding, self.head):
            return self.config["vocab_size"], self._headers[source].shape[1]
        return tuple(self._headers[source].shape)

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor with the adapter's change, in float32."""
        weight = (self.replaced[name] if name in self.replaced else self._base_tensor(self._source(name))).float()
        ids, rows = self.token_rows.get(name) or self.token_rows.get(self._source(name)) or ([], None)
        if rows is not None:
            weight = weight.index_copy(0, torch.tensor(ids), rows.float())
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self.changes:
            return self._added(module, weight)
        return weight

    def _source(self, name: str) -> str:
        return self.embedding if name == self.head and self.tied else name

    def _base_tensor(self, name: str) -> torch.Tensor:
        """The tensor that the adapter changes, with a row for each token."""
        if name in self.base_tensors:
            return self.base_tensors[name]
        tensor = self._file_tensor(name)
        return lengthened(tensor, self.config["vocab_size"]) if name in (self.embedding, self.head) else tensor

    def _file_tensor(self, name: str) -> torch.Tensor:
        return read_tensor(self.base / self._file_of[name], self._headers[name].name)

    def _read_adapter(self, adapter: Path) -> None:
        for key in sorted(tensors_in(adapter / ADAPTER_WEIGHTS)):
            tensor = read_tensor(adapter / ADAPTER_WEIGHTS, key)
            if not tensor.isfinite().all():
                raise ModelError(f"{adapter}: {key} holds numbers that are not finite. Train it again")
            self._take(adapter, key, tensor)
        given, self.base_tensors = self.base_tensors, {}
        same = (name for name, tensor in given.items() if torch.equal(tensor.float(), self._base_tensor(name).float()))
        self.base_tensors = {name: given[name] for name in given.keys() - set(same)}
        for module, parts in self.changes.items():
            self._check_parts(module, parts)

    def _take(self, adapter: Path, key: str, tensor: torch.Tensor) -> None:
        """Sort a tensor of the adapter's file into `changes`, `token_rows`, `base_tensors` or `replaced`."""
        saved_whole = tuple(self._lora.modules_to_save or ())
        known = {name.removesuffix(".weight") for name in self._file_of} | {self.structure.head}
        module, (_, mark, rest) = layer_of(key), key.partition(".lora_")
        if module not in known:
            raise self._wrong_base(f"it has no {module}")
        if rest == "B.bias":
            raise ModelError(f"{adapter}: lora_bias can't be merged. The adapter can be used with PEFT as it is")
        if mark:
            self.changes[module][f"lora_{rest}"] = tensor
        elif key.endswith(TOKEN_ROWS):
            self._take_rows(key, module, tensor)
        elif is_of_the_base(key, self._lora):
            self._take_base(f"{module}.weight", tensor)
        elif module.endswith(saved_whole):
            self._replace(key.removeprefix(PREFIX), tensor)
        else:
            raise ModelError(f"{adapter}: {key} is not in modules_to_save of its {CONFIG}")

    def _take_rows(self, key: str, module: str, rows: torch.Tensor) -> None:
        ids = self._ids.get(module.rpartition(".")[2], [])
        if tuple(rows.shape) != (len(ids), self.config["hidden_size"]):
            raise self._wrong_base(
                f"{key} is {_size(rows.shape)}, for {len(ids)} tokens of {self.config['hidden_size']} numbers each"
            )
        self.token_rows[f"{module}.weight"] = ids, rows

    def _take_base(self, name: str, tensor: torch.Tensor) -> None:
        """Use the embedding or head saved with the adapter instead of the base's. Tied ones must be equal."""
        self._check_size(name, tensor)
        name = self._source(name)
        if not torch.equal(self.base_tensors.setdefault(name, tensor), tensor):
            raise self._wrong_base("its embedding and head are one tensor, and the adapter's are two")

    def _replace(self, name: str, tensor: torch.Tensor) -> None:
        self._check_size(name, tensor)
        if not torch.equal(tensor.float(), self._base_tensor(self._source(name)).float()):
            self.replaced[name] = tensor

    def _check_size(self, name: str, tensor: torch.Tensor) -> None:
        if tuple(tensor.shape) != self.shape(name):
            raise self._wrong_base(f"its {name} is {_size(self.shape(name))}, the adapter's {_size(tensor.shape)}")

    def _check_parts(self, module: str, parts: dict[str, torch.Tensor]) -> None:
        wanted = EMBEDDING_PARTS if "lora_embedding_A" in parts else LINEAR_PARTS
        wanted = wanted | ({MAGNITUDE} if self._lora.use_dora else set())
        if set(parts) != wanted:
            odd = sorted(set(parts) ^ wanted)[0]
            raise ModelError(f"{self.adapter}: {odd} of {module} is {'missing' if odd in wanted else 'not expected'}")
        shape, ours = self.shape(f"{module}.weight"), _shape_of(parts)
        if (shape[::-1] if module in self.transposed else shape) != ours:
            raise self._wrong_base(f"its {module} is {_size(shape)}, the adapter's {_size(ours)}")

    def _changes_one_of_the_tied(self) -> bool:
        tied = (self.structure.embedding, self.structure.head)
        changed = any(module in self.changes or f"{module}.weight" in self.replaced for module in tied)
        return changed or self.head in self.token_rows

    def _added(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight with LoRA's change, merged by PEFT in a module tree that holds this one layer."""
        from peft import inject_adapter_in_model

        parts, shape = self.changes[module], weight.shape
        if "lora_embedding_A" in parts:
            tree: Any = nn.Embedding(shape[0], shape[1], device="meta")
        elif module in self.transposed:
            with torch.device("meta"):
                tree = Conv1D(shape[1], shape[0])
        else:
            tree = nn.Linear(shape[1], shape[0], bias=False, device="meta")
        tree.weight = nn.Parameter(weight, requires_grad=False)
        for name in reversed(module.split(".")):
            above = nn.Module()
            above.add_module(name, tree)
            tree = above
        try:
            inject_adapter_in_model(self._lora, tree)
            lora = tree.get_submodule(module)
            lora.load_state_dict({_named(key): tensor for key, tensor in parts.items()}, strict=False)
            lora.merge(safe_merge=True)
        except Exception as error:  # anything that an unknown adapter causes in PEFT
            raise ModelError(f"{self.adapter}: {module} can't be merged: {first_line(error)}") from None
        return lora.get_base_layer().weight.detach()

    def _wrong_base(self, why: str) -> ModelError:
        made_for = self._lora.base_model_name_or_path or "a model that it does not name"
        return ModelError(f"{self.adapter}: this adapter was made for {made_for}, not for {self.base}: {why}")


def _leave_out_a_copy(base: Path, files: dict[str, dict[str, Stored]], head: str, embedding: str) -> None:
    """Leave out the tensor of a tied head if the files hold it as a copy of the embedding."""
    place = {name: (base / file, tensor.name) for file, tensors in files.items() for name, tensor in tensors.items()}
    if head in place and torch.equal(read_tensor(*place[head]), read_tensor(*place[embedding])):
        for tensors in files.values():
            tensors.pop(head, None)


def _shape_of(parts: dict[str, torch.Tensor]) -> tuple[int, int]:
    """The shape of the weight that an adapter's parts change: [out, in], or [tokens, size] for an embedding."""
    if "lora_embedding_A" in parts:
        return parts["lora_embedding_A"].shape[1], parts["lora_embedding_B"].shape[0]
    return parts["lora_B.weight"].shape[0], parts["lora_A.weight"].shape[1]


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _named(key: str) -> str:
    """The name in PEFT's layer of a part of an adapter file: lora_A.weight -> lora_A.default.weight."""
    part, _, rest = key.partition(".")
    if part.startswith("lora_embedding"):
        return f"{part}.default"
    return f"{part}.default.{rest}" if rest else f"{part}.default.weight"


def merged_shards(weights: MergedWeights) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Each file's name and tensors, in the base's dtypes; one file at a time is in memory.

    Raises:
        ModelError: a merged weight is too large for the base's dtype.
    """
    for file, names in weights.shards.items():
        yield file, {name: _cast(weights, name) for name in names}


def _cast(weights: MergedWeights, name: str) -> torch.Tensor:
    weight = weights[name]
    cast = weight.to(weights.dtype(name)).contiguous()
    if weight.isfinite().all() and not cast.isfinite().all():
        raise ModelError(f"{weights.adapter}: merged, {name} is too large for {cast.dtype}, the dtype of the base")
    return cast
