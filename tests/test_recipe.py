"""The recipe: all mistakes at once, each with its key; what is written is read back the same."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from huarizo.errors import RecipeError
from huarizo.model.architectures.registry import ARCHITECTURES
from huarizo.model.lora import check_lora
from huarizo.plan import Choice
from huarizo.recipe import load_recipe, make_recipe, to_yaml, with_overrides
from huarizo.recipe_file import parse_yaml
from huarizo.results.card import _licence_of_card
from huarizo.training.settings import check_trainer_settings
from tests.general import SIZES
from tests.limits import limited_memory

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
MODEL_TYPES = {
    "HuggingFaceTB/SmolLM2-360M-Instruct": "llama",
    "HuggingFaceTB/SmolLM3-3B": "smollm3",
    "Qwen/Qwen3-0.6B": "qwen3",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": "llama",
    "google/gemma-3-1b-it": "gemma3_text",
    "google/gemma-3-270m-it": "gemma3_text",
    "meta-llama/Llama-3.2-1B-Instruct": "llama",
    "quickstart": "llama",
}
"""Of the models that the recipes name."""

MISTAKES = {
    "modle: x": ["modle: no such key. Did you mean 'model'?"],
    "data: {evl: 3}": ["data.evl: no such key. Did you mean 'data.eval'?"],
    "learning_rate: 1e-4": ["Did you mean 'training.learning_rate'?"],
    "lora: {r: 0}": ["lora.r: input should be greater than or equal to 1, not 0"],
    "lora: {r: many}": ["lora.r: input should be a valid integer", "not 'many'"],
    "lora: {dropout: 1}": ["lora.dropout: input should be less than 1"],
    "lora: {options: {r: 3}}": ["is set by `lora.r`"],
    "lora: {options: {use_rslra: true}}": ["Did you mean 'use_rslora'?"],
    "precision: int9": ["precision: input should be"],
    "data: {prompt: alpacca}": ["data.prompt: not one of", "Did you mean 'alpaca'?"],
    "data: {eval: -1}": ["data.eval: a share lies between 0 and 1"],
    "data: {eval: true}": ["data.eval: write a share"],
    "data: {eval: 1.5}": ["data.eval: a share lies between 0 and 1"],
    "data: {prompt: chat, eos: false}": ["data.eos=false needs data.prompt"],
    "data: {max_length: .inf}": ["data.max_length"],
    "training: {learning_rate: .nan}": ["training.learning_rate"],
    "training: 3": ["training: input should be a valid dictionary"],
    "trainer: {fp16: true}": ["'fp16' can't be set here: use `precision`"],
    "trainer: {hub_token: x}": ["a recipe never holds a hub token"],
    "trainer: {warmup_stps: 3}": ["Did you mean 'warmup_steps'?"],
    "samples: -1": ["samples: input should be greater than or equal to 0"],
    "model: a\nmodel: b": ["the key 'model' appears twice"],
    "model: [": ["not valid YAML"],
    "- a": ["a recipe is a mapping"],
    "model: !!python/object/apply:os.system [true]": ["not valid YAML"],
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_reported_with_its_key(text: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(file)
    assert all(part in str(error.value) for part in MISTAKES[text]), error.value
    assert error.value.exit_code == 2


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("modle: x\nlora: {r: 0}\ntrainer: {fp16: true}")
    with pytest.raises(RecipeError) as error:
        load_recipe(file, ["data.max_length=1", "oops", "samples=[Hi?, You?]"])
    assert str(error.value).startswith("r.yaml: 6 mistakes")


@pytest.mark.parametrize("word", ["hf_datasets", "/data/hf_datasets/alpaca.json", "hf_transformers_models_of_the_year"])
def test_a_path_with_hf_in_it_is_no_token(word: str) -> None:
    assert make_recipe(data={"train": word}).data.train == word
    with pytest.raises(RecipeError, match="never holds a hub token"):
        make_recipe(data={"train": f"{word} hf_{'aB3' * 12}"})


def test_overrides_are_typed_as_in_yaml(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("lora: {r: 4}")
    overrides = [
        "lora.r=16",
        "training.learning_rate=2e-4",
        "lora.target_modules=q_proj,k_proj",
        "data.eval=other.json",
    ]
    recipe = load_recipe(
        file, [*overrides, "samples=['Hi?', 'Who are you?']", "trainer.warmup_steps=3", "training.max_steps=null"]
    )
    assert (recipe.lora.r, recipe.training.learning_rate, recipe.data.eval) == (16, 2e-4, "other.json")
    assert recipe.lora.target_modules == ["q_proj", "k_proj"] and recipe.samples == ["Hi?", "Who are you?"]
    assert recipe.trainer == {"warmup_steps": 3}


def test_a_recipe_is_overridden_as_a_file_is() -> None:
    recipe = make_recipe(model="a", data={"train": "b", "columns": {"output": "reply"}})
    found = with_overrides(recipe, ["data.max_length=64", "data.columns.instruction=question"])
    assert found.data.columns == {"instruction": "question", "output": "reply"} and found.data.max_length == 64
    assert with_overrides(recipe, []) == recipe and recipe.data.max_length == 512
    with pytest.raises(RecipeError, match=r"(?s)2 mistakes.*data\.max_length.*lora\.r"):
        with_overrides(recipe, ["data.max_length=0", "lora.r=0"])


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_recipes_that_ship_are_right_and_survive_a_round_trip(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file)
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(recipe))
    assert load_recipe(copy) == recipe


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_recipes_that_ship_fit_their_models_and_take_the_fast_path(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file)
    model_type = MODEL_TYPES[recipe.model]
    assert ARCHITECTURES[model_type].packs
    sizes: dict[str, Any] = SIZES | {"num_attention_heads": 4, "intermediate_size": 48, "pad_token_id": 0}
    CONFIG_MAPPING[model_type](**sizes).save_pretrained(tmp_path)
    assert check_lora(tmp_path, recipe.lora, "int8") > 0
    check_trainer_settings(recipe, Choice("int8", "test", torch.float32), torch.device("cpu"))


def test_a_missing_recipe_names_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(RecipeError, match="no such recipe file.*recipes/quickstart.yaml"):
        load_recipe("recipes/quickstrat.yaml")


def test_a_recipe_written_as_json_keeps_its_emoji(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"samples": ["Who are you? 🦙 안녕"]}))
    assert load_recipe(tmp_path / "recipe.json").samples == ["Who are you? 🦙 안녕"]
    (tmp_path / "recipe.json").write_text('{"samples": ["\\ud83d"]}')
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(tmp_path / "recipe.json")


PLACES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pipe": (os.mkfifo, "it is a pipe or a device, not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is a pipe or a device, not a file"),
    "folder": (Path.mkdir, "it is a folder, not a file"),
    "large": (lambda path: path.write_bytes(b" " * 100_001), "100,001 bytes are too many"),
    "long name": (lambda path: None, "no such recipe file"),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_recipe_is_reported_at_once(tmp_path: Path, place: str) -> None:
    make, said = PLACES[place]
    make(tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match=f"recipe.yaml: .*{said}"):
        load_recipe(tmp_path / "recipe.yaml")


BOMBS = {
    "aliases": "a0: &a0 [1]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(30)),
    "merge keys": "a0: &a0 {k0: 1}\n"
    + "".join(f"a{i + 1}: &a{i + 1} {{'<<': [{', '.join([f'*a{i}'] * 9)}]}}\n" for i in range(30)),
    "merge keys, unquoted": "a0: &a0 {k0: 1}\n"
    + "".join(f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 9)}]}}\n" for i in range(30)),
    "a merge of itself": "a: &a\n  <<: *a\n",
    "a list of itself": "a: &a [*a]\n",
    "nested lists": "[" * 99_000,
    "nested mappings": "{a: " * 24_000,
    "nested blocks": "".join(f"{' ' * i}a:\n" for i in range(440)),
    "nested items": "- " * 49_000,
    "an endless number": "a: " + "9" * 99_000,
    "sexagesimal": "a: " + ":".join(["59"] * 30_000),
    "many keys": "".join(f"k{i}: 1\n" for i in range(11_000)),
    "many merges": "b: &b {k: 1}\na:\n" + "  <<: *b\n" * 10_000,
    "an endless anchor": "a: &" + "a" * 99_000 + " 1",
    "quotes": "a: '" + "''" * 49_000 + "'",
    "escapes": 'a: "' + "\\x41" * 24_000 + '"',
    "comments": "#\n" * 49_000 + "]",
    "a date that is none": "a: 2001-99-99",
}


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
@pytest.mark.parametrize("bomb", BOMBS)
def test_yaml_of_any_kind_is_read_within_bounds(tmp_path: Path, bomb: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(BOMBS[bomb])
    assert file.stat().st_size <= 100_000
    with limited_memory(200 * 2**20), pytest.raises(RecipeError, match=r"recipe\.yaml: |no such key"):
        load_recipe(file)


@pytest.mark.parametrize("bomb", ["aliases", "merge keys, unquoted", "a list of itself", "nested mappings"])
def test_the_front_matter_of_a_base_is_read_within_bounds(tmp_path: Path, bomb: str) -> None:
    card = tmp_path / "README.md"
    card.write_text(f"---\n{BOMBS[bomb][:99_000]}\n---\n")
    with limited_memory(200 * 2**20):
        assert _licence_of_card(card) is None


def test_ctrl_c_ends_the_reading_of_yaml() -> None:
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    try:
        with pytest.raises(KeyboardInterrupt):
            parse_yaml(BOMBS["nested lists"])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
