"""Texts have the same token ids in llama.cpp as in Transformers, whatever the tokenizer and the prompt format."""

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from huarizo.data.prompts import OpenExchange
from huarizo.data.rows import Exchange
from huarizo.data.tokens import Encoder
from huarizo.errors import ModelError
from huarizo.results.chat_template import leading_space
from huarizo.results.gguf import export_gguf
from huarizo.results.pre_tokenizers import GPT4O, LLAMA3, QWEN2, TEKKEN
from huarizo.results.verify import PROMPTS, LlamaCpp, compare_with_transformers
from tests.results.make import gemma_tokenizer, make_tuned, trained_tokenizer
from tests.tiny import CHATML

LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
TEXTS = [*PROMPTS, "Don't (stop) 12345 me, 9 8!\r\n\n  A\tb   c\u00e9  e\u0301 \u3000x", "  led by blanks", "안녕 🦙🦙"]


def cut_alike(tuned: Any, folder: Path, texts: Sequence[str] = TEXTS) -> LlamaCpp:
    """Conversations of one and two turns, written by the file's own chat template, have the ids of the training."""
    other, encoder = LlamaCpp(export_gguf(tuned, folder / "model.gguf", "f16"), context=4096), tuned.encoder
    for text in texts:
        text = text if encoder.prompt.name == "chat" else text.strip()
        told = [Exchange("Hi there", "", "저는 후아리조입니다 🦙.\nTwo lines."), OpenExchange(text)]
        for turns in ([OpenExchange(text)], told):
            messages = [{"role": "user", "content": turn.instruction} for turn in turns]
            if len(turns) == 2:
                messages.insert(1, {"role": "assistant", "content": told[0].output or ""})
            prompt = other.chat_prompt(messages)
            prompt = prompt.removeprefix(str(encoder.tokenizer.bos_token)) if encoder.adds_bos else prompt
            assert other.tokens(prompt, add_special=True) == encoder.encode_prompt("", turns), (text, prompt)
    return other


def sentencepiece(tokenizer: Any, template: str | None = None, special: bool | None = None, **changes: Any) -> Any:
    """TinyLlama's tokenizer with another template, with ChatML's tokens added, or with other settings."""
    from transformers import AutoTokenizer

    changed = AutoTokenizer.from_pretrained(tokenizer.name_or_path, **changes)
    if special is not None:
        tokens = [AddedToken(text, special=special, normalized=False) for text in ("<|im_start|>", "<|im_end|>")]
        changed.add_tokens(tokens, special_tokens=special)
    changed.chat_template = template or changed.chat_template
    return changed


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"template": LLAMA2},
        {"template": CHATML, "special": True},
        {"template": CHATML, "special": False},
        {"add_prefix_space": False},
        {"template": LLAMA2, "add_prefix_space": False},
    ],
    ids=["TinyLlama", "Llama 2", "ChatML, special", "ChatML, not special", "no space", "Llama 2, no space"],
)
def test_sentencepiece_with_any_chat_template(
    tmp_path: Path, tinyllama_tokenizer: Any, options: dict[str, Any]
) -> None:
    tokenizer = sentencepiece(tinyllama_tokenizer, **options)
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    tuned = make_tuned(tmp_path, tokenizer, prompt="chat", **sizes)
    cut_alike(tuned, tmp_path)
    assert compare_with_transformers(tuned, tmp_path / "model.gguf").agrees("f16")


@pytest.mark.parametrize("prompt", ["alpaca", "Question: {{ instruction }}\nAnswer:\n"])
@pytest.mark.parametrize("options", [{}, {"add_prefix_space": False}], ids=["a space in front", "no space"])
def test_sentencepiece_with_plain_prompts(
    tmp_path: Path, tinyllama_tokenizer: Any, prompt: str, options: dict[str, Any]
) -> None:
    sizes: dict[str, Any] = {"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2}
    tuned = make_tuned(tmp_path, sentencepiece(tinyllama_tokenizer, **options), prompt=prompt, **sizes)
    cut_alike(tuned, tmp_path)
    assert compare_with_transformers(tuned, tmp_path / "model.gguf").agrees("f16")


GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)


@pytest.mark.parametrize("prompt", ["chat", "alpaca"])
def test_gemmas_tokenizer(tmp_path: Path, prompt: str) -> None:
    tuned = make_tuned(
        tmp_path, gemma_tokenizer(GEMMA), prompt=prompt, model_type="gemma3_text", head_dim=32,
        query_pre_attn_scalar=32, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    assert tuned.encoder.adds_bos
    other = cut_alike(tuned, tmp_path)
    for text in ("a  b   c", "x\n\n\ny", "▁▁ ▁", "<pad>", "é\u0301🦙"):
        ids = tuned.encoder.tokenizer.encode(text)
        assert other.tokens(text, add_special=True) == ids, text
    assert GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.model"].contents() == "llama"


def split_by(pattern: str, removed: bool = False) -> list[Any]:
    split = pre_tokenizers.Split(Regex(pattern), "removed" if removed else "isolated", invert=removed)
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


STEPS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": split_by(LLAMA3),
    "llama-bpe removed": split_by(LLAMA3, removed=True),
    "qwen2": split_by(QWEN2),
    "tekken": split_by(TEKKEN),
    "gpt-4o": split_by(GPT4O),
}


TRICKY = [
    *TEXTS, "HelloWORLD helloWorld aBC ÉCOLE École été", "éÉ ǅa ʰx aÉ", "don't DON'T I'll I'LL it'S 'sa", "1234567 12 3.14 ٣٤٥ ½²",
    "a/b\n/x//\n\r\n y", "x \n\n  \t z   ", "(x)[y]{z}==>!?...", "한국어ABC일본語かなカナ123", "e\u0301e\u0301 ñ",
]  # fmt: skip


