"""What is hostile leads to a message: not to code, not to a path outside, not to a full memory, not to a token told."""

import json
import os
import struct
import subprocess
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from huarizo.data.prompts import ChatFormat, prompt_format
from huarizo.data.rows import read_rows
from huarizo.errors import DataError, ModelError, RecipeError, UserError
from huarizo.hub.model_files import tensors_in
from huarizo.hub.names import resolve_model
from huarizo.model.adapter import check_adapter, load_adapter
from huarizo.model.load import load_tokenizer, read_config
from huarizo.model.lora import add_lora
from huarizo.model.weights import check_weights
from huarizo.recipe import load_recipe, make_recipe
from huarizo.results.card import _licence
from tests.tiny import CHATML, make_model, make_tokenizer

TOKEN = "hf_" + "plantedTokenThatNobodyMayTell" + "0123"


# Models


@pytest.mark.parametrize(
    ("file", "fields", "named"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "evil.Config"}}, "auto_map"),
        ("config.json", {"_attn_implementation_internal": "evil/kernel"}, "_attn_implementation_internal"),
        ("config.json", {"attn_implementation": "evil/kernel"}, "attn_implementation"),
        ("config.json", {"text_config": {"auto_map": {"AutoModel": "evil.M"}}}, "auto_map"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.T", None]}}, "auto_map"),
        ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}, "vocab_file"),
        ("tokenizer_config.json", {"tokenizer_file": "../../secret.json"}, "tokenizer_file"),
        ("generation_config.json", {"custom_generate": "evil/code"}, "custom_generate"),
    ],
)
def test_a_model_that_names_code_or_paths_is_refused(
    tiny_model_folder: Path, file: str, fields: dict[str, Any], named: str
) -> None:
    path = tiny_model_folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | fields))
    with pytest.raises(ModelError, match=f"{file} sets {named}.*"):
        resolve_model(str(tiny_model_folder))


def test_fields_that_tools_wrote_for_years_are_no_attack(tiny_model_folder: Path) -> None:
    path = tiny_model_folder / "tokenizer_config.json"
    config = json.loads((tiny_model_folder / "config.json").read_text())
    named = {"_name_or_path": "/home/me/llama", "_model_name_or_path": "Smollm2 135M"}
    (tiny_model_folder / "config.json").write_text(json.dumps(config | named))
    old = {"name_or_path": "/home/me/llama", "special_tokens_map_file": "/root/.cache/x.json", "tokenizer_file": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | old))
    assert load_tokenizer(resolve_model(str(tiny_model_folder)).path)("a")["input_ids"]


@pytest.mark.parametrize(
    "sizes",
    [{"num_hidden_layers": 10**9}, {"hidden_size": 10**7}, {"vocab_size": -5}, {"vocab_size": "many"},
     {"num_attention_heads": 0}, {"num_key_value_heads": 10**9}, {"intermediate_size": 1.5}, {"head_dim": 10**9},
     {"head_dim": 32}, {"head_dim": "x"}, {"num_hidden_layers": 3}, {"vocab_size": 100}, {"num_labels": 10**9},
     {"max_position_embeddings": 10**18}, {"num_attention_heads": 2}],
)  # fmt: skip
def test_sizes_that_the_weights_can_not_have_take_no_memory(tiny_model_folder: Path, sizes: dict[str, Any]) -> None:
    path = tiny_model_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | sizes))
    with pytest.raises(ModelError, match="not a valid size|more weights than|the weights have|weights don't match"):
        read_config(tiny_model_folder)
        check_weights(tiny_model_folder)


@pytest.mark.parametrize("header", [2**63, 10**12, 200_000_000, 0])
def test_a_safetensors_header_of_any_length_takes_no_memory(tiny_model_folder: Path, header: int) -> None:
    file = tiny_model_folder / "model.safetensors"
    with file.open("r+b") as handle:
        handle.write(struct.pack("<Q", header))
        handle.truncate(300_000_000)  # sparse
    with pytest.raises(ModelError, match="not a whole safetensors file|bytes instead of"):
        resolve_model(str(tiny_model_folder))


