"""Files to the hub, with the real huggingface_hub client against a small hub on 127.0.0.1.

As in test_names, the calls run in child processes. The client waits between its attempts; here it does not.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from huarizo.hub.upload import may_write
from tests.hub.server import HubServer, Repo, User
from tests.hub.test_names import Outcome, _closed_port

TOKENS = {
    "ann": "hf_annsSecretTokenAnnsSecretToken",
    "reader": "hf_annsTokenThatMayOnlyRead00001",
    "fine": "hf_fineGrainedForOneRepository002",
    "unknown": "hf_nobodyKnowsThisTokenNobody0003",
    "blank": "hf_brokenIn TheMiddle0000000000004",
}
FILES = {"README.md": b"---\nlicense: mit\n---\n# x\n", "adapter_config.json": b"{}"}
WEIGHTS = bytes(range(256)) * 3000

CHILD = """
import json, logging, os, sys, time, urllib.parse, urllib.request
from pathlib import Path
logging.basicConfig(level=logging.INFO)
time.sleep = lambda seconds: None
from huarizo.errors import HuarizoError
from huarizo.hub.upload import upload

for case in json.load(open(sys.argv[1])):
    if sys.argv[2]:
        urllib.request.urlopen(sys.argv[2] + "/mark/" + urllib.parse.quote(case["case"])).read()
    os.environ.pop("HF_TOKEN", None)
    if case["token"]:
        os.environ["HF_TOKEN"] = case["token"]
    files = {name: text.encode() for name, text in case["files"].items()} | {"w.safetensors": Path(case["weights"])}
    try:
        out = {"url": upload(case["to"], files, case["private"], case["force"], "A test", case["replaced"])}
    except HuarizoError as error:
        out = {"error": type(error).__name__, "exit_code": error.exit_code, "message": str(error)}
    print(json.dumps({"case": case["case"]} | out), flush=True)
