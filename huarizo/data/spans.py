"""Finds the answer in the output of a chat template by comparing two renderings of the same conversation.

Input is a conversation rendered up to its last question (with `add_generation_prompt`), and rendered with the answer.
Output is the pieces that the model has to write after the question, token for token as it will be asked at inference.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

from huarizo.data.records import Flaw
from huarizo.errors import DataError, ModelError
from huarizo.wording import excerpt

QUESTION, ANSWER = "Qquestionq7", "Aanswera7"  # texts that occur in no template
USE_ALPACA = "Use data.prompt=alpaca for this data, or delete the row"


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text, by its kind.

    prompt: read by the model. opening: what the template writes at the beginning of an answer. response: the row's own
    answer, in which special tokens are plain text. stop: the special token that ends an answer. text: a whole plain
    text, outside any prompt format.

    learnt: False for an answer that is only read.
    """

    kind: Literal["prompt", "opening", "response", "stop", "text"]
    text: str
    learnt: bool = True


class RefusedRow(DataError):
    """A prompt format can't write this conversation. `flaw` says why."""

    def __init__(self, what: str, remedy: str = USE_ALPACA, field: str = "") -> None:
        super().__init__(f"{what}. {remedy}")
        self.flaw = Flaw(field, what, remedy)


class Rendered(NamedTuple):
    """A conversation rendered by a chat template.

    generated: (begin, end) in characters of its `generation` blocks; None if the template has no such blocks.
    """

    text: str
    generated: Sequence[tuple[int, int]] | None = None


@dataclass(frozen=True)
class AnswerShape:
    """What a chat template writes around the last answer.

    prefill: what it adds after the question for the model to continue, such as "<think>\\n", and doesn't write before a
    given answer. head: what comes before an answer without thinking. tail: everything after it; `close` and `stop` are
    the part of the tail that ends the answer. writes_stop: False if the template writes no special token after an
    answer, so that `stop` is the tokenizer's. specials: the special tokens.
    """

    prefill: str
    head: str
    tail: str
    close: str
    stop: str
    writes_stop: bool
    specials: frozenset[str]

    def pieces_of_answer(self, prompt: str, whole: Rendered, output: str, has_calls: bool) -> list[Piece]:
        """The pieces that the model has to write after the prompt.

        Args:
            prompt: the conversation rendered up to the question.
            whole: the same, rendered with the answer.
            output: the answer's own text.
            has_calls: whether the answer has tool calls.

        Raises:
            RefusedRow: the template treats this answer differently from others.
        """
        before = prompt.removesuffix(self.prefill)
        if not prompt.endswith(self.prefill) or not whole.text.startswith(before):
            raise RefusedRow("the chat template writes a question differently once it is answered")
        written = whole.text[len(before) :]
        if has_calls and not self.prefill:
            return _mark_generated(self._call_pieces(written, output), len(before), whole.generated)
        if not written.endswith(self.tail):
            raise RefusedRow("the chat template ends this answer differently from others")
        body = written.removesuffix(self.tail)
        if self.prefill:
            return [Piece("response", self._after_prefill(body, output) + self.close), Piece("stop", self.stop)]
        return _mark_generated(
            [*self._text_pieces(body, output), Piece("stop", self.stop)], len(before), whole.generated
        )

    def _call_pieces(self, written: str, output: str) -> list[Piece]:
        """The template writes a tool call as a whole, and may end it with a special token of its own."""
        if output and not appears_in(output, written):
            raise RefusedRow("the chat template leaves out the text of a tool call")
        if written.endswith(self.tail):
            return [Piece("opening", written.removesuffix(self.tail) + self.close), Piece("stop", self.stop)]
        text = written.rstrip()
        if not text.endswith(tuple(self.specials)):
            raise RefusedRow("the chat template ends a tool call without a special token")
        return [Piece("opening", text)]

    def _after_prefill(self, body: str, output: str) -> str:
        """The rest of an answer whose first characters are already in the prompt."""
        kept = body.removeprefix(self.head).strip()
        if not output.strip().endswith(kept) and not appears_in(output, body):
            raise RefusedRow("the chat template leaves out a part of the answer")
        if not output.lstrip().startswith(self.prefill.strip()):
            what = f"the chat template begins every answer with {excerpt(self.prefill)}, and this one does not"
            raise RefusedRow(what, "Write the thinking before the answer, or use data.prompt=alpaca")
        rest = output.lstrip().removeprefix(self.prefill.strip())
        blank = self.prefill[len(self.prefill.rstrip()) :]
        return rest.removeprefix(blank) if blank else rest

    def _text_pieces(self, body: str, output: str) -> Iterator[Piece]:
        """The pieces of an answer without tool calls, but for its stop token."""
        own = next((text for text in (output, output.strip()) if body.endswith(text)), None)
        if own is not None:
            head = body.removesuffix(own)
        elif appears_in(output, body):  # rewritten, as by a template that reformats thinking
            if any(token in output for token in self.specials):
                raise RefusedRow("the chat template rewrites an answer that has a special token written out in it")
            yield Piece("opening", body + self.close)
            return
        else:
            kept = body.removeprefix(self.head).strip()
            if not kept or not output.strip().endswith(kept):
                raise RefusedRow("the chat template leaves out a part of the answer")
            head, own = self.head, output  # the model still writes first the thinking that the template drops
        # Text after the last special token is tokenised with the answer, as a space joins the answer's first token.
        cut = max((head.rfind(token) + len(token) for token in self.specials if token in head), default=0)
        if cut:
            yield Piece("opening", head[:cut])
        yield Piece("response", head[cut:] + own + self.close)