@pytest.mark.parametrize(
    "tensor",
    [
        {"dtype": "F32", "shape": [3, 1], "data_offsets": [0, 8]}, {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}, {"dtype": 4, "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, {"dtype": "F32", "shape": [2**62, 4, 0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": {}, "data_offsets": [0, 8]}, {"dtype": "F32", "shape": [2], "data_offsets": [0]}, [], 3,
    ],
    ids=range(12),
)  # fmt: skip
def test_odd_headers_of_safetensors_are_reported(tmp_path: Path, tensor: Any) -> None:
    header = json.dumps({"a": tensor}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match="^a.safetensors is not a whole safetensors file"):
        tensors_in(tmp_path / "a.safetensors")


def test_a_nested_header_of_safetensors_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000)
    with pytest.raises(ValueError, match="^a.safetensors is not a whole safetensors file"):
        tensors_in(tmp_path / "a.safetensors")


FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
    "generation_config.json",
    "other",
]


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_in_a_models_folder_is_reported(tiny_model_folder: Path, name: str) -> None:
    (tiny_model_folder / name).unlink(missing_ok=True)
    os.mkfifo(tiny_model_folder / name)
    with pytest.raises(ModelError, match=f"{name} is a pipe or a device"):
        resolve_model(str(tiny_model_folder))


@pytest.mark.parametrize("name", FILES[:-1])
def test_a_folder_or_a_dead_link_in_place_of_a_file_is_reported(tiny_model_folder: Path, name: str) -> None:
    (tiny_model_folder / name).unlink(missing_ok=True)
    (tiny_model_folder / name).symlink_to("nowhere")
    with pytest.raises(ModelError, match=name):
        resolve_model(str(tiny_model_folder))
    (tiny_model_folder / name).unlink()
    (tiny_model_folder / name).mkdir()
    with pytest.raises(ModelError, match=name):
        resolve_model(str(tiny_model_folder))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[]", "3", '{"model": null}'])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"]
)
def test_odd_json_in_a_models_folder_is_reported(tiny_model_folder: Path, name: str, text: str) -> None:
    if name == "model.safetensors.index.json":
        (tiny_model_folder / "model.safetensors").unlink()
    (tiny_model_folder / name).write_text(text)
    try:
        folder = resolve_model(str(tiny_model_folder)).path
        read_config(folder)
        load_tokenizer(folder)
    except ModelError as error:
        assert str(tiny_model_folder) in str(error)
    else:
        assert name == "tokenizer_config.json" and text == '{"model": null}'


def test_a_pattern_that_never_ends_in_a_tokenizer_is_reported(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tiny_model_folder / "tokenizer.json"
    spec = json.loads(file.read_text())
    pattern = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
    file.write_text(json.dumps(spec | {"pre_tokenizer": pattern}))
    monkeypatch.setattr("huarizo.model.load.TOKENIZER_TIME", 1.0)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_tokenizer(tiny_model_folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "config.json", "chat_template.jinja"])
def test_configurations_of_any_length_take_no_memory(tiny_model_folder: Path, name: str) -> None:
    with (tiny_model_folder / name).open("ab") as file:
        file.truncate(10**10)  # sparse
    with pytest.raises(ModelError, match=f"{name} has 10,000,000,000 bytes"):
        resolve_model(str(tiny_model_folder))


