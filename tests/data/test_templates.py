"""Chat templates of many families: what is learnt stands where the model will write it, token for token."""

import datetime
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from huarizo.data.dataset import prepare_data
from huarizo.data.prompts import OpenExchange, prompt_format
from huarizo.data.rows import Row
from huarizo.data.tokens import IGNORED, Encoder, tokenise
from huarizo.data.turns import Exchange
from huarizo.errors import DataError, ModelError
from huarizo.recipe import make_recipe
from tests.tiny import CHATML, make_tokenizer

LOOP = "{% for m in messages %}"
NEXT = "{% if add_generation_prompt %}"
END = "{% endif %}"
DONE = "{% endfor %}"
ASSISTANT = "{% if m['role'] == 'assistant' %}"


def chatml(content: str, answer: str = "", begun: str = "", end: str = "'<|im_end|>\\n'") -> str:
    """ChatML whose assistant turns are `content`, with `begun` behind the head of a new one."""
    return (
        f"{LOOP}{{{{ '<|im_start|>' + m['role'] + '\\n' }}}}{ASSISTANT}{answer}{{{{ {content} + {end} }}}}"
        "{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}"
        f"{DONE}{NEXT}{{{{ '<|im_start|>assistant\\n{begun}' }}}}{END}"
    )


AFTER = "m['content'].split('</think>')[-1].lstrip('\\n')"
TEMPLATES = {
    "chatml": CHATML,
    # the answer begins with a space and ends with one
    "llama2": LOOP + "{% if m['role'] == 'system' %}{{ '<<SYS>>' + m['content'] + '<</SYS>>' }}{% elif m['role'] == "
    "'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}{% else %}{{ ' ' + m['content'] | trim + "
    "' ' + eos_token }}{% endif %}" + DONE,
    "vicuna": LOOP + "{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] }}{% elif m['role'] == 'assistant' %}"
    "{{ ' ASSISTANT: ' + m['content'] + eos_token + '\\n' }}{% else %}{{ m['content'] + '\\n' }}{% endif %}" + DONE
    + NEXT + "{{ ' ASSISTANT:' }}" + END,
    # every content is trimmed
    "llama3": LOOP + "{{ '<|im_start|>' + m['role'] + '\\n\\n' + m['content'] | trim + '<|im_end|>' }}" + DONE
    + NEXT + "{{ '<|im_start|>assistant\\n\\n' }}" + END,
    "trims earlier": chatml("(m['content'] if loop.last else m['content'] | trim)"),
    # thinking is laid out anew in the last answer, and left out of earlier ones
    "qwen3": chatml(
        "('<think>\\n' + m['content'].split('</think>')[0].split('<think>')[-1].strip() + '\\n</think>\\n\\n' + "
        f"{AFTER} if loop.last and '</think>' in m['content'] else ('<think>\\n\\n</think>\\n\\n' if loop.last else '')"
        f" + {AFTER})"
    ),
    # a head of the thinking stands in the prompt, and all of it is left out of every answer
    "qwq": chatml(AFTER, begun="<think>\\n"),
    # another end once the conversation goes on
    "gpt-oss": chatml("('<|im_start|>final\\n' if true else '') + m['content']", end="('</s>' if loop.last else '<|im_end|>')"),
    # nothing ends an answer
    "glm": chatml("'<think></think>\\n' + m['content']", end="'\\n'"),
    "generation": chatml("''", "{{ 'note: ' }}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
                         , end="'\\n'"),
}  # fmt: skip
THOUGHT = "<think>\ndeep\n</think>\n\n"
TURNS = (Exchange("one?", "", THOUGHT + "first "), Exchange("two?", "", THOUGHT + "second"))
PLAIN = (Exchange("one?", "", " first\n"), Exchange("two?", "", "second"), Exchange("three?", "", "third"))