def answer_shape(prompt: str, whole: str, specials: Collection[str], eos: str) -> AnswerShape:
    """What a template writes around an answer, from renderings of QUESTION alone and of QUESTION with ANSWER.

    Raises:
        ModelError: the template changes the answer, or changes the question once it is answered.
    """
    at = whole.rfind(ANSWER)
    pairs = enumerate(zip(prompt, whole[: max(at, 0)], strict=False))
    common = next((place for place, (a, b) in pairs if a != b), min(len(prompt), max(at, 0)))
    if at < 0 or (QUESTION in prompt and QUESTION not in prompt[:common]):
        raise ModelError(
            "the model's chat template can't be trained on: it rewrites the answer. Use data.prompt=alpaca"
        )
    tail = whole[at + len(ANSWER) :]
    ends = [(tail.find(token), -len(token), token) for token in specials if token and token in tail]
    place, _, stop = min(ends, default=(0, 0, eos))
    return AnswerShape(
        prompt[common:], whole[common:at], tail, tail[:place], stop, bool(ends), frozenset(filter(None, specials))
    )


def _mark_generated(pieces: list[Piece], begin: int, generated: Sequence[tuple[int, int]] | None) -> list[Piece]:
    """Consecutive pieces, the first at character `begin`, with `learnt` set only inside `generation` blocks.

    Pieces are split at the blocks' borders. Without blocks (None) they are returned as they are.
    """
    if generated is None:
        return pieces
    marked: list[Piece] = []
    for piece in pieces:
        end = begin + len(piece.text)
        if piece.kind == "stop":  # a learnt answer must also end
            marked.append(replace(piece, learnt=any(each.learnt for each in marked)))
            continue
        borders = [border for span in generated for border in span if begin < border < end]
        # White space at a border joins the token next to it, so it is not split off.
        inner = [at for at in borders if piece.text[: at - begin].strip() and piece.text[at - begin :].strip()]
        for first, last in pairwise(sorted({begin, end, *inner})):
            learnt = any(min(last, b) - max(first, a) > 0 for a, b in generated)
            marked.append(Piece(piece.kind, piece.text[first - begin : last - begin], learnt))
        begin = end
    return marked


def appears_in(text: str, written: str) -> bool:
    """Whether a template wrote this text, whatever it did to the white space, or quoted as in JSON."""
    text = text.strip()
    return text in written or "".join(text.split()) in "".join(written.split()) or _quoted(text) in written


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