def test_names_in_an_index_can_not_leave_the_folder(tiny_model_folder: Path) -> None:
    (tiny_model_folder / "model.safetensors").rename(tiny_model_folder.parent / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (tiny_model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="weights are missing: \\.\\./outside"):
        resolve_model(str(tiny_model_folder))


# Chat templates


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than"),
        ("{{ 'a' * 10**10 }}", "takes more memory"),
        ("{{ 'a' * 10000000000 }}", "takes more memory"),
        ("{{ '%9999999999d' % 1 }}", "takes more memory"),
        ("{{ 'a'|center(9999999999) }}", "takes more memory"),
        ("{{ 9**(9**9) }}", "takes more than"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses this conversation"),
        ("{{ cycler.__init__.__globals__.os.system('id') }}", "refuses this conversation"),
        ("{{ self._TemplateReference__context }}", "refuses|rewrites"),
        ("{% include '/etc/passwd' %}", "refuses|fails"),
        ("{{ 1/0 }}", "fails: ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
        ("{{ " + "(" * 5000, "nested too deeply"),
        ("x" * 300_000, "300,000 characters"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_chat_templates_run_in_bounds(template: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huarizo.data.templates.LONGEST_RENDERING", 0.3)
    with pytest.raises(UserError, match=message):
        ChatFormat(make_tokenizer(chat_template=template))


@pytest.mark.parametrize(
    "template",
    ["{{ instruction }}{{ ''.__class__.__base__ }}", "{{ instruction }}{{ 9**(9**9) }}", "{{ instruction * 9999999999 }}",
     "{{ instruction }}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"],
)  # fmt: skip
def test_a_recipes_template_runs_in_bounds(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huarizo.data.templates.LONGEST_RENDERING", 0.3)
    with pytest.raises(RecipeError, match=r"data\.prompt"):
        prompt_format(template, make_tokenizer())


def test_ordinary_templates_with_stars_in_their_text_are_fine() -> None:
    assert ChatFormat(make_tokenizer(chat_template="{{ '**bold** ' }}" + CHATML)).stop == "<|im_end|>"


# Adapters


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = add_lora(make_model().requires_grad_(False), make_recipe(lora={"r": 4}).lora, 0)
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    return tmp_path / "adapter"


def change(adapter: Path, **fields: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_plain_adapter_loads(adapter: Path) -> None:
    assert load_adapter(make_model(), adapter).peft_config["default"].r == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("megatron_config", {"x": 1}), ("megatron_core", "os"), ("auto_mapping", {"parent_library": "os"}),
        ("loftq_config", {"x": 1}), ("eva_config", {"x": 1}), ("corda_config", {"x": 1}), ("layer_replication", [[0, 9]]),
        ("peft_type", "PROMPT_TUNING"), ("r", 10**9), ("r", -1), ("r", "8"),
        ("target_modules", ["(a+)+$"]), ("rank_pattern", {"(a+)+$": 4}), ("init_lora_weights", "eva"),
        ("modules_to_save", ["../x"]), ("bias", "all"), ("something_new", "x"), ("lora_alpha", 1e30),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else None,
)  # fmt: skip
def test_an_adapter_that_asks_for_more_is_refused(adapter: Path, field: str, value: Any) -> None:
    change(adapter, **{field: value})
    with pytest.raises(ModelError, match=f"{field}"):
        load_adapter(make_model(), adapter)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "manifest.json", "other"])
def test_a_pipe_in_an_adapters_folder_is_reported(adapter: Path, name: str) -> None:
    (adapter / name).unlink(missing_ok=True)
    os.mkfifo(adapter / name)
    with pytest.raises(ModelError, match="is a pipe or a device|no adapter here"):
        check_adapter(adapter)


def test_a_pattern_of_target_modules_is_not_compiled(adapter: Path) -> None:
    change(adapter, target_modules="(a+)+$")
    assert load_adapter(make_model(), adapter).peft_config["default"].target_modules != "(a+)+$"


def test_a_rank_that_is_not_the_matrices_own_takes_no_memory(adapter: Path) -> None:
    change(adapter, r=4000)
    with pytest.raises(ModelError, match="has the rank 4, not 4000"):
        load_adapter(make_model(), adapter)


def test_adapters_and_checkpoints_hold_no_pickle(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=r"is a pickle \(adapter_model\.bin\), which is never read.*save_pretrained"):
        load_adapter(make_model(), adapter)


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, " " * 2_000_000])
def test_a_broken_adapter_configuration_is_reported(adapter: Path, text: str) -> None:
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match="can't be read"):
        check_adapter(adapter)


# Recipes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: !!python/object/apply:os.system ['id']", "not valid YAML"),
        ("a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(f"{n}: &{n} [{','.join(['*' + p] * 9)}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True)), "aliases expanded"),
        ("a: &a [*a]", "aliases expanded"),
        ("training: {seed: " + "1" * 5000 + "}", "not valid YAML"),
        ("? [a, b]\n: 1", "a key is a list"),
        ("trainer: {run_name: 2001-13-45}", "not valid YAML"),
        ("[" * 3000, "not valid YAML"),
        (f"model: {TOKEN}", "never holds a hub token"),
        (f"trainer: {{hub_token: {TOKEN}}}", "never holds a hub token"),
        ("trainer: {push_to_hub: true}", "push_to_hub"),
        ("trainer: {output_dir: /etc}", "output_dir"),
        ("lora: {options: {megatron_config: {a: 1}}}", "would import other code"),
    ],
    ids=range(12),
)  # fmt: skip
def test_a_hostile_recipe_is_a_message(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(tmp_path / "recipe.yaml")
    assert TOKEN not in str(error.value)


# Data


def test_a_parquet_file_that_unfolds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("huarizo.data.columnar.MEMORY", 300 * 2**20)
    column = pa.array(["a" * 100_000_000] * 12)
    pq.write_table(pa.table({"instruction": column, "output": column}), tmp_path / "bomb.parquet", compression="zstd")
    assert (tmp_path / "bomb.parquet").stat().st_size < 2_000_000
    with pytest.raises(DataError, match=r"bomb\.parquet.*memory"):
        read_rows(tmp_path / "bomb.parquet", {})


@pytest.mark.parametrize("item", ["[]", "{}", '""', "0", '{"a":0}', "[0]"])
def test_json_that_fills_the_memory_is_refused_by_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, item: str
) -> None:
    file = tmp_path / "rows.json"
    file.write_text("[" + ",".join([item] * 20_000) + "]")
    tracemalloc.start()
    kept = json.loads(file.read_text())
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(kept) == 20_000
    monkeypatch.setattr("huarizo.machine.available_memory", lambda _: used)
    with pytest.raises(DataError, match=r"rows\.json.*too large to load at once"):
        read_rows(file, {})


