"""Prompt formats turn conversations into text: what the model reads, what it has to answer, and where it has to stop.

Input is a conversation (a system text and exchanges); output is pieces of text: prompt, opening, response or stop.
Training, evaluation and chat use the same format. If the answer is still to be written, the last exchange's output is
None and the pieces end with the prompt. Training shows the model each turn exactly as inference does: if a chat
template rewrites earlier turns when later ones are added, one row becomes several examples (`examples`).
"""

import datetime
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from huarizo.data.spans import ANSWER, QUESTION, Piece, RefusedRow, Rendered, answer_shape, appears_in
from huarizo.data.templates import Message, render_chat, render_prompt
from huarizo.data.turns import Exchange, ToolCall
from huarizo.errors import ModelError, RecipeError
from huarizo.sandbox.worker import FailedError, RefusedError, TooCostlyError

if TYPE_CHECKING:
    from huarizo.data.templates import Tokenizer

PLACE, VALUE = "Qplaceq5", "Avaluea5"  # texts that occur in no template
LOST_THINKING = "the model's chat template leaves out the thinking of an answer"
NO_THINKING = "Write it before the answer, as <think>...</think>, or delete it"
NO_TOOLS = "Use a model whose chat template takes tools, or delete the row"
STANFORD_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
STANFORD_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@dataclass(frozen=True, slots=True)
class OpenExchange:
    """A user turn whose answer is still to be written."""

    instruction: str
    input: str = ""
    output: None = None
    calls: str = ""
    results: tuple[str, ...] = ()
    thinking: str = ""


Turn = Exchange | OpenExchange


@dataclass(frozen=True, slots=True)
class Question:
    """A user turn to be answered, and the system text before it."""

    turn: OpenExchange
    system: str = ""


class PromptFormat(Protocol):
    """How conversations become text.

    stop: the special token that ends a response.
    date: the current day that prompts contain, YYYY-MM-DD; None if they contain none.
    """

    name: str
    stop: str
    date: str | None

    def pieces(self, system: str, turns: Sequence[Turn], tools: str = "") -> list[Piece]:
        """The last answer, or the prompt for one, with everything that the model reads before it.

        Raises:
            RefusedRow: the format has no place for something in the conversation.
        """
        ...

    def examples(self, system: str, turns: Sequence[Turn], tools: str = "") -> list[list[Piece]]:
        """All answers, in as few conversations as the format allows. Raises as `pieces` does."""
        ...


def user_text(turn: Turn) -> str:
    """The user's text in a chat: the instruction and, after a blank line, the input."""
    return f"{turn.instruction}\n\n{turn.input}" if turn.input else turn.instruction


def alpaca(turn: Turn) -> str:
    """The tutorial's prompt, with an Input part only if there is an input."""
    middle = f"### Input:\n{turn.input}\n\n" if turn.input else ""
    return f"### Instruction:\n{turn.instruction}\n\n{middle}### Response:\n"


def stanford(turn: Turn) -> str:
    """Stanford Alpaca's prompt: a preamble, and the response directly after the last colon."""
    template = STANFORD_WITH_INPUT if turn.input else STANFORD_WITHOUT_INPUT
    return template.format(instruction=turn.instruction, input=turn.input)


class TextFormat:
    """A prompt format of plain text. A blank line separates the turns of a conversation.

    render: the text of one turn, up to its answer. with_stop: whether `stop` ends each answer.
    """

    date: str | None = None

    def __init__(self, name: str, render: Callable[[Turn], str], stop: str, with_stop: bool = True) -> None:
        self.name, self.stop = name, stop
        self._render, self._with_stop = render, with_stop

    def pieces(self, system: str, turns: Sequence[Turn], tools: str = "") -> list[Piece]:
        if tools or any(turn.calls or turn.results for turn in turns):
            what = "uses tools, and this prompt format has no place for tools"
            raise RefusedRow(what, "Use data.prompt=chat with a model whose chat template takes them", "tools")
        if any(turn.thinking for turn in turns):
            what = "has thinking in a field of its own, and this prompt format has no place for it"
            raise RefusedRow(what, NO_THINKING, "reasoning_content")
        pieces: list[Piece] = []
        lead = f"{system}\n\n" if system else ""
        for turn in turns:
            pieces.append(Piece("prompt", lead + self._render(turn)))
            lead = "\n\n"
            if turn.output is None:
                break
            pieces.append(Piece("response", turn.output, turn.learnt))
            if self._with_stop:
                pieces.append(Piece("stop", self.stop, turn.learnt))
        return pieces

    def examples(self, system: str, turns: Sequence[Turn], tools: str = "") -> list[list[Piece]]:
        return [self.pieces(system, turns, tools)]


