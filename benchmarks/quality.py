"""Does the precision of the frozen base change what is learnt? Held-out loss of each adapter on the *float* base.

    python benchmarks/quality.py --data ROWS.json [--model quickstart] [--seeds 3] [--precisions fp32,bf16,int8]

Every precision trains on the same rows, in the same order, for one epoch, by the same recipe; the last --heldout rows
are kept apart. Each adapter is then loaded by stock PEFT on the base in fp32 and its loss taken on the rows kept
apart. Runs that are in --work already are not trained again, so an interrupted comparison goes on. The last line of
stdout is one JSON object; --write keeps it under benchmarks/results/.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from summary import machine, versions

from huarizo.data.packing import pack_within
from huarizo.data.prompts import prompt_format
from huarizo.data.rows import read_rows, require_good
from huarizo.data.tokens import Encoder
from huarizo.errors import HuarizoError
from huarizo.hub.names import resolve_model
from huarizo.model.adapter import load_adapter
from huarizo.model.load import load_base, load_tokenizer
from huarizo.model.loss import PackedLoss
from huarizo.recipe import make_recipe
from huarizo.training.finetune import fine_tune

CPU = torch.device("cpu")
ZERO = "before training"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="quickstart")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precisions", default="fp32,bf16,int8")
    parser.add_argument("--rows", type=int, default=900)
    parser.add_argument("--heldout", type=int, default=99)
    parser.add_argument("--work", type=Path, help="folder of the runs; default: a temporary one")
    parser.add_argument("--write", action="store_true")
    return parser.parse_args()


def trained(chosen: argparse.Namespace, rows: Path, precision: str, seed: int, work: Path) -> tuple[Path, float]:
    """The adapter's folder and the seconds of its training; an earlier one if it is there."""
    run = work / f"{precision}-{seed}"
    if not (run / "adapter" / "adapter_model.safetensors").is_file():
        recipe = make_recipe(
            model=chosen.model, data={"train": str(rows), "eval": 0, "prompt": "alpaca"}, precision=precision,
            training={"seed": seed}, samples=0, output=str(run),
        )  # fmt: skip
        fine_tune(recipe, console=Console(quiet=True))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return run / "adapter", metrics[-1]["elapsed_s"]


class FloatBase:
    """The base in fp32 with the rows kept apart, to take the loss of one adapter after another on."""

    def __init__(self, model: str, rows: Path) -> None:
        self.folder = resolve_model(model).path
        tokenizer = load_tokenizer(self.folder)
        encoder = Encoder(tokenizer, prompt_format("alpaca", tokenizer))
        examples = [e for e in encoder.encode(require_good(read_rows(rows), "fail")) if e]
        self.batches = list(pack_within(2048, examples))

    @torch.no_grad()
    def loss(self, adapter: Path | None) -> float:
        """Mean over the labelled tokens."""
        base = load_base(self.folder, torch.float32, CPU)
        model: Any = load_adapter(base, adapter) if adapter else base
        packed_loss = PackedLoss(base)
        total = sum(float(packed_loss(model, batch)) for batch in self.batches)
        return total / sum(batch.num_labels for batch in self.batches)


def measure(chosen: argparse.Namespace, work: Path) -> dict[str, Any]:
    rows = json.loads(chosen.data.read_text(encoding="utf-8"))
    train, heldout = work / "train.json", work / "heldout.json"
    train.write_text(json.dumps(rows[: chosen.rows]), encoding="utf-8")
    heldout.write_text(json.dumps(rows[chosen.rows : chosen.rows + chosen.heldout]), encoding="utf-8")
    base = FloatBase(chosen.model, heldout)
    losses: dict[str, Any] = {ZERO: round(base.loss(None), 5)}
    seconds: dict[str, dict[str, float]] = {}
    print(f"{ZERO}: {losses[ZERO]:.4f}", flush=True)
    for seed in range(chosen.seeds):
        for precision in chosen.precisions.split(","):
            adapter, took = trained(chosen, train, precision, seed, work)
            losses.setdefault(precision, {})[str(seed)] = round(base.loss(adapter), 5)
            seconds.setdefault(precision, {})[str(seed)] = took
            print(f"seed {seed} {precision}: {losses[precision][str(seed)]:.4f} after {took:.0f} s", flush=True)
    result = {"heldout_loss": losses, "training_seconds": seconds}
    if {"fp32", "int8"} <= losses.keys():
        pairs = [(losses["int8"][seed], losses["fp32"][seed]) for seed in losses["fp32"]]
        result["int8_excess_percent"] = round(100 * statistics.mean(ours / plain - 1 for ours, plain in pairs), 3)
        result["seed_spread_percent"] = round(100 * (max(p for _, p in pairs) / min(p for _, p in pairs) - 1), 3)
    return result


def main() -> None:
    chosen = options()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        work = chosen.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        try:
            result = measure(chosen, work)
        except HuarizoError as error:
            raise SystemExit(f"quality.py: {error}") from None
    about = {
        "model": chosen.model,
        "rows": chosen.data.name,
        "trained_rows": chosen.rows,
        "heldout_rows": chosen.heldout,
    }
    result = about | result | {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "versions": versions(None)}
    if chosen.write:
        target = Path(__file__).parent / "results" / f"quality-{chosen.model}-{result['date']}.json"
        target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
