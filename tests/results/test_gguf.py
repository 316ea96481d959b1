"""GGUF files are compared with Transformers in llama.cpp itself."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from huarizo.data.prompts import OpenExchange
from huarizo.errors import MachineError, ModelError, UserError
from huarizo.inference.artifact import Tuned
from huarizo.model.merge import MergedWeights
from huarizo.results.gguf import export_adapter, export_gguf, is_adapter, write_gguf
from huarizo.results.verify import PROMPTS, LlamaCpp, compare_adapter, compare_with_transformers
from tests.limits import limited_files
from tests.results.make import make_tuned

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def change_weights(tuned: Tuned, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    file = tuned.base / "model.safetensors"
    save_file({name: change(name, tensor) for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def change_config(tuned: Tuned, **values: Any) -> None:
    file = tuned.base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("kind", "tolerance", "config"),
    [
        ("f32", 0.01, {}),
        ("f16", 0.04, {"tie_word_embeddings": True}),
        ("bf16", 0.3, {}),
        ("q8_0", 0.3, {}),
        ("f32", 0.01, {"rope_parameters": LLAMA3_ROPE}),
        ("f32", 0.01, {"rope_parameters": {k: v for k, v in LLAMA3_ROPE.items() if "original" not in k}}),
        ("f32", 0.01, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        ("f32", 0.01, {"num_key_value_heads": 4, "head_dim": 32}),
        ("f32", 0.01, {"attention_bias": True, "mlp_bias": True}),
    ],
    ids=["f32", "f16-tied", "bf16", "q8_0", "llama3-rope", "llama3-rope-short", "linear-rope", "head_dim", "biases"],
)
def test_llama_cpp_computes_the_same(tmp_path: Path, kind: Any, tolerance: float, config: dict[str, Any]) -> None:
    tuned = make_tuned(tmp_path, **config)
    change_weights(tuned, lambda name, tensor: torch.randn_like(tensor) if name.endswith(".bias") else tensor)
    file = export_gguf(tuned, tmp_path / "model.gguf", kind)
    found = compare_with_transformers(tuned, file)
    assert found.agrees(kind)
    assert not found.other_tokens and found.compared >= 4
    assert found.largest_difference < tolerance, found


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
    write_gguf(weights, tuned.encoder, tmp_path / "base.gguf", "f32", "base")
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
    assert verified.agrees("f16") and verified.compared >= 4 and verified.largest_difference < 0.04, verified
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_an_adapter_that_is_more_than_a_and_b_is_not_written_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="leave out --adapter"):
        export_adapter(make_tuned(tmp_path, options=options), tmp_path / "adapter.gguf")


def test_what_an_adapter_alone_can_not_be_is_refused(tmp_path: Path) -> None:
    tuned = make_tuned(tmp_path / "a")
    wide = make_tuned(tmp_path / "b", hidden_size=128)
    with pytest.raises(ModelError, match="its .*q_proj is 128 x 128, the adapter's 64 x 64"):
        export_adapter(dataclasses.replace(tuned, base=wide.base), tmp_path / "adapter.gguf")
    head = make_tuned(tmp_path / "c", targets=["lm_head"], tie_word_embeddings=True)
    with pytest.raises(ModelError, match="changes the head"):
        export_adapter(head, tmp_path / "adapter.gguf")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


def test_an_adapter_on_the_head_is_tried_on_its_base(tmp_path: Path) -> None:
    tuned = make_tuned(tmp_path, targets=["q_proj", "lm_head"])
    found = compare_adapter(tuned, export_adapter(tuned, tmp_path / "adapter.gguf"))
    assert found.agrees("f16") and found.compared >= 4, found


def test_what_older_conversions_left_in_the_base_is_left_out(tmp_path: Path) -> None:
    tuned = make_tuned(tmp_path)
    file = tuned.base / "model.safetensors"
    odd = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(load_file(file) | odd, file, {"format": "pt"})
    assert compare_with_transformers(tuned, export_gguf(tuned, tmp_path / "model.gguf", "f32")).agrees("f32")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope scaling 'dynamic'"),
        ({"hidden_act": "gelu"}, "the activation silu, not gelu"),
    ],
)
def test_what_llama_cpp_does_not_have_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    tuned = make_tuned(tmp_path)
    change_config(tuned, **config)
    with pytest.raises(ModelError, match=message):
        export_gguf(tuned, tmp_path / "model.gguf", "f16")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


def test_what_a_type_can_not_hold_is_reported(tmp_path: Path) -> None:
    tuned = make_tuned(tmp_path)
    change_weights(tuned, lambda name, tensor: tensor + 1e5 if "down_proj" in name else tensor)
    with pytest.raises(ModelError, match=r"down_proj.weight: 100\d+ is too large for F16.*bf16 or f32"):
        export_gguf(tuned, tmp_path / "model.gguf", "f16")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))
    for kind in ("bf16", "f32", "q8_0"):
        export_gguf(tuned, tmp_path / f"{kind}.gguf", kind)


def test_a_file_that_the_disk_has_not_all_of_is_none(tmp_path: Path) -> None:
    tuned = make_tuned(tmp_path)
    size = export_gguf(tuned, tmp_path / "model.gguf", "f16").stat().st_size
    small = export_adapter(tuned, tmp_path / "adapter.gguf").stat().st_size
    for missing in (1, 50, 5000, size - 10):
        with limited_files(size - missing), pytest.raises(MachineError, match="cut.gguf: could not be written"):
            export_gguf(tuned, tmp_path / "cut.gguf", "f16")
    for missing in (1, 50, small - 10):
        with limited_files(small - missing), pytest.raises(MachineError, match="cut.gguf: could not be written"):
            export_adapter(tuned, tmp_path / "cut.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "adapter.gguf", "base", "model.gguf"]


def test_the_file_is_the_same_each_time_and_has_the_name_that_was_asked_for(tmp_path: Path) -> None:
    tuned = make_tuned(tmp_path)
    file, before = export_gguf(tuned, tmp_path / "my-model.gguf", "f16"), (tmp_path / "my-model.gguf").read_bytes()
    assert GGUFReader(file).fields["general.name"].contents() == "my-model"
    assert export_gguf(tuned, file, "f16", force=True).read_bytes() == before


def test_a_damaged_file_is_reported(tmp_path: Path) -> None:
    tuned, choice = make_tuned(tmp_path), random.Random(0)
    whole = export_adapter(tuned, tmp_path / "adapter.gguf").read_bytes()
    assert is_adapter(tmp_path / "adapter.gguf")
    told = 0
    for _ in range(300):
        data = bytearray(whole[: choice.choice((len(whole), choice.randrange(len(whole))))])
        for _ in range(choice.choice((0, 1, 5, 50))):
            if data:
                data[choice.randrange(min(len(data), 400))] = choice.randrange(256)
        (tmp_path / "damaged.gguf").write_bytes(data)
        try:
            is_adapter(tmp_path / "damaged.gguf")
        except ModelError as error:
            told += "not a complete GGUF file" in str(error)
    assert told > 150
