"""Ids and labels: only the response is learnt, it ends with EOS, BOS stands once, bytes survive."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from huarizo.data.prompts import OpenExchange, prompt_format
from huarizo.data.rows import Row
from huarizo.data.tokens import IGNORED, Encoder, tokenise
from huarizo.data.turns import Exchange
from huarizo.errors import DataError, ModelError
from tests.data.encoding import TEMPLATES, TINY, TURNS, encoder_of, learnt_of_row
from tests.data.reading import read
from tests.tiny import make_tokenizer

FORMATS = ["alpaca", "stanford", "chat", "Q: {{ instruction }} {{ input }}\nA:"]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=60)


TRICKY = [
    "안녕하세요, 라마와 알파카입니다.",
    "a\nb\n\n",
    "  two spaces",
    "\tTab",
    "🦙 emoji 🏔️",
    "</s> in the text",
    "x</s>",
    "ﬁ ½",
    "\n",
]


def row(output: str, instruction: str = "Say it", input: str = "", system: str = "") -> Row:
    return Row("rows.json", 1, system, (Exchange(instruction, input, output),))


def encode(encoder: Encoder, *rows: Row) -> list[Any]:
    return list(encoder.encode(rows))


def learnt_text(encoder: Encoder, example: Any) -> str:
    """The learnt ids without their last, the stop, as text; an anchor keeps SentencePiece from stripping a space."""
    ids = [label for label in example.labels if label != IGNORED]
    assert ids[-1] == encoder.stop_id
    anchor = encoder.tokenizer("\n", add_special_tokens=False)["input_ids"]
    text = encoder.tokenizer.decode(anchor + ids[:-1], clean_up_tokenization_spaces=False)
    return text.removeprefix("\n")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("output", TRICKY)
def test_labels_decode_to_the_response_with_tinyllamas_tokenizer(
    name: str, output: str, tinyllama_tokenizer: Any
) -> None:
    encoder = Encoder(tinyllama_tokenizer, prompt_format(name, tinyllama_tokenizer))
    (example,) = encode(encoder, row(output, "지시", "입력 <|user|>"))
    assert learnt_text(encoder, example) == output
    assert example.input_ids.count(tinyllama_tokenizer.bos_token_id) == 1 and example.input_ids[0] == 1


@pytest.mark.parametrize("name", ["alpaca", "chat"])
def test_labels_of_999_real_rows_decode_to_the_response(
    name: str, tinyllama_tokenizer: Any, real_rows_file: Path
) -> None:
    data = json.loads(real_rows_file.read_text())
    rows = [
        Row("real", i, "", (Exchange(r["instruction"], r.get("input", ""), r["output"]),)) for i, r in enumerate(data)
    ]
    encoder = Encoder(tinyllama_tokenizer, prompt_format(name, tinyllama_tokenizer), max_length=100_000)
    examples = encode(encoder, *rows)
    assert len(examples) == 999
    assert [learnt_text(encoder, example) for example in examples] == [r["output"] for r in data]


@settings(max_examples=60, deadline=None)
@given(TEXT, TEXT, st.one_of(st.just(""), TEXT), st.sampled_from(FORMATS[:3]))
def test_any_response_is_learnt_whole_and_nothing_else_is(
    output: str, instruction: str, given_input: str, name: str
) -> None:
    encoder = Encoder(TINY, prompt_format(name, TINY), max_length=10_000)
    (example,) = encode(encoder, row(output, instruction, given_input))
    assert learnt_text(encoder, example) == output
    learnt = [label != IGNORED for label in example.labels]
    assert learnt == sorted(learnt)  # the prompt first, then the response
    assert all(label in (IGNORED, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    prompt = encoder.encode_prompt("", [OpenExchange(instruction, given_input)])
    assert example.input_ids[: learnt.index(True)] == prompt  # asked exactly as it was trained


@pytest.mark.parametrize("name", FORMATS[:3])
def test_every_assistant_turn_is_learnt(name: str) -> None:
    encoder = Encoder(TINY, prompt_format(name, TINY))
    conversation = Row("f", 1, "be brief", (Exchange("a?", "", "one"), Exchange("b?", "", "two")))
    (example,) = encode(encoder, conversation)
    text = TINY.decode([label for label in example.labels if label != IGNORED])
    assert text == f"one{encoder.prompt.stop}two{encoder.prompt.stop}"
    prompt = encoder.encode_prompt("be brief", [Exchange("a?", "", "one"), OpenExchange("b?")])
    assert example.input_ids[: len(prompt)] == prompt


@pytest.mark.parametrize("max_length", [1, 30, 64, 75, 500])
def test_long_rows_are_cut_or_left_out(max_length: int) -> None:
    encoder = Encoder(TINY, prompt_format("alpaca", TINY), max_length=max_length)
    whole = encode(
        Encoder(TINY, prompt_format("alpaca", TINY), max_length=10_000), row("an answer of some length" * 3)
    )[0]
    (example,) = encode(encoder, row("an answer of some length" * 3))
    prompt_length = whole.labels.count(IGNORED)
    if max_length <= prompt_length:
        assert example is None
    else:
        assert example.input_ids == whole.input_ids[:max_length]
        assert example.was_cut == (max_length < len(whole.input_ids))


def test_labels_all_without_eos_is_the_tutorials_text(tinyllama_tokenizer: Any) -> None:
    encoder = Encoder(tinyllama_tokenizer, prompt_format("alpaca", tinyllama_tokenizer, eos=False), labels="all")
    (example,) = encode(encoder, row("Fine.", "How are you?", "today"))
    text = "### Instruction:\nHow are you?\n\n### Input:\ntoday\n\n### Response:\nFine."
    assert example.input_ids == tinyllama_tokenizer(text)["input_ids"] == example.labels


@pytest.mark.parametrize("stop", ["<|im_end|>", "</s>"])
def test_eos_is_learnt_where_pad_is_eos_and_where_the_template_writes_no_stop(stop: str) -> None:
    bare = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = make_tokenizer(bare if stop == "</s>" else TINY.chat_template, eos=stop)
    encoder = Encoder(tokenizer, prompt_format("chat", tokenizer))
    (example,) = encode(encoder, row("hi"))
    assert example.labels[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id


def test_prepared_rows_are_cached_by_content(tmp_path: Path) -> None:
    rows = [row(f"answer {n}", f"question {n}") for n in range(2500)] + [row("long", "x" * 600)]
    encoder = Encoder(TINY, prompt_format("alpaca", TINY))
    first = tokenise(rows, encoder, tmp_path)
    assert len(first.dataset) == 2500 and first.left_out == [2500]
    assert first.tokens == sum(map(len, first.dataset["input_ids"]))
    (file,) = tmp_path.glob("*.arrow")
    stamp = file.stat().st_mtime_ns
    again = tokenise(rows, encoder, tmp_path)
    assert file.stat().st_mtime_ns == stamp and again.left_out == [2500]
    assert again.dataset[7] == first.dataset[7]
    expected = encode(encoder, rows[2499])[0]
    assert again.dataset[2499]["input_ids"] == expected.input_ids and again.dataset[2499]["labels"] == expected.labels
    tokenise([row("other")], encoder, tmp_path)
    tokenise(rows, Encoder(TINY, prompt_format("stanford", TINY)), tmp_path)
    assert len(list(tmp_path.glob("*.arrow"))) == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "prolonged"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, damage: str) -> None:
    rows, encoder = [row(f"answer {n}") for n in range(50)], Encoder(TINY, prompt_format("alpaca", TINY))
    first = tokenise(rows, encoder, tmp_path)
    (file,) = tmp_path.glob("*.arrow")
    whole = file.read_bytes()
    middle = len(whole) // 2
    damaged = {"cut": whole[:middle], "emptied": b"", "prolonged": whole + b"x"}
    damaged["flipped"] = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    file.unlink()  # the first one is still mapped
    file.write_bytes(damaged[damage])
    again = tokenise(rows, encoder, tmp_path)
    assert file.read_bytes() == whole and again.dataset[:] == first.dataset[:]
    assert again.fingerprint == first.fingerprint


def test_two_runs_may_prepare_the_same_rows_at_once(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    rows, encoder = [row(f"answer {n}") for n in range(300)], Encoder(TINY, prompt_format("alpaca", TINY))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: tokenise(rows, encoder, tmp_path), range(8)))
    assert all(one.dataset[:] == found[0].dataset[:] for one in found)
    assert [path.suffix for path in tmp_path.iterdir()] == [".arrow"]


def test_what_a_killed_run_left_in_the_cache_is_removed_later(tmp_path: Path) -> None:

    for name, age in {".old.arrow.0123abcd.tmp": 2e5, ".new.arrow.0123abcd.tmp": 0}.items():
        (tmp_path / name).write_bytes(b"half")
        stamp = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (stamp, stamp))
    tokenise([row("x")], Encoder(TINY, prompt_format("alpaca", TINY)), tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"} == {".new.arrow.0123abcd.tmp"}


def test_rows_without_any_response_within_the_length_are_refused(tmp_path: Path) -> None:
    encoder = Encoder(TINY, prompt_format("alpaca", TINY), max_length=8)
    with pytest.raises(DataError, match="data.max_length=8"):
        tokenise([row("x")], encoder, tmp_path)


class PanicException(BaseException):
    """As libraries in Rust raise it, by its name alone."""


@pytest.mark.parametrize("error", [PanicException("out of range"), Exception("out of range")])
def test_a_tokenizer_that_fails_is_reported_with_its_name(error: BaseException) -> None:
    class Tokenizer:
        name_or_path, bos_token_id, eos_token_id = "models/odd", None, None

        def convert_tokens_to_ids(self, token: str) -> int:
            return 7

        def __call__(self, texts: list[str], **options: bool) -> dict[str, Any]:
            if "break" in texts[-1]:
                raise error
            return {"input_ids": [[] for _ in texts]}

    encoder = Encoder(Tokenizer(), prompt_format("Q: {{ instruction }}\nA:", TINY, eos=False))
    with pytest.raises(ModelError, match="^models/odd: the tokenizer can't encode these texts: .*out of range"):
        list(encoder.by_row([row("break")]))
    with pytest.raises(ModelError, match="^models/odd: "):
        encoder.encode_text("break")


def test_several_examples_of_a_row_are_kept_together(tmp_path: Path) -> None:
    rows = [Row("rows.json", 1, "", TURNS), Row("rows.json", 2, "", TURNS[:1])]
    found = tokenise(rows, encoder_of(TEMPLATES["qwen3"]), tmp_path)
    assert found.dataset["row"] == [0, 0, 1] and found.left_out == []


@pytest.mark.parametrize("prompt", ["alpaca", "chat"])
def test_a_text_is_trained_on_as_it_is(tmp_path: Path, prompt: str) -> None:
    texts = ["### Human: What is salt?### Assistant: Sodium chloride.", "<s>[INST] Hi [/INST] Hi. </s>"]
    rows = read(tmp_path, *({"text": text} for text in texts))
    assert rows.format == "text"
    assert (
        [learnt_of_row(row, prompt) for row in rows.rows]
        == texts
        == [learnt_of_row(row, prompt, "all") for row in rows.rows]
    )
    with pytest.raises(DataError, match=r"a.json, row 1, field 'text': .*data.labels=auto"):
        list(Encoder(TINY, prompt_format(prompt, TINY), "response").encode(rows.rows))


def test_a_texts_special_tokens_stand_once(tinyllama_tokenizer: Any) -> None:
    encoder = Encoder(tinyllama_tokenizer, prompt_format("alpaca", tinyllama_tokenizer))
    for text in ("<s> Hi </s>", "Hi </s>", "Hi"):
        (example,) = encoder.encode([Row("f", 1, "", (), text=text)])
        assert example is not None and example.input_ids == example.labels
        assert example.input_ids.count(1) == 1 and example.input_ids.count(2) == text.count("</s>")
