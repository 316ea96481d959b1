"""A prompt format as a chat template: rendered by Jinja alone, it writes the format's own prompts."""

from typing import Any

import pytest
from jinja2 import Environment

from huarizo.data.prompts import OpenExchange, prompt_format
from huarizo.data.tokens import Encoder
from huarizo.data.turns import Exchange
from huarizo.errors import ModelError
from huarizo.results.chat_template import chat_template, leading_space, rendered, turns_of
from tests.tiny import CHATML, make_tokenizer

TURNS = [Exchange('Say {{ x }} "<&>"', "", "한 {% y %}"), Exchange("Two", "", "\\n 2"), OpenExchange("Three\n\nlines")]


def encoder_of(format: str, template: str | None = CHATML) -> Encoder:
    tokenizer = make_tokenizer(template, eos="</s>")
    return Encoder(tokenizer, prompt_format(format, tokenizer))


def messages_of(system: str) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    for turn in TURNS:
        messages.append({"role": "user", "content": turn.instruction})
        if isinstance(turn, Exchange):
            messages.append({"role": "assistant", "content": turn.output})
    return messages


@pytest.mark.parametrize("lead", ["", " "])
@pytest.mark.parametrize("format", ["alpaca", "stanford", "Q: {{ instruction }}\nA:", "chat"])
def test_the_template_writes_the_formats_prompts(format: str, lead: str) -> None:
    encoder = encoder_of(format)
    template = Environment().from_string(chat_template(encoder, lead) or "")
    for system in ("", "Be brief."):
        found = template.render(messages=messages_of(system), add_generation_prompt=True)
        assert found == lead + rendered(encoder, system, TURNS)


def test_the_texts_around_the_turns() -> None:
    turns = turns_of(encoder_of("chat"))
    assert turns.head == "<|im_start|>user\n"
    assert turns.system == ("<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n")
    assert turns.asked == "<|im_end|>\n<|im_start|>assistant\n" and turns.answered == "<|im_end|>\n<|im_start|>user\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("message.content | upper if message.role == 'user' else message.content", "it changes"),
        ("loop.index ~ message.content", "later turns"),
    ],
)
def test_a_format_that_rewrites_its_turns_has_no_constant_texts(content: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        turns_of(encoder_of("chat", CHATML.replace("message['content']", f"({content})")))


def test_a_system_text_that_the_format_drops_has_no_place() -> None:
    kept = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}"
    assert turns_of(encoder_of("chat", kept + CHATML)).system is None


def test_only_a_tokenizer_that_puts_a_space_in_front_needs_one_in_the_prompt(tinyllama_tokenizer: Any) -> None:
    assert leading_space(encoder_of("alpaca")) == ""
    assert leading_space(Encoder(tinyllama_tokenizer, prompt_format("alpaca", tinyllama_tokenizer))) == " "
