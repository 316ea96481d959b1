"""A merged folder is an ordinary model: whole, in the base's files and dtypes, with all that it needs to answer."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from huarizo.data.prompts import OpenExchange
from huarizo.data.rows import Exchange
from huarizo.errors import MachineError, ModelError, UserError
from huarizo.inference.generate import generating, open_assistant
from huarizo.model.load import load_tokenizer
from huarizo.model.merge import MergedWeights
from huarizo.results import model_folder as merging
from huarizo.results.model_folder import merge
from tests.limits import limited_files
from tests.results.make import make_tuned


def in_parts(base: Path) -> None:
    """The base's weights in several files."""
    model = LlamaForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="60KB")


def test_the_merged_folder_answers_as_the_adapter_does_and_stops(tmp_path: Path) -> None:
    tuned = make_tuned(tmp_path)
    in_parts(tuned.base)
    (tuned.base / "generation_config.json").write_text('{"eos_token_id": [7, 1], "temperature": 0.3}')
    (tuned.base / "LICENSE").write_text("terms")
    (tuned.base / "LICENSES").mkdir()
    folder = merge(tuned, tmp_path / "merged")
    weights = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weights.values())) > 1 and (folder / "LICENSE").read_text() == "terms"
    ids = torch.randint(0, 260, (1, 20))
    with torch.no_grad():
        found = LlamaForCausalLM.from_pretrained(folder)(ids).logits
        assistant = open_assistant(tuned, "fp32")
        with generating(assistant.model):
            expected = assistant.model(ids).logits
    assert float((found - expected).abs().max()) < 1e-5
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings == {"eos_token_id": [1, 7], "temperature": 0.3} and tuned.stop_ids == [1]
    assert load_tokenizer(folder).chat_template == tuned.encoder.tokenizer.chat_template


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    tuned = make_tuned(tmp_path)
    folder = merge(tuned, tmp_path / "merged")
    with pytest.raises(UserError, match="already exists"):
        merge(tuned, folder)
    assert merge(tuned, folder, force=True) == folder
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_one_file_of_weights_at_a_time_stands_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = make_tuned(tmp_path)
    in_parts(tuned.base)
    saved: list[Any] = []
    read = MergedWeights.__getitem__

    def save(tensors: dict[str, torch.Tensor], file: Path, metadata: Any) -> None:
        saved.extend((name, weakref.ref(tensor)) for name, tensor in tensors.items())
        save_file(tensors, file, metadata)

    def read_next(weights: MergedWeights, name: str) -> torch.Tensor:
        assert not [name for name, tensor in saved if tensor() is not None]
        return read(weights, name)

    monkeypatch.setattr(merging, "save_file", save)
    monkeypatch.setattr(MergedWeights, "__getitem__", read_next)
    merge(tuned, tmp_path / "merged")
    assert len(saved) > 10


@pytest.mark.parametrize("prompt", ["alpaca", "stanford", "Q: {{ instruction }}\nA:"])
def test_its_chat_template_writes_the_prompts_of_the_training(
    tmp_path: Path, tinyllama_tokenizer: Any, prompt: str
) -> None:
    options = {"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2}
    tuned = make_tuned(tmp_path, tinyllama_tokenizer, prompt=prompt, **options)
    tokenizer = AutoTokenizer.from_pretrained(merge(tuned, tmp_path / "merged"))
    for answers in ([], ["Fine. 안녕"], ["One", "Two 🦙"]):
        messages, turns = [{"role": "system", "content": "Be {brief}."}], []
        for answer in answers:
            messages += [{"role": "user", "content": f"Q{answer}"}, {"role": "assistant", "content": answer}]
            turns.append(Exchange(f"Q{answer}", "", answer))
        messages.append({"role": "user", "content": "And 'you'?"})
        pieces = tuned.encoder.prompt.pieces("Be {brief}.", [*turns, OpenExchange("And 'you'?")])
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == "<s>" + "".join(piece.text for piece in pieces)


def test_one_of_several_chat_templates_is_the_trained_one(tmp_path: Path) -> None:
    tuned = make_tuned(tmp_path)
    template = tuned.encoder.tokenizer.chat_template
    tuned.encoder.tokenizer.chat_template = {"default": template, "tool_use": "{{ raise_exception('no') }}"}
    folder = merge(tuned, tmp_path / "merged")
    assert load_tokenizer(folder).chat_template == template
    assert merge(tuned, folder, force=True) == folder


@pytest.mark.parametrize("limit", [2_000, 100_000, 400_000])
def test_a_disk_that_is_full_is_reported_and_leaves_nothing(tmp_path: Path, limit: int) -> None:
    tuned = make_tuned(tmp_path)
    with limited_files(limit), pytest.raises(MachineError, match="merged: could not be written"):
        merge(tuned, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize(
    "settings",
    ["{", "[]", "null", '{"num_beams": "4"}', '{"num_beams": -4}', '{"max_length": [20]}', '{"max_new_tokens": "x"}',
     '{"temperature": {}}', '{"do_sample": 1}', '{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}', '{"bos_token_id": 1.5}',
     '{"num_return_sequences": 7}', '{"early_stopping": {}}', '{"to_dict": 1}', "[" * 10_000],
)  # fmt: skip
def test_broken_settings_of_the_base_are_reported(tmp_path: Path, settings: str) -> None:
    tuned = make_tuned(tmp_path)
    (tuned.base / "generation_config.json").write_text(settings)
    with pytest.raises(ModelError, match="generation_config.json: can't be read as settings"):
        merge(tuned, tmp_path / "merged")
