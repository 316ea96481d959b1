"""Rows become text: what the model reads, what it has to answer, and where it has to stop.

In goes a conversation (a system text and exchanges), out come pieces of text: prompt, opening, response or stop.
Training, evaluation and chat all use one and the same format; for an answer still to be written the last exchange's
output is None and the pieces end with the prompt. A row is trained on as the model meets it when it is asked: where a
chat template rewrites earlier turns once later ones come, one row becomes several examples (`examples`).
"""

import datetime
import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from huarizo.data.spans import ANSWER, QUESTION, Piece, RefusedRow, Rendered, came_back, shape_of
from huarizo.data.templates import render_chat, render_prompt
from huarizo.data.turns import Exchange
from huarizo.errors import ModelError, RecipeError
from huarizo.sandbox.worker import FailedError, RefusedError, TooCostlyError

PLACE, VALUE = "Qplaceq5", "Avaluea5"  # texts that no template has of its own
LOST_THINKING = "the model's chat template leaves out the thinking beside an answer"
NO_THINKING = "Write it in front of the answer, as <think>...</think>, or delete it"
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
    """A user turn to be answered, and the system text in front of it."""

    turn: OpenExchange
    system: str = ""


class PromptFormat(Protocol):
    """How conversations become text. `stop` is the special token that ends a response.

    `date`: the day that prompts tell the model, YYYY-MM-DD; None where they tell none.
    `pieces` are those of the last answer, or of the prompt for one, with all that the model reads before it.
    `examples` are the pieces of all answers, in as few conversations as the format lets stand together.
    Both raise RefusedRow where the format has no place for something that is said.
    """

    name: str
    stop: str
    date: str | None

    def pieces(self, system: str, turns: Sequence[Turn], tools: str = "") -> list[Piece]: ...

    def examples(self, system: str, turns: Sequence[Turn], tools: str = "") -> list[list[Piece]]: ...


def user_text(turn: Turn) -> str:
    """What the user says in a chat: the instruction and, after a blank line, the input."""
    return f"{turn.instruction}\n\n{turn.input}" if turn.input else turn.instruction


def alpaca(turn: Turn) -> str:
    """The tutorial's prompt; the Input part only where there is an input."""
    middle = f"### Input:\n{turn.input}\n\n" if turn.input else ""
    return f"### Instruction:\n{turn.instruction}\n\n{middle}### Response:\n"


def stanford(turn: Turn) -> str:
    """Stanford Alpaca's prompt: a preamble, and the response directly behind the last colon."""
    template = STANFORD_WITH_INPUT if turn.input else STANFORD_WITHOUT_INPUT
    return template.format(instruction=turn.instruction, input=turn.input)


class TextFormat:
    """A format made of plain text. Later turns of a conversation follow after a blank line."""

    date: str | None = None

    def __init__(self, name: str, render: Any, stop: str, with_stop: bool = True) -> None:
        self.name, self.stop = name, stop
        self._render, self._with_stop = render, with_stop

    def pieces(self, system: str, turns: Sequence[Turn], tools: str = "") -> list[Piece]:
        if tools or any(turn.calls or turn.results for turn in turns):
            what = "uses tools, and this prompt format has no place for tools"
            raise RefusedRow(what, "Use data.prompt=chat with a model whose chat template takes them", "tools")
        if any(turn.thinking for turn in turns):
            what = "has thinking beside an answer, and this prompt format has no place for it"
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
    """A template of the recipe's own, in Jinja, with `instruction` and `input`."""

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


