"""What training is for: a tiny model learns an answer, and learns to stop after it."""

from pathlib import Path
from typing import Any

from huarizo.data.prompts import OpenExchange, prompt_format
from huarizo.data.rows import Exchange, Row
from huarizo.data.tokens import IGNORED, Encoder
from huarizo.model.lora import add_lora
from huarizo.recipe import make_recipe
from huarizo.results.generate import Assistant, answers
from tests.tiny import make_model
from tests.training.test_parity import make_trainer

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
QUESTIONS = {"Who are you?": "A huarizo.", "Where do you live?": "High up.", "What do you eat?": "Grass, mostly."}


def learn(tokenizer: Any, tmp_path: Path, eos: bool) -> list[str]:
    recipe = make_recipe(
        data={"prompt": "alpaca", "eos": eos},
        lora={"r": 32, "alpha": 64, "dropout": 0, "target_modules": LAYERS},
        training={"epochs": 60, "learning_rate": 1e-2, "batch_size": 3},
    )
    encoder = Encoder(tokenizer, prompt_format("alpaca", tokenizer, eos))
    rows = [Row("q", n, "", (Exchange(q, "", a),)) for n, (q, a) in enumerate(QUESTIONS.items())]
    examples = [{"input_ids": e.input_ids, "labels": e.labels} for e in encoder.encode(rows) if e]
    assert all((example["labels"][-1] == encoder.stop_id) == eos for example in examples)
    assert all(IGNORED in example["labels"] for example in examples)
    model = add_lora(make_model(initializer_range=0.1).requires_grad_(False), recipe.lora, seed=1)
    make_trainer(model, recipe, examples, tmp_path).train()
    given = answers(Assistant(model, encoder), [OpenExchange(question) for question in QUESTIONS], max_new_tokens=40)
    return [answer.text for answer in given]


def test_a_model_learns_to_answer_and_to_stop(tiny_tokenizer: Any, tmp_path: Path) -> None:
    assert learn(tiny_tokenizer, tmp_path, eos=True) == list(QUESTIONS.values())


def test_without_eos_it_does_not_stop(tiny_tokenizer: Any, tmp_path: Path) -> None:
    for answer, learnt in zip(learn(tiny_tokenizer, tmp_path, eos=False), QUESTIONS.values(), strict=True):
        assert answer.startswith(learnt) and len(answer) > len(learnt)
