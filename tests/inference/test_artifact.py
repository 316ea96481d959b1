"""A result by any of its names: a run, its adapter, any PEFT adapter's folder, an id on the hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from huarizo.data.prompts import OpenExchange
from huarizo.errors import HuarizoError, HubError, ModelError, RecipeError, UserError
from huarizo.inference.artifact import find_tuned, read_otherwise
from huarizo.inference.generate import open_assistant
from huarizo.model.load import default_template, load_tokenizer
from huarizo.recipe import make_recipe, to_yaml
from huarizo.results.model_folder import merge
from tests.hub.server import HubServer, Repo
from tests.results.make import make_tuned
from tests.tiny import CHATML, make_model, make_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """An adapter that stock PEFT made for a local base."""
    base = tmp_path / "base"
    make_model().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    from transformers import LlamaForCausalLM

    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(str(tmp_path / "foreign"))
    return tmp_path / "foreign"


def test_an_adapter_from_elsewhere_names_its_base(foreign: Path) -> None:
    tuned = find_tuned(str(foreign))
    assert tuned.base == foreign.parent / "base" and tuned.adapter == foreign and tuned.run is None
    assert tuned.encoder.prompt.name == "chat" and tuned.folder == Path()
    assert find_tuned(str(foreign), "alpaca").encoder.prompt.name == "alpaca"


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_chat_template_beside_an_adapter_is_the_one_it_speaks_through(foreign: Path, name: str) -> None:
    template = CHATML.replace("<|im_start|>", "<s>")
    (foreign / name).write_text(template if name.endswith("jinja") else json.dumps({"chat_template": template}))
    tuned = find_tuned(str(foreign))
    assert tuned.encoder.prompt.pieces("", [OpenExchange("Hi")])[0].text == "<s>user\nHi<|im_end|>\n<s>assistant\n"
    assert load_tokenizer(merge(tuned, foreign.parent / "merged")).chat_template == template
    (foreign / name).write_bytes(b"\xff")
    with pytest.raises(ModelError, match="can't be read"):
        find_tuned(str(foreign))


def test_a_run_is_found_by_its_folder_and_by_its_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_tuned(tmp_path)
    recipe = made.recipe.model_copy(update={"model": str(made.base)})
    data = recipe.data.model_copy(update={"max_length": 99, "labels": "all", "prompt": "alpaca", "train": "quickstart"})
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe.model_copy(update={"data": data})))
    for name in (tmp_path, tmp_path / "adapter"):
        tuned = find_tuned(str(name))
        assert tuned.run and tuned.run.path == tmp_path and tuned.folder == tmp_path
        assert tuned.encoder.prompt.name == "alpaca"
        assert (tuned.encoder.max_length, tuned.encoder.labels) == (99, "all")
    monkeypatch.chdir(tmp_path / "adapter")
    here = find_tuned(".")
    assert here.run and here.folder.resolve() == tmp_path


@pytest.mark.parametrize(
    ("base", "message"), [("", "base_model_name_or_path is empty"), ("/no/such/model", "no such file or folder")]
)
def test_a_base_that_can_not_be_found_is_reported(foreign: Path, base: str, message: str) -> None:
    file = foreign / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    with pytest.raises(UserError, match=message):
        find_tuned(str(foreign))


@pytest.mark.parametrize("name", ["nothing-of-that-name", "./no/run", "/no/run"])
def test_what_is_not_there_is_reported(name: str) -> None:
    with pytest.raises(HuarizoError, match="not a run folder"):
        find_tuned(name)


def test_an_adapter_of_another_model_is_refused_with_both_names(tmp_path: Path, foreign: Path) -> None:

    other = tmp_path / "wider"
    make_model(hidden_size=128).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    file = foreign / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(other)}))
    for use in (lambda tuned: merge(tuned, tmp_path / "merged"), lambda tuned: open_assistant(tuned, "fp32")):
        with pytest.raises(ModelError, match=r"foreign.*wider"):
            use(find_tuned(str(foreign)))


def test_an_adapter_comes_from_the_hub(tmp_path: Path, foreign: Path) -> None:
    (foreign / "chat_template.jinja").write_text(CHATML)
    files = {file.name: file.read_bytes() for file in foreign.iterdir() if file.is_file()}
    repos = {"ann/adapter": Repo(files), "ann/empty": Repo({"README.md": b"nothing"})}
    code = (
        "import sys; from huarizo.inference.artifact import find_tuned; from huarizo.errors import HuarizoError\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(sorted(p.name for p in find_tuned(name).adapter.iterdir()))\n"
        "    except HuarizoError as error: print(error)\n"
    )
    with HubServer(repos, {}) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
        environment.pop("HF_HUB_OFFLINE", None)
        command = [sys.executable, "-c", code, "ann/adapter", "ann/empty", "ann/missing"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    found, empty, missing = done.stdout.splitlines()
    assert found == "['adapter_config.json', 'adapter_model.safetensors', 'chat_template.jinja']", done.stderr
    assert "not a PEFT LoRA adapter" in empty and "no such model" in missing


def test_a_recipe_of_an_adapter_needs_no_data() -> None:
    assert make_recipe(model="a/b", data={"train": "quickstart"}).data.prompt == "auto"


def test_an_adapter_of_a_base_that_has_moved(foreign: Path) -> None:
    moved = foreign.parent / "moved"
    (foreign.parent / "base").rename(moved)
    with pytest.raises(HubError, match=r"adapter_config.json: base_model_name_or_path: .*base.*--base-model") as error:
        find_tuned(str(foreign))
    assert str(error.value).startswith(str(foreign))
    assert find_tuned(str(foreign), base=str(moved)).base == moved
    with pytest.raises(HubError, match="^./nowhere: there is no such"):
        find_tuned(str(foreign), base="./nowhere")


def test_a_run_whose_base_has_moved(tmp_path: Path) -> None:
    made = make_tuned(tmp_path)
    recipe = made.recipe.model_copy(update={"model": str(tmp_path / "gone")})
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    with pytest.raises(HubError, match=r"recipe.yaml: model: .*gone.*--base-model"):
        find_tuned(str(tmp_path))
    assert find_tuned(str(tmp_path), base=str(made.base)).base == made.base


def test_what_unsloth_writes_is_taken(foreign: Path) -> None:
    file = foreign / "adapter_config.json"
    note = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    changed = {"auto_mapping": note | {"unsloth_fixed": True}, "task_type": None}
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    assert find_tuned(str(foreign)).adapter == foreign


@pytest.mark.parametrize("beside", [False, True], ids=["of the base", "of the adapter"])
def test_of_several_chat_templates_the_default_one_is_used_and_saved(beside: bool, foreign: Path) -> None:
    default = CHATML.replace("<|im_start|>", "<s>")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": default, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(foreign if beside else foreign.parent / "base")
    tuned = find_tuned(str(foreign))
    assert tuned.encoder.prompt.pieces("", [OpenExchange("Hi")])[0].text == "<s>user\nHi<|im_end|>\n<s>assistant\n"
    assert load_tokenizer(merge(tuned, foreign.parent / "merged")).chat_template == default


def test_templates_by_name_in_a_tokenizers_settings() -> None:
    pair = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]
    assert default_template(pair) == default_template({"rag": "b", "default": "a"}) == default_template("a") == "a"
    assert default_template({"rag": "b"}) == "b"
    assert default_template({"rag": "b", "tool_use": "c"}) is default_template(None) is None


@pytest.mark.parametrize(
    "word", ["data.prompt=alpaca", "lora.r=3", "data.max_lengthy=3", "data.max_length=0", "data.on_bad_row=x"]
)
def test_nothing_else_of_a_run_can_be_other(tmp_path: Path, word: str) -> None:
    with pytest.raises(RecipeError, match=word.partition("=")[0]):
        read_otherwise(make_tuned(tmp_path), [word])
