"""Names to files, with the real huggingface_hub client against a small hub on 127.0.0.1.

The endpoint and the offline switch are read when huggingface_hub is imported, so the calls run in a few child
processes, each with a list of cases; the tests then look at what each case gave, and what the hub was asked meanwhile.
"""

import hashlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from huarizo.errors import HubError, ModelError
from huarizo.hub import access
from huarizo.hub.data_files import are_rows
from huarizo.hub.model_files import quantised
from huarizo.hub.names import resolve_data, resolve_model
from huarizo.hub.sources import DATA_SET, Source
from tests.hub.server import HubServer, Repo, User, commit_of
from tests.tiny import make_model, make_tokenizer

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
import errno, json, logging, os, sys, urllib.parse, urllib.request
logging.basicConfig(level=logging.INFO)
import huggingface_hub.file_download
from huarizo.errors import HuarizoError
from huarizo.hub import names as hub

def disk_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

http_get = huggingface_hub.file_download.http_get
home = os.getcwd()
for case in json.load(open(sys.argv[1])):
    if sys.argv[2]:
        urllib.request.urlopen(sys.argv[2] + "/mark/" + urllib.parse.quote(case["case"])).read()
    os.environ.pop("HF_TOKEN", None)
    if case["token"]:
        os.environ["HF_TOKEN"] = case["token"]
    os.chdir(case["cwd"] or home)
    huggingface_hub.file_download.http_get = disk_full if case["disk_full"] else http_get
    try:
        source = getattr(hub, case["call"])(case["name"])
        out = {"path": str(source.path), "revision": source.revision, "sha256": source.sha256, "pinned": source.pinned}
        out["note"] = source.note
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
    """A Llama of two layers with random weights, and a tokenizer of one token a byte."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_bytes(tiny_model: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in tiny_model.iterdir()}


@pytest.fixture(scope="module")
def hub_server(model_bytes: dict[str, bytes]) -> Iterator[HubServer]:
    model = model_bytes
    weights = model["model.safetensors"]
    no_weights = {name: content for name, content in model.items() if name != "model.safetensors"}
    terms = {"README.md": b"# tiny", "LICENSE.txt": b"You may.", "NOTICE": b"Ours", "USE_POLICY.md": b"Be good."}
    extras = terms | {
        "sub/LICENSE": b"x",
        "evil.py": b"1/0",
        "pytorch_model.bin": weights,
        "sub/model.safetensors": weights,
    }
    other = model | {"generation_config.json": b'{"eos_token_id": 2}'}
    rows = json.dumps([ROW]).encode()
    read_here = {"entity": {"type": "user", "name": "bob"}, "permissions": ["repo.content.read"]}
    config = json.loads(model["config.json"]) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    quantised = model | {"config.json": json.dumps(config).encode(), "README.md": b"---\nbase_model: a/b\n---\n# x"}
    speech = json.dumps({"model_type": "whisper"}).encode()
    coded = json.dumps(json.loads(model["config.json"]) | {"auto_map": {"AutoModel": "evil.M"}}).encode()
    repos = {
        "alpaca/speech": Repo(model | {"config.json": speech}),
        "alpaca/coded": Repo(model | {"config.json": coded}),
        "alpaca/tiny": Repo(model | extras, branches={"dev": other | terms}),
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
        "alpaca/tiny-GPTQ": Repo(quantised),
        "alpaca/down": Repo(dict(model), status=503),
        "alpaca/busy": Repo(dict(model), status=429),
        "alpaca/portal": Repo(dict(model), status=0),
        "alpaca/cut": Repo(dict(model), cut=("model.safetensors",)),
        "alpaca/damaged": Repo(dict(model), damaged={"model.safetensors": 1}),
        "alpaca/damaged-small": Repo(dict(model), damaged={"config.json": 1}),
        "alpaca/shaky": Repo(dict(model), drops={"model.safetensors": 1}),
        "alpaca/broken": Repo(dict(model), drops={"model.safetensors": 6}),
        "alpaca/rows": Repo(
            {
                "data/train.json": rows,
                "more.csv": b"instruction,output\n",
                "dataset_infos.json": b"{}",
                "run.py": b"1/0",
            },
            kind="dataset",
        ),
        "alpaca/sums": Repo(
            {
                f"{config}/{split}-00000-of-00001.json": rows
                for config in ("main", "socratic")
                for split in ("train", "test")
            },
            kind="dataset",
        ),
        "alpaca/declared": Repo(
            {
                "README.md": b"---\nconfigs:\n- data_files: [{split: train, path: b.*}, {split: held, path: a.json}]\n---\n",
                "a.json": rows,
                "b.json": rows,
            },
            kind="dataset",
        ),
        "alpaca/versions": Repo({"rows.json": rows, "rows_cleaned.json": rows}, kind="dataset"),
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
        case("speech", "alpaca/speech"),
        case("coded", "alpaca/coded"),
        case("branch", "alpaca/tiny@dev"),
        case("commit", f"alpaca/pinned@{commit}"),
        case("commit again", f"alpaca/pinned@{commit}", token="unknown"),
        case("rows", "alpaca/rows", call="resolve_data"),
        case("pictures", "alpaca/pictures", call="resolve_data"),
        case("configs", "alpaca/sums", call="resolve_data"),
        case("config", "alpaca/sums:main", call="resolve_data"),
        case("config and split", "alpaca/sums@main:socratic[test]", call="resolve_data"),
        case("no config", "alpaca/sums:mian", call="resolve_data"),
        case("declared", "alpaca/declared", call="resolve_data"),
        case("declared split", "alpaca/declared[held]", call="resolve_data"),
        case("no declared split", "alpaca/declared[dev]", call="resolve_data"),
        case("no split", "alpaca/sums:main[validation]", call="resolve_data"),
        case("versions", "alpaca/versions", call="resolve_data"),
        case("version", "alpaca/versions:rows_cleaned.json", call="resolve_data"),
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
        case("quantised", "alpaca/tiny-GPTQ"),
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
    return run_cases(cases, home, hub_server.url, mark=hub_server.url)


@pytest.fixture(scope="module")
def offline(online: Outcome, hub_server: HubServer, home: Path, tiny_model: Path) -> Outcome:
    """The same home with HF_HUB_OFFLINE=1. The token is one that the hub would refuse."""
    cases = [
        case("offline, public", "alpaca/tiny", token="unknown"),
        case("offline, commit", f"alpaca/pinned@{commit_of('alpaca/pinned main')}", token="blank"),
        case("offline, rows", "alpaca/rows", call="resolve_data"),
        case("offline, configs", "alpaca/sums", call="resolve_data"),
        case("offline, split", f"alpaca/sums@{commit_of('alpaca/sums main')}:main[test]", call="resolve_data"),
        case("offline, declared", "alpaca/declared", call="resolve_data"),
        case("offline, half", "alpaca/cut"),
        case("offline, half without a list", "alpaca/enospc"),
        case("offline, never seen", "alpaca/never"),
        case("offline, damaged", "alpaca/shaky"),
        case("offline, local", str(tiny_model), token="blank"),
        case("offline, without its terms", "alpaca/tiny@dev"),
    ]
    for name in TERMS:
        (home / "hf" / "hub" / "models--alpaca--tiny" / "snapshots" / commit_of("alpaca/tiny dev") / name).unlink(
            missing_ok=True
        )
    half = home / "hf" / "hub" / "models--alpaca--enospc"
    commit = commit_of("alpaca/enospc main")
    shutil.rmtree(half / "trees", ignore_errors=True)  # the client's list of what a whole copy holds
    (half / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
    (half / "snapshots" / commit / "config.json").write_text("{}")
    blob = (Path(online.ok("shaky")["path"]) / "model.safetensors").resolve()
    content = blob.read_bytes()
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return run_cases(cases, home, hub_server.url, mark="", HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def unplugged(online: Outcome, home: Path, tiny_model: Path) -> Outcome:
    """The same home with a hub that nobody answers for."""
    cases = [
        case("unplugged, public", "alpaca/tiny", token="ann"),
        case("unplugged, commit", f"alpaca/pinned@{commit_of('alpaca/pinned main')}"),
        case("unplugged, never seen", "alpaca/never", token="ann"),
        case("unplugged, local", str(tiny_model), token="blank"),
    ]
    return run_cases(cases, home, f"http://127.0.0.1:{_closed_port()}")


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
MODEL_FILES |= {"chat_template.jinja"}
TERMS = {"README.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md"}


def digests(contents: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


# What a hub id gives


def test_a_public_model_needs_no_token_and_loads(online: Outcome, model_bytes: dict[str, bytes]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = online.ok("public")
    commit = commit_of("alpaca/tiny main")
    assert found["revision"] == commit
    assert found["pinned"] == f"alpaca/tiny@{commit}"
    assert set(model_bytes) == MODEL_FILES
    assert found["sha256"] == digests(model_bytes)
    assert AutoModelForCausalLM.from_pretrained(found["path"]).config.hidden_size == 64
    assert AutoTokenizer.from_pretrained(found["path"]).eos_token == "<|im_end|>"


def test_only_listed_files_are_fetched(online: Outcome, hub_server: HubServer) -> None:
    assert hub_server.files_sent("public") == MODEL_FILES | TERMS
    assert {file.name for file in Path(online.ok("public")["path"]).rglob("*")} == MODEL_FILES | TERMS
    assert online.ok("public")["sha256"].keys() == MODEL_FILES
    assert all(token is None for _, _, token in hub_server.asked_in("public"))


def test_of_a_quantised_model_no_weights_are_fetched(online: Outcome, hub_server: HubServer) -> None:
    online.failure("quantised", "ModelError", "alpaca/tiny-GPTQ: ", "(gptq)", "Give the original model, a/b;")
    assert hub_server.files_sent("quantised") == {"config.json", "README.md"}


def test_of_a_model_that_is_not_for_text_no_weights_are_fetched(online: Outcome, hub_server: HubServer) -> None:
    online.failure("speech", "ModelError", "alpaca/speech: it has an encoder and a decoder", "'whisper'")
    online.failure("coded", "ModelError", "alpaca/coded: config.json sets auto_map, which names code to run")
    assert hub_server.files_sent("speech") == hub_server.files_sent("coded") == {"config.json"}


def test_a_second_call_fetches_nothing(online: Outcome, hub_server: HubServer) -> None:
    assert online.ok("again") == online.ok("public") | {"case": "again"}
    assert not hub_server.files_sent("again")


def test_revisions_are_kept_apart(online: Outcome) -> None:
    found = online.ok("branch")
    assert found["revision"] == commit_of("alpaca/tiny dev")
    assert found["sha256"]["generation_config.json"] == hashlib.sha256(b'{"eos_token_id": 2}').hexdigest()
    assert found["sha256"]["model.safetensors"] == online.ok("public")["sha256"]["model.safetensors"]


def test_a_pinned_commit_in_the_cache_asks_nobody(online: Outcome, hub_server: HubServer) -> None:
    found = online.ok("commit")
    assert found["pinned"] == f"alpaca/pinned@{commit_of('alpaca/pinned main')}"
    assert hub_server.files_sent("commit") == MODEL_FILES
    assert online.ok("commit again") == found | {"case": "commit again"}
    assert hub_server.asked_in("commit again") == []


def test_a_data_set_is_a_folder_of_rows(online: Outcome) -> None:
    found = online.ok("rows")
    contents = {"data/train.json": json.dumps([ROW]).encode()}
    assert found["sha256"] == digests(contents)
    assert {name: (Path(found["path"]) / name).read_bytes() for name in found["sha256"]} == contents
    assert not (Path(found["path"]) / "run.py").exists()
    online.failure("pictures", "DataError", "alpaca/pictures", ".jsonl")


def test_a_data_set_with_several_configs_or_splits_is_not_mixed(online: Outcome, offline: Outcome) -> None:
    for outcome, configs in ((online, "configs"), (offline, "offline, configs")):
        outcome.failure(configs, "DataError", "several configs (main, socratic)", "Write alpaca/sums:main, or a list")
    chosen = {"config": ("main", "train"), "config and split": ("socratic", "test")}
    for case, (config, split) in chosen.items():
        found = online.ok(case)
        assert list(found["sha256"]) == [f"{config}/{split}-00000-of-00001.json"]
        assert found["pinned"] == f"alpaca/sums@{found['revision']}:{config}[{split}]"
    assert online.ok("config")["note"] == "alpaca/sums: config main, split train, not read: split test"
    assert list(offline.ok("offline, split")["sha256"]) == ["main/test-00000-of-00001.json"]
    online.failure("no config", "DataError", "no config 'mian'", "There are: main, socratic")
    online.failure("no split", "DataError", "no split 'validation'", "There are: test, train")
    online.failure(
        "versions", "DataError", "rows.json, rows_cleaned.json", "Write alpaca/versions:rows.json, or a list"
    )
    assert list(online.ok("version")["sha256"]) == ["rows_cleaned.json"]


def test_a_card_on_the_hub_tells_the_splits(online: Outcome, offline: Outcome) -> None:
    for found in (online.ok("declared"), offline.ok("offline, declared")):
        assert list(found["sha256"]) == ["b.json"]
    assert online.ok("declared")["note"] == "alpaca/declared: split train, not read: split held"
    assert list(online.ok("declared split")["sha256"]) == ["a.json"]
    online.failure("no declared split", "DataError", "There are: train, held")


# Names that lead nowhere


def test_names_that_are_not_on_the_hub(online: Outcome, home: Path) -> None:
    said = online.failure("misspelt", "HubError", "alpaca/tinny", "no such model", "spelling", "private", "log in")
    assert f"{home / 'alpaca/tinny'} does not exist" in said
    online.failure("misspelt, logged in", "HubError", "no such model", "spelling", "belongs to someone without access")
    online.failure("data set as model", "HubError", "alpaca/rows", "no such model")
    online.failure("no revision", "HubError", "alpaca/tiny", "no revision 'nope'", "branch, tag or commit")


def test_repositories_without_a_trainable_model(online: Outcome, hub_server: HubServer) -> None:
    online.failure("pickle", "ModelError", "alpaca/pickle", "pickle", "never reads", "save_pretrained")
    online.failure("gguf", "ModelError", "alpaca/gguf", "GGUF", "safetensors")
    online.failure("adapter", "ModelError", "alpaca/adapter", "LoRA adapter", "base_model_name_or_path")
    online.failure("mute", "ModelError", "alpaca/mute", "tokenizer", "save_pretrained")
    for nothing in ("pickle", "gguf", "adapter", "mute"):
        assert not hub_server.files_sent(nothing)


# Tokens


def test_an_invalid_token_is_reported_before_anything_is_fetched(online: Outcome, hub_server: HubServer) -> None:
    said = online.failure("public, bad token", "HubError", "HF_TOKEN", "not valid", "/settings/tokens", "hf auth login")
    assert "Public models need no token" in said
    assert hub_server.url in said
    assert not hub_server.files_sent("public, bad token")
    online.failure("blank in token", "HubError", "HF_TOKEN", "no token has")
    assert hub_server.asked_in("blank in token") == []


def test_private_models(online: Outcome, hub_server: HubServer) -> None:
    online.failure("private, nobody", "HubError", "alpaca/private", "If it is private, log in", "hf auth login")
    online.failure("private, stranger", "HubError", "belongs to someone without access")
    assert online.ok("private")["revision"] == commit_of("alpaca/private main")
    assert online.ok("private data")["sha256"].keys() == {"rows.json"}
    for case_of, user in (("private", "ann"), ("private data", "bob")):
        asked = hub_server.asked_in(case_of)
        paths = [path for _, path, _ in asked]
        first_file = next(index for index, path in enumerate(paths) if "/api/" not in path)
        assert "/api/whoami-v2" in paths[:first_file]
        assert {token for _, path, token in asked if not path.startswith("/cdn/")} == {TOKENS[user]}


def test_fine_grained_tokens_are_asked_for_their_right_to_read(online: Outcome, hub_server: HubServer) -> None:
    online.failure("private, no right", "HubError", "bob/own", "valid, but has no permission to read", "Read access")
    online.failure("private, gated right only", "HubError", "valid, but has no permission to read")
    assert online.ok("private, right")["pinned"].startswith("bob/own@")
    online.failure("gated, no right", "HubError", "alpaca/gated", "no permission to read", "public gated repos")
    assert online.ok("gated, granted")["pinned"].startswith("alpaca/gated@")
    assert online.ok("public, token without rights")["revision"] == commit_of("alpaca/tiny dev")
    for refused in ("private, no right", "private, gated right only", "gated, no right"):
        assert not hub_server.files_sent(refused)


def test_gated_models(online: Outcome, hub_server: HubServer) -> None:
    page = f"{hub_server.url}/alpaca/gated"
    online.failure("gated, nobody", "HubError", "is gated", f"Request access at {page};", "log in", "/settings/tokens")
    online.failure("gated, not granted", "HubError", "is gated", "bob", "no access to it yet", page)
    assert not hub_server.files_sent("gated, not granted")


def test_where_the_token_is_looked_for(online: Outcome, hub_server: HubServer) -> None:
    def sent(name: str) -> set[str | None]:
        online.ok(name)
        return {token for _, path, token in hub_server.asked_in(name) if not path.startswith("/cdn/")}

    assert sent("token in .env") == {TOKENS["ann"]}
    assert sent("token in HF_TOKEN and .env") == {TOKENS["bob"]}
    online.failure(".env is no text", "HubError", ".env can't be read")


def test_the_stored_token_comes_before_a_file_in_the_folder(
    online: Outcome, hub_server: HubServer, home: Path, tmp_path: Path
) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(TOKENS["bob"] + "\n")
    cases = [
        case("stored", "alpaca/private-data", call="resolve_data"),
        case("stored and .env", "alpaca/private-data", call="resolve_data", cwd=str(home / "project")),
    ]
    outcome = run_cases(cases, tmp_path, hub_server.url, mark=hub_server.url)
    outcome.ok("stored"), outcome.ok("stored and .env")
    assert {token for _, _, token in hub_server.asked_in("stored")} == {TOKENS["bob"]}
    assert {token for _, _, token in hub_server.asked_in("stored and .env")} == {TOKENS["bob"]}


@pytest.mark.parametrize("owned", [".env", "."])
def test_a_dotenv_that_is_not_the_users_own_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owned: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(access, "get_token", lambda: None)
    Path(".env").write_text("HF_TOKEN=hf_own\n")
    assert access.log_in() == access.Login("hf_own", str(tmp_path / ".env"))
    monkeypatch.setattr(access, "_is_own", lambda path: path != Path(owned))
    assert access.log_in() is None


def test_a_dotenv_that_is_no_file_is_ignored_and_a_huge_one_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(access, "get_token", lambda: None)
    os.mkfifo(".env")
    assert access.log_in() is None
    Path(".env").unlink()
    with Path(".env").open("wb") as file:
        file.truncate(10**10)  # sparse
    with pytest.raises(HubError, match="can't be read"):
        access.log_in()


def test_no_token_is_ever_shown_or_sent_elsewhere(
    online: Outcome, offline: Outcome, unplugged: Outcome, hub_server: HubServer
) -> None:
    for outcome in (online, offline, unplugged):
        for token in TOKENS.values():
            assert token not in outcome.output
    storage = [token for _, path, token in hub_server.asked if path.startswith("/cdn/")]
    assert storage
    assert set(storage) == {None}


# The disk and the network


def test_a_full_disk(online: Outcome, hub_server: HubServer, home: Path) -> None:
    said = online.failure("huge", "MachineError", "alpaca/huge", "10,000,000,000 MB", "HF_HOME", exit_code=3)
    assert str(home / "hf" / "hub") in said
    assert not hub_server.files_sent("huge")
    online.failure("enospc", "MachineError", "alpaca/enospc", "is full", "HF_HOME", "are kept", exit_code=3)


def test_a_hub_in_trouble(online: Outcome, hub_server: HubServer) -> None:
    online.failure("down", "HubError", "alpaca/down", "has a server error", "503", "Try again later")
    online.failure("busy", "HubError", "alpaca/busy", "too many requests")
    online.failure("portal", "HubError", "alpaca/portal", "the response is not a hub's", hub_server.url)


def test_an_interrupted_download_goes_on(online: Outcome, hub_server: HubServer) -> None:
    assert online.ok("shaky")["revision"] == commit_of("alpaca/shaky main")
    online.failure(
        "broken", "HubError", "alpaca/broken", "the download failed", "Run the same command again", "are kept"
    )
    assert online.ok("broken, again")["revision"] == commit_of("alpaca/broken main")
    assert hub_server.files_sent("broken, again") == {"model.safetensors"}
    online.failure("cut", "HubError", "alpaca/cut", "the download failed", "Run the same command again")


def test_damaged_files_are_found(online: Outcome, hub_server: HubServer, home: Path) -> None:
    said = online.failure("damaged", "HubError", "model.safetensors is not the file that the hub publishes", "Delete")
    online.failure("damaged small", "HubError", "config.json is not the file that the hub publishes", "Delete")
    named = Path(said.split("Delete ")[1].split(" and run again")[0])
    named.unlink()
    mended = run_cases([case("mended", "alpaca/damaged")], home, hub_server.url, mark=hub_server.url)
    assert mended.ok("mended")["sha256"] == online.ok("public")["sha256"]
    assert hub_server.files_sent("mended") == {"model.safetensors"}


def test_offline_mode_uses_the_cache_and_asks_nobody(
    online: Outcome, offline: Outcome, hub_server: HubServer, tiny_model: Path
) -> None:
    asked = len(hub_server.asked)
    for name, as_online in (("public", "public"), ("commit", "commit"), ("rows", "rows")):
        found = offline.ok(f"offline, {name}")
        assert found == online.ok(as_online) | {"case": found["case"]}
    for name in ("half", "half without a list", "never seen"):
        offline.failure(f"offline, {name}", "HubError", "has no complete copy", "HF_HUB_OFFLINE")
    offline.failure("offline, damaged", "HubError", "model.safetensors is not the file that the hub publishes")
    assert offline.ok("offline, local")["pinned"] == str(tiny_model)
    assert len(hub_server.asked) == asked


def test_a_copy_without_its_terms_is_whole(offline: Outcome) -> None:
    assert offline.ok("offline, without its terms")["sha256"].keys() == MODEL_FILES


def test_without_a_network_the_cache_serves_with_a_note(online: Outcome, unplugged: Outcome, tiny_model: Path) -> None:
    found = unplugged.ok("unplugged, public")
    assert found == online.ok("public") | {"case": found["case"]}
    commit = commit_of("alpaca/tiny main")
    assert "alpaca/tiny: no answer from the hub" in unplugged.output
    assert f"Using the copy in the cache, alpaca/tiny@{commit}" in unplugged.output
    assert unplugged.ok("unplugged, commit")["sha256"] == online.ok("commit")["sha256"]
    assert "alpaca/pinned: no answer" not in unplugged.output
    unplugged.failure("unplugged, never seen", "HubError", "could not be reached", "Check the network", "local folder")
    assert unplugged.ok("unplugged, local")["pinned"] == str(tiny_model)


# Local files, in this process, where no connection can be made


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a local name must not need the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_TOKEN", TOKENS["blank"])


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path, no_network: None) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "llama"))


def test_a_local_folder(folder: Path, model_bytes: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "notes.txt").write_text("not used")
    (folder / "pytorch_model.bin").write_bytes(b"not used")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "model.safetensors").write_bytes(b"not used")
    found = resolve_model(str(folder))
    assert found == Source(str(folder), folder, None, digests(model_bytes))
    assert found.pinned == str(folder)
    monkeypatch.chdir(folder.parent)
    assert resolve_model("./llama").path == folder
    assert resolve_model("llama").pinned == str(folder)
    (folder.parent / "owner").mkdir()
    folder.rename(folder.parent / "owner" / "llama")
    assert resolve_model("owner/llama").path == folder.parent / "owner" / "llama"


def test_a_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_model("~/llama").path == folder


def _shards(folder: Path, *names: str) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(["a"], "model-1.safetensors") | {name: name for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_weights_in_several_files(folder: Path) -> None:
    _shards(folder)
    assert "model-1.safetensors" in resolve_model(str(folder)).sha256


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _lfs_pointer(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_text(pointer)


def _cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _bad_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"nope" + bytes(10))


def _header_beyond_end(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")


def _bad_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[]")


DAMAGE = {
    "only pickle": (_only_pickle, "never reads"),
    "LFS pointer": (_lfs_pointer, "git lfs pull"),
    "cut off": (_cut_off, "it was cut off"),
    "bad header": (_bad_header, "not a whole safetensors file"),
    "header beyond the end": (_header_beyond_end, "not a whole safetensors file"),
    "empty weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "not a whole safetensors file"),
    "bad index": (_bad_index, "weight_map"),
    "missing part": (lambda folder: _shards(folder, "model-2.safetensors"), "model-2.safetensors"),
    "part outside": (lambda folder: _shards(folder, "../llama/model-1.safetensors"), "../llama/model-1.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer is missing"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "empty": (lambda folder: [file.unlink() for file in folder.iterdir()], "no weights"),
    "only an adapter": (lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"), "LoRA adapter"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_local_folder_that_is_no_whole_model(damage: str, folder: Path) -> None:
    change, said = DAMAGE[damage]
    change(folder)
    with pytest.raises(ModelError, match=f"^{folder}: ") as error:
        resolve_model(str(folder))
    assert said in str(error.value)


BNB = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
QUANTISED = {
    "x/tiny-bnb-4bit": (BNB, None, "", "bitsandbytes", "x/tiny"),
    "tiny-unsloth-bnb-4bit": (BNB, "unsloth/tiny-bnb-4bit", "", "bitsandbytes", "tiny"),
    "TheBloke/Tiny-v1.0-GPTQ": ({"quant_method": "gptq"}, "x/Tiny-v1.0", "", "gptq", "x/Tiny-v1.0"),
    "a/Tiny-AWQ-4bit": ({"quant_method": "awq"}, None, "---\nbase_model:\n- o/Tiny\n---\n", "awq", "o/Tiny"),
    "a/Tiny-FP8-Dynamic": ({"quant_method": "compressed-tensors"}, "/home/x/t", "", "compressed-tensors", "a/Tiny"),
    "a/tiny": ({"quant_method": "mxfp4"}, None, "---\nbase_model: a/tiny\n---\n", "mxfp4", None),
    "b/tiny": ([1], None, "base_model: o/Tiny", "quantization_config", None),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_model_is_refused_with_the_name_of_the_float_one(name: str, tmp_path: Path) -> None:
    settings, written, card, method, original = QUANTISED[name]
    config = {"model_type": "llama", "quantization_config": settings, "_name_or_path": written}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "README.md").write_text(card)
    said = quantised(tmp_path, name)
    assert said and f"quantised already ({method}" in said
    assert f"Give the original model{', ' + original if original else ''};" in said


def test_a_quantised_folder_is_refused_before_its_weights_are_read(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelError, match=rf"^{folder}: its weights are quantised already \(fp8\)"):
        resolve_model(str(folder))


NO_NAMES = {
    "./nowhere": "no such file or folder",
    "../nowhere": "no such file or folder",
    "~/nowhere": "no such file or folder",
    "/no/where": "no such file or folder",
    "nowhere": "owner/name",
    "no/where/at-all": "owner/name",
    "owner/name@": "owner/name@revision",
    "owner/na--me": "owner/name",
    "owner/na me": "owner/name",
    "https://hub.example/owner/name": "not an address",
    "": "owner/name",
    "x" * 5000: "name",
    "a/" + "x" * 200: "owner/name",
}


@pytest.mark.parametrize("name", NO_NAMES, ids=lambda name: name[:30])
@pytest.mark.parametrize("resolve", [resolve_model, resolve_data])
def test_names_that_can_not_be(name: str, resolve: Any, no_network: None) -> None:
    with pytest.raises(HubError) as error:
        resolve(name)
    assert str(error.value).startswith(f"{name}: ")
    assert NO_NAMES[name] in str(error.value)


def test_a_name_that_is_nearly_right(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for name in ("./lama", "lama", str(folder.parent / "lama")):
        with pytest.raises(HubError, match=r"Did you mean .*llama\?$"):
            resolve_model(name)


def test_files_that_are_no_models(folder: Path) -> None:
    gguf = folder / "model.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="GGUF file, which is for running"):
        resolve_model(str(gguf))
    with pytest.raises(ModelError, match="Give the folder"):
        resolve_model(str(folder / "model.safetensors"))


def test_local_data(tmp_path: Path, no_network: None) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([ROW]))
    found = resolve_data(str(file))
    assert (found.path, found.revision, found.pinned) == (file, None, str(file))
    assert found.sha256 == digests({"rows.json": file.read_bytes()})
    (tmp_path / ".hidden").mkdir()
    for name in (".hidden/rows.json", "dataset_infos.json", "readme.txt", "b.parquet"):
        (tmp_path / name).write_bytes(b"x")
    assert resolve_data(str(tmp_path)).sha256.keys() == {"rows.json", "b.parquet"}


def test_pipes_are_not_opened(tmp_path: Path, no_network: None) -> None:
    os.mkfifo(tmp_path / "rows.json")
    assert resolve_data(str(tmp_path / "rows.json")).sha256 == {}
    assert resolve_data(str(tmp_path)).sha256 == {}


def test_files_are_fetched_that_the_reader_of_rows_takes() -> None:
    names = ["a.json", "B.json", "b/c.jsonl.gz", "b/c.csv.zst", "d.parquet", "e.arrow"]
    none = ["a.py", "a.pkl", "x.parquet.gz", "b/state.json", "dataset_info.json", "cache-1.arrow", ".a.json"]
    assert (
        DATA_SET.used([*names, *none]) == [name for name in sorted([*names, *none]) if are_rows(name)] == sorted(names)
    )


def test_the_quickstart_data(no_network: None) -> None:
    assert resolve_data("quickstart").pinned == "quickstart"
    assert resolve_data("quickstart").sha256.keys() == {"train.json"}
    assert resolve_data("quickstart", heldout=True).sha256.keys() == {"eval.json"}
