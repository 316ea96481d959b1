"""What of a run is sent to the hub, looked at before it is sent, and as it lies on a small hub on 127.0.0.1."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from huarizo.errors import ModelError, UserError
from huarizo.inference.samples import Sample, samples_as_text
from huarizo.model.adapter import check_adapter
from huarizo.results.publish import CARD, Publication, publication, publish
from huarizo.runs import Run
from tests.hub.server import HubServer, User
from tests.results.finished import SECRET, TOKEN, change_json, content, front_matter, with_hub
from tests.tiny import make_model

ADAPTER_FILES = {
    *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", CARD),
}


@pytest.mark.parametrize("what", ["adapter", "merged", "gguf"])
def test_no_file_tells_a_local_path_or_what_is_not_listed(made: Path, what: Any) -> None:
    found = publication(Run(made / "runs" / "hello"), "ann/hello", what)
    for name in found.files:
        sent = content(found, name)
        assert str(made).encode() not in sent and b"~/models" not in sent and SECRET.encode() not in sent, name
    assert str(made) not in str(found) and SECRET not in str(found)


def test_an_adapter_and_only_its_files(made: Path) -> None:
    run = Run(made / "runs" / "hello")
    found = publication(run, "ann/hello")
    assert found.private and set(found.files) == ADAPTER_FILES
    config = json.loads(content(found, "adapter_config.json"))
    mine = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config == mine | {"base_model_name_or_path": "my-llama"}
    tokenizer = json.loads(content(found, "tokenizer_config.json"))
    assert "name_or_path" not in tokenizer and tokenizer["deep"] == [{"kept": 1}]
    for name in ("adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert found.files[name] == run.adapter / name


def test_what_is_sent_loads_as_an_adapter(made: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    found = publication(Run(made / "runs" / "hello"), "ann/hello")
    for name in found.files:
        (tmp_path / name).write_bytes(content(found, name))
    assert check_adapter(tmp_path).r == 4
    assert isinstance(PeftModel.from_pretrained(make_model(), str(tmp_path)), torch.nn.Module)


def test_it_is_shown_before_it_is_sent(made: Path) -> None:
    found = publication(Run(made / "runs" / "hello"), "ann/hello")
    shown = str(found)
    assert "ann/hello (private)" in shown and content(found, CARD).decode() in shown
    size = (made / "runs" / "hello" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert f"adapter_model.safetensors  {size:,} bytes" in shown
    assert "everyone can see it" in str(publication(Run(made / "runs" / "hello"), "ann/hello", public=True))


def test_a_base_that_has_moved_is_named_as_it_is_now(run: Run, tmp_path: Path) -> None:
    moved = publication(run, "ann/hello", base_model="llamas/small")
    assert front_matter(moved)["base_model"] == "llamas/small"
    assert json.loads(content(moved, "adapter_config.json"))["base_model_name_or_path"] == "llamas/small"
    with pytest.raises(UserError, match=r"--base-model \./nowhere: no such folder, and not a hub id"):
        publication(run, "ann/hello", base_model="./nowhere")


def test_merged_and_gguf(run: Run) -> None:
    merged = publication(run, "ann/hello", "merged")
    weights = {"config.json", "generation_config.json", "model.safetensors"}
    terms = {"LICENSE.txt", "USE_POLICY.md", "NOTICE"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(merged.files) == weights | terms | tokenizer | {CARD}
    assert "_name_or_path" not in json.loads(content(merged, "config.json"))
    (run.path / "Modelfile").write_text("FROM ./hello-f16.gguf\n")
    gguf = publication(run, "ann/hello", "gguf")
    assert set(gguf.files) == {"hello-f16.gguf", "Modelfile", CARD}
    assert "--hf-file hello-f16.gguf\n" in content(gguf, CARD).decode()


def test_weights_that_the_model_does_not_name_are_not_sent(run: Run) -> None:
    merged = run.path / "merged"
    shutil.copy(merged / "model.safetensors", merged / "old-00001-of-00002.safetensors")
    (merged / "model.safetensors").rename(merged / "part.safetensors")
    shutil.copy(merged / "part.safetensors", merged / "other.safetensors")
    (merged / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "part.safetensors"}}')
    sent = set(publication(run, "ann/hello", "merged").files)
    assert {name for name in sent if "safetensors" in name} == {"part.safetensors", "model.safetensors.index.json"}
    (merged / "part.safetensors").rename(merged / "model.safetensors")
    assert {name for name in publication(run, "ann/hello", "merged").files if name.endswith(".safetensors")} == {
        "model.safetensors"
    }


@pytest.mark.parametrize("damage", [b"", b"GGUF", b"GGUF" + bytes(100), b"PK\x03\x04" * 20])
def test_a_file_that_is_no_whole_gguf_is_not_sent(run: Run, damage: bytes) -> None:
    (run.path / "hello-f16.gguf").write_bytes(damage)
    with pytest.raises(ModelError, match="hello-f16.gguf"):
        publication(run, "ann/hello", "gguf")


def test_secrets_in_a_configuration_are_left_out(run: Run) -> None:
    secrets = dict.fromkeys(("token", "use_auth_token", "auth_token"), SECRET)
    change_json(run.adapter / "tokenizer_config.json", **secrets, deep=[{"init": secrets | {"eos_token": "kept"}}])
    found = json.loads(content(publication(run, "ann/hello"), "tokenizer_config.json"))
    assert SECRET not in str(found) and found["deep"] == [{"init": {"eos_token": "kept"}}] and "eos_token" in found


def test_a_path_anywhere_in_a_text_is_left_out(run: Run, tmp_path: Path) -> None:
    texts = {
        "home": f"made in {Path.home()} by me",
        "runs": f"file={tmp_path}/runs/x",
        "up": "../x",
        "here": "./x",
        "list": ["a", f"<{tmp_path / 'runs'}>"],
    }
    change_json(run.adapter / "tokenizer_config.json", **texts, word="and/or")
    found = json.loads(content(publication(run, "ann/hello"), "tokenizer_config.json"))
    assert found["list"] == ["a"] and found["word"] == "and/or" and not {"home", "runs", "up", "here"} & found.keys()


@pytest.mark.parametrize("what", ["adapter", "merged", "gguf"])
def test_a_token_in_a_sample_is_never_sent(run: Run, what: Any) -> None:
    run.samples.write_text(samples_as_text([Sample(f"My token is {TOKEN}.", "", "Oh.", "Thanks.")]))
    with pytest.raises(UserError, match="hub token") as error:
        publication(run, "ann/hello", what)
    assert TOKEN not in str(error.value) and CARD in str(error.value)


@pytest.mark.parametrize("name", ["chat_template.jinja", "LICENSE", "NOTICE.md", "vocab.json", "merges.txt"])
def test_a_token_in_a_text_file_is_never_sent(run: Run, name: str) -> None:
    (run.path / "merged" / name).write_text(json.dumps({"x": f"y {TOKEN}"}))
    with pytest.raises(UserError, match=f"{name}: it contains a hub token") as error:
        publication(run, "ann/hello", "merged")
    assert TOKEN not in str(error.value)


def test_a_token_in_a_modelfile_is_never_sent(run: Run) -> None:
    (run.path / "Modelfile").write_text(f"FROM ./hello-f16.gguf\nSYSTEM {TOKEN}\n")
    with pytest.raises(UserError, match="Modelfile: it contains a hub token"):
        publication(run, "ann/hello", "gguf")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("metrics", "7"), ("metrics", "[]"),
        ("metrics", '{"step": 1, "eval_loss": "low"}'), ("metrics", "{"),
        ("samples", "7"), ("samples", "[]"), ("samples", "{}"), ("samples", '{"instruction": 3, "input": "", "before": "", "after": ""}'),
    ],
)  # fmt: skip
def test_a_damaged_record_of_the_run_is_reported(run: Run, name: str, line: str) -> None:
    getattr(run, name).write_text(f"{getattr(run, name).read_text()}{line}\n")
    with pytest.raises(UserError, match=f"{name}.jsonl"):
        publication(run, "ann/hello")


def test_tokens_that_look_like_paths_stay(run: Run) -> None:
    file = run.adapter / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"][0]["content"] = "/think"
    tokenizer["pre_tokenizer"] = {"type": "Split", "pattern": {"String": "/"}}
    file.write_text(json.dumps(tokenizer))
    change_json(run.adapter / "special_tokens_map.json", eos_token="/end", additional_special_tokens=["/think", "~"])
    found = publication(run, "ann/hello")
    assert found.files["tokenizer.json"] == file
    assert found.files["special_tokens_map.json"] == run.adapter / "special_tokens_map.json"


@pytest.mark.parametrize("name", ["../hello", "ann/hello/more", "ann/", "an n/hello", ""])
def test_a_name_that_no_repository_can_have_is_reported_before_the_list(run: Run, name: str) -> None:
    with pytest.raises(UserError, match="has the form"):
        publication(run, name)


def test_what_is_not_there_yet(run: Run) -> None:
    shutil.rmtree(run.path / "merged")
    (run.path / "hello-f16.gguf").unlink()
    (run.adapter / "adapter_model.safetensors").unlink()
    for what, remedy in (("adapter", "huarizo resume"), ("merged", "huarizo merge"), ("gguf", "huarizo export")):
        with pytest.raises(UserError, match=remedy):
            publication(run, "ann/hello", what)  # pyright: ignore[reportArgumentType]


def test_what_is_broken(run: Run) -> None:
    change_json(run.adapter / "adapter_config.json", r=5)
    with pytest.raises(ModelError, match="belong together"):
        publication(run, "ann/hello")
    (run.path / "merged" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match="safetensors"):
        publication(run, "ann/hello", "merged")
    run.samples.write_text("{")
    with pytest.raises(UserError, match="samples.jsonl"):
        publication(run, "ann/hello", "gguf")


@pytest.mark.parametrize(
    "line",
    [
        "FROM /home/ann/x.gguf", "from ~/x.gguf", 'FROM "C:\\x.gguf"', "ADAPTER /x.gguf", "FROM\t/home/x.gguf", "ADAPTER ../x.gguf",
        "  FROM   more/x.gguf", "FROM .", "FROM", "FROM '/x.gguf'", "FROM\u00a0/x.gguf",
    ],
)  # fmt: skip
def test_a_modelfile_with_a_path_is_refused(run: Run, line: str) -> None:
    (run.path / "Modelfile").write_text(f"{line}\nSYSTEM hello\n")
    with pytest.raises(UserError, match=r"\./FILE\.gguf"):
        publication(run, "ann/hello", "gguf")


@pytest.mark.parametrize(
    "line", ["FROM hello-f16.gguf", "FROM ./hello-f16.gguf", 'from "./hello-f16.gguf"', "FROM\t./hello-f16.gguf"]
)
def test_a_modelfile_that_names_the_file_beside_it_is_sent(run: Run, line: str) -> None:
    (run.path / "Modelfile").write_text(f"# FROM /nowhere\n\n{line}\nSYSTEM from /here to there\n")
    assert "Modelfile" in publication(run, "ann/hello", "gguf").files


def test_links_out_of_what_is_sent_are_refused(run: Run, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (run.path / "secret.gguf").symlink_to(secret)
    with pytest.raises(UserError, match="leads out of"):
        publication(run, "ann/hello", "gguf")
    link = run.adapter / "vocab.json"
    for place in (secret, "../recipe.yaml", "../../hello/metrics.jsonl"):
        link.symlink_to(place)
        with pytest.raises(UserError, match="leads out of"):
            publication(run, "ann/hello")
        link.unlink()
    link.symlink_to("tokenizer_config.json")
    assert "vocab.json" in publication(run, "ann/hello").files


CHILD = """
import sys
from pathlib import Path
from huarizo.results.publish import publication, publish
from huarizo.runs import Run
run = Run(Path(sys.argv[1]))
print(publish(publication(run, "hello")))
print(publish(publication(run, "ann/hello-merged", "merged", public=True)))
"""


def test_a_run_as_it_lies_on_the_hub(made: Path, tmp_path: Path) -> None:
    run = Run(made / "runs" / "hello")
    with HubServer({}, {TOKEN: User("ann", "write")}) as server:
        child = with_hub(server, CHILD, str(run.path), home=tmp_path, HF_TOKEN=TOKEN)
    assert TOKEN not in child.stdout + child.stderr
    hello, merged = server.repos["ann/hello"], server.repos["ann/hello-merged"]
    assert hello.private and not merged.private and len(hello.commits) == len(merged.commits) == 1
    for repo, repo_id, what in ((hello, "ann/hello", "adapter"), (merged, "ann/hello-merged", "merged")):
        expected = publication(run, repo_id, what)  # pyright: ignore[reportArgumentType]
        assert repo.files == {".gitattributes": b""} | {name: content(expected, name) for name in expected.files}
        assert not [name for name, sent in repo.files.items() if str(made).encode() in sent]
    assert {token for method, _, token in server.asked if method == "PUT"} == {None}


def test_forcing_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("huarizo.results.publish.upload", lambda *args: asked.append(args) or "address")
    found = Publication("ann/hello", True, {CARD: b"# x"})
    assert publish(found, force=True) == "address"
    assert asked[0][:4] == ("ann/hello", found.files, True, True)
