"""A conversation: who answers, what is remembered, what a person may type, and that Ctrl-C stops an answer only."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from huarizo.data.prompts import ChatFormat, OpenExchange
from huarizo.data.tokens import Encoder
from huarizo.errors import MachineError, UserError
from huarizo.inference.chat import Conversation, checked, converse
from huarizo.inference.generate import Assistant, Sampling, open_assistant, stream_answer
from tests.inference.make import NO_MEMORY, failing
from tests.results.make import make_tuned
from tests.tiny import CHATML, make_tokenizer


def talk(assistant: Assistant, *lines: str, **options: Any) -> list[str]:
    """What was written after each line."""
    written: list[str] = []
    conversation = Conversation(assistant, written.append, sampling=Sampling(max_new_tokens=8), **options)
    said = []
    for line in lines:
        written.clear()
        assert conversation.hear(line)
        said.append("".join(written))
    return said


def test_base_switches_to_the_untuned_model_and_back(assistant: Assistant) -> None:
    tuned, _, _, base, _, _, again = talk(assistant, "Hi", "/reset", "/base", "Hi", "/base", "/reset", "Hi")
    assert tuned == again != base
    with assistant.untuned():
        assert base.startswith(stream_answer(assistant, [OpenExchange("Hi")], lambda _: None, "", Sampling(8)).text)


def test_what_was_said_is_remembered_until_reset(assistant: Assistant) -> None:
    first, second, _, third = talk(assistant, "Hi", "Hi", "/reset", "Hi")
    assert first == third != second


def test_a_system_message_begins_a_new_conversation(assistant: Assistant) -> None:
    plain, _, spoken, _, without = talk(assistant, "Hi", "/system Be rude.", "Hi", "/system", "Hi")
    assert plain == without != spoken
    assert talk(assistant, "Hi", system="Be rude.") == [spoken]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + CHATML, "leaves out the system"),
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system!') }}{% endif %}" + CHATML, "no system!"),
    ],
)  # fmt: skip
def test_a_system_message_that_the_template_does_not_take_is_reported(
    assistant: Assistant, template: str, said: str
) -> None:
    tokenizer = make_tokenizer(template)
    deaf = replace(assistant, encoder=Encoder(tokenizer, ChatFormat(tokenizer)))
    assert said in talk(deaf, "/system Be rude.")[0]
    assert talk(deaf, "/system") == ["new conversation without a system message\n"]
    written: list[str] = []
    converse(Conversation(deaf, written.append, "Be rude."), lambda _: "/exit")
    assert said in written[0]
    assert assistant.unheard("Be rude.") == ""


def test_what_is_no_text_is_reported_and_nothing_is_lost(assistant: Assistant) -> None:
    good, broken, _ = talk(assistant, "Hi", "Hi \udcff", "Hi")
    assert "not UTF-8 text" in broken and good
    lines: list[Any] = ["Hi", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), EOFError()]

    def read(_: str) -> str:
        line = lines.pop(0)
        if isinstance(line, Exception):
            raise line
        return line

    written: list[str] = []
    converse(Conversation(assistant, written.append, sampling=Sampling(max_new_tokens=2)), read)
    assert not lines and "not UTF-8 text" in "".join(written)


def test_old_turns_make_room_for_new_ones(assistant: Assistant) -> None:
    said = talk(assistant, *["Tell me more about llamas"] * 12)
    assert "old turns are dropped" in said[-1]
    (said,) = talk(assistant, "x?" * 400)
    assert "the model supports at most 256" in said
    *_, refused, third = talk(assistant, "Hi", "You?", "x?" * 400, "And?")
    assert "dropped" not in refused and third == talk(assistant, "Hi", "You?", "And?")[-1]


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/nope", "/nope: no such command"), ("/help", "/system TEXT"), ("/set", "/set takes one of max_new_tokens"),
        ("/set temperature hot", "and a number"), ("/set top_p 2", "top_p is 2.0; it must be above 0"),
        ("/set top_k 5", "top_k is 5"), ("/set seed 3", "seed is 3"), ("", ""),
    ],
)  # fmt: skip
def test_commands_are_answered_in_words(assistant: Assistant, line: str, answer: str) -> None:
    (said,) = talk(assistant, line)
    assert answer in said


def test_ctrl_c_stops_the_answer_and_not_the_program(assistant: Assistant) -> None:
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 1:
            raise KeyboardInterrupt

    lines = iter(["Tell me a story, please", KeyboardInterrupt(), "Hi", "/exit"])

    def read(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, KeyboardInterrupt):
            raise line
        return str(line)

    conversation = Conversation(assistant, write, sampling=Sampling(max_new_tokens=40))
    converse(conversation, read)
    assert "(stopped; this turn is dropped)" in "".join(written)
    assert [turn.instruction for turn in conversation.turns] == ["Hi"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": 1e-40}, {"temperature": float("nan")}, {"top_p": 0.0},
        {"top_k": -1}, {"repetition_penalty": 0.0}, {"repetition_penalty": 1e-42}, {"seed": -1}, {"seed": 2**63},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        checked(Sampling(**wrong))


def test_a_template_that_strips_reasoning_is_asked_again(tmp_path: Path) -> None:
    said = "message['content'].split('</think>')[-1] if message['role'] == 'assistant' and not loop.last else message['content']"
    tuned = make_tuned(tmp_path, make_tokenizer(CHATML.replace("message['content']", f"({said})")))
    assert isinstance(tuned.encoder.prompt, ChatFormat)
    assistant = open_assistant(tuned, "fp32")
    written: list[str] = []
    conversation = Conversation(assistant, written.append, sampling=Sampling(max_new_tokens=4))
    conversation.hear("Hi")
    conversation.turns[0] = type(conversation.turns[0])("Hi", "", "<think>deep</think>Hello")
    conversation.hear("And?")
    assert len(conversation.turns) == 2 and "template" not in "".join(written)


def test_a_chat_goes_on_where_memory_gave_out(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(type(assistant.model), "generate", failing(NO_MEMORY))
        with pytest.raises(MachineError, match="not enough memory"):
            stream_answer(assistant, [OpenExchange("Hi")], lambda _: None)
        written: list[str] = []
        conversation = Conversation(assistant, written.append, sampling=Sampling(8))
        assert conversation.hear("Hi") and "(not enough memory" in "".join(written) and not conversation.turns
    written.clear()
    assert conversation.hear("Hi") and "".join(written) == talk(assistant, "Hi")[0]
