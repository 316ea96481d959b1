"""A local model folder becomes a Llama whose decoder layers are int8, one layer at a time.

Each layer is read in its float dtype, a few training rows run through it so that its input channels show their size,
then its linears are quantised and the float weights let go; the output head likewise. The whole float model never
stands in memory, and no layer sees what quantisation did to the ones before it. Embedding and norms stay in the float
dtype.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from huarizo.data.packing import PackedBatch
from huarizo.model.attention import NAME as PACKED_ATTENTION
from huarizo.model.frozen.int8 import quantise
from huarizo.model.load import read_config
from huarizo.model.weights import HEAD, check_weights, read_tensor, tensors_of, unloadable

# Linears of a decoder layer that read the same activations.
GROUPS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)


class _Weights:
    """The tensors of a model folder by name, each read when it is asked for."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.files = {name: folder / file for file, names in tensors_of(folder).items() for name in names}
        self.folder, self.dtype, self.device = folder, dtype, device

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Give every parameter of `module` the tensor of its name behind `prefix`."""
        tensors = {}
        for name, _ in module.named_parameters():
            full = f"{prefix}.{name}"
            tensors[name] = read_tensor(self.files[full], full, self.device).to(self.dtype)
        module.load_state_dict(tensors, assign=True)


@contextmanager
def _peaks(layer: nn.Module) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """The largest |x| of each input channel, float32 [K], of every linear of `layer` that runs inside the block."""
    seen: dict[nn.Module, torch.Tensor] = {}

    def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen[module] = args[0].detach().abs().flatten(0, -2).amax(0).float()

    handles = [m.register_forward_pre_hook(note) for m in layer.modules() if isinstance(m, nn.Linear)]
    yield seen
    for handle in handles:
        handle.remove()


def quantise_layer(layer: nn.Module, peaks: dict[nn.Module, torch.Tensor]) -> None:
    """Put int8 layers in the place of the linears of a decoder layer."""
    for part, names in GROUPS:
        parent = layer.get_submodule(part)
        linears: Sequence[Any] = [getattr(parent, name) for name in names]
        for name, replacement in zip(names, quantise(linears, peaks[linears[0]]), strict=True):
            setattr(parent, name, replacement)


@torch.no_grad()
def load_int8_base(folder: Path, dtype: torch.dtype, device: torch.device, calibration: PackedBatch) -> Any:
    """The frozen base with int8 linears on `device`, with packed attention.

    dtype: of the activations and of what is not quantised; calibration: a packed batch of training rows. The same rows
    give the same int8 weights.

    Raises:
        MachineError: there is not enough memory for it.
        ModelError: another architecture; missing, broken, pickled or other weights than config.json describes.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    read_config(folder)
    check_weights(folder)
    config = LlamaConfig.from_pretrained(folder, local_files_only=True)
    config._attn_implementation = PACKED_ATTENTION
    config.use_cache = False
    config.dtype = dtype
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    try:
        weights = _Weights(folder, dtype, device)
        inner: Any = model.model
        inner.rotary_emb = LlamaRotaryEmbedding(config).to(device)
        weights.fill(inner.embed_tokens, "model.embed_tokens")
        weights.fill(inner.norm, "model.norm")
        calibration = calibration.to(device)
        hidden = inner.embed_tokens(calibration.input_ids)
        embeddings = inner.rotary_emb(hidden, calibration.position_ids)
        for number, layer in enumerate(inner.layers):
            weights.fill(layer, f"model.layers.{number}")
            with _peaks(layer) as peaks:
                hidden = layer(hidden, position_embeddings=embeddings, cu_seqlens=calibration.cu_seqlens)
            quantise_layer(layer, peaks)
        if HEAD in weights.files:
            weights.fill(model.lm_head, "lm_head")
        else:
            model.tie_weights()
        with _peaks(model) as peaks:
            model.lm_head(inner.norm(hidden))
        model.lm_head = quantise([model.lm_head], peaks[model.lm_head])[0]
    except (RuntimeError, ValueError, KeyError) as error:
        raise unloadable(folder, error) from None
    model.generation_config = GenerationConfig()  # as load_base
    return model.requires_grad_(False).eval()