class JinjaFormat(TextFormat):
    """A recipe's own Jinja template, with the variables `instruction` and `input`."""

    def __init__(self, template: str, stop: str, with_stop: bool = True) -> None:
        def render(turn: Turn) -> str:
            try:
                return render_prompt(template, turn.instruction, turn.input)
            except TooCostlyError as error:
                raise RecipeError(f"data.prompt: the template takes {error}") from None
            except (RefusedError, FailedError) as error:
                raise RecipeError(f"data.prompt: {error}. A template has `instruction` and `input`") from None

        if "\0" not in render(OpenExchange("\0")):
            raise RecipeError(
                "data.prompt: the template must contain {{ instruction }}, and must not end with the answer"
            )
        super().__init__(template, render, stop, with_stop)


def _messages_before_answer(turn: Turn) -> list[Message]:
    """Tool results and the user's text, as messages for a chat template."""
    messages: list[Message] = [json.loads(result) for result in turn.results]
    text = user_text(turn)
    return [*messages, {"role": "user", "content": text}] if text or not messages else messages


def _with_json_arguments(call: ToolCall) -> ToolCall:
    """A tool call with its arguments as a JSON text instead of an object."""
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _with_thinking_in_output(turn: Turn) -> Turn:
    """The turn with its thinking written at the beginning of its output."""
    return replace(turn, output=f"<think>\n{turn.thinking}\n</think>\n\n{turn.output or ''}", thinking="")


