"""Losses row by row against Transformers' own, and intervals against many draws."""

import dataclasses
import math
import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from huarizo.data.rows import Exchange, Row
from huarizo.data.tokens import Example
from huarizo.errors import MachineError
from huarizo.inference.generate import open_assistant
from huarizo.model.architectures.registry import ARCHITECTURES
from huarizo.results import statistics as losses
from huarizo.results.statistics import Losses, Mean, mean_loss, measure, student_t975
from tests.results.make import make_tuned

ROWS = [Row("rows.json", n, "", (Exchange(f"Count to {n}", "", "one two three " * n),)) for n in range(1, 9)]


def as_transformers_takes(example: Example) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([example.input_ids]), "labels": torch.tensor([example.labels])}


def test_each_row_has_the_loss_that_transformers_gives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = make_tuned(tmp_path)
    assistant = open_assistant(tuned, "fp32")
    examples = [example for example in tuned.encoder.encode(ROWS) if example]
    monkeypatch.setattr(losses, "BATCH_TOKENS", 200)  # several batches, several rows in each
    found = measure(assistant, examples)
    model = assistant.model
    model.get_base_model().set_attn_implementation("sdpa")
    for index, example in enumerate(examples):
        batch = as_transformers_takes(example)
        count = int((batch["labels"][0, 1:] != -100).sum())
        with torch.no_grad():
            after = float(model(**batch).loss) * count
            with model.disable_adapter():
                before = float(model(**batch).loss) * count
        assert found.tokens[index] == count
        assert found.after[index] == pytest.approx(after, rel=1e-5)
        assert found.before[index] == pytest.approx(before, rel=1e-5)
    assert found.change.value == pytest.approx(found.mean_after.value - found.mean_before.value)
    perplexity, mean = found.mean_after.perplexity, found.mean_after
    assert (perplexity.value, perplexity.low, perplexity.high) == tuple(
        map(math.exp, (mean.value, mean.low, mean.high))
    )


def test_a_model_that_is_not_known_to_pack_is_measured_on_padded_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = make_tuned(tmp_path)
    examples = [example for example in tuned.encoder.encode(ROWS) if example]
    monkeypatch.setattr(losses, "BATCH_TOKENS", 400)
    expected = measure(open_assistant(tuned, "fp32"), examples)
    unknown = dataclasses.replace(ARCHITECTURES["llama"], packs=False)
    monkeypatch.setattr("huarizo.model.architectures.registry.ARCHITECTURES", {"llama": unknown})
    assistant = open_assistant(tuned, "fp32")
    assert assistant.model.config._attn_implementation == "sdpa"
    found = measure(assistant, examples)
    assert found.tokens == expected.tokens
    for padded, packed in ((found.before, expected.before), (found.after, expected.after)):
        assert padded == pytest.approx(packed, rel=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_base_has_its_own_losses_beside_an_adapter_that_rewrites_it(tmp_path: Path, init: str) -> None:
    tuned = make_tuned(tmp_path, options={"init_lora_weights": init})
    examples = [example for example in tuned.encoder.encode(ROWS) if example]
    found = measure(open_assistant(tuned, "fp32"), examples)
    base = LlamaForCausalLM.from_pretrained(tuned.base)
    for example, before, after, count in zip(examples, found.before, found.after, found.tokens, strict=True):
        with torch.no_grad():
            loss = float(base(**as_transformers_takes(example)).loss)
        assert before / count == pytest.approx(loss, rel=1e-4) and abs(after - before) > 1e-3


@pytest.mark.parametrize(
    "error",
    [torch.cuda.OutOfMemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()],
)
def test_memory_that_does_not_do_makes_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    tuned = make_tuned(tmp_path)
    assistant = open_assistant(tuned, "fp32")
    examples = [example for example in tuned.encoder.encode(ROWS) if example]
    expected, batch_losses, fitting = measure(assistant, examples), losses._batch_losses, 3

    def short_of_memory(*arguments):
        if arguments[2].num_examples > fitting:
            raise error
        return batch_losses(*arguments)

    monkeypatch.setattr(losses, "_batch_losses", short_of_memory)
    found = measure(assistant, examples)
    assert found.after == pytest.approx(expected.after) and found.tokens == expected.tokens
    fitting = 0
    with pytest.raises(MachineError, match="data.max_length"):
        measure(assistant, examples)
    error = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        measure(assistant, examples)


def test_the_interval_holds_the_true_mean_as_often_as_it_says() -> None:
    generator, hits, draws = random.Random(3), 0, 600

    def row() -> tuple[float, int]:
        tokens, mean = generator.choice([5, 20, 80]), generator.gauss(2, 0.5)
        return mean * tokens, tokens

    for _ in range(draws):
        sums, tokens = zip(*[row() for _ in range(60)], strict=True)
        mean = mean_loss(sums, tokens)
        assert mean.low < mean.value < mean.high
        hits += mean.low <= 2 <= mean.high
    assert 0.91 < hits / draws < 0.98
    assert mean_loss([6.0, 2.0], [3, 1]).value == 2.0


@pytest.mark.parametrize("rows", [2, 5, 10])
def test_so_does_the_interval_of_a_few_rows_of_like_length(rows: int) -> None:
    generator, hits, draws = random.Random(rows), 0, 3000
    for _ in range(draws):
        tokens = [generator.randint(20, 40) for _ in range(rows)]
        mean = mean_loss([count * generator.gauss(2, 0.5) for count in tokens], tokens)
        hits += mean.low <= 2 <= mean.high
    assert 0.92 < hits / draws < 0.98


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (10, 2.2281), (30, 2.0423), (1000, 1.9623)],
)
def test_students_t_is_that_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_t975(freedom) == pytest.approx(quantile, abs=5e-5)


def test_one_row_has_a_mean_and_no_interval() -> None:
    mean = mean_loss([6.0], [3])
    assert math.isnan(mean.low) and str(mean) == "2.0000" and str(Mean(2.0, 1.5, 2.5)) == "2.0000 ± 0.5000"
    assert mean.perplexity.value == pytest.approx(math.exp(2)) and str(mean.perplexity) == "7.3891"


def test_a_change_is_judged_row_by_row() -> None:
    generator = random.Random(1)
    before = [generator.uniform(1, 100) for _ in range(50)]
    found = Losses(before, [loss - 1 for loss in before], [10] * 50)
    assert found.change.high < 0 and found.change.high - found.change.low < 1e-6
    assert found.mean_before.high > found.mean_after.low