"""


def case(name: str, to: str, token: str | None = "ann", **more: Any) -> dict[str, Any]:
    texts = {file: content.decode() for file, content in FILES.items()}
    defaults = {"files": texts, "weights": "w.safetensors", "private": True, "force": False, "replaced": []}
    return {"case": name, "to": to, "token": TOKENS[token] if token else None} | defaults | more


def run_cases(cases: list[dict[str, Any]], home: Path, endpoint: str, mark: str = "", **env: str) -> Outcome:
    """One child process over all the cases, without Xet, which speaks to a service of its own."""
    file = home / f"cases-{len(list(home.glob('cases-*')))}.json"
    file.write_text(json.dumps(cases))
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", CHILD, str(file), mark]
    child = subprocess.run(
        command, env=kept | settings | env, cwd=home, capture_output=True, text=True, timeout=120, check=False
    )
    assert child.returncode == 0, child.stderr
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    return Outcome({line["case"]: line for line in lines}, child.stdout + child.stderr)


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    mine: dict[str, Any] = {"private": True, "readers": ("ann",)}
    repos = {
        name: Repo({".gitattributes": b""}, **(mine | more))
        for name, more in {
            "ann/empty": {},
            "ann/shown": {"private": False},
            "ann/shaky": {"put_drops": 1},
            "ann/broken": {"put_drops": 100},
            "ann/trouble": {"commit_status": 500},
            "ann/hangs-up": {"commit_status": 0},
            "ann/moved": {"commit_status": 412},
            "ann/forbidden": {"commit_status": 403},
            "ann/busy": {"preupload_status": 429},
            "ann/no-hub": {"status": 0},
            "ann/down": {"status": 503},
            "ann/card": {},
            "ann/absent": {},
            "ann/fine": {},
            "ann/other": {},
        }.items()
    }
    repos["ann/full"] = Repo({".gitattributes": b"", "README.md": b"old", "notes.txt": b"kept"}, **mine)
    parts = {"part-1.safetensors": b"old", "model.safetensors.index.json": b"{}", "notes.txt": b"kept"}
    repos["ann/parts"] = Repo({".gitattributes": b""} | parts, **mine)
    repos["ann/replaced"] = Repo({".gitattributes": b"", "README.md": b"old", "notes.txt": b"kept"}, **mine)
    here = {"entity": {"type": "model", "name": "ann/fine"}, "permissions": ["repo.content.read", "repo.write"]}
    users = {
        TOKENS["ann"]: User("ann", "write", orgs=("herd",)),
        TOKENS["reader"]: User("ann", "read"),
        TOKENS["fine"]: User("ann", "fineGrained", {"global": [], "scoped": [here]}),
    }
    with HubServer(repos, users) as running:
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "w.safetensors").write_bytes(WEIGHTS)
    (folder / "other.safetensors").write_bytes(WEIGHTS[::-1])
    (folder / "third.safetensors").write_bytes(WEIGHTS[1:])
    return folder


@pytest.fixture(scope="module")
def online(server: HubServer, home: Path) -> Outcome:
    cases = [
        case("new", "ann/new"),
        case("new, public", "ann/new-public", private=False),
        case("own name", "mine"),
        case("organisation", "herd/new"),
        case("there, empty", "ann/empty"),
        case("no token", "ann/x", token=None),
        case("unknown token", "ann/x", token="unknown"),
        case("blank in token", "ann/x", token="blank"),
        case("read token", "ann/x", token="reader"),
        case("fine-grained, here", "ann/fine", token="fine"),
        case("fine-grained, elsewhere", "ann/other", token="fine"),
        case("somebody's", "bob/x"),
        case("no id", "ann/x/y"),
        case("no id, address", "https://hub.example/ann/x"),
        case("public", "ann/shown"),
        case("public, meant", "ann/shown", private=False),
        case("taken", "ann/full"),
        case("taken, force", "ann/replaced", force=True),
        case("old weights", "ann/parts", files={}, replaced=["*.safetensors", "*.index.json"]),
        case("old weights, force", "ann/parts", files={}, replaced=["*.safetensors", "*.index.json"], force=True),
        case("shaky", "ann/shaky", weights="other.safetensors"),
        case("broken", "ann/broken", weights="third.safetensors"),
        case("trouble", "ann/trouble"),
        case("hangs up", "ann/hangs-up"),
        case("moved", "ann/moved"),
        case("forbidden", "ann/forbidden"),
        case("busy", "ann/busy"),
        case("no hub", "ann/no-hub"),
        case("down", "ann/down"),
        case("bad card", "ann/card", files={"README.md": "---\nbase_model: /home/ann/llama\n---\n"}),
        case("absent", "ann/absent", weights="absent.safetensors"),
    ]
    return run_cases(cases, home, server.url, mark=server.url)


def sent() -> dict[str, bytes]:
    return {".gitattributes": b"", "w.safetensors": WEIGHTS} | FILES


@pytest.mark.parametrize(
    ("name", "repo_id", "private"),
    [
        ("new", "ann/new", True),
        ("new, public", "ann/new-public", False),
        ("own name", "ann/mine", True),
        ("organisation", "herd/new", True),
        ("there, empty", "ann/empty", True),
        ("fine-grained, here", "ann/fine", True),
        ("public, meant", "ann/shown", False),
    ],
)
def test_the_files_arrive_in_one_commit(
    online: Outcome, server: HubServer, name: str, repo_id: str, private: bool
) -> None:
    repo = server.repos[repo_id]
    assert online.ok(name)["url"].startswith(f"{server.url}/{repo_id}/commit/")
    assert (repo.files, repo.private, len(repo.commits)) == (sent(), private, 1)


def test_the_token_goes_to_the_hub_alone(online: Outcome, server: HubServer) -> None:
    asked = server.asked_in("new")
    puts = [(path, token) for method, path, token in asked if method == "PUT"]
    assert len(puts) == 1 and puts[0][1] is None
    assert {token for method, path, token in asked if method != "PUT"} == {TOKENS["ann"]}
    assert not [token for method, _, token in server.asked if method == "PUT" and token]


def test_no_token_is_ever_written(online: Outcome) -> None:
    assert not [token for token in TOKENS.values() if token in online.output]


REFUSED = {
    "no token": ("needs a token", "token of the type Write", "HF_TOKEN"),
    "unknown token": ("is not valid", "HF_TOKEN", "type Write"),
    "blank in token": ("contains a character that no token has",),
    "read token": ("no permission to write", "type Write"),
    "fine-grained, elsewhere": ("ann/other", "no permission to write", "Write access"),
    "somebody's": ("bob is neither you (ann", "herd"),
    "no id": ("owner/name",),
    "no id, address": ("owner/name",),
    "public": ("repository is public", "--public", "/ann/shown/settings"),
    "taken": ("README.md", "--force"),
    "down": ("has a server error", "Run again later"),
    "no hub": ("not a hub's", "HF_ENDPOINT"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_be_known_before_is_reported_before_anything_is_sent(
    online: Outcome, server: HubServer, name: str
) -> None:
    online.failure(name, "HubError", *REFUSED[name])
    assert not [path for method, path, _ in server.asked_in(name) if method in ("POST", "PUT")]


FAILED = {
    "broken": ("ann/broken", "HubError", ("the upload failed", "nothing was committed", "Run the same command again")),
    "trouble": ("ann/trouble", "HubError", ("server error", "500", "nothing was committed", "***")),
    "hangs up": ("ann/hangs-up", "HubError", ("connection broke", "run again", "whole or not at all")),
    "moved": ("ann/moved", "HubError", ("someone else changed it", "Run again")),
    "forbidden": ("ann/forbidden", "HubError", ("refuses", "type Write")),
    "busy": ("ann/busy", "HubError", ("too many requests", "Wait")),
    "bad card": ("ann/card", "HubError", ("model card", "base_model", "nothing was committed")),
}


@pytest.mark.parametrize("name", FAILED)
def test_what_fails_on_the_way_commits_nothing(online: Outcome, server: HubServer, name: str) -> None:
    repo_id, error, said = FAILED[name]
    message = online.failure(name, error, *said)
    assert "hf_" not in message and "\n" not in message
    repo = server.repos[repo_id]
    assert (repo.files, repo.commits) == ({".gitattributes": b""}, [])


def test_a_file_that_is_gone(online: Outcome, server: HubServer) -> None:
    online.failure("absent", "MachineError", "absent.safetensors", "nothing was committed", exit_code=3)
    assert not server.repos["ann/absent"].commits


def test_a_connection_that_breaks_once_is_tried_again(online: Outcome, server: HubServer) -> None:
    assert online.ok("shaky") and server.repos["ann/shaky"].put_drops == 0
    assert server.repos["ann/shaky"].files["w.safetensors"] == WEIGHTS[::-1]


def test_a_repository_that_is_taken_is_unchanged_unless_forced(online: Outcome, server: HubServer) -> None:
    assert server.repos["ann/full"].files == {".gitattributes": b"", "README.md": b"old", "notes.txt": b"kept"}
    assert online.ok("taken, force")
    assert server.repos["ann/replaced"].files == sent() | {"notes.txt": b"kept"}


def test_old_weights_do_not_stay_beside_new_ones(online: Outcome, server: HubServer) -> None:
    online.failure("old weights", "HubError", "contains part-1.safetensors, model.safetensors.index.json", "--force")
    assert online.ok("old weights, force")
    assert server.repos["ann/parts"].files == {".gitattributes": b"", "notes.txt": b"kept", "w.safetensors": WEIGHTS}


def test_without_a_hub(server: HubServer, home: Path) -> None:
    before = len(server.asked)
    offline = run_cases([case("offline", "ann/new")], home, server.url, HF_HUB_OFFLINE="1")
    offline.failure("offline", "HubError", "HF_HUB_OFFLINE", "Unset it")
    assert len(server.asked) == before
    unplugged = run_cases([case("unplugged", "ann/new")], home, f"http://127.0.0.1:{_closed_port()}")
    message = unplugged.failure("unplugged", "HubError", "could not be reached", "Check the network")
    assert TOKENS["ann"] not in message + unplugged.output


def test_a_mirror_that_names_no_rights_is_asked() -> None:
    assert may_write({}, "ann/x")
    scope = {"entity": {"name": "Ann"}, "permissions": ["repo.write"]}
    token = {"role": "fineGrained", "fineGrained": {"scoped": [scope]}}
    assert may_write({"auth": {"accessToken": token}}, "ann/x")
    assert not may_write({"auth": {"accessToken": token}}, "bob/x")