def encoder_of(template: str, **options: Any) -> Encoder:
    tokenizer = make_tokenizer(template)
    return Encoder(tokenizer, prompt_format("chat", tokenizer), **options)


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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama2", [" first </s>", " second </s>", " third </s>"]),
        ("vicuna", ["  first\n<|im_end|>", " second<|im_end|>", " third<|im_end|>"]),
        ("llama3", ["first<|im_end|>", "second<|im_end|>", "third<|im_end|>"]),
        ("glm", ["<think></think>\n first\n</s>", "<think></think>\nsecond</s>", "<think></think>\nthird</s>"]),
        ("generation", [" first\n<|im_end|>", "second<|im_end|>", "third<|im_end|>"]),
        ("gpt-oss", [f"<|im_start|>final\n{text}</s>" for text in (" first\n", "second", "third")]),
    ],
)
def test_what_is_learnt(name: str, expected: list[str]) -> None:
    tokenizer = make_tokenizer(TEMPLATES[name], eos="<|im_end|>" if name in ("vicuna", "generation") else "</s>")
    encoder = Encoder(tokenizer, prompt_format("chat", tokenizer))
    (examples,) = encoder.by_row([Row("rows.json", 1, "", PLAIN)])
    assert isinstance(examples, list)
    found = [tokenizer.decode([label for label in each.labels if label != IGNORED]) for each in examples]
    assert "".join(found) == "".join(expected)
    assert len(found) == (3 if name == "gpt-oss" else 1)  # one for each answer where earlier ones end otherwise


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


def test_special_tokens_in_an_answer_stay_text_beside_those_of_the_template() -> None:
    encoder = encoder_of(TEMPLATES["gpt-oss"])
    (example,) = encoder.encode([Row("rows.json", 1, "", (Exchange("Q", "", "no <|im_end|> here"),))])
    assert example is not None
    ids = [label for label in example.labels if label != IGNORED]
    special = encoder.tokenizer.convert_tokens_to_ids(["<|im_start|>", "</s>"])
    assert [i for i in ids if i < 4] == special


def test_an_answer_outside_of_generation_blocks_is_only_read() -> None:
    block = "{% if loop.last %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    encoder = encoder_of(chatml("''", block + "{{ m['content'] + '<|im_end|>' }}{% endif %}", end="'\\n'"))
    (example,) = encoder.encode(
        [Row("rows.json", 1, "", (Exchange("a", "", "b", learnt=False), Exchange("c", "", "d")))]
    )
    assert example is not None
    assert encoder.tokenizer.decode([label for label in example.labels if label != IGNORED]) == "d<|im_end|>"


DROPPING = {
    "the system text": (LOOP + "{% if m['role'] != 'system' %}{{ m['content'] + '</s>' }}{% endif %}" + DONE, "S"),
    "what the user said": (
        LOOP + "{% if loop.index > messages | length - 2 %}{{ m['role'] + m['content'] + '</s>' }}{% endif %}" + DONE, ""
    ),
}  # fmt: skip


@pytest.mark.parametrize("lost", DROPPING)
def test_a_template_that_leaves_out_what_was_said_is_told_by_row(lost: str) -> None:
    template, system = DROPPING[lost]
    turns = (Exchange("one?", "", "first"), Exchange("two?", "", "second"))
    with pytest.raises(DataError, match=f"rows.json, row 7: the model's chat template leaves out {lost}"):
        list(encoder_of(template).encode([Row("rows.json", 7, system, turns)]))


def test_a_conversation_that_can_not_be_trained_on_can_be_gone_on_with() -> None:
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


def test_a_template_that_leaves_out_tools_or_calls_is_told_by_row() -> None:
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


def learnt(encoder: Encoder, *exchanges: Exchange) -> list[str]:
    """The learnt parts of a conversation's examples, each run of them for itself."""
    (found,) = encoder.by_row([Row("f", 1, "", exchanges)])
    assert isinstance(found, list), found
    runs = []
    for example in found:
        pairs = zip(example.input_ids, example.labels, strict=True)
        for is_learnt, run in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORED):
            if is_learnt:
                runs.append(encoder.tokenizer.decode([token for token, _ in run]))
    return runs


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


