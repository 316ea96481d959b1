"""Training prompts are those that the model is asked with, whatever the chat template does."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from huarizo.data.prompts import ChatFormat, OpenExchange, prompt_format
from huarizo.data.rows import Row
from huarizo.data.tokens import IGNORED, Encoder
from huarizo.data.turns import Exchange
from huarizo.errors import DataError, ModelError, RecipeError
from huarizo.recipe import make_recipe
from tests.data.encoding import AFTER, DONE, END, LOOP, NEXT, PLAIN, TEMPLATES, TINY, TURNS, chatml, encoder_of, learnt
from tests.data.reading import OPENAI, SHAREGPT, read
from tests.tiny import CHATML, make_tokenizer


def test_prompt_formats_that_can_not_work_are_refused() -> None:
    no_template = make_tokenizer(chat_template=None)
    with pytest.raises(RecipeError, match="no chat template"):
        prompt_format("chat", no_template)
    assert prompt_format("auto", no_template).name == "alpaca"
    assert prompt_format("auto", TINY).name == "chat"
    with pytest.raises(RecipeError, match="must contain"):
        prompt_format("{{ 1 }}", TINY)
    with pytest.raises(RecipeError, match="instruktion"):
        prompt_format("{{ instruktion }}", TINY)
    with pytest.raises(RecipeError, match="unexpected end of template"):
        prompt_format("{{ instruction ", TINY)
    with pytest.raises(RecipeError):
        prompt_format("{{ instruction.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}", TINY)
    shouting = make_tokenizer("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}")
    with pytest.raises(ModelError, match="rewrites the answer"):
        prompt_format("chat", shouting)
    strict = make_tokenizer(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m['content'] + '</s>' }}{% endfor %}"
    )
    with pytest.raises(DataError, match="rows.json, row 1: .*no system here"):
        row = Row("rows.json", 1, "be kind", (Exchange("Say it", "", "x"),))
        list(Encoder(strict, prompt_format("chat", strict)).encode([row]))


def test_the_chat_format_renders_what_the_template_renders() -> None:
    turns = [Exchange("a", "b", "c"), Exchange("d", "", "e")]
    pieces = ChatFormat(TINY).pieces("s", turns)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "a\n\nb"}]
    messages += [
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e"},
    ]
    assert "".join(p.text for p in pieces) == TINY.apply_chat_template(messages, tokenize=False).rstrip("\n")


@pytest.mark.parametrize("turns", [TURNS, PLAIN], ids=["thinking", "plain"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_row_is_trained_on_as_the_model_is_asked(name: str, turns: tuple[Exchange, ...]) -> None:
    encoder = encoder_of(TEMPLATES[name], max_length=10_000)
    (examples,) = encoder.by_row([Row("rows.json", 1, "", turns)])
    if name == "qwq" and turns is PLAIN:
        assert not isinstance(examples, list) and "begins every answer with '<think>" in examples.what
        return
    assert isinstance(examples, list)
    learnt = 0
    for number, turn in enumerate(turns):
        asked = encoder.encode_prompt("", [*turns[:number], OpenExchange(turn.instruction)])
        whole = next(
            each for each in examples if each.input_ids[: len(asked)] == asked and len(each.input_ids) > len(asked)
        )
        answer, labels = whole.input_ids[len(asked) :], whole.labels[len(asked) :]
        assert encoder.stop_id is not None
        stop = answer.index(encoder.stop_id)
        text = encoder.tokenizer.decode(answer[: stop + 1])
        assert turn.output.split("</think>")[-1].strip() in text
        if name != "generation":
            assert labels[: stop + 1] == answer[: stop + 1]
        learnt += sum(label != IGNORED for label in labels[: stop + 1])
    assert learnt == sum(label != IGNORED for each in examples for label in each.labels)  # and nothing else


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"glm"}))
def test_the_prompt_is_what_the_template_writes(name: str) -> None:
    encoder = encoder_of(TEMPLATES[name])
    turns = [*TURNS, OpenExchange("three?")]
    messages = []
    for turn in turns:
        messages += [{"role": "user", "content": turn.instruction}, {"role": "assistant", "content": turn.output}]
    written = encoder.tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    text = encoder.tokenizer.decode(encoder.encode_prompt("", turns))
    assert text.removeprefix("<s>") == written.removeprefix("<s>")


def test_thinking_is_learnt_once_and_dropped_where_the_template_drops_it() -> None:
    for name, head in (("qwen3", ""), ("qwq", "<think>\n")):
        encoder = encoder_of(TEMPLATES[name])
        (examples,) = encoder.by_row([Row("rows.json", 1, "", TURNS)])
        assert isinstance(examples, list) and len(examples) == 2
        texts = [encoder.tokenizer.decode(each.input_ids) for each in examples]
        assert texts[1].count("deep") == 1 and "first" in texts[1]
        for text, example, turn in zip(texts, examples, TURNS, strict=True):
            answer = encoder.tokenizer.decode([label for label in example.labels if label != IGNORED])
            assert "".join((head + answer).split()) == "".join((turn.output + "<|im_end|>").split())
            assert text.endswith(answer)


DROPPING = {
    "the system text": (LOOP + "{% if m['role'] != 'system' %}{{ m['content'] + '</s>' }}{% endif %}" + DONE, "S"),
    "what the user said": (
        LOOP + "{% if loop.index > messages | length - 2 %}{{ m['role'] + m['content'] + '</s>' }}{% endif %}" + DONE, ""
    ),
}  # fmt: skip


@pytest.mark.parametrize("lost", DROPPING)
def test_a_template_that_leaves_out_what_was_said_is_reported_by_row(lost: str) -> None:
    template, system = DROPPING[lost]
    turns = (Exchange("one?", "", "first"), Exchange("two?", "", "second"))
    with pytest.raises(DataError, match=f"rows.json, row 7: the model's chat template leaves out {lost}"):
        list(encoder_of(template).encode([Row("rows.json", 7, system, turns)]))


def test_a_conversation_that_can_not_be_trained_on_can_be_continued() -> None:
    encoder = encoder_of(TEMPLATES["qwq"])
    turns = [Exchange("one?", "", "no thinking"), OpenExchange("two?")]
    text = encoder.tokenizer.decode(encoder.encode_prompt("", turns))
    assert "no thinking<|im_end|>" in text and text.endswith("assistant\n<think>\n")


TOOLED = (
    "{% if tools %}{{ '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}" + LOOP
    + "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}{% for call in m['tool_calls'] or [] %}"
    "{{ '<call>' + call['function']['name'] + (call['function']['arguments'] | tojson) + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}" + DONE + NEXT + "{{ '<|im_start|>assistant\\n' }}" + END
)  # fmt: skip


TOOLS = json.dumps([{"type": "function", "function": {"name": "weather"}}])


CALLS = json.dumps([{"type": "function", "function": {"name": "weather", "arguments": {"city": "Busan"}}}])


RESULT = json.dumps({"role": "tool", "content": '{"c": 21}'})


WITH_TOOLS = (Exchange("Weather?", "", "", calls=CALLS), Exchange("", "", "21 C.", results=(RESULT,)))


def test_tools_and_calls_go_through_the_template() -> None:
    encoder = encoder_of(TOOLED)
    (example,) = encoder.encode([Row("rows.json", 1, "", WITH_TOOLS, TOOLS)])
    assert example is not None
    learnt = encoder.tokenizer.decode([label for label in example.labels if label != IGNORED])
    assert learnt == '<call>weather{"city": "Busan"}</call><|im_end|>21 C.<|im_end|>'
    text = encoder.tokenizer.decode(example.input_ids)
    assert '"name": "weather"' in text and '<|im_start|>tool\n{"c": 21}<|im_end|>' in text


def test_a_template_that_leaves_out_tools_or_calls_is_reported_by_row() -> None:
    without_calls = TOOLED.replace("call['function']['name']", "''")
    for template, tools in ((CHATML, TOOLS), (without_calls, "")):
        with pytest.raises(DataError, match=r"rows.json, row 1, field 'tool.*leaves out tool"):
            list(encoder_of(template).encode([Row("rows.json", 1, "", WITH_TOOLS, tools)]))


DEEPSEEK = (
    LOOP + "{% if m['role'] == 'user' %}{{ '<s>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' and m['content'] is none %}{{ '<|im_start|>' }}{% for c in m['tool_calls'] %}"
    "{{ c['type'] + c['function']['name'] + '\n```json\n' + c['function']['arguments'] + '\n```</s>' }}{% endfor %}"
    "{% elif m['role'] == 'assistant' %}"
    "{{ ('' if loop.index0 and messages[loop.index0 - 1]['role'] == 'tool' else '<|im_start|>') + m['content'] + "
    "'<|im_end|>' }}{% else %}{{ '(' + m['content'] + ')' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'tool' %}{{ '<|im_start|>' }}{% endif %}"
)


PARAMETERS = chatml(
    "m['content']",
    "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] }}{% for k, v in c['function']['arguments'].items() %}"
    "{{ '<' + k + '>' + v + '</' + k + '>' }}{% endfor %}{% endfor %}",
)


def test_call_arguments_are_given_as_the_template_takes_them() -> None:
    assert learnt(encoder_of(DEEPSEEK), *WITH_TOOLS) == [
        'functionweather\n```json\n{"city": "Busan"}\n```</s>', "21 C.<|im_end|>"
    ]  # fmt: skip
    assert learnt(encoder_of(PARAMETERS), WITH_TOOLS[0]) == ["weather<city>Busan</city><|im_end|>"]
    bare = chatml("m['content']", "{{ m['tool_calls'][0]['function']['name'] if m['tool_calls'] }}")
    (found,) = encoder_of(bare).by_row([Row("f", 1, "", WITH_TOOLS[:1])])
    assert "leaves out tool calls" in str(found)


BESIDE = (
    "{% set think = m['reasoning_content'] if m['reasoning_content'] else '' %}"
    "{% if loop.last %}{{ '<think>\n' + think + '\n</think>\n\n' }}{% endif %}"
)


THINKING = (Exchange("one?", "", "first", thinking="deep"), Exchange("two?", "", "second", thinking="deeper"))


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_thinking_beside_an_answer_is_learnt_as_the_template_writes_it(key: str) -> None:
    encoder = encoder_of(chatml("m['content']", BESIDE.replace("reasoning_content", key)))
    written = [
        "<think>\ndeep\n</think>\n\nfirst<|im_end|>",
        "<think>\ndeeper\n</think>\n\nsecond<|im_end|>",
    ]
    assert learnt(encoder, *THINKING) == written
    (found,) = encoder.by_row([Row("f", 1, "", (Exchange("a", "", "b", thinking="c<|im_end|>"),))])
    assert "special token written out in its thinking" in str(found)


def test_thinking_goes_before_the_answer_where_the_template_takes_it_there() -> None:
    encoder = encoder_of(chatml(AFTER, begun="<think>\\n"))
    assert learnt(encoder, *THINKING) == ["deep\n</think>\n\nfirst<|im_end|>", "deeper\n</think>\n\nsecond<|im_end|>"]


def test_thinking_that_the_template_leaves_out_is_reported_by_row() -> None:
    tokenizer = make_tokenizer()
    for prompt in ("chat", "alpaca"):
        encoder = Encoder(tokenizer, prompt_format(prompt, tokenizer))
        (flaw,) = encoder.by_row([Row("f", 1, "", THINKING)])
        assert isinstance(flaw, tuple)
        assert flaw[0] == "reasoning_content"
    twice = encoder_of(chatml("m['content']", "{{ '<think>\\n\\n</think>\\n\\n' }}"))
    (flaw,) = twice.by_row([Row("f", 1, "", THINKING)])
    assert "leaves out the thinking" in str(flaw)


def test_added_tokens_are_words_like_any_other() -> None:
    tokenizer = make_tokenizer(chatml("m['content']", BESIDE))
    tokenizer.add_tokens(["<step>"])
    row = Row("f", 1, "", (Exchange("one?", "", "first", thinking="c <step> d"),))
    (flaw,) = Encoder(tokenizer, prompt_format("chat", tokenizer)).by_row([row])
    assert "special token" in str(flaw)
    (examples,) = Encoder(tokenizer, prompt_format("chat", tokenizer, words=["<step>"])).by_row([row])
    assert "special token" not in str(examples)


DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\\n' }}" + CHATML


def test_the_day_that_a_template_asks_for_is_kept(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(DATED)
    today = prompt_format("chat", tokenizer)
    assert today.date == f"{datetime.date.today()}"
    then = prompt_format("chat", tokenizer, date="2024-02-29")
    assert then.pieces("", [OpenExchange("Q")])[0].text.startswith("Today: 29 Feb 2024\n")
    assert prompt_format("chat", make_tokenizer()).date is None
    assert Encoder(tokenizer, today).fingerprint() != Encoder(tokenizer, then).fingerprint()
    for wrong in ("2024-13-01", "today"):
        with pytest.raises(Exception, match="date"):
            make_recipe(data={"date": wrong})


@pytest.mark.parametrize("record", [OPENAI, SHAREGPT], ids=["openai", "sharegpt"])
@pytest.mark.parametrize("prompt", ["alpaca", "stanford", "{{ instruction }}{{ input }}", "chat"])
def test_rows_with_tools_are_refused_where_the_prompts_have_no_place_for_them(
    tmp_path: Path, record: dict[str, Any], prompt: str
) -> None:
    encoder = Encoder(TINY, prompt_format(prompt, TINY))
    with pytest.raises(DataError, match=r"a.json, row 1, field 'tools': .* tools"):
        list(encoder.encode(read(tmp_path, record).rows))