class ChatFormat:
    """The model's own chat template, split where an answer begins and where it ends.

    date: the current day for the template, YYYY-MM-DD; today by default, and None if the template doesn't ask for it.
    words: added tokens that may occur in rows like any other word.

    Raises:
        ModelError: the template can't be split there, because it rewrites the answer.
    """

    name = "chat"

    def __init__(self, tokenizer: "Tokenizer", date: str | None = None, words: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self.date = (date or f"{datetime.date.today()}") if "strftime_now" in str(tokenizer.chat_template) else None
        probe: list[Message] = [{"role": "user", "content": QUESTION}]
        specials = {str(token) for token in tokenizer.get_added_vocab()} | set(tokenizer.all_special_tokens)
        specials -= set(words)
        try:
            prompt = self._rendered(probe, answer_next=True)
            whole = self._rendered([*probe, {"role": "assistant", "content": ANSWER}])
        except RefusedRow as error:
            raise ModelError(f"{error.flaw.what}. Use data.prompt=alpaca") from None
        self._thinks = "</think>" in str(tokenizer.chat_template)
        self._shape = answer_shape(prompt.text, whole.text, specials, str(tokenizer.eos_token))
        self.stop = self._shape.stop

    def _rendered(self, messages: list[Message], tools: str = "", answer_next: bool = False) -> Rendered:
        """Render messages; `tools` is a JSON list or ""."""
        known = json.loads(tools) if tools else None
        try:
            return render_chat(self._tokenizer, messages, known, answer_next, self.date)
        except RefusedError as error:
            raise RefusedRow(f"the model's chat template refuses this conversation: {error}") from None
        except TooCostlyError as error:
            raise ModelError(f"the model's chat template takes {error}. Use data.prompt=alpaca") from None
        except FailedError as error:
            raise RefusedRow(f"the model's chat template fails: {error}") from None

    def pieces(self, system: str, turns: Sequence[Turn], tools: str = "") -> list[Piece]:
        try:
            return self.examples(system, turns, tools)[-1]
        except RefusedRow:
            if turns[-1].output is not None:
                raise
        # Nothing is learnt here, so the whole prompt can be one piece, whatever the earlier answers are.
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        for turn in turns[:-1]:
            messages += [*_messages_before_answer(turn), self._answer_message(turn)]
        return [
            Piece(
                "prompt", self._rendered([*messages, *_messages_before_answer(turns[-1])], tools, answer_next=True).text
            )
        ]

    def examples(self, system: str, turns: Sequence[Turn], tools: str = "") -> list[list[Piece]]:
        """All answers. A new example begins where the template writes the earlier turns differently from how the model
        read and wrote them: without the thinking, for instance, or with another token at the end."""
        examples: list[list[Piece]] = []
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        so_far = ""  # text of the current example
        for number, turn in enumerate(turns, 1):
            messages += _messages_before_answer(turn)
            prompt = self._rendered(messages, tools, answer_next=True).text
            _require_nothing_lost(prompt, system, turns[:number], tools)
            if not examples or not prompt.startswith(so_far):
                examples.append([])
                so_far = ""
            examples[-1].append(Piece("prompt", prompt[len(so_far) :]))
            if turn.output is None:
                break
            message, answer = self._answer(prompt, messages, turn, tools)
            messages.append(message)
            examples[-1] += [replace(piece, learnt=piece.learnt and turn.learnt) for piece in answer]
            written = (piece.text for piece in answer if piece.kind != "stop" or self._shape.writes_stop)
            so_far = prompt + "".join(written)
        return examples

    def _answer(self, prompt: str, messages: list[Message], turn: Exchange, tools: str) -> tuple[Message, list[Piece]]:
        """The message of an answer, and the pieces that follow the prompt.

        Thinking is passed in a field of its own, which most templates with thinking read. If the template leaves it
        out there, it is passed at the beginning of the answer.
        """
        if any(token in turn.thinking for token in self._shape.specials):
            raise RefusedRow("has a special token written out in its thinking", "Delete the token", "reasoning_content")
        try:
            return self._rendered_answer(prompt, messages, turn, tools)
        except RefusedRow:
            if not turn.thinking or not self._thinks:
                raise
        message, answer = self._rendered_answer(prompt, messages, _with_thinking_in_output(turn), tools)
        if sum(piece.text.count("</think>") for piece in answer) > 1:  # the template writes thinking of its own
            raise RefusedRow(LOST_THINKING, NO_THINKING, "reasoning_content")
        return message, answer

    def _rendered_answer(
        self, prompt: str, messages: list[Message], turn: Turn, tools: str
    ) -> tuple[Message, list[Piece]]:
        message = self._answer_message(turn)
        whole = self._rendered([*messages, message], tools)
        answer = self._shape.pieces_of_answer(prompt, whole, turn.output or "", bool(turn.calls))
        written = "".join(piece.text for piece in answer)
        if not appears_in(turn.thinking, written):
            raise RefusedRow(LOST_THINKING, NO_THINKING, "reasoning_content")
        _require_calls(turn.calls, written)
        return message, answer

    def _answer_message(self, turn: Turn) -> Message:
        """The message of an answer, in the form that the template reads."""
        message: Message = {"role": "assistant", "content": turn.output}
        if turn.thinking:
            message |= {"reasoning_content": turn.thinking, "thinking": turn.thinking}
        if turn.calls:
            as_text, no_content = self._call_style
            calls = json.loads(turn.calls)
            message["tool_calls"] = [_with_json_arguments(call) for call in calls] if as_text else calls
            message["content"] = turn.output or no_content
        return message

    @functools.cached_property
    def _call_style(self) -> tuple[bool, str | None]:
        """The first (arguments as JSON text?, content of a call without text) that the template writes as JSON."""
        arguments: dict[str, object] = {PLACE: [VALUE, True]}  # Python and JSON write it differently
        call: ToolCall = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": arguments}}
        wanted = "".join(json.dumps(arguments).split())
        for no_content, as_text in itertools.product(("", None), (False, True)):
            calls = [_with_json_arguments(call) if as_text else call]
            answer: Message = {"role": "assistant", "content": no_content, "tool_calls": calls}
            try:
                written = self._rendered([{"role": "user", "content": QUESTION}, answer]).text
            except RefusedRow:
                continue
            if wanted in "".join(written.split()):
                return as_text, no_content
        return False, ""


def _require_nothing_lost(prompt: str, system: str, turns: Sequence[Turn], tools: str) -> None:
    """Check that a rendered prompt contains everything that was said and the names of all tools.

    Raises:
        RefusedRow: something is missing.
    """
    lost = ""
    if not appears_in(system, prompt):
        lost = "the system text"
    elif any(not appears_in(user_text(turn), prompt) for turn in turns):
        lost = "what the user said"
    elif not all(_last_word(turn) in prompt for turn in turns[:-1]):
        lost = "an earlier answer"
    if lost:
        raise RefusedRow(f"the model's chat template leaves out {lost}")
    names = [tool["function"]["name"] for tool in (json.loads(tools) if tools else ())]
    said = [str(json.loads(result)["content"]) for turn in turns for result in turn.results]
    if not all(appears_in(text, prompt) for text in (*names, *said)):
        raise RefusedRow("the model's chat template leaves out tools, or their results", NO_TOOLS, "tools")
    for turn in turns[:-1]:
        _require_calls(turn.calls, prompt)


def _last_word(turn: Turn) -> str:
    """The last word of an answer, which remains even if a template leaves out its thinking."""
    words = re.findall(r"\w+", turn.output or "")
    return words[-1] if words else ""


def _require_calls(calls: str, written: str) -> None:
    """Check that the text contains the names of all calls and the contents of their arguments.

    Raises:
        RefusedRow: something is missing.
    """
    for call in json.loads(calls) if calls else ():
        for text in (call["function"]["name"], *_texts(call["function"]["arguments"])):
            if not appears_in(text, written) and json.dumps(text)[1:-1] not in written:
                raise RefusedRow("the model's chat template leaves out tool calls", NO_TOOLS, "tool_calls")


def _texts(value: object) -> Iterator[str]:
    """The names and texts in a JSON value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(inner)


def prompt_format(
    name: str, tokenizer: "Tokenizer", eos: bool = True, date: str | None = None, words: Sequence[str] = ()
) -> PromptFormat:
    """The prompt format named by `data.prompt`.

    Args:
        name: auto (chat if the tokenizer has a template, else alpaca), chat, alpaca, stanford, or a Jinja template.
        tokenizer: of the model.
        eos: whether answers end with the end-of-sequence token.
        date: the current day for a chat template, YYYY-MM-DD; today by default.
        words: added tokens that may occur in rows like any other word (`data.special_tokens`).

    Raises:
        RecipeError: `chat` for a model without a template, or an invalid Jinja template.
        ModelError: the tokenizer has no end-of-sequence token, or its template can't be split.
    """
    if eos and tokenizer.eos_token is None:
        raise ModelError(
            "the model's tokenizer has no end-of-sequence token, so answers could never end. Set data.eos=false"
        )
    if name == "auto":
        name = "chat" if tokenizer.chat_template and eos else "alpaca"
    if name == "chat":
        if not tokenizer.chat_template:
            raise RecipeError(
                "data.prompt: this model has no chat template. Use data.prompt=alpaca or a template of your own"
            )
        return ChatFormat(tokenizer, date, words)
    stop = str(tokenizer.eos_token or "")
    if name in ("alpaca", "stanford"):
        return TextFormat(name, alpaca if name == "alpaca" else stanford, stop, with_stop=eos)
    return JinjaFormat(name, stop, with_stop=eos)
