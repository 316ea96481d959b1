"""Writes a Modelfile beside an exported GGUF file, so that Ollama uses the prompts of the training.

The prompt format becomes Ollama's template (Go's text/template over `.System` and `.Messages`,
https://docs.ollama.com/template) and the texts that end an answer.
"""

import re
import shlex
from pathlib import Path

from huarizo.data.prompts import OpenExchange
from huarizo.data.tokens import Encoder
from huarizo.errors import ModelError, UserError
from huarizo.files import write_whole
from huarizo.inference.artifact import Tuned
from huarizo.results.chat_template import FIRST, Turns, leading_space, rendered, turns_of
from huarizo.results.overwrite import check_file

BY_HAND = "Export without --ollama and write a TEMPLATE by hand"
MODELFILE = "Modelfile"
LONGEST_NAME = 80  # characters of a model's name in Ollama


def modelfile(tuned: Tuned, gguf: str) -> str:
    """The text of a Modelfile in the same folder as the GGUF file `gguf`.

    Raises:
        UserError: a Modelfile can't contain this file name.
        ModelError: the prompt format changes the texts, or writes later turns differently from the first.
    """
    name = Path(gguf).name
    if not name.isprintable() or name != name.strip():
        raise UserError(f"{gguf!r}: a Modelfile can't contain this file name. Choose a plain one")
    encoder, lead = tuned.encoder, leading_space(tuned.encoder)
    try:
        turns = turns_of(encoder)
    except ModelError as error:
        raise ModelError(f"Ollama can't express this prompt format: {error}. {BY_HAND}") from None
    notes = [f"# {note}" for note in _notes(encoder, turns)]
    return (
        "\n".join([*notes, f"FROM ./{name}", f'TEMPLATE """{_template(turns, lead)}"""', *_stops(encoder, turns)])
        + "\n"
    )


def write_modelfile(tuned: Tuned, gguf: Path, force: bool = False) -> Path:
    """Write `Modelfile` beside the GGUF file, whole or not at all.

    Raises:
        UserError: the Modelfile exists and `force` is not set.
        ModelError: Ollama can't express the prompt format.
        MachineError: the file can't be written.
    """
    target = gguf.with_name(MODELFILE)
    check_file(target, force)
    write_whole(target, modelfile(tuned, gguf.name))
    return target


def commands(gguf: Path, modelfile: Path) -> list[str]:
    """The shell commands that create the model in Ollama and run it."""
    name = re.sub(r"\.{2,}", ".", re.sub(r"[^a-z0-9._-]+", "-", gguf.stem.lower()))
    name = name.strip("-._")[:LONGEST_NAME].rstrip("-._") or "model"
    return [f"ollama create {name} -f {shlex.quote(str(modelfile))}", f"ollama run {name}"]


def _template(turns: Turns, lead: str) -> str:
    """Ollama's template. An answer is only closed by the next question, so a started answer can be continued.

    lead: text in front of every prompt.
    """
    opening = _static(lead + turns.head)
    if turns.system:
        before, behind = _static(lead + turns.system[0]), _static(turns.system[1])
        opening = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{behind}{{{{ else }}}}{opening}{{{{ end }}}}"
    return (
        f"{{{{ $begun := false }}}}{opening}{{{{ range .Messages }}}}"
        f'{{{{ if eq .Role "user" }}}}{{{{ if $begun }}}}{_static(turns.answered)}{{{{ end }}}}'
        f"{{{{ .Content }}}}{_static(turns.asked)}{{{{ $begun = true }}}}"
        '{{ else if eq .Role "assistant" }}{{ if $begun }}'
        f"{_static(turns.begun)}{{{{ .Content }}}}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"
    )


def _static(text: str) -> str:
    """Escape text for a Modelfile's template, which drops unprintable characters and ends at three quotes."""
    text = re.sub(r"\{(?=\{|\Z)", '{{ "{" }}', text)
    text = re.sub('"{3,}', lambda quotes: '{{ "' + r"\x22" * len(quotes[0]) + '" }}', text)
    return "".join(c if c == "\n" or c.isprintable() else f'{{{{ "\\U{ord(c):08x}" }}}}' for c in text)


def _stops(encoder: Encoder, turns: Turns) -> list[str]:
    """PARAMETER lines for the texts that end an answer: stop token, end of sequence, and the next Alpaca heading."""
    stops = [encoder.prompt.stop, str(encoder.tokenizer.eos_token or "")]
    if encoder.prompt.name in ("alpaca", "stanford"):
        stops += turns.answered.removeprefix(encoder.prompt.stop).splitlines()
    texts = [text for text in dict.fromkeys(stops) if text and text.isprintable()]
    return [f'PARAMETER stop """{text}"""' if '"' in text else f'PARAMETER stop "{text}"' for text in texts]


def _notes(encoder: Encoder, turns: Turns) -> list[str]:
    """How Ollama's prompts still differ from the format's."""
    notes = []
    padded = f" {FIRST}\n"
    if padded not in rendered(encoder, "", [OpenExchange(padded)]):
        notes.append("The model's chat template strips white space around messages; Ollama does not.")
    if turns.system is None:
        notes.append("The model's chat template has no place for a system text before the questions; it is left out.")
    if encoder.prompt.name == "chat" and "strftime_now" in str(encoder.tokenizer.chat_template):
        notes.append("The model's chat template writes today's date; here it is the date of the export.")
    return notes
