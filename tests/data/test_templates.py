"""A chat template in the child process gives what Transformers gives."""

from typing import Any

import pytest

from huarizo.data.templates import render_chat
from huarizo.sandbox.worker import RefusedError
from tests.tiny import CHATML, make_tokenizer

MESSAGES = [
    {"role": "system", "content": "<b> & \"quotes\" 가"},
    {"role": "user", "content": " spaces \n"},
    {"role": "assistant", "content": "x"},
]  # fmt: skip


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{% for m in messages %}\n    {% if loop.index == 2 %}{% break %}{% endif %}\n  {{ m | tojson }}\n{% endfor %}\n",
        "{{ messages | tojson(indent=2) }}{{ bos_token }}{{ eos_token }}{{ tools is none }}{{ documents is none }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% for m in messages %}{% generation %}\n {% set a = m.role %}{{ a }}{{ m.content }}{% endgeneration %}\n{% endfor %}",
        "{% set a = 1 %}{% generation %}{% set a = 2 %}{% endgeneration %}{{ a }}",
        "{{ dict(a=1).a }}{{ dict.fromkeys(['x'], 3) }}{{ undefined_name }}{{ strftime_now('%Y') }}{{ 2**5 }}",
        "{% if messages[0]['role'] == 'system' %}{{ messages[0].content.strip() }}{% endif %}{{ messages[1:] | length }}",
        "{{ messages | map(attribute='role') | join(',') }}{{ none }}{{ add_generation_prompt }}",
    ],
)
@pytest.mark.parametrize("answer_next", [True, False])
def test_as_transformers_renders(template: str, answer_next: bool) -> None:
    tokenizer: Any = make_tokenizer(chat_template=template)
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=answer_next)
    assert render_chat(tokenizer, MESSAGES, answer_next=answer_next).text == expected


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system text') }}", "{% set ns = namespace(__class__=1) %}", "{% do messages.append(1) %}",
     "{{ messages.append(1) }}", "{{ strftime_now.__globals__.os }}", "{% set ns = namespace() %}{% set ns._a = 1 %}"],
)  # fmt: skip
def test_what_transformers_refuses(template: str) -> None:
    tokenizer: Any = make_tokenizer(chat_template=template)
    with pytest.raises(Exception):  # noqa: B017
        tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    with pytest.raises(RefusedError):
        render_chat(tokenizer, MESSAGES)
