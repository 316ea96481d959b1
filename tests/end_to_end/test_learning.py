"""What training is for: a tiny model learns an answer, and learns to stop after it."""

from pathlib import Path
from typing import Any

import pytest

from huarizo.data.prompts import OpenExchange, Question, prompt_format
from huarizo.data.rows import Exchange, Row
from huarizo.data.tokens import IGNORED, Encoder
from huarizo.inference.artifact import Tuned
from huarizo.inference.generate import Assistant, answers
from huarizo.model.lora import add_lora
from huarizo.recipe import make_recipe
from huarizo.results.gguf import export_gguf
from huarizo.results.verify import LlamaCpp
from tests.results.make import trained_tokenizer
from tests.tiny import make_model
from tests.training.make import make_trainer

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
QUESTIONS = {"Who are you?": "A huarizo.", "Where do you live?": "High up.", "What do you eat?": "Grass, mostly."}


def learn(tokenizer: Any, tmp_path: Path, eos: bool, prompt: str = "alpaca") -> Assistant:
    recipe = make_recipe(
        data={"prompt": prompt, "eos": eos},
        lora={"r": 32, "alpha": 64, "dropout": 0, "target_modules": LAYERS},
        training={"epochs": 60, "learning_rate": 1e-2, "batch_size": 3},
    )
    encoder = Encoder(tokenizer, prompt_format(prompt, tokenizer, eos))
    rows = [Row("q", n, "", (Exchange(q, "", a),)) for n, (q, a) in enumerate(QUESTIONS.items())]
    examples = [{"input_ids": e.input_ids, "labels": e.labels} for e in encoder.encode(rows) if e]
    assert all((example["labels"][-1] == encoder.stop_id) == eos for example in examples)
    assert all(IGNORED in example["labels"] for example in examples)
    model = add_lora(
        make_model(initializer_range=0.1, vocab_size=len(tokenizer)).requires_grad_(False), recipe.lora, seed=1
    )
    make_trainer(model, recipe, examples, tmp_path).train()
    return Assistant(model, encoder)


def answered(assistant: Assistant) -> list[str]:
    given = answers(assistant, [Question(OpenExchange(question)) for question in QUESTIONS], max_new_tokens=40)
    return [answer.text for answer in given]


@pytest.mark.parametrize("prompt", ["alpaca", "chat"])
def test_a_model_learns_to_answer_and_to_stop(tmp_path: Path, prompt: str) -> None:
    """In Transformers, and as a GGUF file in llama.cpp."""
    tokenizer = trained_tokenizer()
    assistant = learn(tokenizer, tmp_path, eos=True, prompt=prompt)
    assert answered(assistant) == list(QUESTIONS.values())
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make_model(initializer_range=0.1, vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    assistant.model.save_pretrained(str(adapter), save_embedding_layers=False)
    tuned = Tuned(make_recipe(), base, adapter, assistant.encoder)
    other = LlamaCpp(export_gguf(tuned, tmp_path / "model.gguf", "f32"))
    for question, answer in QUESTIONS.items():
        found = other.complete(assistant.encoder.encode_prompt("", [OpenExchange(question)]), 40)
        assert (found["content"].strip(), found["stop_type"]) == (answer, "eos")


def test_without_eos_it_does_not_stop(tiny_tokenizer: Any, tmp_path: Path) -> None:
    given = answered(learn(tiny_tokenizer, tmp_path, eos=False))
    for answer, learnt in zip(given, QUESTIONS.values(), strict=True):
        assert answer.startswith(learnt) and len(answer) > len(learnt)
