"""Whatever a server answers in a hub's place, the message names the repository and says that it is not a hub."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

CHILD = """
import json, sys
from huarizo.errors import HubError
from huarizo.hub.names import resolve_data, resolve_model
from huarizo.hub.upload import full_name
for number in range(int(sys.argv[1])):
    for call in (resolve_model, resolve_data):
        try:
            call(f"odd/a{number}")
        except HubError as error:
            assert f"odd/a{number}: " in str(error), error
        else:
            raise AssertionError(number)
    try:
        full_name(f"odd/b{number}")
    except HubError as error:
        assert f"odd/b{number}: " in str(error) or "The token" in str(error), error
print("done")
"""
FILE = {"rfilename": "model.safetensors"}
ANSWERS = [
    "[]", "3", "null", '"x"', "{}", "[" * 100_000, "{", "<html>", json.dumps({"sha": 3, "id": 4}),
    *(json.dumps({"id": "odd/a", "sha": "a" * 40, "siblings": siblings}) for siblings in
      (3, {"a": 1}, [3], [{}], [[]], [{"rfilename": 5}], [FILE | {"lfs": 3}], [FILE | {"lfs": {}}], [FILE | {"size": "x"}])),
    json.dumps({"name": ["x"], "auth": 3}), json.dumps({"name": "x", "orgs": [3], "auth": {"accessToken": []}}),
    json.dumps({"name": "x", "auth": {"accessToken": {"role": "fineGrained", "fineGrained": {"scoped": [{"permissions": 3}]}}}}),
]  # fmt: skip


@pytest.fixture
def odd_hub() -> str:
    class Handler(BaseHTTPRequestHandler):
        asked = -1

        def do_GET(self) -> None:
            if "/api/models/" in self.path:  # each number begins with its model
                Handler.asked = int(self.path.partition("odd/")[2].partition("/")[0][1:])
            body = ANSWERS[max(Handler.asked, 0)].encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_odd_answers_are_reported(odd_hub: str, tmp_path: Path) -> None:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    settings = {"HF_ENDPOINT": odd_hub, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_x", "NO_PROXY": "127.0.0.1"}
    settings |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", CHILD, str(len(ANSWERS))]
    done = subprocess.run(command, cwd=tmp_path, env=kept | settings, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr[-3000:]
