"""Generates answers: in batches for a list of prompts, or streamed for a conversation.

Prompts are encoded by the same code as in training, and an answer ends at the stop token learnt there.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from huarizo.console import tracked
from huarizo.data.prompts import OpenExchange, Question, Turn
from huarizo.data.spans import RefusedRow, appears_in
from huarizo.data.tokens import Encoder
from huarizo.errors import MachineError, UserError
from huarizo.inference.artifact import Tuned
from huarizo.machine import DTYPES, available_memory, device, float_precision, is_out_of_memory
from huarizo.model.adapter import load_adapter, rewrites_base, rewritten_weights, without_adapter
from huarizo.model.compile import uncompiled
from huarizo.model.frozen.load import load_quantised_base
from huarizo.model.frozen.peaks import read_peaks
from huarizo.model.frozen.storages import STORAGES, Storage
from huarizo.model.load import load_base, positions
from huarizo.model.padded_loss import take_own_attention
from huarizo.model.skeleton import largest
from huarizo.plan import Choice, choose_precision, nearest_precision, read_plan
from huarizo.wording import excerpt

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "float", "bf16", "fp16", "fp32")
FASTEST = "the fastest float format here"
SHARE = 0.25  # of the free memory, for a batch of answers
UNHEARD = "the model's chat template leaves out the system text, so the model does not see it"
TOO_LONG = "not enough memory for one answer. Close other programs, or shorten the answer or the prompt"


@dataclass(frozen=True)
class Assistant:
    """A model ready to answer, with the encoder of its prompts.

    base_weights: the base's own values of weights that loading the adapter changed (`rewritten_weights`).
    """

    model: Any  # a PeftModel, which forwards to its base attributes that have no types
    encoder: Encoder
    base_weights: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def positions(self) -> int:
        """The longest conversation that the model supports, in tokens, including the answer."""
        return positions(self.model.config.to_dict())

    def prompt_ids(self, system: str, turns: Sequence[Turn]) -> list[int]:
        """Token ids of a conversation whose last turn is to be answered.

        Raises:
            UserError: the terminal or pipe sent bytes that are not UTF-8.
            ModelError: the tokenizer has a token that the model has no embedding for.
        """
        try:
            "".join((system, *(turn.instruction for turn in turns))).encode("utf-8")
        except UnicodeEncodeError:
            raise UserError("the input is not UTF-8 text. Send it again as UTF-8") from None
        ids = self.encoder.encode_prompt(system, turns)
        self.encoder.check_embedding(max(ids), self.model.config.vocab_size)
        return ids

    def unheard(self, system: str) -> str:
        """Why a system text does not reach the model (the chat template drops or rejects it), or "" if it does."""
        try:
            pieces = self.encoder.prompt.pieces(system, [OpenExchange("Hi")])
        except RefusedRow as error:
            return str(error)
        return "" if appears_in(system, "".join(piece.text for piece in pieces)) else UNHEARD

    def fits(self, question: Question) -> bool:
        """Whether a prompt leaves room for an answer within the model's positions."""
        return len(self.prompt_ids(question.system, [question.turn])) < self.positions

    def untuned(self, wanted: bool = True) -> AbstractContextManager[None]:
        """A context in which the base answers without the adapter. Does nothing if not `wanted`."""
        return without_adapter(self.model, self.base_weights) if wanted else nullcontext()


