"""Names to files, with the real huggingface_hub client against a small hub on 127.0.0.1.

The endpoint and the offline switch are read when huggingface_hub is imported, so the calls run in a few child processes,
each with a list of cases; the tests then look at what each case gave, and at what the hub was asked meanwhile.
"""

import hashlib
import json
import logging
import os
import shutil
import socket
import struct
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from huarizo.errors import DataError, HubError, ModelError
from huarizo.hub import Source, quickstart_eval_path, resolve_data, resolve_model
from tests.hub_server import HubServer, Repo, User, commit_of

TOKENS = {
    "ann": "hf_annsSecretTokenAnnsSecretToken",
    "bob": "hf_bobsSecretTokenBobsSecretToken",
    "gated only": "hf_fineGrainedWithGatedRepos0001",
    "no rights": "hf_fineGrainedWithNothingAtAll002",
    "unknown": "hf_nobodyKnowsThisTokenNobody0003",
    "blank": "hf_brokenIn TheMiddle0000000000004",
}
ROW = {"instruction": "Say hello.", "output": "Hello!"}

CHILD = """
import errno, json, logging, os, sys, urllib.request
logging.basicConfig(level=logging.INFO)
import huggingface_hub.file_download
from huarizo.errors import HuarizoError
from huarizo import hub

def disk_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

http_get = huggingface_hub.file_download.http_get
home = os.getcwd()
for case in json.load(open(sys.argv[1])):
    if sys.argv[2]:
        urllib.request.urlopen(sys.argv[2] + "/mark/" + case["case"]).read()
    os.environ.pop("HF_TOKEN", None)
    if case["token"]:
        os.environ["HF_TOKEN"] = case["token"]
    os.chdir(case["cwd"] or home)
    huggingface_hub.file_download.http_get = disk_full if case["disk_full"] else http_get
    try:
        source = getattr(hub, case["call"])(case["name"])
        out = {"path": str(source.path), "revision": source.revision, "sha256": source.sha256, "pinned": source.pinned}
    except HuarizoError as error:
        out = {"error": type(error).__name__, "exit_code": error.exit_code, "message": str(error)}
    print(json.dumps({"case": case["case"]} | out), flush=True)
"""


@dataclass
class Outcome:
    """What the cases of one child process gave, and all that it wrote."""

    results: dict[str, dict[str, Any]]
    output: str

    def ok(self, case: str) -> dict[str, Any]:
        assert "error" not in self.results[case], self.results[case]
        return self.results[case]

    def failure(self, case: str, error: str, *said: str, exit_code: int = 2) -> str:
        """The message of a case that must have failed in this way, saying all of this."""
        result = self.results[case]
        assert result.get("error") == error, result
        assert result["exit_code"] == exit_code
        for part in said:
            assert part in result["message"], (part, result["message"])
        return result["message"]


def case(name: str, of: str, token: str | None = None, call: str = "resolve_model", **more: Any) -> dict[str, Any]:
    token_text = TOKENS[token] if token else None
    return {"case": name, "name": of, "token": token_text, "call": call, "cwd": None, "disk_full": False} | more


