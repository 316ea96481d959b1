"""A Modelfile beside an exported GGUF, so that Ollama sends the model the very prompts it was trained on.

In goes the prompt format of a result, out comes Ollama's template (Go's text/template over `.System` and `.Messages`,
https://docs.ollama.com/template) and the texts at which an answer stops. The template is not translated: marked texts
are sent through the format itself, and what stands around them is what Ollama has to write.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from huarizo.data.prompts import OpenExchange
from huarizo.data.rows import Exchange
from huarizo.data.tokens import Encoder
from huarizo.errors import DataError, ModelError, RecipeError, UserError
from huarizo.files import write_whole
from huarizo.results.gguf import leading_space
from huarizo.results.target import check_file
from huarizo.results.tuned import Tuned

REFUSED = "Ollama can't have this prompt format"
BY_HAND = "Export without --ollama and write a TEMPLATE by hand"
SYSTEM, FIRST, SECOND, THIRD, ANSWER, LAST_ANSWER = (
    f"{name}q \"'<&>\\\n  é {{{{x}}}} aA{name}" for name in ("System", "First", "Second", "Third", "Answer", "Last")
)
"""Texts with everything that a format might escape, fold or rewrite, and no white space at their ends."""
TURNS = [Exchange(FIRST, "", ANSWER), Exchange(SECOND, "", LAST_ANSWER), OpenExchange(THIRD)]
SENTINELS = [FIRST, ANSWER, SECOND, LAST_ANSWER, THIRD]
LONGEST_NAME = 80  # characters of a model's name in Ollama


def modelfile(tuned: Tuned, gguf: str) -> str:
    """The text of a Modelfile that stands in the folder of the GGUF file `gguf`.

    Raises:
        UserError: a file name that a Modelfile can't hold.
        ModelError: a prompt format that changes the texts, or writes one turn otherwise than the next.
    """
    name = Path(gguf).name
    if not name.isprintable() or name != name.strip():
        raise UserError(f"{gguf!r}: this file name can't stand in a Modelfile. Export under a plain one")
    encoder = tuned.encoder
    plain = _between(encoder, "", SENTINELS)
    with_system = _with_system(encoder)
    head, asked, answered, *_ = plain
    if any(parts and parts[-5:] != [asked, answered, asked, answered, asked] for parts in (plain, with_system)):
        raise ModelError(f"{REFUSED}: it writes later turns otherwise than the first. {BY_HAND}")
    notes = [f"# {note}" for note in _notes(encoder, bool(with_system))]
    template = _template(head, with_system[:2], asked, answered)
    stops = _stops(encoder, answered)
    return "\n".join([*notes, f"FROM ./{name}", f'TEMPLATE """{template}"""', *stops]) + "\n"


def write_modelfile(tuned: Tuned, gguf: Path, force: bool = False) -> Path:
    """Write `Modelfile` beside the GGUF file, whole or not at all.

    Raises:
        UserError: there is one already, and not `force`; or a prompt format that Ollama can't have (ModelError).
        MachineError: it can't be written.
    """
    target = gguf.with_name("Modelfile")
    check_file(target, force)
    write_whole(target, modelfile(tuned, gguf.name))
    return target


def commands(gguf: Path, modelfile: Path) -> list[str]:
    """What to type in a shell: make the model in Ollama, and talk to it."""
    name = re.sub(r"\.{2,}", ".", re.sub(r"[^a-z0-9._-]+", "-", gguf.stem.lower()))
    name = name.strip("-._")[:LONGEST_NAME].rstrip("-._") or "model"
    return [f"ollama create {name} -f {shlex.quote(str(modelfile))}", f"ollama run {name}"]


def _rendered(encoder: Encoder, system: str, turns: Sequence[Exchange | OpenExchange]) -> str:
    """The prompt without the BOS that Ollama itself puts in front where the GGUF says so."""
    try:
        text = "".join(piece.text for piece in encoder.prompt.pieces(system, turns))
    except (ModelError, RecipeError) as error:
        raise ModelError(f"{REFUSED}: {str(error).partition('. ')[0]}. {BY_HAND}") from None
    text = text.removeprefix(str(encoder.tokenizer.bos_token)) if encoder.adds_bos else text
    return leading_space(encoder) + text


def _between(encoder: Encoder, system: str, sentinels: Sequence[str]) -> list[str]:
    """What stands before, between and behind the sentinels in a conversation of three turns."""
    parts, rest = [], _rendered(encoder, system, TURNS)
    for sentinel in sentinels:
        if rest.count(sentinel) != 1:
            raise ModelError(f"{REFUSED}: it changes what is said. {BY_HAND}")
        before, _, rest = rest.partition(sentinel)
        parts.append(before)
    return [*parts, rest]


def _with_system(encoder: Encoder) -> list[str]:
    """What stands around a system text and all that follows; [] where the format refuses one or leaves it out."""
    try:
        if _rendered(encoder, SYSTEM, TURNS) == _rendered(encoder, "", TURNS):
            return []
    except DataError:
        return []
    return _between(encoder, SYSTEM, [SYSTEM, *SENTINELS])


def _template(head: str, around_system: Sequence[str], asked: str, answered: str) -> str:
    """Ollama's template. An answer stays open until the next question, so that an answer begun can be continued.

    head: before the first question where there is no system text; around_system: before and behind one, or nothing.
    asked: behind a question; answered: behind an answer, up to the next question.
    """
    opening = _static(head)
    if around_system:
        before, behind = map(_static, around_system)
        opening = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{behind}{{{{ else }}}}{opening}{{{{ end }}}}"
    return (
        f"{{{{ $begun := false }}}}{opening}{{{{ range .Messages }}}}"
        f'{{{{ if eq .Role "user" }}}}{{{{ if $begun }}}}{_static(answered)}{{{{ end }}}}'
        f"{{{{ .Content }}}}{_static(asked)}{{{{ $begun = true }}}}"
        '{{ else if eq .Role "assistant" }}{{ if $begun }}{{ .Content }}{{ end }}{{ end }}{{ end }}'
    )


def _static(text: str) -> str:
    """Text as it stands in a template in a Modelfile, which drops what is not printable and ends at three quotes."""
    text = re.sub(r"\{(?=\{|\Z)", '{{ "{" }}', text)
    text = re.sub('"{3,}', lambda quotes: '{{ "' + r"\x22" * len(quotes[0]) + '" }}', text)
    return "".join(c if c == "\n" or c.isprintable() else f'{{{{ "\\U{ord(c):08x}" }}}}' for c in text)


def _stops(encoder: Encoder, answered: str) -> list[str]:
    """Lines for the texts that end an answer: stop token, end of sequence, and how the next Alpaca question begins."""
    stops = [encoder.prompt.stop, str(encoder.tokenizer.eos_token or "")]
    if encoder.prompt.name in ("alpaca", "stanford"):
        stops += answered.removeprefix(encoder.prompt.stop).splitlines()
    texts = [text for text in dict.fromkeys(stops) if text and text.isprintable()]
    return [f'PARAMETER stop """{text}"""' if '"' in text else f'PARAMETER stop "{text}"' for text in texts]


def _notes(encoder: Encoder, has_system: bool) -> list[str]:
    """In what the prompts of Ollama differ from the format's all the same."""
    notes = []
    padded = f" {FIRST}\n"
    if padded not in _rendered(encoder, "", [OpenExchange(padded)]):
        notes.append("The model's chat template strips white space around messages; Ollama does not.")
    if not has_system:
        notes.append("The model's chat template has no place for a system text; Ollama leaves it out too.")
    if encoder.prompt.name == "chat" and "strftime_now" in str(encoder.tokenizer.chat_template):
        notes.append("The model's chat template writes today's date; here it stays that of the export.")
    return notes
