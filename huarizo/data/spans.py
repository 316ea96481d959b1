"""Where an answer stands in what a chat template writes, found by comparing renderings.

In go a conversation rendered up to its last question, with the head of the answer that is to come, and the same one
with the answer; out come the pieces that the model has to write after the question, token for token as it is asked.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

from huarizo.data.records import Flaw
from huarizo.errors import DataError, ModelError
from huarizo.wording import excerpt

QUESTION, ANSWER = "Qquestionq7", "Aanswera7"  # texts that no template has of its own
INSTEAD = "Use data.prompt=alpaca for this data, or delete the row"


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text: read (prompt), or the answer, with what a template writes at its head (opening), the row's own
    text (response, in which special tokens are plain text), and the special token that ends it (stop). Or the whole of
    a plain text, outside any prompt format (text).

    learnt: False for an answer that is only read.
    """

    kind: Literal["prompt", "opening", "response", "stop", "text"]
    text: str
    learnt: bool = True


class RefusedRow(DataError):
    """A conversation that a prompt format can't write."""

    def __init__(self, what: str, remedy: str = INSTEAD, field: str = "") -> None:
        super().__init__(f"{what}. {remedy}")
        self.flaw = Flaw(field, what, remedy)


class Rendered(NamedTuple):
    """A conversation as a chat template writes it.

    generated: (begin, end) of its `generation` blocks; None of a template that has none.
    """

    text: str
    generated: Sequence[tuple[int, int]] | None = None


@dataclass(frozen=True)
class Shape:
    """What a chat template writes around the last answer.

    begun: what it puts behind the question for the model to go on from, and does not write in front of an answer that
    is there, such as "<think>\\n". head: in front of an answer without thinking. tail: all behind one; of it, `close`
    and `stop` are the answer's end. writes_stop: False where `stop` is the tokenizer's, which the template leaves out.
    """

    begun: str
    head: str
    tail: str
    close: str
    stop: str
    writes_stop: bool
    specials: frozenset[str]

    def answer(self, asked: str, whole: Rendered, said: str, has_calls: bool) -> list[Piece]:
        """The pieces of the answer `said`, which stand behind `asked` when the model writes them.

        Raises:
            RefusedRow: the template does something else with this answer than with others.
        """
        before = asked.removesuffix(self.begun)
        if not asked.endswith(self.begun) or not whole.text.startswith(before):
            raise RefusedRow("the chat template writes a question otherwise once it is answered")
        written = whole.text[len(before) :]
        if has_calls and not self.begun:
            return _marked(self._calls(written, said), len(before), whole.generated)
        if not written.endswith(self.tail):
            raise RefusedRow("the chat template ends this answer otherwise than others")
        body = written.removesuffix(self.tail)
        if self.begun:
            return [Piece("response", self._gone_on(body, said) + self.close), Piece("stop", self.stop)]
        return _marked([*self._pieces(body, said), Piece("stop", self.stop)], len(before), whole.generated)

    def _calls(self, written: str, said: str) -> list[Piece]:
        """A tool call is written by the template as a whole; it may end with a token of its own."""
        if said and not came_back(said, written):
            raise RefusedRow("the chat template leaves out the text beside a tool call")
        if written.endswith(self.tail):
            return [Piece("opening", written.removesuffix(self.tail) + self.close), Piece("stop", self.stop)]
        text = written.rstrip()
        if not text.endswith(tuple(self.specials)):
            raise RefusedRow("the chat template ends a tool call without a special token")
        return [Piece("opening", text)]

    def _gone_on(self, body: str, said: str) -> str:
        """What is left to write of an answer whose first characters the prompt has already."""
        kept = body.removeprefix(self.head).strip()
        if not said.strip().endswith(kept) and not came_back(said, body):
            raise RefusedRow("the chat template leaves out a part of the answer")
        if not said.lstrip().startswith(self.begun.strip()):
            what = f"the chat template begins every answer with {excerpt(self.begun)}, and this one does not"
            raise RefusedRow(what, "Write the thinking in front of the answer, or use data.prompt=alpaca")
        rest = said.lstrip().removeprefix(self.begun.strip())
        blank = self.begun[len(self.begun.rstrip()) :]
        return rest.removeprefix(blank) if blank else rest

    def _pieces(self, body: str, said: str) -> Iterator[Piece]:
        own = next((text for text in (said, said.strip()) if body.endswith(text)), None)
        if own is not None:
            head = body.removesuffix(own)
        elif came_back(said, body):  # rewritten, as a template does that lays out thinking anew
            if any(token in said for token in self.specials):
                raise RefusedRow("the chat template rewrites an answer that has a special token written out in it")
            yield Piece("opening", body + self.close)
            return
        else:
            kept = body.removeprefix(self.head).strip()
            if not kept or not said.strip().endswith(kept):
                raise RefusedRow("the chat template leaves out a part of the answer")
            head, own = self.head, said  # thinking that the template leaves out is still written by the model first
        # What stands behind the last special token goes together with the answer: a space becomes part of its token.
        cut = max((head.rfind(token) + len(token) for token in self.specials if token in head), default=0)
        if cut:
            yield Piece("opening", head[:cut])
        yield Piece("response", head[cut:] + own + self.close)


def shape_of(asked: str, whole: str, specials: Collection[str], eos: str) -> Shape:
    """What a template writes around an answer, from a conversation of QUESTION and ANSWER.

    Raises:
        ModelError: the template changes the answer, or the question once it is answered.
    """
    at = whole.rfind(ANSWER)
    pairs = enumerate(zip(asked, whole[: max(at, 0)], strict=False))
    common = next((place for place, (a, b) in pairs if a != b), min(len(asked), max(at, 0)))
    if at < 0 or (QUESTION in asked and QUESTION not in asked[:common]):
        raise ModelError(
            "the model's chat template can't be trained on: it rewrites the answer. Use data.prompt=alpaca"
        )
    tail = whole[at + len(ANSWER) :]
    ends = [(tail.find(token), -len(token), token) for token in specials if token and token in tail]
    place, _, stop = min(ends, default=(0, 0, eos))
    return Shape(
        asked[common:], whole[common:at], tail, tail[:place], stop, bool(ends), frozenset(filter(None, specials))
    )


def _marked(pieces: list[Piece], begin: int, generated: Sequence[tuple[int, int]] | None) -> list[Piece]:
    """Pieces that stand one behind the other from `begin` on, of which only those in `generation` blocks are learnt.

    All of them are where the template has no blocks. Pieces are cut at the blocks' borders.
    """
    if generated is None:
        return pieces
    marked: list[Piece] = []
    for piece in pieces:
        end = begin + len(piece.text)
        if piece.kind == "stop":  # an answer that is learnt is also ended
            marked.append(replace(piece, learnt=any(each.learnt for each in marked)))
            continue
        borders = [border for span in generated for border in span if begin < border < end]
        # White space at a border becomes part of the token beside it.
        inner = [at for at in borders if piece.text[: at - begin].strip() and piece.text[at - begin :].strip()]
        for first, last in pairwise(sorted({begin, end, *inner})):
            learnt = any(min(last, b) - max(first, a) > 0 for a, b in generated)
            marked.append(Piece(piece.kind, piece.text[first - begin : last - begin], learnt))
        begin = end
    return marked


def came_back(said: str, written: str) -> bool:
    """Whether a text stands in what a template wrote, whatever became of its white space, or quoted as in JSON."""
    text = said.strip()
    return text in written or "".join(text.split()) in "".join(written.split()) or _quoted(text) in written


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