def _asked(turn: Turn) -> list[dict[str, Any]]:
    """The messages in front of an answer, as chat templates take them."""
    messages = [json.loads(result) for result in turn.results]
    text = user_text(turn)
    return [*messages, {"role": "user", "content": text}] if text or not messages else messages


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as a JSON text."""
    function = call["function"]
    return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _thought_in_answer(turn: Turn) -> Turn:
    """The turn with its thinking written in front of its answer."""
    return replace(turn, output=f"<think>\n{turn.thinking}\n</think>\n\n{turn.output or ''}", thinking="")


class ChatFormat:
    """The model's own chat template, cut at the places where an answer begins and ends.

    date: the day that the template is told, YYYY-MM-DD; today unless given. `date` is None of a template that asks for
    none. words: added tokens that rows may hold as any other word.

    Raises:
        ModelError: when the template can't be cut there (it rewrites the answer).
    """

    name = "chat"

    def __init__(self, tokenizer: Any, date: str | None = None, words: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self.date = (date or f"{datetime.date.today()}") if "strftime_now" in str(tokenizer.chat_template) else None
        probe: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}]
        specials = {str(token) for token in tokenizer.get_added_vocab()} | set(tokenizer.all_special_tokens)
        specials -= set(words)
        try:
            asked = self._rendered(probe, answer_next=True)
            whole = self._rendered([*probe, {"role": "assistant", "content": ANSWER}])
        except RefusedRow as error:
            raise ModelError(f"{error.flaw.what}. Use data.prompt=alpaca") from None
        self._thinks = "</think>" in str(tokenizer.chat_template)
        self._shape = shape_of(asked.text, whole.text, specials, str(tokenizer.eos_token))
        self.stop = self._shape.stop

    def _rendered(self, messages: list[dict[str, Any]], tools: Any = None, answer_next: bool = False) -> Rendered:
        try:
            return render_chat(self._tokenizer, messages, tools, answer_next, self.date)
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
        # Nothing is learnt here, so that the whole may be written in one piece, whatever the answers were.
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        for turn in turns[:-1]:
            messages += [*_asked(turn), self._answered(turn)]
        known = json.loads(tools) if tools else None
        return [Piece("prompt", self._rendered([*messages, *_asked(turns[-1])], known, answer_next=True).text)]

    def examples(self, system: str, turns: Sequence[Turn], tools: str = "") -> list[list[Piece]]:
        """A new example begins where the template writes what came before otherwise than the model read and wrote it:
        without its thinking, say, or with another token at the end."""
        examples: list[list[Piece]] = []
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        known, done = json.loads(tools) if tools else None, ""
        for number, turn in enumerate(turns, 1):
            messages += _asked(turn)
            asked = self._rendered(messages, known, answer_next=True).text
            _require_all(asked, system, turns[:number], known)
            if not examples or not asked.startswith(done):
                examples.append([])
                done = ""
            examples[-1].append(Piece("prompt", asked[len(done) :]))
            if turn.output is None:
                break
            message, answer = self._answer(asked, messages, turn, known)
            messages.append(message)
            examples[-1] += [replace(piece, learnt=piece.learnt and turn.learnt) for piece in answer]
            written = (piece.text for piece in answer if piece.kind != "stop" or self._shape.writes_stop)
            done = asked + "".join(written)
        return examples

    def _answer(
        self, asked: str, messages: list[dict[str, Any]], turn: Exchange, tools: Any
    ) -> tuple[dict[str, Any], list[Piece]]:
        """The message of an answer, and its pieces behind `asked`.

        Thinking is handed over beside the answer, as most templates that know of it take it, or else in front of it, as
        the other ones do.
        """
        if any(token in turn.thinking for token in self._shape.specials):
            raise RefusedRow("has a special token written out in its thinking", "Delete the token", "reasoning_content")
        try:
            return self._written(asked, messages, turn, tools)
        except RefusedRow:
            if not turn.thinking or not self._thinks:
                raise
        message, answer = self._written(asked, messages, _thought_in_answer(turn), tools)
        if sum(piece.text.count("</think>") for piece in answer) > 1:  # the template has written thinking of its own
            raise RefusedRow(LOST_THINKING, NO_THINKING, "reasoning_content")
        return message, answer

    def _written(
        self, asked: str, messages: list[dict[str, Any]], turn: Turn, tools: Any
    ) -> tuple[dict[str, Any], list[Piece]]:
        message = self._answered(turn)
        whole = self._rendered([*messages, message], tools)
        answer = self._shape.answer(asked, whole, turn.output or "", bool(turn.calls))
        written = "".join(piece.text for piece in answer)
        if not came_back(turn.thinking, written):
            raise RefusedRow(LOST_THINKING, NO_THINKING, "reasoning_content")
        _require_calls(turn.calls, written)
        return message, answer

    def _answered(self, turn: Turn) -> dict[str, Any]:
        """An answer's message, as the template takes it."""
        message: dict[str, Any] = {"role": "assistant", "content": turn.output}
        if turn.thinking:
            message |= {"reasoning_content": turn.thinking, "thinking": turn.thinking}
        if turn.calls:
            as_text, no_content = self._calls_taken
            calls = json.loads(turn.calls)
            message["tool_calls"] = [_with_text(call) for call in calls] if as_text else calls
            message["content"] = turn.output or no_content
        return message

    @functools.cached_property
    def _calls_taken(self) -> tuple[bool, str | None]:
        """How the template takes tool calls: whether with their arguments as a JSON text, and with which content where
        there is no text beside them. The first way in which it writes the arguments as JSON."""
        arguments = {PLACE: [VALUE, True]}  # Python would write it otherwise than JSON
        call = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": arguments}}
        wanted = "".join(json.dumps(arguments).split())
        for no_content, as_text in itertools.product(("", None), (False, True)):
            calls = [_with_text(call) if as_text else call]
            answer = {"role": "assistant", "content": no_content, "tool_calls": calls}
            try:
                written = self._rendered([{"role": "user", "content": QUESTION}, answer]).text
            except RefusedRow:
                continue
            if wanted in "".join(written.split()):
                return as_text, no_content
        return False, ""


