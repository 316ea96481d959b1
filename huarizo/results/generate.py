"""A tuned model answers: in batches for a list of prompts, or streamed for a person.

Prompts go through the same code as in training, and an answer ends at the stop token that was learnt.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from transformers import GenerationConfig, TextStreamer

from huarizo.console import tracked
from huarizo.data.prompts import OpenExchange, Turn
from huarizo.data.tokens import Encoder
from huarizo.errors import MachineError, UserError
from huarizo.machine import available_memory, choose_precision, device, float_precision
from huarizo.model.adapter import load_adapter
from huarizo.model.fast import uncompiled
from huarizo.model.load import load_base
from huarizo.results.tuned import Tuned

SHARE = 0.25  # of the free memory, that a batch of answers may take


@dataclass(frozen=True)
class Assistant:
    """A model that can be asked, with the encoder that its prompts go through."""

    model: Any
    encoder: Encoder

    @property
    def positions(self) -> int:
        """The longest conversation that the model was made for, in tokens, its answer included."""
        return self.model.config.max_position_embeddings

    def prompt_ids(self, system: str, turns: Sequence[Turn]) -> list[int]:
        """Token ids of a conversation whose last turn is to be answered.

        Raises:
            UserError: a terminal or a pipe sent bytes that are no letters.
        """
        try:
            "".join((system, *(turn.instruction for turn in turns))).encode("utf-8")
        except UnicodeEncodeError:
            raise UserError("what was typed or sent is not text in UTF-8. Send it again in that encoding") from None
        return self.encoder.encode_prompt(system, turns)

    def fits(self, turn: OpenExchange) -> bool:
        """Whether a prompt leaves room for an answer in what the model was made for."""
        return len(self.prompt_ids("", [turn])) < self.positions

    def untuned(self, wanted: bool = True) -> Any:
        """A block in which the base answers, as if it had no adapter; nothing changes where not `wanted`."""
        return self.model.disable_adapter() if wanted else nullcontext()


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. temperature 0 takes the likeliest token every time; top_k 0 and top_p 1 cut nothing."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 0.95
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Answer:
    """A text, its number of tokens, and whether the model ended it itself or reached `max_new_tokens`."""

    text: str
    tokens: int
    finished: bool


def open_assistant(tuned: Tuned, precision: str | None = None) -> Assistant:
    """The base model with its adapter, in a float format; None: the recipe's, or the fastest one for int8.

    Raises:
        ModelError: the adapter does not fit the base.
        UserError: a format that there is not, or that this device does not have.
    """
    if precision not in (None, "bf16", "fp16", "fp32"):
        raise UserError(f"--precision {precision}: answers and losses are computed in bf16, fp16 or fp32")
    on = device()
    wanted = precision or tuned.recipe.precision
    dtype = choose_precision(float_precision(on) if wanted in ("int8", "auto") else wanted, on).dtype
    model = load_base(tuned.base, dtype, on)
    return Assistant(load_adapter(model, tuned.adapter), tuned.encoder)


@contextmanager
def generating(model: Any) -> Iterator[None]:
    """Evaluation mode, with Transformers' own attention and a key/value cache; put back as it was afterwards."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention, was_training = base.config._attn_implementation, model.training
    base.set_attn_implementation("sdpa")
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
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        names = ("temperature", "top_p", "top_k")
        options = {"do_sample": True} | {name: getattr(sampling, name) for name in names}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, repetition_penalty=sampling.repetition_penalty,
        eos_token_id=stops or None, pad_token_id=pad, use_cache=True, **options,
    )  # fmt: skip


def _room(assistant: Assistant, prompt: Sequence[int]) -> int:
    if len(prompt) >= assistant.positions:
        raise UserError(
            f"a prompt has {len(prompt):,} tokens, and the model was made for {assistant.positions:,}. Shorten it"
        )
    return assistant.positions - len(prompt)


def _left_padded(prompts: Sequence[list[int]], pad: int, on: torch.device) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=on), "attention_mask": torch.tensor(mask, device=on)}


