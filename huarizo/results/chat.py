"""A tuned model answers: all at once for a list of prompts, or streamed for a person.

Prompts go through the same code as in training, and an answer ends at the stop token that was learnt.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from huarizo.data.prompts import OpenExchange, Turn
from huarizo.data.rows import Exchange
from huarizo.data.tokens import Encoder
from huarizo.machine import choose_precision, device, float_precision
from huarizo.model.adapter import load_adapter
from huarizo.model.fast import uncompiled
from huarizo.model.load import load_base
from huarizo.results.tuned import open_tuned
from huarizo.runs import Run


@dataclass(frozen=True)
class Assistant:
    """A model that can be asked, with the encoder that its prompts go through."""

    model: Any
    encoder: Encoder


def open_assistant(run: Run) -> Assistant:
    """The base model of a run with its adapter.

    Raises:
        UserError: the run has no adapter yet, or its base model can't be found or is no longer the one it was.
    """
    tuned, on = open_tuned(run), device()
    wanted = float_precision(on) if tuned.recipe.precision == "int8" else tuned.recipe.precision
    model = load_base(tuned.base, choose_precision(wanted, on).dtype, on)
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


def _generation_config(assistant: Assistant, max_new_tokens: int, temperature: float) -> GenerationConfig:
    tokenizer = assistant.encoder.tokenizer
    stops = [i for i in dict.fromkeys((assistant.encoder.stop_id, tokenizer.eos_token_id)) if i is not None]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature > 0 else {"do_sample": False}
    )
    return GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=stops or None, pad_token_id=pad, use_cache=True, **sampling
    )


def _left_padded(prompts: Sequence[list[int]], pad: int, on: torch.device) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=on), "attention_mask": torch.tensor(mask, device=on)}


def answers(
    assistant: Assistant, turns: Sequence[OpenExchange], max_new_tokens: int = 80, at_once: int = 4
) -> list[str]:
    """Greedy answers to single prompts, `at_once` in a batch, so that memory does not grow with their number."""
    config = _generation_config(assistant, max_new_tokens, temperature=0)
    prompts = [assistant.encoder.encode_prompt("", [turn]) for turn in turns]
    texts: list[str] = []
    with generating(assistant.model):
        for start in range(0, len(prompts), at_once):
            batch = _left_padded(prompts[start : start + at_once], config.pad_token_id, assistant.model.device)  # pyright: ignore
            output = assistant.model.generate(**batch, generation_config=config)
            new = output[:, batch["input_ids"].shape[1] :]
            texts += assistant.encoder.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in texts]


class _Streamer(TextStreamer):
    """Hands each finished stretch of text to a function."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.parts = write, []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.parts.append(text)
        self.write(text)


def stream_answer(
    assistant: Assistant,
    turns: Sequence[Turn],
    write: Callable[[str], None],
    system: str = "",
    max_new_tokens: int = 512,
    temperature: float = 0.0,
) -> str:
    """Answer the last turn, passing the text to `write` as it comes. temperature 0 takes the likeliest token."""
    streamer = _Streamer(assistant.encoder.tokenizer, write)
    prompt = assistant.encoder.encode_prompt(system, turns)
    config = _generation_config(assistant, max_new_tokens, temperature)
    batch = _left_padded([prompt], 0, assistant.model.device)
    with generating(assistant.model):
        assistant.model.generate(**batch, generation_config=config, streamer=streamer)
    return "".join(streamer.parts).strip()


def converse(
    assistant: Assistant,
    read: Callable[[str], str],
    write: Callable[[str], None],
    system: str = "",
    max_new_tokens: int = 512,
    temperature: float = 0.0,
) -> None:
    """A conversation until `/exit` or the end of input. `read` shows a prompt and gives the next line."""
    turns: list[Exchange] = []
    while True:
        try:
            line = read("you> ").strip()
        except EOFError:
            write("\n")
            return
        if line == "/exit":
            return
        if line == "/reset":
            turns.clear()
        elif line:
            try:
                asked = [*turns, OpenExchange(line)]
                answer = stream_answer(assistant, asked, write, system, max_new_tokens, temperature)
                turns.append(Exchange(line, "", answer))
            except KeyboardInterrupt:
                write("\n(stopped; this turn is forgotten)")
            write("\n")