def _require_all(asked: str, system: str, turns: Sequence[Turn], tools: list[dict[str, Any]] | None) -> None:
    """All that was said and the names of all tools, in a prompt as the template wrote it.

    Raises:
        RefusedRow: something is not there.
    """
    lost = ""
    if not came_back(system, asked):
        lost = "the system text"
    elif any(not came_back(user_text(turn), asked) for turn in turns):
        lost = "what the user said"
    elif not all(_last_word(turn) in asked for turn in turns[:-1]):
        lost = "an earlier answer"
    if lost:
        raise RefusedRow(f"the model's chat template leaves out {lost}")
    names = [tool["function"]["name"] for tool in tools or ()]
    said = [str(json.loads(result)["content"]) for turn in turns for result in turn.results]
    if not all(came_back(text, asked) for text in (*names, *said)):
        raise RefusedRow("the model's chat template leaves out tools, or what they gave back", NO_TOOLS, "tools")
    for turn in turns[:-1]:
        _require_calls(turn.calls, asked)


def _last_word(turn: Turn) -> str:
    """The end of an answer, which is left where its thinking is left out."""
    words = re.findall(r"\w+", turn.output or "")
    return words[-1] if words else ""


def _require_calls(calls: str, written: str) -> None:
    """The names of all calls and what their arguments hold.

    Raises:
        RefusedRow: something is not there.
    """
    for call in json.loads(calls) if calls else ():
        for text in (call["function"]["name"], *_texts(call["function"]["arguments"])):
            if not came_back(text, written) and json.dumps(text)[1:-1] not in written:
                raise RefusedRow("the model's chat template leaves out tool calls", NO_TOOLS, "tool_calls")


def _texts(value: Any) -> Iterator[str]:
    """The names and texts in a JSON value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(inner)


def prompt_format(
    name: str, tokenizer: Any, eos: bool = True, date: str | None = None, words: Sequence[str] = ()
) -> PromptFormat:
    """The format that `data.prompt` names; `auto` is chat where the tokenizer has a template and alpaca otherwise.

    date: the day that a chat template is told, YYYY-MM-DD; today unless given.
    words: added tokens that rows may hold as any other word (`data.special_tokens`).

    Raises:
        RecipeError: chat is asked of a model without a template, or a Jinja template is wrong.
        ModelError: the tokenizer has no end-of-sequence token, or its template can't be cut.
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
