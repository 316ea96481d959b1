"""Renders foreign templates in a child process, where endless loops, recursion and memory use end in an error."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from huarizo.data.spans import Rendered
from huarizo.sandbox.worker import FailedError, Worker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

    Tokenizer = PreTrainedTokenizer | PreTrainedTokenizerFast

LONGEST_TEMPLATE = 200_000  # characters
LONGEST_RENDERING, MOST_MEMORY = 5.0, 512 * 2**20  # seconds and bytes, for one conversation
Message = dict[str, object]
"""A message as chat templates take it: `role`, `content` and other fields, all of them JSON values."""
_WORKER = Worker("templates", MOST_MEMORY)


def render_chat(
    tokenizer: "Tokenizer",
    messages: Sequence[Message],
    tools: list[dict[str, object]] | None = None,
    answer_next: bool = False,
    date: str | None = None,
) -> Rendered:
    """Render messages with the tokenizer's chat template.

    Args:
        tokenizer: has the chat template.
        messages: the conversation.
        tools: their descriptions in OpenAI's shape.
        answer_next: also write what comes before an answer (`add_generation_prompt`).
        date: the current day for the template, YYYY-MM-DD; today by default.

    Raises:
        RefusedError: the template is not valid Jinja, or refuses the messages.
        TooCostlyError: it takes more time or memory than allowed.
        FailedError: it fails with any other error.
    """
    text, generated = _render(
        "chat",
        tokenizer.get_chat_template(tools=tools),
        date=date,
        **tokenizer.special_tokens_map,
        messages=messages,
        tools=tools,
        documents=None,
        add_generation_prompt=answer_next,
    )
    return Rendered(text, generated)


def render_prompt(template: str, instruction: str, input: str) -> str:
    """Render a recipe's own template with its two variables. Raises as `render_chat` does."""
    return _render("prompt", template, instruction=instruction, input=input)


def _render(job: str, template: str, **variables: object) -> Any:  # what the job returns
    if len(template) > LONGEST_TEMPLATE:
        raise FailedError(f"it has {len(template):,} characters, too many for a template")
    return _WORKER.call(job, LONGEST_RENDERING, template=template, **variables)
