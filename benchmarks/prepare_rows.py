"""Seconds to read, check and tokenise 52,002 rows, the size of Stanford Alpaca, and again from the cache.

    python benchmarks/prepare_rows.py MODEL_FOLDER ROWS.json

The rows of the file are repeated, each with a number behind its instruction so that none is the same. One JSON object.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from huarizo.data.dataset import prepare_data
from huarizo.model.load import load_tokenizer
from huarizo.recipe import DataRecipe

COUNT = 52_002


def main(model_folder: Path, rows_file: Path) -> None:
    rows = json.loads(rows_file.read_text(encoding="utf-8"))
    many = [rows[i % len(rows)] | {"instruction": f"{rows[i % len(rows)]['instruction']} {i}"} for i in range(COUNT)]
    tokenizer = load_tokenizer(model_folder)
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        file.write_text(json.dumps(many), encoding="utf-8")
        for name in ("fresh", "cached"):
            began = time.perf_counter()
            prepare_data(DataRecipe(eval=0), 42, file, None, tokenizer, Path(folder, "cache"))
            seconds[name] = round(time.perf_counter() - began, 1)
    print(json.dumps({"rows": COUNT, "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