def run_cases(cases: list[dict[str, Any]], home: Path, endpoint: str, mark: str = "", **env: str) -> Outcome:
    """One child process over all the cases. Its environment has no token and no cache but those in `home`."""
    home.mkdir(parents=True, exist_ok=True)
    file = home / f"cases-{len(list(home.glob('cases-*')))}.json"
    file.write_text(json.dumps(cases))
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost", "PYTHONPATH": str(Path.cwd())}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(file), mark],
        env=kept | settings | env,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    return Outcome({line["case"]: line for line in lines}, child.stdout + child.stderr)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights, and a tokenizer trained on three words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(["llama alpaca huarizo"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_bytes(tiny_model: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in tiny_model.iterdir()}


@pytest.fixture(scope="module")
def hub_server(model_bytes: dict[str, bytes]) -> Iterator[HubServer]:
    model = model_bytes
    weights = model["model.safetensors"]
    no_weights = {name: content for name, content in model.items() if name != "model.safetensors"}
    extras = {"README.md": b"# tiny", "evil.py": b"1/0", "pytorch_model.bin": weights, "sub/model.safetensors": weights}
    other = model | {"generation_config.json": b'{"eos_token_id": 2}'}
    rows = json.dumps([ROW]).encode()
    read_here = {"entity": {"type": "user", "name": "bob"}, "permissions": ["repo.content.read"]}
    repos = {
        "alpaca/tiny": Repo(model | extras, branches={"dev": other}),
        "alpaca/pinned": Repo(dict(model)),
        "alpaca/private": Repo(dict(model), private=True, readers=("ann",)),
        "alpaca/private-data": Repo({"rows.json": rows}, kind="dataset", private=True, readers=("bob", "ann")),
        "alpaca/gated": Repo(dict(model), gated=True, readers=("ann", "carl", "dora")),
        "bob/own": Repo(dict(model), private=True, readers=("carl", "dora")),
        "alpaca/pickle": Repo(no_weights | {"pytorch_model.bin": b"\x80\x04."}),
        "alpaca/gguf": Repo({"model.Q4_0.gguf": b"GGUF"}),
        "alpaca/adapter": Repo({"adapter_config.json": b"{}", "adapter_model.safetensors": weights}),
        "alpaca/mute": Repo({name: model[name] for name in ("config.json", "model.safetensors")}),
        "alpaca/huge": Repo(dict(model), claimed_sizes={"model.safetensors": 10**16}),
        "alpaca/enospc": Repo(dict(model)),
        "alpaca/down": Repo(dict(model), status=503),
        "alpaca/busy": Repo(dict(model), status=429),
        "alpaca/portal": Repo(dict(model), status=0),
        "alpaca/cut": Repo(dict(model), cut=("model.safetensors",)),
        "alpaca/damaged": Repo(dict(model), damaged={"model.safetensors": 1}),
        "alpaca/damaged-small": Repo(dict(model), damaged={"config.json": 1}),
        "alpaca/shaky": Repo(dict(model), drops={"model.safetensors": 1}),
        "alpaca/broken": Repo(dict(model), drops={"model.safetensors": 6}),
        "alpaca/rows": Repo(
            {"data/train.json": rows, "more.csv": b"instruction,output\n", "dataset_infos.json": b"{}", "run.py": b"1/0"},
            kind="dataset",
        ),
        "alpaca/pictures": Repo({"cat.png": b"PNG"}, kind="dataset"),
    }
    users = {
        TOKENS["ann"]: User("ann"),
        TOKENS["bob"]: User("bob"),
        TOKENS["gated only"]: User("carl", "fineGrained", {"canReadGatedRepos": True, "global": [], "scoped": []}),
        TOKENS["no rights"]: User("dora", "fineGrained", {"canReadGatedRepos": False, "global": [], "scoped": []}),
    }
    users["hf_bobsFineGrainedToken000000005"] = User("carl", "fineGrained", {"scoped": [read_here]})
    with HubServer(repos, users) as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(hub_server: HubServer, home: Path) -> Outcome:
    """All cases with a hub, one after the other in one process."""
    commit = commit_of("alpaca/pinned main")
    dotenv = home / "project"
    dotenv.mkdir()
    (dotenv / ".env").write_text(f"# a comment\nHF_TOKEN={TOKENS['ann']}\n", encoding="utf-8-sig")
    garbage = home / "garbage"
    garbage.mkdir()
    (garbage / ".env").write_bytes(b"\xff\xfeH\0F\0")
    cases = [
        case("public", "alpaca/tiny"),
        case("again", "alpaca/tiny"),
        case("branch", "alpaca/tiny@dev"),
        case("commit", f"alpaca/pinned@{commit}"),
        case("commit again", f"alpaca/pinned@{commit}", token="unknown"),
        case("rows", "alpaca/rows", call="resolve_data"),
        case("pictures", "alpaca/pictures", call="resolve_data"),
        case("no revision", "alpaca/tiny@nope"),
        case("misspelt", "alpaca/tinny"),
        case("misspelt, logged in", "alpaca/tinny", token="ann"),
        case("data set as model", "alpaca/rows"),
        case("public, bad token", "alpaca/gguf", token="unknown"),
        case("blank in token", "alpaca/tiny", token="blank"),
        case("private, nobody", "alpaca/private"),
        case("private, stranger", "alpaca/private", token="bob"),
        case("private, no right", "bob/own", token="no rights"),
        case("private, gated right only", "bob/own", token="gated only"),
        case("private, right", "bob/own") | {"token": "hf_bobsFineGrainedToken000000005"},
        case("private", "alpaca/private", token="ann"),
        case("private data", "alpaca/private-data", token="bob", call="resolve_data"),
        case("gated, nobody", "alpaca/gated"),
        case("gated, not granted", "alpaca/gated", token="bob"),
        case("gated, no right", "alpaca/gated", token="no rights"),
        case("gated, granted", "alpaca/gated", token="gated only"),
        case("public, token without rights", "alpaca/tiny@dev", token="no rights"),
        case("pickle", "alpaca/pickle"),
        case("gguf", "alpaca/gguf"),
        case("adapter", "alpaca/adapter"),
        case("mute", "alpaca/mute"),
        case("huge", "alpaca/huge"),
        case("enospc", "alpaca/enospc", disk_full=True),
        case("down", "alpaca/down"),
        case("busy", "alpaca/busy"),
        case("portal", "alpaca/portal"),
        case("cut", "alpaca/cut"),
        case("damaged", "alpaca/damaged"),
        case("damaged small", "alpaca/damaged-small"),
        case("shaky", "alpaca/shaky"),
        case("broken", "alpaca/broken"),
        case("broken, again", "alpaca/broken"),
        case("token in .env", "alpaca/tiny@dev", cwd=str(dotenv)),
        case("token in HF_TOKEN and .env", "alpaca/tiny@dev", token="bob", cwd=str(dotenv)),
        case(".env is no text", "alpaca/tiny", cwd=str(garbage)),
    ]
    for step in cases:
        step["case"] = step["case"].replace(" ", "_").replace(",", "")
    outcome = run_cases(cases, home, hub_server.url, mark=hub_server.url)
    outcome.results = {step: outcome.results[step] for step in outcome.results}
    return outcome
