"""How this machine computes a recipe: precision, batching, micro-batches, activation checkpointing, compilation.

The recipe decides what is trained, the plan how it is computed here, and why. It is made before a run starts, printed,
and stored next to the recipe in the run folder. A resumed run gets a new plan: an equal one on the same machine, so
that the result stays bit-identical, and one for the new machine elsewhere.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import torch

from huarizo.errors import RecipeError
from huarizo.host import world_size
from huarizo.kernels import int8
from huarizo.kernels.build import Library
from huarizo.kernels.tiers import tiers, torch_int8
from huarizo.machine import DTYPES, FixedPrecision, available_memory, float_precision, name_of, spread
from huarizo.recipe import Recipe
from huarizo.sandbox.reading import read_text

Gain = Callable[[torch.device, torch.dtype], float]
INT8_GAIN = 1.1  # speedup of an int8 layer over a float one that is worth its rounding error
LEAST_TOKENS = 64  # the smallest micro-batch
Batching = Literal["packed", "padded", "alone"]
"""How examples go through the model, the fastest first: end to end, padded to a similar length, or one by one."""
PADDED = "batches are not packed"  # why layers are not compiled then


@dataclass(frozen=True)
class Choice:
    """The precision of the frozen base, the dtype of its activations, and the reason to show to the user."""

    precision: FixedPrecision
    reason: str
    dtype: torch.dtype

    def to_values(self) -> dict[str, str]:
        """As JSON values."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"precision": self.precision, "precision_reason": self.reason, "dtype": dtype}

    @classmethod
    def from_values(cls, values: Mapping[str, object]) -> "Choice":
        """The inverse of `to_values`; ignores other keys.

        Raises:
            ValueError: the values are not those of a choice.
        """
        formats = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
        precision = next((known for known in get_args(FixedPrecision) if known == values.get("precision")), None)
        dtype = formats.get(str(values.get("dtype")))
        if precision is None or dtype is None:
            raise ValueError("unknown precision or dtype")
        return cls(precision, str(values.get("precision_reason")), dtype)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Estimated memory of a run by part, in bytes."""

    weights: int
    """The frozen base."""
    adapter: int
    """LoRA weights, their gradients and the optimizer moments, all in fp32."""
    activations: int
    """Activations that one micro-batch keeps for the backward pass."""
    available: int
    """Free memory when the plan was made."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a recipe is computed on this machine. None of it changes what is trained."""

    device: str
    """Identifies the device across machines (`huarizo.machine.name_of`)."""
    world_size: int
    """Number of processes."""
    choice: Choice
    """The precision of the frozen base, the dtype of activations, and why."""
    micro_batch_tokens: int
    """Tokens computed at once, at most."""
    activation_checkpointing: bool
    """Whether activations are recomputed in the backward pass to save memory."""
    spread: bool
    """Whether the base is spread over all GPUs, because one can't hold it."""
    compiled: bool
    """Whether the decoder layers are compiled."""
    compilation: str
    """Why they are not; "" if they are."""
    memory: Memory
    batching: Batching = "packed"
    """How examples go through the model."""
    batching_reason: str = ""
    """Why so, to show to the user."""

    def with_batching(self, batching: Batching, reason: str) -> "Plan":
        """The same plan with another batching; only packed batches are computed by compiled layers."""
        compilation = self.compilation if batching == "packed" else self.compilation or PADDED
        return replace(
            self, batching=batching, batching_reason=reason, compiled=not compilation, compilation=compilation
        )

    def to_json(self) -> str:
        """The content of plan.json."""
        values = {key: value for key, value in vars(self).items() if key not in ("choice", "memory")}
        return json.dumps({**values, **self.choice.to_values(), "memory": asdict(self.memory)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The inverse of `to_json`. A plan without a batching is one of packed batches.

        Raises:
            ValueError: the text is not that of a plan.
        """
        try:
            values = {"batching": "packed", "batching_reason": "", **json.loads(text)}
            own = {field.name: values[field.name] for field in fields(cls) if field.name not in ("choice", "memory")}
            plan = cls(**own, choice=Choice.from_values(values), memory=Memory(**values["memory"]))
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a plan: {error}") from None
        for part in (plan, plan.memory):
            for name, kind in get_type_hints(type(part)).items():
                if kind in (str, int, bool) and type(getattr(part, name)) is not kind:
                    raise ValueError(f"not a plan: {name} is not of type {kind.__name__}")
        if plan.micro_batch_tokens < 1:
            raise ValueError("not a plan: micro_batch_tokens is below 1")
        if plan.batching not in get_args(Batching):
            raise ValueError("not a plan: unknown batching")
        return plan

    def is_for(self, device: str, world_size: int) -> bool:
        """Whether it was made for this device and number of processes."""
        return (self.device, self.world_size) == (device, world_size)


def choose_precision(wanted: str, on: torch.device, int8_gain: Gain | None = None) -> Choice:
    """Choose the precision of the frozen base.

    `auto` is int8 on a CPU whose tier has an int8 kernel, or whose int8 instructions torch uses, and on a GPU where a
    whole int8 layer is at least INT8_GAIN times as fast as the best float layer; otherwise it is the fastest float
    precision. On a CPU nothing is measured, but the kernel is compiled.

    int8_gain: measures the speedup of int8 (`huarizo.model.frozen.measure`); without it, no GPU gets int8.

    Raises:
        RecipeError: this device does not support the wanted precision.
    """
    best = float_precision(on)
    if wanted == "auto":
        if reason := _reason_for_int8(on, best, int8_gain):
            return Choice("int8", reason, DTYPES[best])
        return Choice(best, _reason_for_float(on, best), DTYPES[best])
    if wanted == "fp16" and on.type != "cuda":
        raise RecipeError("precision: fp16 needs an NVIDIA GPU. Use precision=auto, int8, bf16 or fp32")
    if wanted == "bf16" and on.type == "cuda" and best != "bf16":
        raise RecipeError("precision: this GPU has no bf16. Use precision=auto, int8 or fp16")
    if wanted == "int8" and on.type not in ("cpu", "cuda"):
        raise RecipeError(f"precision: int8 needs a CPU or an NVIDIA GPU, not {on.type}. Use precision=auto")
    return Choice(wanted, "as the recipe asks", DTYPES[best if wanted == "int8" else wanted])  # pyright: ignore


def nearest_precision(made_in: str, on: torch.device) -> Choice:
    """As `choose_precision`, for a resumed run; another precision if this device lacks the run's own."""
    try:
        return choose_precision(made_in, on)
    except RecipeError:
        best = float_precision(on)
        reason = f"the run was started in {made_in}, which this {on.type} does not support"
        return Choice(best, reason, DTYPES[best])


def _reason_for_int8(on: torch.device, best: FixedPrecision, int8_gain: Gain | None) -> str | None:
    """Why int8, with activations in the precision `best`, is the fastest here; None if it isn't."""
    if on.type == "cpu":  # known, not measured: a busy machine must not change what is trained
        return _reason_for_int8_on_cpu(DTYPES[best])
    gain = int8_gain(on, DTYPES[best]) if on.type == "cuda" and int8_gain is not None else 0.0
    return f"a layer measured {gain:.1f} times as fast as in {best}" if gain >= INT8_GAIN else None


def _reason_for_int8_on_cpu(dtype: torch.dtype) -> str | None:
    library = int8.library() if int8.reason_against(dtype) is None else None
    if isinstance(library, Library) and library.tier.int8_product:
        return f"this CPU multiplies int8 with {library.tier.int8_product} (tier {library.tier.name})"
    instructions = torch_int8()
    return f"this CPU has int8 instructions that torch uses ({', '.join(instructions)})" if instructions else None


def _reason_for_float(on: torch.device, best: FixedPrecision) -> str:
    """Why int8 isn't the fastest here, where `_reason_for_int8` finds no reason for it."""
    if on.type != "cpu":
        return f"the fastest float format of {on.type}; int8 is not faster here"
    missing = int8.reason_against(DTYPES[best])
    if missing and any(tier.int8_product for tier in tiers()):
        return f"the fastest float format of this CPU. int8 would be faster, but its kernel is missing: {missing}"
    return "the fastest float format of this CPU, which has no int8 instructions"


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The sizes of a model that a plan needs, in a given precision."""

    weights: int
    """Bytes of the frozen base."""
    trained: int
    """Number of LoRA weights."""
    activations: int
    """Bytes of activations that one token keeps for the backward pass."""
    checkpoints: int
    """The same with activation checkpointing."""


def read_plan(path: Path) -> Plan | None:
    """The plan in a run folder's plan.json; None if there is none, or none that can be read."""
    try:
        return Plan.from_json(read_text(path))
    except (OSError, ValueError):
        return None


def make_plan(
    recipe: Recipe,
    choice: Choice,
    size: ModelSize,
    on: torch.device,
    compilation: str,
    before: Plan | None = None,
    batching: tuple[Batching, str] = ("packed", ""),
) -> Plan:
    """Plan the micro-batches, and activation checkpointing if the longest row would not fit without it.

    compilation: why the layers can't be compiled; "" if they can.
    before: the plan of the same run on this machine. Its micro-batches and batching are kept, so that rounding stays
        the same.
    batching: how examples go through the model, and why.
    """
    everywhere = spread(size.weights, on) and choice.precision != "int8"
    if everywhere:
        compilation = compilation or "the model is spread over several GPUs"
    available = available_memory(on, everywhere)
    wanted = recipe.training.micro_batch_tokens
    tokens = wanted or micro_batch_tokens(size.activations, available - size.weights, on)
    left_open = "gradient_checkpointing" not in recipe.trainer
    checkpointing = not wanted and left_open and tokens < recipe.data.max_length
    if before is not None and not wanted:
        tokens, checkpointing = before.micro_batch_tokens, left_open and before.activation_checkpointing
    elif checkpointing:
        tokens = recipe.data.max_length
    tokens = tokens if wanted else max(tokens, LEAST_TOKENS)
    checkpointing = checkpointing or bool(recipe.trainer.get("gradient_checkpointing"))
    kept = size.checkpoints if checkpointing else size.activations
    plan = Plan(
        device=name_of(on),
        world_size=world_size(),
        choice=choice,
        micro_batch_tokens=tokens,
        activation_checkpointing=checkpointing,
        spread=everywhere,
        compiled=not compilation,
        compilation=compilation,
        memory=Memory(weights=size.weights, adapter=16 * size.trained, activations=tokens * kept, available=available),
    )
    if before is not None and before.batching != batching[0]:
        batching = before.batching, before.batching_reason
    return plan.with_batching(*batching)


def micro_batch_tokens(bytes_per_token: int, free: int, on: torch.device) -> int:
    """How many tokens to compute at once: as many as fit in 60% of the `free` bytes, up to where speed levels off."""
    most = 16384 if on.type == "cuda" else 1024
    return max(0, min(most, int(0.6 * free) // max(bytes_per_token, 1) // 64 * 64))
