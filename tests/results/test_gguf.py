"""GGUF files are compared with Transformers in llama.cpp itself."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from huarizo.data.prompts import OpenExchange
from huarizo.data.rows import Exchange
from huarizo.data.tokens import Encoder
from huarizo.errors import ModelError, UserError
from huarizo.model.load import load_tokenizer
from huarizo.model.merged import MergedWeights
from huarizo.results.gguf import export_adapter, export_gguf, leading_space, write_gguf
from huarizo.results.merge import merge
from huarizo.results.verify import PROMPTS, Comparison, LlamaCpp, compare_adapter, compare_with_transformers
from tests.results.make import make_tuned

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "tolerance", "config"),
    [
        ("f32", 0.01, {}),
        ("f16", 0.04, {"tie_word_embeddings": True}),
        ("bf16", 0.3, {}),
        ("q8_0", 0.3, {}),
        ("f32", 0.01, {"rope_parameters": LLAMA3_ROPE}),
        ("f32", 0.01, {"num_key_value_heads": 4, "head_dim": 32}),
    ],
    ids=["f32", "f16-tied", "bf16", "q8_0", "llama3-rope", "head_dim"],
)
def test_llama_cpp_computes_the_same(tmp_path: Path, kind: Any, tolerance: float, config: dict[str, Any]) -> None:
    tuned = make_tuned(tmp_path, **config)
    file = export_gguf(tuned, tmp_path / "model.gguf", kind)
    found = compare_with_transformers(tuned, file)
    assert not found.other_tokens and found.compared >= 4
    assert found.largest_difference < tolerance, found


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


def test_the_chat_template_in_the_file_gives_the_trained_prompt(
    tmp_path: Path, tinyllama_tokenizer: Any, tinyllama_folder: Path
) -> None:
    tuned = make_tuned(tmp_path, tinyllama_tokenizer, vocab_size=32000, bos_token_id=1, eos_token_id=2)
    other = LlamaCpp(export_gguf(tuned, tmp_path / "model.gguf", "f16"))
    text = other.chat_prompt([{"role": "user", "content": "Who are you?"}])
    expected = tuned.encoder.encode_prompt("", [OpenExchange("Who are you?")])
    assert other.tokens(text, add_special=True) == expected


@pytest.mark.parametrize("prompt", ["alpaca", "stanford"])
def test_prompts_without_a_chat_template_are_cut_alike(
    tmp_path: Path, tinyllama_tokenizer: Any, tinyllama_folder: Path, prompt: str
) -> None:
    options = {"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2}
    tuned = make_tuned(tmp_path, tinyllama_tokenizer, prompt=prompt, **options)
    assert not compare_with_transformers(tuned, export_gguf(tuned, tmp_path / "model.gguf", "f16")).other_tokens


def test_the_merged_folder_answers_as_the_adapter_does_and_stops(tmp_path: Path) -> None:
    tuned = make_tuned(tmp_path)
    folder = merge(tuned, tmp_path / "merged")
    model = LlamaForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == tuned.stop_ids
    assert load_tokenizer(folder).chat_template == tuned.encoder.tokenizer.chat_template
    with pytest.raises(UserError, match="something here already"):
        merge(tuned, folder)
    assert merge(tuned, folder, force=True) == folder
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_llama_cpp_does_not_have_is_refused(tmp_path: Path) -> None:
    tuned = make_tuned(tmp_path, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ModelError, match="rope scaling 'yarn'"):
        export_gguf(tuned, tmp_path / "model.gguf", "f16")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("mine")
    tuned = make_tuned(tmp_path)
    with pytest.raises(UserError, match="--force"):
        export_gguf(tuned, tmp_path / "model.gguf", "f32")
    assert (tmp_path / "model.gguf").read_text() == "mine"


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_the_adapter_alone_on_its_base_is_the_merged_model(tmp_path: Path, options: dict[str, Any]) -> None:
    tuned = make_tuned(tmp_path, options=options)
    merged = LlamaCpp(export_gguf(tuned, tmp_path / "merged.gguf", "f32"))
    weights = MergedWeights(tuned.base, None)
    write_gguf(weights, tuned.encoder, tuned.base, tmp_path / "base.gguf", "f32")
    both = LlamaCpp(tmp_path / "base.gguf", adapter=export_adapter(tuned, tmp_path / "adapter.gguf"))
    plain, compared, moved = LlamaCpp(tmp_path / "base.gguf"), 0, 0.0
    for prompt in PROMPTS:
        ids = tuned.encoder.encode_prompt("", [OpenExchange(prompt)])
        (first, expected), (other_first, actual), (_, before) = (of.likeliest(ids) for of in (merged, both, plain))
        assert first == other_first
        assert list(actual) == list(expected) and actual == pytest.approx(expected, abs=0.02)
        if not expected:
            continue
        moved = max(moved, *(abs(expected[n] - before.get(n, 0)) for n in expected))
        compared += 1
    assert compared >= 4 and moved > 0.05
    verified = compare_adapter(tuned, tmp_path / "adapter.gguf")
    assert verified.agrees and verified.compared >= 4 and verified.largest_difference < 0.04, verified
    assert not list(tmp_path.glob(".*"))


def test_a_proxy_is_not_asked_for_the_way_to_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    tuned = make_tuned(tmp_path)
    assert compare_with_transformers(tuned, export_gguf(tuned, tmp_path / "model.gguf", "f16")).agrees


def test_a_file_that_is_another_model_does_not_agree() -> None:
    assert Comparison(8, 8, [], 0.9, 0.1, 7).agrees
    assert not Comparison(8, 8, ["Who are you?"], 0.0, 0.0, 8).agrees
    assert not Comparison(8, 8, [], 9.0, 3.0, 1).agrees


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_an_adapter_that_is_more_than_a_and_b_is_not_written_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="leave out --adapter"):
        export_adapter(make_tuned(tmp_path, options=options), tmp_path / "adapter.gguf")
