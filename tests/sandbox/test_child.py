"""The child's side: what it imports, and how it frames values."""

import datetime
import io
import json
import subprocess
import sys
from pathlib import Path

from huarizo.sandbox.child import OPAQUE, frame, read_frame

ROOT = Path(__file__).parents[2]


def test_a_frame_is_read_as_it_was_written_and_a_cut_one_is_none() -> None:
    data = frame({"a": ["가\ud800\0", 1.5, None], "day": datetime.date(2024, 2, 29)})
    expected = {"a": ["가\ud800\0", 1.5, None], "day": {OPAQUE: "date"}}
    stream = io.BytesIO(data * 2)
    assert [json.loads(read_frame(stream) or b"") for _ in range(2)] == [expected] * 2
    assert read_frame(stream) is None
    for end in (0, 3, len(data) - 1):
        assert read_frame(io.BytesIO(data[:end])) is None


def test_a_child_imports_nothing_heavy() -> None:
    code = "import sys, json, huarizo.sandbox.child, huarizo.sandbox.templates; print(json.dumps(list(sys.modules)))"
    modules = set(json.loads(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)))
    assert not modules & {"torch", "transformers", "numpy", "pyarrow"}
