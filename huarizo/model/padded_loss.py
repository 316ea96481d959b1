"""Cross-entropy at labelled positions of padded batches, from the logits that the model's own code computes.

Nothing is assumed about the model but that it is causal: its own attention runs, with a mask, and its own logits are
taken, so that windows, soft caps and scales are whatever they are. Logits are computed for the labelled columns only
where the model's forward pass has `logits_to_keep`.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from huarizo.data.padding import PaddedBatch, Within, each_alone, pad_within
from huarizo.model.dropout import at_places

# Shapes: n examples of a group, W tokens of each with padding, K columns of it, L labelled tokens; V vocabulary size.


def take_own_attention(base: PreTrainedModel) -> None:
    """Let a model use Transformers' default attention for it: sdpa, or eager if it has no sdpa."""
    base.set_attn_implementation(base.get_correct_attn_implementation(None))


def logits_bytes_per_token(config: Mapping[str, Any], dtype: torch.dtype) -> int:
    """Memory in bytes that the logits of a learnt token need for the backward pass.

    They and the labelled ones among them have gradients in the dtype of activations, their log-probabilities in fp32.

    config: the content of config.json.
    """
    return config["vocab_size"] * (4 * torch.finfo(dtype).bits // 8 + 2 * 4)


class PaddedLoss:
    """The summed loss of padded batches (see `huarizo.data.padding`).

    base: the causal model, inside any wrapper; it takes its own attention. alone: whether each example is a batch of
    its own.
    """

    def __init__(self, base: PreTrainedModel, alone: bool = False) -> None:
        take_own_attention(base)
        self.base = base
        self.within: Within = each_alone if alone else pad_within
        self.takes = frozenset(inspect.signature(base.forward).parameters)

    def __call__(self, model: torch.nn.Module, batch: PaddedBatch) -> torch.Tensor:
        """The loss of a batch, a float32 scalar. `model` is the base or wraps it."""
        logits_LV = self._labelled(model, batch)
        if not batch.num_labels:
            return (logits_LV * 0).sum().float()
        return F.cross_entropy(logits_LV.float(), batch.targets.to(logits_LV.device), reduction="sum")

    def by_token(self, model: torch.nn.Module, batch: PaddedBatch) -> torch.Tensor:
        """The loss of each labelled token of a batch: [L] float32, without gradient."""
        with torch.no_grad():
            logits_LV = self._labelled(model, batch)
            return F.cross_entropy(logits_LV.float(), batch.targets.to(logits_LV.device), reduction="none")

    def _labelled(self, model: torch.nn.Module, batch: PaddedBatch) -> torch.Tensor:
        """The model's logits at the labelled positions, [L, V]."""
        columns_K = batch.label_columns.unique() if batch.num_labels else batch.label_columns.new_zeros(1)
        inputs: dict[str, Any] = batch.model_inputs()
        if "use_cache" in self.takes:
            inputs["use_cache"] = False
        if "logits_to_keep" not in self.takes:
            logits_nKV = model(**inputs).logits
        else:
            head = self.base.get_output_embeddings()
            assert head is not None
            places_nK = batch.places.view(batch.num_examples, -1)[:, columns_K]
            with at_places(head, places_nK.flatten()):
                logits_nKV = model(**inputs, logits_to_keep=columns_K).logits
        on, every = logits_nKV.device, logits_nKV.shape[1] == batch.longest
        columns_L = batch.label_columns if every else torch.searchsorted(columns_K, batch.label_columns)
        return logits_nKV[batch.label_rows.to(on), columns_L.to(on)]
