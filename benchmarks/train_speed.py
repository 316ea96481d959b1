"""Tokens a second of a LoRA training step: the tutorial's recipe, stock bf16, and Huarizo, on the same rows.

    python benchmarks/train_speed.py --model quickstart --steps 8 [--data FILE] [--write]

The contenders take turns at every step (A B C A B C), so that a noisy machine is noisy for all. Tokens are those of
the rows; padding is not counted, though its time is. The first two rounds warm up. The last line on stdout is one JSON
object; --write also keeps it under benchmarks/results/. What it leaves out: the Trainer's own work between steps,
which is a few milliseconds and the same for all.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM

from huarizo.data.packing import pack
from huarizo.data.prompts import prompt_format
from huarizo.data.rows import read_rows, require_good
from huarizo.data.tokens import Encoder
from huarizo.hub.names import resolve_data, resolve_model
from huarizo.model.load import load_base, load_tokenizer
from huarizo.model.lora import add_lora, output_head
from huarizo.model.loss import packed_loss
from huarizo.recipe import LoraRecipe

ROWS = 4  # of a step
WARM_UP = 2
CPU = torch.device("cpu")


def padded(examples: list[dict[str, Any]], width: int) -> dict[str, torch.Tensor]:
    def column(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in values])

    ids = [list(example["input_ids"]) for example in examples]
    return {
        "input_ids": column(ids, 0),
        "attention_mask": column([[1] * len(row) for row in ids], 0),
        "labels": column([list(example["labels"]) for example in examples], -100),
    }


def stock(folder: Path, dtype: torch.dtype, width: int | None) -> Callable[[list[dict[str, Any]]], torch.Tensor]:
    """Transformers and PEFT as they come: all logits, rows padded to `width`, or to the longest."""
    model = add_lora(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), LoraRecipe(), seed=0).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)

    def step(examples: list[dict[str, Any]]) -> torch.Tensor:
        batch = padded(examples, width or max(len(example["input_ids"]) for example in examples))
        return finish(model(**batch).loss, optimizer)

    return step


def huarizo(folder: Path, dtype: torch.dtype) -> Callable[[list[dict[str, Any]]], torch.Tensor]:
    model = add_lora(load_base(folder, dtype, CPU), LoraRecipe(), seed=0).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    head = output_head(model)

    def step(examples: list[dict[str, Any]]) -> torch.Tensor:
        batch = pack(examples)
        return finish(packed_loss(model, batch, head) / len(batch["targets"]), optimizer)

    return step


def finish(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart")
    parser.add_argument("--data", default="quickstart")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    folder = resolve_model(options.model).path
    tokenizer = load_tokenizer(folder)
    encoder = Encoder(tokenizer, prompt_format("alpaca", tokenizer))
    rows = require_good(read_rows(resolve_data(options.data).path), "fail")[: (options.steps + WARM_UP) * ROWS]
    examples = [{"input_ids": e.input_ids, "labels": e.labels} for e in encoder.encode(rows) if e]
    contenders = {
        "tutorial": stock(folder, torch.float32, 512),
        "trainer_bf16": stock(folder, torch.bfloat16, None),
        "huarizo_fp32": huarizo(folder, torch.float32),
        "huarizo_bf16": huarizo(folder, torch.bfloat16),
    }
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for start in range(0, len(examples) - ROWS + 1, ROWS):
        chosen = examples[start : start + ROWS]
        tokens = sum(len(example["input_ids"]) for example in chosen)
        for name, step in contenders.items():
            began = time.perf_counter()
            step(chosen)
            if start >= WARM_UP * ROWS:
                speeds[name].append(tokens / (time.perf_counter() - began))
    medians = {name: round(statistics.median(values), 1) for name, values in speeds.items()}
    ours = max(medians["huarizo_fp32"], medians["huarizo_bf16"])
    result = {
        "model": options.model,
        "rows": options.data if options.data == "quickstart" else Path(options.data).name,
        "steps": len(speeds["tutorial"]),
        "tokens_per_second": medians,
        "ratio_to_tutorial": round(ours / medians["tutorial"], 2),
        "ratio_to_best_peer": round(ours / max(medians["tutorial"], medians["trainer_bf16"]), 2),
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
    }
    for name, value in medians.items():
        print(f"{name:<14} {value:>8.1f} tokens/s")
    if options.write:
        target = Path(__file__).parent / "results" / f"train_speed-{options.model}-{result['date']}.json"
        target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