@dataclass(frozen=True)
class Sampling:
    """How an answer is sampled. temperature 0 always takes the likeliest token; top_k 0 and top_p 1 cut nothing."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 0.95
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Answer:
    """A text, its number of tokens, and whether the model ended it before `max_new_tokens`."""

    text: str
    tokens: int
    finished: bool


def open_assistant(tuned: Tuned, precision: str = "auto", on: torch.device | None = None) -> Assistant:
    """Load the base model with its adapter.

    precision: auto is that of the training, also where it was int8; float is the training's as well, or the fastest
        float format if that was int8; else bf16, fp16 or fp32.
    on: the device; default: this machine's best one.

    Raises:
        ModelError: the adapter does not fit the base.
        UserError: an unknown precision, or one that this device does not support.
    """
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: answers and losses are computed in {', '.join(PRECISIONS)}")
    on = on or device()
    choice = _choice(tuned, precision, on)
    if precision in ("auto", "float"):
        logger.info("precision: %s, %s", choice.precision, choice.reason)
    if choice.precision in STORAGES:
        assert tuned.run is not None
        peaks = read_peaks(tuned.run.calibration)
        model = load_quantised_base(tuned.base, choice.precision, choice.dtype, on, peaks)
    else:
        model = load_base(tuned.base, choice.dtype, on)
    base_weights = rewritten_weights(model, tuned.adapter)
    return Assistant(load_adapter(model, tuned.adapter), tuned.encoder, base_weights)


def _choice(tuned: Tuned, precision: str, on: torch.device) -> Choice:
    """The precision to answer in, and why."""
    if precision not in ("auto", "float"):
        return choose_precision(precision, on)
    plan = read_plan(tuned.run.plan_file) if tuned.run else None
    trained = plan.choice.precision if plan else tuned.recipe.precision
    best, reason = float_precision(on), ""
    if trained == "auto" or (trained in STORAGES and precision == "float"):
        reason = FASTEST
    elif trained in STORAGES and (against := _reason_against(tuned, STORAGES[trained], on, DTYPES[best])):
        reason = f"not {trained} as in training: {against}"
    if reason:
        return replace(choose_precision(best, on), reason=reason)
    choice = nearest_precision(trained, on)
    return replace(choice, reason="as in training") if choice.precision == trained else choice


def _reason_against(tuned: Tuned, storage: Storage, on: torch.device, dtype: torch.dtype) -> str | None:
    """Why the base of a run can't be loaded here as it was trained, in this storage; None if it can."""
    if tuned.run is None or not tuned.run.calibration.is_file():
        return "the run folder doesn't hold the calibration"
    if rewrites_base(tuned.adapter):
        return "this LoRA is started from a part of the base's float weights"
    return storage.reason_against(on, dtype)


