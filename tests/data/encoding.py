"""Chat templates of many families, and what is learnt of rows that go through them."""

import itertools
from typing import Any

from huarizo.data.prompts import prompt_format
from huarizo.data.rows import Row
from huarizo.data.tokens import IGNORED, Encoder
from huarizo.data.turns import Exchange
from tests.tiny import CHATML, make_tokenizer

TINY = make_tokenizer()
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
    # the assistant has another name, and every content is trimmed
    "gemma": "{{ bos_token }}" + LOOP + "{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' "
    "+ m['content'] | trim + '<|im_end|>\\n' }}" + DONE + NEXT + "{{ '<|im_start|>model\\n' }}" + END,
    # a system text with the date before everything, and a `generation` block that begins before the answer
    "smollm3": "{{ '<|im_start|>system\\nToday Date: ' + strftime_now('%d %B %Y') + '<|im_end|>\\n' }}" + LOOP + ASSISTANT
    + "{% generation %}{{ '<|im_start|>assistant\\n' + m['content'].lstrip('\\n') + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}" + END + DONE
    + NEXT + "{{ '<|im_start|>assistant\\n' }}" + END,
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


def learnt_of_row(row: Row, prompt: str, labels: Any = "auto") -> str:
    """The learnt text of a row that is one example."""
    encoder = Encoder(TINY, prompt_format(prompt, TINY), labels)
    (example,) = encoder.encode([row])
    assert example is not None
    return TINY.decode([label for label in example.labels if label != IGNORED])
