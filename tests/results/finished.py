"""A finished run, with much in it that is private, and what is about to be sent of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import yaml

from huarizo.inference.samples import Sample
from huarizo.recipe import make_recipe, to_yaml
from huarizo.results.publish import CARD, Publication
from huarizo.runs import Run
from tests.hub.server import HubServer

TOKEN = "hf_annsSecretTokenAnnsSecretToken"
SECRET = "what only the owner of the run may read"
BROKEN_ANSWER = "````\n---\nlicense: mit\n---\n# Title\n<script>| a | b |\n```text\n\ud800"
SAMPLES = [
    Sample("Say hello.", "", "Hm.", "Hello!", "Hello!"),
    Sample("Break out", "of it", "```", BROKEN_ANSWER),
    Sample("Never answered", "", "x", None),
    Sample("Third", "", "c" * 5000, "C"),
    Sample("Fourth", "", "d", "D"),
]


def write_gguf(file: Path, kind: str = "model") -> None:
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type(kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


def change_recipe(run: Run, **values: Any) -> None:
    run.recipe_file.write_text(to_yaml(make_recipe(**(run.recipe().model_dump() | values))))


def content(found: Publication, name: str) -> bytes:
    value = found.files[name]
    return value if isinstance(value, bytes) else value.read_bytes()


def front_matter(found: Publication) -> dict[str, Any]:
    return yaml.safe_load(content(found, CARD).decode().split("---\n")[1])


def with_hub(server: HubServer, code: str, *arguments: str, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Python code in a child process that knows no other hub."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HOME": str(home), "PYTHONPATH": str(Path.cwd())}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost"}
    command = [sys.executable, "-c", code, *arguments]
    child = subprocess.run(
        command, env=kept | settings | env, cwd=home, capture_output=True, text=True, timeout=120, check=False
    )
    assert child.returncode == 0, child.stderr
    return child
