"""Expresses a prompt format as a template for other programs.

Nothing is translated: marker texts are sent through the format, and the text found around them is what the other
template must write.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from huarizo.data.prompts import OpenExchange, Turn
from huarizo.data.tokens import Encoder
from huarizo.data.turns import Exchange
from huarizo.errors import DataError, ModelError, RecipeError

SYSTEM, FIRST, SECOND, THIRD, ANSWER, LAST_ANSWER = (
    f"{name}q \"'<&>\\\n  é {{{{x}}}} aA{name}" for name in ("System", "First", "Second", "Third", "Answer", "Last")
)
"""Markers that contain everything a format might escape, fold or rewrite, without white space at the ends."""
TURNS = [Exchange(FIRST, "", ANSWER), Exchange(SECOND, "", LAST_ANSWER), OpenExchange(THIRD)]
SENTINELS = [FIRST, ANSWER, SECOND, LAST_ANSWER, THIRD]


@dataclass(frozen=True)
class Turns:
    """The constant texts of a prompt format, without a BOS that the tokenizer adds.

    head: before the first question if there is no system text. system: before and after the system text; None if the
    format has no place for one in front of the first question. asked: after a question. begun: before an answer
    that stands in the conversation, where the prompt for a new one ends earlier. answered: after an answer, up to the
    next question.
    """

    head: str
    system: tuple[str, str] | None
    asked: str
    begun: str
    answered: str


def turns_of(encoder: Encoder) -> Turns:
    """The texts around the turns of an encoder's prompt format.

    Raises:
        ModelError: the format changes the texts, or writes later turns differently from the first.
    """
    plain = _between(encoder, "", SENTINELS)
    with_system = _with_system(encoder)
    head, told, answered, _, _, asked = plain
    alike = [told, answered, told, answered, asked]
    if any(parts and parts[-5:] != alike for parts in (plain, with_system)) or not told.startswith(asked):
        raise ModelError("it writes later turns differently from the first")
    system = (with_system[0], with_system[1]) if with_system else None
    return Turns(head, system, asked, told.removeprefix(asked), answered)


def rendered(encoder: Encoder, system: str, turns: Sequence[Turn]) -> str:
    """A conversation's prompt without the BOS that the tokenizer adds.

    Raises:
        ModelError: the format can't write it.
    """
    try:
        text = "".join(piece.text for piece in encoder.prompt.pieces(system, turns))
    except (ModelError, RecipeError) as error:
        raise ModelError(str(error).partition(". ")[0]) from None
    return text.removeprefix(str(encoder.tokenizer.bos_token)) if encoder.adds_bos else text


def _between(encoder: Encoder, system: str, sentinels: Sequence[str]) -> list[str]:
    """The texts before, between and after the sentinels in a conversation of three turns."""
    parts, rest = [], rendered(encoder, system, TURNS)
    for sentinel in sentinels:
        if rest.count(sentinel) != 1:
            raise ModelError("it changes the messages")
        before, _, rest = rest.partition(sentinel)
        parts.append(before)
    return [*parts, rest]


def _with_system(encoder: Encoder) -> list[str]:
    """The texts around a system text and all that follows; [] if the format rejects it, drops it, or writes it behind
    the first question."""
    try:
        text = rendered(encoder, SYSTEM, TURNS)
    except DataError:
        return []
    before = text.partition(FIRST)[0]
    if text == rendered(encoder, "", TURNS) or (SYSTEM in text and SYSTEM not in before):
        return []
    return _between(encoder, SYSTEM, [SYSTEM, *SENTINELS])


def chat_template(encoder: Encoder, lead: str = "") -> str | None:
    """A Jinja template over `messages` that writes an encoder's prompts. For the chat format it is the model's own.

    Returns None if the format can't be expressed as one. lead: text in front of every prompt.
    """
    if encoder.prompt.name == "chat":
        return (f"{{{{- {json.dumps(lead)} }}}}" if lead else "") + str(encoder.tokenizer.get_chat_template())
    try:
        turns = turns_of(encoder)
    except ModelError:
        return None
    stop = encoder.prompt.stop if turns.answered.startswith(encoder.prompt.stop) else ""
    head, asked = _literal(lead + turns.head), _literal(turns.asked)
    begun = f"{_literal(turns.begun)} + " if turns.begun else ""
    next_one = _literal(turns.answered.removeprefix(stop))
    if turns.system is None:
        opening = f"{{{{- {head} }}}}"
    else:
        before, behind = _literal(lead + turns.system[0]), _literal(turns.system[1])
        opening = (
            "{%- if messages[0]['role'] == 'system' %}"
            f"{{{{- {before} + messages[0]['content'] + {behind} }}}}{{%- else %}}{{{{- {head} }}}}{{%- endif %}}"
        )
    return (
        f"{opening}{{%- set ns = namespace(begun=false) %}}{{%- for message in messages %}}"
        f"{{%- if message['role'] == 'user' %}}{{%- if ns.begun %}}{{{{- {next_one} }}}}{{%- endif %}}"
        f"{{{{- message['content'] + {asked} }}}}{{%- set ns.begun = true %}}"
        f"{{%- elif message['role'] == 'assistant' %}}{{{{- {begun}message['content'] + {_literal(stop)} }}}}"
        "{%- endif %}{%- endfor %}"
    )


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def leading_space(encoder: Encoder) -> str:
    """What a prompt must begin with in llama.cpp for the token ids that Transformers gives: " " or "".

    llama.cpp adds a space before the text and after every special token, or nowhere. Most SentencePiece tokenizers add
    one only before the whole text. For these llama.cpp is set to nowhere, and the prompt contains the one space.
    """
    spec = json.loads(encoder.tokenizer.backend_tokenizer.to_str())
    if not spec["model"].get("byte_fallback") or space_everywhere(encoder) or "first" not in _schemes(spec):
        return ""
    text = encoder.prompt.pieces("", [OpenExchange("Hi")])[0].text
    return "" if text.startswith(tuple(token["content"] for token in spec["added_tokens"])) else " "


def space_everywhere(encoder: Encoder) -> bool:
    """Whether a SentencePiece tokenizer adds a space before the text and after every special token."""
    spec = json.loads(encoder.tokenizer.backend_tokenizer.to_str())
    normalizer = spec.get("normalizer") or {}
    prepends = any(step.get("type") == "Prepend" for step in normalizer.get("normalizers", [normalizer]))
    return prepends or "always" in _schemes(spec)


def _schemes(spec: dict[str, Any]) -> list[str | None]:
    steps = spec.get("pre_tokenizer") or {}
    return [step.get("prepend_scheme") for step in steps.get("pretokenizers", [steps])]
