"""Model cards: what they state, the base and the licence that they name, and samples that stay in their blocks."""

import json
import re
from pathlib import Path

import pytest
import yaml

from huarizo.results.publish import CARD, publication
from huarizo.runs import Run
from tests.hub.server import HubServer, Repo
from tests.results.finished import change_recipe, content, front_matter, with_hub, write_gguf


def test_the_card_says_what_the_run_was(made: Path) -> None:
    found = publication(Run(made / "runs" / "hello"), "ann/hello")
    card = content(found, CARD).decode()
    assert front_matter(found) == {
        "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "huarizo"]
    }  # fmt: skip
    for said in ("`my-llama`", "`letters.json`", "`chat`", "r=4", "held-out loss: 3.5000 before, 1.2500 after"):
        assert said in card
    assert 'PeftModel.from_pretrained(base, "ann/hello")' in card and "path/to/my-llama" in card
    assert "Say hello." in card and "Never answered" not in card and "Third" in card and "Fourth" not in card
    assert "c" * 1500 + "…" in card


def test_no_sample_can_break_out_of_its_block(made: Path) -> None:
    card = content(publication(Run(made / "runs" / "hello"), "ann/hello"), CARD).decode()
    assert "license" not in yaml.safe_load(card.split("---\n")[1])
    fence, outside = "", []
    for line in card.splitlines():
        opens = re.match(r"`{3,}", line)
        if not fence and opens:
            fence = opens[0]
        elif fence and re.fullmatch(f"`{{{len(fence)},}}", line):
            fence = ""
        elif not fence:
            outside.append(line)
    assert not fence and not any("Title" in line or "script" in line for line in outside)
    assert [line for line in outside if line.startswith("#")] == [
        "# hello: LoRA adapter", "## Before and after training", "## Use", "## Licence"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "base", "licence"),
    [
        ("quickstart", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ("llamas/small@0123456789012345678901234567890123456789", "llamas/small", None),
    ],
)
def test_a_base_that_others_can_find_is_named(run: Run, model: str, base: str, licence: str | None) -> None:
    change_recipe(run, model=model)
    for what, relation in (("adapter", "adapter"), ("merged", "finetune"), ("gguf", "quantized")):
        front = front_matter(publication(run, "ann/hello", what))
        assert (front["base_model"], front["base_model_relation"], front.get("license")) == (base, relation, licence)
    config = json.loads(content(publication(run, "ann/hello"), "adapter_config.json"))
    assert config["base_model_name_or_path"] == base


@pytest.mark.parametrize(
    ("file", "text", "licence"),
    [
        ("README.md", "---\nlicense: llama3.2\n---\n# x", "llama3.2"),
        ("README.md", "---\nlicense: [oh, no]\n---\n", None),
        ("README.md", "---\n: {\n---\n", None),
        ("LICENSE", "   Apache License\n   Version 2.0, January 2004", "apache-2.0"),
        ("LICENSE.txt", "You may not.", "other"),
    ],
)
def test_the_licence_of_a_local_base(run: Run, tmp_path: Path, file: str, text: str, licence: str | None) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / file).write_text(text)
    change_recipe(run, model=str(tmp_path / "base"))
    found = publication(run, "ann/hello")
    assert front_matter(found).get("license") == licence
    assert "whose terms apply" in content(found, CARD).decode()


def test_an_adapter_is_known_by_what_it_is_and_not_by_its_name(run: Run) -> None:
    (run.path / "hello-f16.gguf").unlink()
    write_gguf(run.path / "it's mine; rm.gguf", "adapter")
    card = content(publication(run, "ann/hello", "gguf"), CARD).decode()
    assert "--lora 'it'\"'\"'s mine; rm.gguf'" in card and "--hf-file" not in card
    write_gguf(run.path / "the $(whole)-adapter.gguf")
    card = content(publication(run, "ann/hello", "gguf"), CARD).decode()
    assert "--hf-file 'the $(whole)-adapter.gguf'\n" in card and "--lora" not in card


LICENCE_CHILD = """
import sys
from pathlib import Path
from huarizo.hub.names import resolve_model
from huarizo.recipe import to_yaml
from huarizo.results.publish import publication
from huarizo.runs import Run
run = Run(Path(sys.argv[1]))
source = resolve_model("llamas/small")
for name in ("llamas/small", source.pinned):
    run.recipe_file.write_text(to_yaml(run.recipe().model_copy(update={"model": name})))
    print(publication(run, "ann/hello").files["README.md"].decode())
"""


def test_the_licence_of_a_base_on_the_hub(made: Path, run: Run, tmp_path: Path) -> None:
    base = {file.name: file.read_bytes() for file in (made / "my-llama").iterdir()}
    base |= {"README.md": b"---\nlicense: apache-2.0\n---\n# Small\n", "LICENSE": b"Apache License\nVersion 2.0"}
    with HubServer({"llamas/small": Repo(base)}, {}) as server:
        cards = with_hub(server, LICENCE_CHILD, str(run.path), home=tmp_path).stdout
    assert cards.count("license: apache-2.0") == 2 and cards.count("base_model: llamas/small\n") == 2
