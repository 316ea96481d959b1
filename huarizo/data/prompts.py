"""Rows become text: what the model reads, what it has to answer, and where it has to stop.

In goes a conversation (a system text and exchanges), out come pieces of text marked prompt, response or stop. Training,
evaluation and chat all call `pieces` of one and the same format; for an answer still to be written the last
exchange's output is None and the pieces end with the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from huarizo.data.rows import Exchange
from huarizo.data.templates import render_chat, render_prompt
from huarizo.errors import DataError, ModelError, RecipeError
from huarizo.sandbox.worker import FailedError, RefusedError, TooCostlyError

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
class Piece:
    """A stretch of text that is read (prompt), learnt (response), or ends a response (stop, a special token)."""

    kind: Literal["prompt", "response", "stop"]
    text: str


@dataclass(frozen=True, slots=True)
class OpenExchange:
    """A user turn whose answer is still to be written."""

    instruction: str
    input: str = ""
    output: None = None


Turn = Exchange | OpenExchange


@dataclass(frozen=True, slots=True)
class Question:
    """A user turn to be answered, and the system text in front of it."""

    turn: OpenExchange
    system: str = ""


class PromptFormat(Protocol):
    """How conversations become text. `stop` is the special token that ends a response."""

    name: str
    stop: str

    def pieces(self, system: str, turns: Sequence[Turn]) -> list[Piece]: ...


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

    def __init__(self, name: str, render: Any, stop: str, with_stop: bool = True) -> None:
        self.name, self.stop = name, stop
        self._render, self._with_stop = render, with_stop

    def pieces(self, system: str, turns: Sequence[Turn]) -> list[Piece]:
        pieces: list[Piece] = []
        lead = f"{system}\n\n" if system else ""
        for turn in turns:
            pieces.append(Piece("prompt", lead + self._render(turn)))
            lead = "\n\n"
            if turn.output is None:
                break
            pieces.append(Piece("response", turn.output))
            if self._with_stop:
                pieces.append(Piece("stop", self.stop))
        return pieces


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


def _messages(system: str, turns: Sequence[Turn]) -> list[dict[str, str]]:
    """A conversation up to its last question, as chat templates take it."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": user_text(turn)})
        messages.append({"role": "assistant", "content": turn.output or ""})
    return messages[:-1]


class ChatFormat:
    """The model's own chat template, cut at the places where an answer begins and ends.

    Raises:
        ModelError: when the template can't be cut there (it rewrites earlier turns, or the answer itself).
    """

    name = "chat"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        probe = [{"role": "user", "content": "u"}]
        prompt = self._text(probe, answer_next=True)
        tail = self._text([*probe, {"role": "assistant", "content": "x"}])
        if not tail.startswith(prompt + "x"):
            raise ModelError(
                "the model's chat template can't be trained on: it rewrites the answer. Use data.prompt=alpaca"
            )
        tail = tail.removeprefix(prompt + "x")
        specials = {str(token) for token in tokenizer.get_added_vocab()} | set(tokenizer.all_special_tokens)
        ends = [token for token in specials if token and tail.startswith(token)]
        self._writes_stop = bool(ends)
        self.stop = max(ends, key=len) if ends else str(tokenizer.eos_token)

    def _text(self, messages: list[dict[str, str]], answer_next: bool = False) -> str:
        try:
            return render_chat(self._tokenizer, messages, answer_next)
        except RefusedError as error:
            raise DataError(f"the model's chat template refuses this conversation: {error}") from None
        except TooCostlyError as error:
            raise ModelError(f"the model's chat template takes {error}. Use data.prompt=alpaca") from None
        except FailedError as error:
            raise ModelError(f"the model's chat template fails: {error}. Use data.prompt=alpaca") from None

    def pieces(self, system: str, turns: Sequence[Turn]) -> list[Piece]:
        pieces: list[Piece] = []
        done = ""
        for number, turn in enumerate(turns, 1):
            text = self._text(_messages(system, turns[:number]), answer_next=True)
            if not text.startswith(done):
                if turns[-1].output is None:  # nothing is learnt here, so the whole may be written in one piece
                    return [Piece("prompt", self._text(_messages(system, turns), answer_next=True))]
                raise ModelError(
                    "the model's chat template rewrites earlier turns. Use data.prompt=alpaca for this data"
                )
            pieces.append(Piece("prompt", text[len(done) :]))
            if turn.output is None:
                break
            pieces += [Piece("response", turn.output), Piece("stop", self.stop)]
            done = text + turn.output + (self.stop if self._writes_stop else "")
        return pieces


def prompt_format(name: str, tokenizer: Any, eos: bool = True) -> PromptFormat:
    """The format that `data.prompt` names; `auto` is chat where the tokenizer has a template and alpaca otherwise.

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
        return ChatFormat(tokenizer)
    stop = str(tokenizer.eos_token or "")
    if name in ("alpaca", "stanford"):
        return TextFormat(name, alpaca if name == "alpaca" else stanford, stop, with_stop=eos)
    return JinjaFormat(name, stop, with_stop=eos)
