"""A conversation: who answers, what is remembered, what a person may type, and that Ctrl-C stops an answer only."""

from pathlib import Path
from typing import Any

import pytest
import torch

from huarizo.data.prompts import OpenExchange, Question
from huarizo.errors import MachineError, UserError
from huarizo.results import generate
from huarizo.results.chat import Conversation, checked, converse
from huarizo.results.generate import Assistant, Sampling, answers, open_assistant, stream_answer
from tests.results.make import make_tuned

PROMPTS = ["Hi", "What is the capital of France, and why?", "Sing!", "One two three four five six seven", "?"]


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    return open_assistant(make_tuned(tmp_path_factory.mktemp("tuned"), max_position_embeddings=256), "fp32")


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


def test_what_is_no_text_is_told_and_nothing_is_lost(assistant: Assistant) -> None:
    good, broken, _ = talk(assistant, "Hi", "Hi \udcff", "Hi")
    assert "not text in UTF-8" in broken and good
    lines: list[Any] = ["Hi", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), EOFError()]

    def read(_: str) -> str:
        line = lines.pop(0)
        if isinstance(line, Exception):
            raise line
        return line

    written: list[str] = []
    converse(Conversation(assistant, written.append, sampling=Sampling(max_new_tokens=2)), read)
    assert not lines and "not text in UTF-8" in "".join(written)


def test_old_turns_make_room_for_new_ones(assistant: Assistant) -> None:
    said = talk(assistant, *["Tell me more about llamas"] * 12)
    assert "old turns are forgotten" in said[-1]
    (said,) = talk(assistant, "x?" * 400)
    assert "the model was made for 256" in said
    *_, refused, third = talk(assistant, "Hi", "You?", "x?" * 400, "And?")
    assert "forgotten" not in refused and third == talk(assistant, "Hi", "You?", "And?")[-1]


def test_a_list_of_prompts_keeps_within_what_the_model_was_made_for(assistant: Assistant) -> None:
    length = len(assistant.encoder.encode_prompt("", [OpenExchange("x?" * 50)]))
    long = Question(OpenExchange("x?" * (50 + (256 - length - 8) // 2)))
    given = answers(assistant, [Question(OpenExchange("Hi")), long], 40)
    room = 256 - len(assistant.encoder.encode_prompt("", [long.turn]))
    assert given[1].tokens <= room < 40 and given[0].tokens > room
    with pytest.raises(UserError, match="the model was made for 256"):
        answers(assistant, [Question(OpenExchange("Hi")), Question(OpenExchange("x?" * 400))])


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/nope", "/nope: no such command"), ("/help", "/system TEXT"), ("/set", "/set takes one of max_new_tokens"),
        ("/set temperature hot", "and a number"), ("/set top_p 2", "top_p is 2.0, but has to be above 0"),
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
    assert "(stopped; this turn is forgotten)" in "".join(written)
    assert [turn.instruction for turn in conversation.turns] == ["Hi"]


def test_a_seed_draws_the_same_answer(assistant: Assistant) -> None:
    def drawn(seed: int, **options: Any) -> str:
        sampling = Sampling(12, temperature=1.5, top_p=1.0, seed=seed, **options)
        return stream_answer(assistant, [OpenExchange("Hi")], lambda _: None, "", sampling).text

    assert drawn(1) == drawn(1) and len({drawn(seed) for seed in range(5)}) > 1
    greedy = stream_answer(assistant, [OpenExchange("Hi")], lambda _: None, "", Sampling(12)).text
    assert drawn(1, top_k=1) == greedy


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"repetition_penalty": 0.0}]
)
def test_values_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        checked(Sampling(**wrong))


def test_answers_in_batches_are_those_given_one_by_one(assistant: Assistant) -> None:
    questions = [Question(OpenExchange(prompt)) for prompt in PROMPTS]
    assert answers(assistant, questions, 12, at_once=5) == [answers(assistant, [each], 12)[0] for each in questions]


def test_where_memory_is_short_batches_get_smaller(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [Question(OpenExchange(prompt)) for prompt in PROMPTS]
    expected, answered, sizes, fitting = answers(assistant, questions, 8), generate._answered, [], 2

    def short_of_memory(assistant: Assistant, prompts: Any, config: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > fitting:
            raise torch.cuda.OutOfMemoryError("no memory")
        return answered(assistant, prompts, config)

    monkeypatch.setattr(generate, "_answered", short_of_memory)
    assert answers(assistant, questions, 8, at_once=5) == expected and sizes == [5, 2, 2, 1]
    fitting = 0
    with pytest.raises(MachineError, match="not enough memory"):
        answers(assistant, questions, 8)


def test_a_batch_takes_no_more_than_its_share_of_memory(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    answered, questions = generate._answered, [Question(OpenExchange(prompt)) for prompt in PROMPTS]
    monkeypatch.setattr(generate, "_answered", lambda a, p, c: sizes.append(len(p)) or answered(a, p, c))
    answers(assistant, questions, 20)
    assert sizes == [len(PROMPTS)]
    config = assistant.model.config
    keys_and_values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    monkeypatch.setattr(generate, "available_memory", lambda on: 100 * keys_and_values)
    sizes.clear()
    answers(assistant, questions, 20)
    assert max(sizes) <= 100 / 20 and sum(sizes) == len(PROMPTS)


@pytest.mark.parametrize("prompt", ["chat", "alpaca"])
def test_an_answer_ends_at_the_stop_token(tmp_path: Path, prompt: str) -> None:
    tuned = make_tuned(tmp_path, prompt=prompt)
    assistant = open_assistant(tuned, "fp32")
    prompt_length = len(tuned.encoder.encode_prompt("", [OpenExchange("Hi")]))
    seen: list[int] = []

    def ends_after_three(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        seen.append(len(seen))
        stop = torch.zeros(logits.shape[-1])
        stop[tuned.encoder.stop_id] = 1e4 if len(seen) > 3 else -1e4
        return logits + stop

    assistant.model.get_base_model().lm_head.register_forward_hook(ends_after_three)
    (answer,) = answers(assistant, [Question(OpenExchange("Hi"))], 8)
    assert answer.finished and answer.tokens == 3 and prompt_length > 3