def test_merge_keys_of_a_foreign_card_do_not_unfold(tmp_path: Path) -> None:
    bomb = "a: &a {x: 1}\n" + "".join(
        f"{b}: &{b} {{<<: [{','.join(['*' + a] * 9)}]}}\n" for a, b in pairwise("abcdefghijk")
    )
    (tmp_path / "README.md").write_text(f"---\n{bomb}license: mit\n---\n")
    assert _licence(str(tmp_path)) is None


# Tokens


def test_no_token_is_ever_shown(tmp_path: Path, tiny_model_folder: Path, alpaca_file: Path) -> None:
    recipe = {"model": str(tiny_model_folder), "data": {"train": str(alpaca_file)}, "training": {"compile": False},
              "output": str(tmp_path / "run"), "trainer": {"report_to": "none"}}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / ".env").write_text(f"HF_TOKEN={TOKEN}\n")
    (tmp_path / "home").mkdir()
    environment = {**os.environ, "HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN, "HOME": str(tmp_path / "home"),
                   "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(Path(__file__).parents[2])}  # fmt: skip
    environment.pop("HF_HUB_OFFLINE", None)
    for arguments in (["train", "recipe.yaml"], ["ask", str(tmp_path / "run"), "Count"], ["train", "recipe.yaml", f"lora.r={TOKEN}"],
                      ["train", "recipe.yaml", f"model=owner/{TOKEN}", "output=x"], ["train", "recipe.yaml", "model=owner/name", "output=x"]):  # fmt: skip
        command = [sys.executable, "-m", "huarizo", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert TOKEN not in done.stdout + done.stderr, arguments
        assert done.returncode == (0 if (len(arguments) < 4 and arguments[0] != "train") or len(arguments) == 2 else 2)
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.name != ".env":
            assert TOKEN.encode() not in file.read_bytes(), file


def test_the_base_of_an_adapter_with_other_names(adapter: Path) -> None:
    save_file({"base_model.model.x.lora_B.weight": torch.zeros(2, 2)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="there is no LoRA matrix"):
        load_adapter(make_model(), adapter)
