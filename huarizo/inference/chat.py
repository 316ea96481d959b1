"""A conversation in the terminal. A line is a message to the model, or a command that begins with a slash."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

from huarizo.data.prompts import OpenExchange, Turn
from huarizo.data.turns import Exchange
from huarizo.errors import MachineError, UserError
from huarizo.inference.generate import Assistant, Sampling, stream_answer

HELP = """\
/base          switch to the untuned model, or back to the tuned one
/system TEXT   start over with a system message; without TEXT, with none
/set NAME X    temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed
/reset         start over
/exit          end (or Ctrl-D); Ctrl-C stops an answer"""
ROOM = 64  # tokens kept free for an answer


class Conversation:
    """The turns so far, which model answers, and how it samples.

    write: prints text as it is; an answer comes in pieces.
    """

    def __init__(
        self, assistant: Assistant, write: Callable[[str], None], system: str = "", sampling: Sampling | None = None
    ) -> None:
        self.assistant, self.write, self.system = assistant, write, system
        self.sampling = sampling or Sampling()
        self.turns: list[Exchange] = []
        self.untuned = False

    @property
    def prompt(self) -> str:
        """The prompt shown in front of the user's line."""
        return "you (to the base)> " if self.untuned else "you> "

    def hear(self, line: str) -> bool:
        """Handle a line. False if it ends the conversation."""
        line = line.strip()
        if line == "/exit":
            return False
        if line.startswith("/"):
            self.write(f"{self._command(*line.split(maxsplit=1))}\n")
        elif line:
            self._answer(line)
        return True

    def _command(self, name: str, rest: str = "") -> str:
        if name == "/base":
            self.untuned = not self.untuned
            return "the untuned model answers from here on" if self.untuned else "the tuned model answers again"
        if name == "/reset":
            self.turns.clear()
            return "conversation reset"
        if name == "/system":
            self.system = rest
            self.turns.clear()
            unheard = self.assistant.unheard(rest)
            said = "new conversation with this system message" if rest else "new conversation without a system message"
            return f"{said}\n({unheard})" if unheard else said
        if name == "/set":
            return self._set(*rest.split())
        return HELP if name == "/help" else f"{name}: no such command\n{HELP}"

    def _set(self, name: str = "", value: str = "", *more: str) -> str:
        kinds = {field.name: int if isinstance(field.default, int | None) else float for field in fields(Sampling)}
        try:
            number = kinds[name](value)
            self.sampling = checked(replace(self.sampling, **{name: number}))
        except (KeyError, ValueError):
            return f"/set takes one of {', '.join(kinds)}, and a number"
        except UserError as error:
            return str(error)
        return f"{name} is {number}"

    def _answer(self, line: str) -> None:
        try:
            remembered = self._remembered(line)
            asked = [*remembered, OpenExchange(line)]
            with self.assistant.untuned(self.untuned):
                answer = stream_answer(self.assistant, asked, self.write, self.system, self.sampling)
            self.turns = [*remembered, Exchange(line, "", answer.text)]
            self.write("" if answer.finished else f"\n(cut at {answer.tokens} tokens)")
        except KeyboardInterrupt:
            self.write("\n(stopped; this turn is dropped)")
        except (UserError, MachineError) as error:
            self.write(f"({error})")
        self.write("\n")

    def _remembered(self, line: str) -> list[Exchange]:
        """The earlier turns, without the oldest ones if these leave no room for an answer."""
        turns = list(self.turns)
        while turns and self._length([*turns, OpenExchange(line)]) + ROOM > self.assistant.positions:
            turns.pop(0)
        gone = len(self.turns) - len(turns)
        if gone and self._length([*turns, OpenExchange(line)]) < self.assistant.positions:
            self.write(f"(the model's {self.assistant.positions:,} tokens are full: {gone} old turns are dropped)\n")
        return turns

    def _length(self, turns: Sequence[Turn]) -> int:
        return len(self.assistant.prompt_ids(self.system, turns))


def checked(sampling: Sampling) -> Sampling:
    """The same sampling settings, checked.

    Raises:
        UserError: a value is out of range; the message gives the range.
    """
    ranges = {
        "max_new_tokens": (sampling.max_new_tokens >= 1, "1 or more"),
        "temperature": (
            sampling.temperature == 0 or 0.01 <= sampling.temperature <= 100,
            "0 (always the likeliest token) or 0.01 to 100",
        ),
        "top_p": (0 < sampling.top_p <= 1, "above 0 and at most 1"),
        "top_k": (sampling.top_k >= 0, "0 (no limit) or more"),
        "repetition_penalty": (0.01 <= sampling.repetition_penalty <= 100, "0.01 to 100 (1 changes nothing)"),
        "seed": (sampling.seed is None or 0 <= sampling.seed < 2**63, "0 or more, and below 2^63"),
    }
    for name, (fits, range_) in ranges.items():
        if not fits:
            raise UserError(f"{name} is {getattr(sampling, name)}; it must be {range_}")
    return sampling


def converse(conversation: Conversation, read: Callable[[str], str]) -> None:
    """Read and answer until `/exit` or the end of input. `read` shows a prompt and returns the next line."""
    if unheard := conversation.assistant.unheard(conversation.system):
        conversation.write(f"({unheard})\n")
    while True:
        try:
            line = read(conversation.prompt)
        except EOFError:
            conversation.write("\n")
            return
        except KeyboardInterrupt:
            conversation.write("\n(Ctrl-D or /exit ends)\n")
            continue
        except UnicodeDecodeError:
            conversation.write("(this was not UTF-8 text)\n")
            continue
        try:
            if not conversation.hear(line):
                return
        except KeyboardInterrupt:  # a second one, while the first was being reported
            conversation.write("\n")
