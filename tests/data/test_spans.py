"""The learnt part of what a chat template writes is the answer, token for token as the model will write it."""

import pytest

from huarizo.data.prompts import prompt_format
from huarizo.data.rows import Row
from huarizo.data.tokens import IGNORED, Encoder
from huarizo.data.turns import Exchange
from huarizo.errors import ModelError
from tests.data.encoding import PLAIN, TEMPLATES, chatml, encoder_of
from tests.tiny import make_tokenizer


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


def test_templates_that_change_the_answer_are_refused() -> None:
    with pytest.raises(ModelError, match="rewrites the answer"):
        encoder_of(chatml("m['content'] | upper"))