ASCII_CASES = ("tekken", "gpt-4o")
"""Where llama.cpp knows upper and lower case in ASCII alone, and splits before combining marks."""


@pytest.mark.parametrize("prompt", ["chat", "alpaca"])
@pytest.mark.parametrize("kind", STEPS)
def test_byte_level_bpe(tmp_path: Path, kind: str, prompt: str) -> None:
    tuned = make_tuned(tmp_path, trained_tokenizer(TRICKY, STEPS[kind]), prompt=prompt)
    texts = TRICKY
    if kind in ASCII_CASES:
        texts = [unicodedata.normalize("NFC", text) for text in TRICKY if "éÉ" not in text]
    other, tokenizer = cut_alike(tuned, tmp_path, texts), tuned.encoder.tokenizer
    for text in texts:
        assert other.tokens(text) == tokenizer.encode(text, add_special_tokens=False), text
    assert GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.pre"].contents() == kind.split()[0]


def test_texts_that_are_normalised_already_are_cut_as_with_nfc(tmp_path: Path) -> None:
    tokenizer = trained_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tuned = make_tuned(tmp_path, tokenizer)
    other = LlamaCpp(export_gguf(tuned, tmp_path / "model.gguf", "f16"), context=4096)
    for text in TEXTS:
        text = unicodedata.normalize("NFC", text)
        assert other.tokens(text, add_special=False) == tokenizer.encode(text), text


def test_answers_end_at_the_templates_token_and_at_the_tokenizers(tmp_path: Path) -> None:
    tokenizer = trained_tokenizer()
    tokenizer.eos_token = "</s>"
    tokenizer.chat_template = CHATML.replace("<|im_end|>\\n'", "<|im_end|>' + eos_token")
    tuned = make_tuned(tmp_path, tokenizer, prompt="chat")
    cut_alike(tuned, tmp_path)
    fields = GGUFReader(tmp_path / "model.gguf").fields
    ids = [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot")]
    assert tokenizer.convert_ids_to_tokens(ids) == ["</s>", "<|im_end|>"] and tuned.stop_ids == ids[::-1]


def rewrites(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()


def puts_a_space_in_front(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def strips(tokenizer: Any) -> None:
    tokenizer.add_tokens([AddedToken("<tool>", rstrip=True)])


def splits_otherwise(tokenizer: Any) -> None:
    split = pre_tokenizers.Split(Regex(LLAMA3 + "|x"), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rewrites, "rewrites texts"), (puts_a_space_in_front, "rewrites texts"), (strips, "<tool>"),
        (splits_otherwise, "has no known name for"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_cut_otherwise_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    tokenizer = trained_tokenizer()
    change(tokenizer)
    with pytest.raises(ModelError, match=message):
        export_gguf(make_tuned(tmp_path, tokenizer), tmp_path / "model.gguf", "f16")
    assert not (tmp_path / "model.gguf").exists()


def test_tinyllamas_tokenizer_cuts_real_rows_alike(
    tmp_path: Path, tinyllama_tokenizer: Any, tinyllama_folder: Path, real_rows_file: Path
) -> None:
    tuned = make_tuned(tmp_path, tinyllama_tokenizer, vocab_size=32000, bos_token_id=1, eos_token_id=2)
    file = export_gguf(tuned, tmp_path / "model.gguf", "f16")
    found = compare_with_transformers(tuned, file)
    assert not found.other_tokens and found.compared >= 4 and found.largest_difference < 0.04, found
    other = LlamaCpp(file, context=4096)
    encoder, space = tuned.encoder, leading_space(tuned.encoder)
    rows = json.loads(real_rows_file.read_text())[:500]
    turns = [OpenExchange(row["instruction"], row["input"]) for row in rows] + [OpenExchange(text) for text in PROMPTS]
    answer = "저는 후아리조입니다 🦙.\nTwo lines."
    for turn in turns:
        told = [Exchange(turn.instruction, turn.input, answer), OpenExchange("Go on.")]
        for system, conversation in (("", [turn]), ("Be short.", told)):
            text = space + "".join(p.text for p in encoder.prompt.pieces(system, conversation))
            assert other.tokens(text, add_special=True) == encoder.encode_prompt(system, conversation), text


@pytest.fixture(scope="module", params=["byte-level BPE", "SentencePiece"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaCpp, Encoder, str]:
    folder = tmp_path_factory.mktemp("loaded")
    if request.param == "SentencePiece":
        tokenizer = request.getfixturevalue("tinyllama_tokenizer")
        tuned = make_tuned(folder, tokenizer, vocab_size=32000, bos_token_id=1, eos_token_id=2)
    else:
        tuned = make_tuned(folder)
    return (
        LlamaCpp(export_gguf(tuned, folder / "model.gguf", "f16"), context=4096),
        tuned.encoder,
        leading_space(tuned.encoder),
    )


@given(st.text() | st.text(alphabet="  \n\tabAB019.'안녕🦙é\u0301\u200d\u3000</s>|"))
@settings(max_examples=300, deadline=None)
def test_any_text_is_cut_alike(loaded: tuple[LlamaCpp, Encoder, str], text: str) -> None:
    other, encoder, space = loaded
    prompt = space + "".join(piece.text for piece in encoder.prompt.pieces("", [OpenExchange(text)]))
    assert other.tokens(prompt, add_special=True) == encoder.encode_prompt("", [OpenExchange(text)])
