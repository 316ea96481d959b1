"""How a step's time and the memory grow: with rows a step, their length, LoRA's rank, and the micro-batch.

    python benchmarks/scaling.py [--model quickstart] [--precision int8] [--write]

One thing changes at a time, from 4 rows of some 256 tokens, r=8 on q and v, 1024 tokens at once. Every point is a run
of its own process (peak memory includes the load); its time is the median of the steps after the first. The last line
of stdout is one JSON object; --write keeps it under benchmarks/results/.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from contenders import Clock
from summary import machine, versions

STEPS = 5
BASE = {"rows": 4, "length": 256, "rank": 8, "micro_batch_tokens": 1024}
SERIES = {
    "rows": [1, 2, 4, 8, 16],
    "length": [64, 128, 256, 512, 1024],
    "rank": [4, 8, 32, 128],
    "micro_batch_tokens": [256, 512, 1024, 2048],
}


def train(model: str, precision: str, point: dict[str, int], target: Path) -> None:
    """One run, in this process; what it took goes to `target`."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    from huarizo.machine import device, peak_memory
    from huarizo.recipe import make_recipe
    from huarizo.training.finetune import fine_tune

    clock = Clock()
    INTEGRATION_TO_CALLBACK["benchmark"] = clock  # pyright: ignore[reportArgumentType]
    with tempfile.TemporaryDirectory() as folder:
        text = " ".join(["day"] * (point["length"] - 20))
        rows = [{"instruction": "Say it.", "input": "", "output": text}] * (point["rows"] * STEPS)
        Path(folder, "rows.json").write_text(json.dumps(rows))
        recipe = make_recipe(
            model=model,
            data={"train": str(Path(folder, "rows.json")), "eval": 0, "prompt": "alpaca", "max_length": 2048},
            lora={"r": point["rank"]},
            training={
                "max_steps": STEPS, "batch_size": point["rows"], "micro_batch_tokens": point["micro_batch_tokens"]
            },
            precision=precision, samples=0, output=str(Path(folder, "run")), trainer={"report_to": "benchmark"},
        )  # fmt: skip
        fine_tune(recipe)
    target.write_text(json.dumps(clock.result() | {"peak_memory": peak_memory(device())}))


def measured(model: str, precision: str, point: dict[str, int]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "result.json")
        command = [sys.executable, __file__, "--model", model, "--precision", precision]
        subprocess.run(
            [*command, "--point", json.dumps(point), "--target", str(target)], check=True, stdout=subprocess.DEVNULL
        )
        result = json.loads(target.read_text())
    steps = sorted(zip(result["step_seconds"], result["step_tokens"], strict=True))[: STEPS - 1]
    seconds, tokens = steps[len(steps) // 2]
    return point | {
        "tokens": tokens,
        "step_ms": round(1000 * seconds),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_memory_gb": round(result["peak_memory"] / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.point:
        train(chosen.model, chosen.precision, chosen.point, chosen.target)
        return
    result: dict[str, Any] = {"model": chosen.model, "precision": chosen.precision, "series": {}}
    for name, values in SERIES.items():
        print(f"{name:>20}{'tokens':>8}{'step ms':>9}{'tokens/s':>10}{'peak GB':>9}")
        result["series"][name] = [measured(chosen.model, chosen.precision, BASE | {name: value}) for value in values]
        for point in result["series"][name]:
            print(
                f"{point[name]:>20}{point['tokens']:>8}{point['step_ms']:>9}{point['tokens_per_second']:>10}"
                f"{point['peak_memory_gb']:>9}"
            )
    result |= {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "versions": versions(None)}
    if chosen.write:
        target = Path(__file__).parent / "results" / f"scaling-{chosen.model}-{result['date']}.json"
        target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