@contextmanager
def generating(model: Any) -> Iterator[None]:
    """Evaluation mode with Transformers' own attention. Restores both afterwards."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention, was_training = base.config._attn_implementation, model.training
    take_own_attention(base)
    model.eval()
    try:
        with torch.no_grad(), uncompiled():
            yield
    finally:
        base.set_attn_implementation(attention)
        model.train(was_training)


def _generation_config(assistant: Assistant, sampling: Sampling) -> GenerationConfig:
    tokenizer = assistant.encoder.tokenizer
    stops = [i for i in dict.fromkeys((assistant.encoder.stop_id, tokenizer.eos_token_id)) if i is not None]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, repetition_penalty=sampling.repetition_penalty,
        eos_token_id=stops or None, pad_token_id=pad, use_cache=True,
        do_sample=sampling.temperature > 0, **(drawn if sampling.temperature > 0 else {}),
    )  # fmt: skip


def _room(assistant: Assistant, prompt: Sequence[int], text: str) -> int:
    if len(prompt) >= assistant.positions:
        raise UserError(
            f"the prompt {excerpt(text)} has {len(prompt):,} tokens, but the model supports at most "
            f"{assistant.positions:,}. Shorten it"
        )
    return assistant.positions - len(prompt)


def _left_padded(prompts: Sequence[list[int]], pad: int, on: torch.device) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=on), "attention_mask": torch.tensor(mask, device=on)}


def answers(
    assistant: Assistant,
    questions: Sequence[Question],
    max_new_tokens: int = 80,
    at_once: int = 32,
    console: Console | None = None,
) -> list[Answer]:
    """Greedy answers to single prompts.

    at_once: most prompts in a batch; fewer if memory is short.
    console: a terminal to show progress on.

    Raises:
        UserError: a prompt leaves no room for an answer within the model's positions.
        MachineError: not enough memory even for one prompt.
    """
    prompts = [assistant.prompt_ids(question.system, [question.turn]) for question in questions]
    rooms = [_room(assistant, ids, asked.turn.instruction) for ids, asked in zip(prompts, questions, strict=True)]
    given = _each_answer(assistant, prompts, [min(max_new_tokens, room) for room in rooms], at_once)
    found = dict(tracked(given, "answering", console, len(prompts)))
    return [found[index] for index in range(len(prompts))]


def _each_answer(
    assistant: Assistant, prompts: Sequence[list[int]], room: Sequence[int], at_once: int
) -> Iterator[tuple[int, Answer]]:
    """Each prompt's index with its answer, longest prompt first. Halves the batch when memory runs out.

    room: most tokens of each answer. A batch holds only prompts with the same room.
    """
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    while by_length:
        longest = by_length[0]
        size = min(at_once, _most_at_once(assistant, len(prompts[longest]) + room[longest]))
        batch = [index for index in by_length[:size] if room[index] == room[longest]]
        try:
            given = _answered(assistant, [prompts[index] for index in batch], room[longest])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise MachineError(TOO_LONG) from None
            at_once = len(batch) // 2
            torch.cuda.empty_cache()
            continue
        yield from zip(batch, given, strict=True)
        by_length = by_length[len(batch) :]


def _most_at_once(assistant: Assistant, length: int) -> int:
    """How many prompts of this length (answer included) fit into memory: keys, values, one layer and its mask."""
    config, on = assistant.model.config, assistant.model.device
    heads, hidden = largest(config, "num_attention_heads") or 1, config.hidden_size
    size = largest(config, "head_dim") or hidden // heads
    keys_and_values = 2 * config.num_hidden_layers * (largest(config, "num_key_value_heads") or heads) * size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    values = keys_and_values + 8 * hidden + 3 * inner + 2 * length
    free = SHARE * available_memory(on)
    return max(1, int(free / (length * values * assistant.model.dtype.itemsize)))


def _answered(assistant: Assistant, prompts: Sequence[list[int]], max_new_tokens: int) -> list[Answer]:
    config = _generation_config(assistant, Sampling(max_new_tokens))
    batch = _left_padded(prompts, config.pad_token_id, assistant.model.device)  # pyright: ignore[reportArgumentType]
    with generating(assistant.model):
        output = assistant.model.generate(**batch, generation_config=config)
    return [_answer(assistant, ids, config) for ids in output[:, batch["input_ids"].shape[1] :].tolist()]


def _answer(assistant: Assistant, ids: list[int], config: GenerationConfig) -> Answer:
    length = _length(ids, config)
    return Answer(_text(assistant.encoder.tokenizer, ids[:length]), length, length < len(ids))


def _length(ids: Sequence[int], config: GenerationConfig) -> int:
    """Number of new tokens before the first one that ends the answer."""
    stops: Any = config.eos_token_id or []
    return next((place for place, number in enumerate(ids) if number in stops), len(ids))


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


class _Streamer(BaseStreamer):
    """Passes an answer's text to a function as it grows. The pieces add up to the `Answer`'s text, unless a stray byte
    spoils a character that was already shown.

    All tokens are decoded each time, because a token's text depends on those before it. What may still change is held
    back: an incomplete character, and white space at the end.
    """

    def __init__(self, tokenizer: Any, config: GenerationConfig, write: Callable[[str], None]) -> None:
        self.tokenizer, self.config, self.write = tokenizer, config, write
        self.ids: list[int] = []
        self.shown = ""
        self.saw_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt first, then each new token: int64 [1]."""
        if self.saw_prompt:
            self.ids += value.flatten().tolist()
            self._show(self._text().rstrip("\ufffd").rstrip())
        self.saw_prompt = True

    def end(self) -> None:
        self._show(self._text())

    def _text(self) -> str:
        return _text(self.tokenizer, self.ids[: _length(self.ids, self.config)])

    def _show(self, text: str) -> None:
        if not self.shown.startswith(text):
            same = next((place for place, (a, b) in enumerate(zip(text, self.shown, strict=False)) if a != b), None)
            self.write(text[len(self.shown) if same is None else same :])
            self.shown = text


def stream_answer(
    assistant: Assistant,
    turns: Sequence[Turn],
    write: Callable[[str], None],
    system: str = "",
    sampling: Sampling | None = None,
) -> Answer:
    """Answer the last turn, passing the text to `write` as it comes.

    Raises:
        UserError: the conversation leaves no room for an answer within the model's positions, or is not UTF-8.
        MachineError: not enough memory.
    """
    sampling = sampling or Sampling()
    prompt = assistant.prompt_ids(system, turns)
    config = _generation_config(assistant, sampling)
    config.max_new_tokens = min(sampling.max_new_tokens, _room(assistant, prompt, turns[-1].instruction))
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    batch = _left_padded([prompt], 0, assistant.model.device)
    streamer = _Streamer(assistant.encoder.tokenizer, config, write)
    try:
        with generating(assistant.model):
            output = assistant.model.generate(**batch, generation_config=config, streamer=streamer)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MachineError(TOO_LONG) from None
    return _answer(assistant, output[0, len(prompt) :].tolist(), config)