def answers(
    assistant: Assistant,
    turns: Sequence[OpenExchange],
    max_new_tokens: int = 80,
    at_once: int = 32,
    console: Console | None = None,
) -> list[Answer]:
    """Greedy answers to single prompts.

    at_once: prompts in a batch at most, fewer where memory is short.
    console: a terminal to show on how many are answered.

    Raises:
        UserError: a prompt leaves no room for an answer in what the model was made for.
        MachineError: not even one prompt fits into the card's memory.
    """
    prompts = [assistant.prompt_ids("", [turn]) for turn in turns]
    room = [min(max_new_tokens, _room(assistant, prompt)) for prompt in prompts]
    given = _each_answer(assistant, prompts, room, at_once)
    found = dict(tracked(given, "answering", console, len(prompts)))
    return [found[index] for index in range(len(prompts))]


def _each_answer(
    assistant: Assistant, prompts: Sequence[list[int]], room: Sequence[int], at_once: int
) -> Iterator[tuple[int, Answer]]:
    """Each prompt's index with its answer, the longest first; where a card's memory does not do, half as many at once.

    room: tokens that each answer may have; those in a batch may have as many.
    """
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    while by_length:
        longest = by_length[0]
        size = min(at_once, _most_at_once(assistant, len(prompts[longest]) + room[longest]))
        batch = [index for index in by_length[:size] if room[index] == room[longest]]
        try:
            given = _answered(assistant, [prompts[index] for index in batch], room[longest])
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                raise MachineError("the card has not enough memory for one answer: shorten it or the prompt") from None
            at_once = len(batch) // 2
            torch.cuda.empty_cache()
            continue
        yield from zip(batch, given, strict=True)
        by_length = by_length[len(batch) :]


def _most_at_once(assistant: Assistant, length: int) -> int:
    """How many prompts of a length, answers included, memory has room for: keys and values, and one layer at work."""
    config, on = assistant.model.config, assistant.model.device
    keys_and_values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    values = keys_and_values + 8 * config.hidden_size + 3 * config.intermediate_size
    free = SHARE * available_memory(on)
    return max(1, int(free / (length * values * assistant.model.dtype.itemsize)))


def _answered(assistant: Assistant, prompts: Sequence[list[int]], max_new_tokens: int) -> list[Answer]:
    config = _generation_config(assistant, Sampling(max_new_tokens))
    batch = _left_padded(prompts, config.pad_token_id, assistant.model.device)  # pyright: ignore[reportArgumentType]
    with generating(assistant.model):
        output = assistant.model.generate(**batch, generation_config=config)
    return [_answer(assistant, ids, config) for ids in output[:, batch["input_ids"].shape[1] :].tolist()]


def _answer(assistant: Assistant, ids: list[int], config: GenerationConfig) -> Answer:
    """The text of new tokens, up to the first that ends it."""
    stops: Any = config.eos_token_id or []
    length = next((place for place, number in enumerate(ids) if number in stops), len(ids))
    text = assistant.encoder.tokenizer.decode(ids[:length], skip_special_tokens=True)
    return Answer(text.strip(), length, length < len(ids))


class _Streamer(TextStreamer):
    """Hands each finished stretch of text to a function."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


def stream_answer(
    assistant: Assistant,
    turns: Sequence[Turn],
    write: Callable[[str], None],
    system: str = "",
    sampling: Sampling | None = None,
) -> Answer:
    """Answer the last turn, passing the text to `write` as it comes.

    Raises:
        UserError: the conversation leaves no room for an answer in what the model was made for, or is no text.
    """
    sampling = sampling or Sampling()
    prompt = assistant.prompt_ids(system, turns)
    config = _generation_config(assistant, sampling)
    config.max_new_tokens = min(sampling.max_new_tokens, _room(assistant, prompt))
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    batch = _left_padded([prompt], 0, assistant.model.device)
    streamer = _Streamer(assistant.encoder.tokenizer, write)
    with generating(assistant.model):
        output = assistant.model.generate(**batch, generation_config=config, streamer=streamer)
    return _answer(assistant, output[0, len(prompt) :].tolist(), config)
