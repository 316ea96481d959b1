"""What the machine makes of a recipe: the number format, how many tokens are computed at once, and what is compiled.

The recipe says what is trained and is the same everywhere; the plan says how it is computed here, and why. It is made
before a run starts, shown, and kept beside the recipe in the run's folder. A run that is resumed gets a new plan: the
same one on the same machine, so that the result stays bit-identical, and another machine's own elsewhere.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from huarizo.errors import RecipeError
from huarizo.host import int8_instructions, world_size
from huarizo.machine import DTYPES, FixedPrecision, available_memory, float_precision, name_of, spread
from huarizo.recipe import Recipe

Gain = Callable[[torch.device, torch.dtype], float]
INT8_GAIN = 1.1  # how much faster a whole int8 layer must be than a float one, to be worth its rounding
LEAST_TOKENS = 64  # of a micro-batch


@dataclass(frozen=True)
class Choice:
    """A precision of the frozen base, the dtype of its activations, and the reason, in words for the user."""

    precision: FixedPrecision
    reason: str
    dtype: torch.dtype

    def to_values(self) -> dict[str, str]:
        """As JSON values."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"precision": self.precision, "precision_reason": self.reason, "dtype": dtype}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "Choice":
        """`to_values`, read back; other keys are left alone.

        Raises:
            ValueError: it is something else.
        """
        formats = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
        precision, dtype = values.get("precision"), formats.get(values.get("dtype", ""))
        if precision not in ("int8", *DTYPES) or dtype is None:
            raise ValueError("an unknown number format")
        return cls(precision, str(values.get("precision_reason")), dtype)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a run takes, by part, as estimated before the start; `available` are those that were free then."""

    weights: int
    """The frozen base."""
    adapter: int
    """LoRA's weights with their gradients and the optimizer's moments, all in fp32."""
    activations: int
    """What one micro-batch keeps for the backward pass."""
    available: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a recipe is computed on this machine. Nothing in it changes what is trained."""

    device: str
    """In words, with what tells it from other machines: the name, and the instructions of a CPU."""
    world_size: int
    """Processes of the run."""
    choice: Choice
    """The precision of the frozen base, the dtype of activations, and why."""
    micro_batch_tokens: int
    """Tokens computed at once."""
    activation_checkpointing: bool
    """Whether activations are computed a second time in the backward pass, because they do not all fit."""
    compiled: bool
    """Whether the decoder layers are compiled."""
    compilation: str
    """Why they are not; empty where they are."""
    memory: Memory

    def to_json(self) -> str:
        """The content of plan.json."""
        values = {key: value for key, value in vars(self).items() if key not in ("choice", "memory")}
        return json.dumps({**values, **self.choice.to_values(), "memory": asdict(self.memory)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """`to_json`, read back.

        Raises:
            ValueError: it is something else.
        """
        values = json.loads(text)
        try:
            own = {field.name: values[field.name] for field in fields(cls) if field.name not in ("choice", "memory")}
            return cls(**own, choice=Choice.from_values(values), memory=Memory(**values["memory"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no plan of a run: {error}") from None

    def is_for(self, device: str, world_size: int) -> bool:
        """Whether it was made on such a machine, for as many processes."""
        return (self.device, self.world_size) == (device, world_size)


def choose_precision(wanted: str, on: torch.device, int8_gain: Gain | None = None) -> Choice:
    """The number format of the frozen base.

    `auto` takes int8 on a CPU with instructions for it, and on a card where a whole int8 layer is INT8_GAIN times as
    fast as the best float's; otherwise the fastest float format. On a CPU nothing is measured.

    int8_gain: measures how many times as fast it is (`huarizo.model.frozen.measure`); without it no card gets int8.

    Raises:
        RecipeError: a format that this device does not have.
    """
    best = float_precision(on)
    if wanted == "auto":
        int8 = _reason_for_int8(on, best, int8_gain)
        if int8:
            return Choice("int8", int8, DTYPES[best])
        return Choice(best, _reason_for_float(on), DTYPES[best])
    if wanted == "fp16" and on.type != "cuda":
        raise RecipeError("precision: fp16 needs an NVIDIA card. Use precision=auto, int8, bf16 or fp32")
    if wanted == "bf16" and on.type == "cuda" and best != "bf16":
        raise RecipeError("precision: this card has no bf16. Use precision=auto, int8 or fp16")
    if wanted == "int8" and on.type not in ("cpu", "cuda"):
        raise RecipeError(f"precision: int8 needs a CPU or an NVIDIA card, not {on.type}. Use precision=auto")
    return Choice(wanted, "as the recipe asks", DTYPES[best if wanted == "int8" else wanted])  # pyright: ignore


def nearest_precision(made_in: str, on: torch.device) -> Choice:
    """As `choose_precision`, for a run made in this format elsewhere; another one where this device lacks it."""
    try:
        return choose_precision(made_in, on)
    except RecipeError:
        best = float_precision(on)
        reason = f"the run was made in {made_in}, which {on.type} does not have here"
        return Choice(best, reason, DTYPES[best])


def _reason_for_int8(on: torch.device, best: str, int8_gain: Gain | None) -> str | None:
    """Why int8 is the fastest here, in words; None if it isn't."""
    if on.type == "cpu":  # known, not measured: a busy machine must not change what is trained
        instructions = int8_instructions()
        return f"this CPU has int8 instructions ({', '.join(instructions)})" if instructions else None
    gain = int8_gain(on, DTYPES[best]) if on.type == "cuda" and int8_gain is not None else 0.0
    return f"a layer is measured to be {gain:.1f} times as fast as in {best}" if gain >= INT8_GAIN else None


def _reason_for_float(on: torch.device) -> str:
    if on.type != "cpu":
        return f"the fastest float format of {on.type}, and int8 gains nothing here"
    return "the fastest float format of this CPU, which has no int8 instructions"


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What a plan has to know of a model, in a number format."""

    weights: int
    """Bytes of the frozen base."""
    trained: int
    """LoRA's weights, in number."""
    activations: int
    """Bytes that one token keeps for the backward pass."""
    checkpoints: int
    """The same with activation checkpointing."""


def make_plan(
    recipe: Recipe, choice: Choice, size: ModelSize, on: torch.device, compilation: str, before: Plan | None = None
) -> Plan:
    """Plan how to compute a recipe: the micro-batches, and activation checkpointing where not even the longest row
    fits without.

    compilation: why the layers can't be compiled; empty where they can.
    before: the plan of the same run on this machine, whose micro-batches are kept, so that sums are rounded alike.
    """
    everywhere = spread(size.weights, on) and choice.precision != "int8"
    if everywhere:
        compilation = compilation or "the model is spread over several cards"
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
    return Plan(
        device=name_of(on),
        world_size=world_size(),
        choice=choice,
        micro_batch_tokens=tokens,
        activation_checkpointing=checkpointing,
        compiled=not compilation,
        compilation=compilation,
        memory=Memory(weights=size.weights, adapter=16 * size.trained, activations=tokens * kept, available=available),
    )


def micro_batch_tokens(bytes_per_token: int, free: int, on: torch.device) -> int:
    """How many tokens to compute at once: as many as 60% of the `free` bytes hold, within what still gains speed."""
    most = 16384 if on.type == "cuda" else 1024
    return max(0, min(most, int(0.6 * free) // max(bytes_per_token, 1) // 64 * 64))
