"""Foreign templates become text in a child process: what loops, fills the memory or recurses ends there, in words."""

from collections.abc import Sequence
from typing import Any

from huarizo.sandbox.worker import FailedError, Worker

LONGEST_TEMPLATE = 200_000  # characters
LONGEST_RENDERING, MOST_MEMORY = 5.0, 512 * 2**20  # seconds and bytes, of one conversation
_WORKER = Worker("templates", MOST_MEMORY)


def render_chat(tokenizer: Any, messages: Sequence[dict[str, Any]], answer_next: bool = False) -> str:
    """What the tokenizer's chat template makes of the messages; with `answer_next` up to where an answer begins.

    Raises:
        RefusedError: the template is no Jinja, or refuses the messages.
        TooCostlyError: it takes more time or memory than a text can.
        FailedError: it ends in another error.
    """
    return _render(
        "chat",
        tokenizer.get_chat_template(),
        **tokenizer.special_tokens_map,
        messages=messages,
        tools=None,
        documents=None,
        add_generation_prompt=answer_next,
    )


def render_prompt(template: str, instruction: str, input: str) -> str:
    """A recipe's template with its two variables. Raises as `render_chat` does."""
    return _render("prompt", template, instruction=instruction, input=input)


def _render(job: str, template: str, **variables: Any) -> str:
    if len(template) > LONGEST_TEMPLATE:
        raise FailedError(f"it has {len(template):,} characters, too many for one")
    return _WORKER.call(job, LONGEST_RENDERING, template=template, **variables)
