"""A GGUF file that is another model, or has other prompts, does not pass for the trained one."""

import dataclasses
import math
from pathlib import Path

import pytest

from huarizo.data.prompts import prompt_format
from huarizo.data.tokens import Encoder
from huarizo.model.merge import MergedWeights
from huarizo.results.gguf import export_gguf, write_gguf
from huarizo.results.verify import PROMPTS, compare_with_transformers
from tests.results.make import make_tuned


def test_a_proxy_is_not_asked_for_the_way_to_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    tuned = make_tuned(tmp_path)
    assert compare_with_transformers(tuned, export_gguf(tuned, tmp_path / "model.gguf", "f16")).agrees("f16")


def test_a_file_that_is_another_model_does_not_agree(tmp_path: Path) -> None:
    tuned = make_tuned(tmp_path)
    weights = MergedWeights(tuned.base, None)
    write_gguf(weights, tuned.encoder, tmp_path / "base.gguf", "f32", "base")
    untuned = compare_with_transformers(tuned, tmp_path / "base.gguf")
    assert not untuned.other_tokens and untuned.mean_difference_from_base < 0.01 and not untuned.agrees("f32")
    near = dataclasses.replace(untuned, mean_difference=0.01)
    assert not near.agrees("f32")  # as near as a type's rounding, but nearer to the untuned model
    same = dataclasses.replace(untuned, mean_difference=0.001, mean_difference_from_base=0.5)
    assert same.agrees("f32")
    for wrong in ({"other_tokens": ["Hi"]}, {"compared": 0}, {"mean_difference": 0.1}, {"mean_difference": math.inf}):
        assert not dataclasses.replace(same, **wrong).agrees("f32")


def test_a_file_with_the_prompts_of_another_format_does_not_agree(tmp_path: Path) -> None:
    tuned = make_tuned(tmp_path)
    tokenizer = tuned.encoder.tokenizer
    alpaca = dataclasses.replace(tuned, encoder=Encoder(tokenizer, prompt_format("alpaca", tokenizer)))
    found = compare_with_transformers(tuned, export_gguf(alpaca, tmp_path / "model.gguf", "f32"))
    assert found.other_tokens == list(PROMPTS) and found.mean_difference < 0.01 and not found.agrees("f32")