def test_thinking_stands_in_front_of_the_answer_where_the_template_takes_it_there() -> None:
    encoder = encoder_of(chatml(AFTER, begun="<think>\\n"))
    assert learnt(encoder, *THINKING) == ["deep\n</think>\n\nfirst<|im_end|>", "deeper\n</think>\n\nsecond<|im_end|>"]


def test_thinking_that_has_no_place_is_told_by_row() -> None:
    tokenizer = make_tokenizer()
    for prompt in ("chat", "alpaca"):
        encoder = Encoder(tokenizer, prompt_format(prompt, tokenizer))
        (flaw,) = encoder.by_row([Row("f", 1, "", THINKING)])
        assert isinstance(flaw, tuple)
        assert flaw[0] == "reasoning_content"
    twice = encoder_of(chatml("m['content']", "{{ '<think>\\n\\n</think>\\n\\n' }}"))
    (flaw,) = twice.by_row([Row("f", 1, "", THINKING)])
    assert "leaves out the thinking" in str(flaw)


def test_rows_that_a_template_refuses_are_left_out_or_told_all_at_once(tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    rows = [{"instruction": f"Q{n}", "output": "A", "system": "S" if n in (2, 5) else ""} for n in range(8)]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(rows))
    for policy in ("skip", "fail"):
        recipe = make_recipe(data={"train": "a.json", "eval": 0, "on_bad_row": policy}).data
        arguments = (recipe, 0, file, None, make_tokenizer(template), tmp_path)
        if policy == "fail":
            with pytest.raises(DataError, match=r"(?s)2 of 8 rows .*row 3: .*no system.*row 6: .*no system"):
                prepare_data(*arguments)
            continue
        data = prepare_data(*arguments)
        assert data.bad_row_count == 2 and [problem.number for problem in data.problems] == [3, 6]
        assert data.train.dataset["row"] == [0, 1, 3, 4, 6, 7]


def test_rows_of_which_nothing_is_left_are_told(tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    rows = [{"instruction": "Q", "output": "A", "system": "S"}, {"instruction": "long " * 100, "output": "A"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    recipe = make_recipe(data={"train": "a.json", "eval": 0, "on_bad_row": "skip", "max_length": 32}).data
    with pytest.raises(DataError, match="none of the 1 rows has any of its response within"):
        prepare_data(recipe, 0, tmp_path / "a.json", None, make_tokenizer(template), tmp_path)


def test_added_tokens_are_words_like_any_other() -> None:
    tokenizer = make_tokenizer(chatml("m['content']", BESIDE))
    tokenizer.add_tokens(["<step>"])
    row = Row("f", 1, "", (Exchange("one?", "", "first", thinking="c <step> d"),))
    (flaw,) = Encoder(tokenizer, prompt_format("chat", tokenizer)).by_row([row])
    assert "special token" in str(flaw)
    (examples,) = Encoder(tokenizer, prompt_format("chat", tokenizer, words=["<step>"])).by_row([row])
    assert "special token" not in str(examples)


def test_an_end_token_in_an_answer_is_told(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"instruction": "Q", "output": text} for text in ("A", "A <|im_end|>", "A")]))
    data = prepare_data(make_recipe(data={"eval": 0}).data, 0, file, None, make_tokenizer(), tmp_path)
    (note,) = data.notes
    assert "<|im_end|> is written out" in note and "row 2)" in note


def test_several_examples_of_a_row_are_kept_together(tmp_path: Path) -> None:
    rows = [Row("rows.json", 1, "", TURNS), Row("rows.json", 2, "", TURNS[:1])]
    found = tokenise(rows, encoder_of(TEMPLATES["qwen3"]), tmp_path)
    assert found.dataset["row"] == [0, 0, 1] and found.left_out == []


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


def test_templates_that_change_the_answer_are_refused() -> None:
    with pytest.raises(ModelError, match="rewrites the answer"):
        encoder_of(chatml("m['content'] | upper"))
