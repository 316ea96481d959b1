"""Tokens a second of LoRA training: the tutorial's Trainer, the same at its best, TRL and Huarizo, on the same rows.

    python benchmarks/train_speed.py --model quickstart --data FILE [--steps N] [--rounds R] [--write]
    python benchmarks/train_speed.py --model tinyllama-shape --tokenizer FOLDER --data FILE

Each contender is a whole training run in a process of its own (`contenders.py`), and they take turns (A B C, B C A, C A
B), so that a noisy machine is noisy for all. Tokens are those of the rows: padding is not counted, though its time is.
The first two steps of a run warm up, or compile, and are told apart. Between rounds the machine's matrix products are
timed (`gemm.py`), which says how near a run comes to what the machine can do. A table goes to stdout, and as its last
line one JSON object, which --write keeps under benchmarks/results/.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, MAX_LENGTH, ROWS_A_STEP, SEED, Task
from processes import ContenderError, measure_gemm, random_model, run_contender, why_left_out
from summary import Facts, summary, table

from huarizo.data.packing import num_labels, order
from huarizo.data.prompts import prompt_format
from huarizo.data.rows import read_rows, require_good
from huarizo.data.tokens import Encoder, Example
from huarizo.hub.names import resolve_data, resolve_model
from huarizo.hub.quickstart import QUICKSTART
from huarizo.model.load import load_tokenizer, read_config

WARM_UP = 2  # steps of each run
QUICK_STEPS = 3


def options_given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[QUICKSTART, "tinyllama-shape"], default=QUICKSTART)
    parser.add_argument("--tokenizer", type=Path, help="folder of TinyLlama's tokenizer, for tinyllama-shape")
    parser.add_argument("--data", default=QUICKSTART, help="file of Alpaca rows")
    parser.add_argument("--steps", type=int, default=10, help=f"timed steps of a run, after {WARM_UP} to warm up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows-a-step", type=int, default=ROWS_A_STEP, help="the batch size")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, such as tutorial,huarizo_bf16")
    parser.add_argument("--trl-path", help="folder that holds TRL, where it is not installed")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps, one round, without the tutorial")
    parser.add_argument("--write", action="store_true", help="keep the result under benchmarks/results/")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(CONTENDERS):
        parser.error(f"--only: no contender {', '.join(sorted(unknown))}; there are {', '.join(CONTENDERS)}")
    if options.model == "tinyllama-shape" and options.tokenizer is None:
        parser.error("--model tinyllama-shape needs --tokenizer, the folder of TinyLlama's tokenizer")
    if options.quick:
        options.steps, options.rounds = QUICK_STEPS, 1
        options.only = [name for name in options.only if name != "tutorial"]
    return options


def usable_rows(file: Path, folder: Path) -> tuple[list[dict[str, str]], list[Example]]:
    """The rows that every contender can train on, so that all draw the same ones, and what Huarizo makes of them.

    Left out are conversations of several turns or with a system text, and rows without a response within the length.
    """
    tokenizer = load_tokenizer(folder)
    rows = [r for r in require_good(read_rows(file), "skip") if len(r.exchanges) == 1 and not r.system]
    examples = list(Encoder(tokenizer, prompt_format("alpaca", tokenizer), max_length=MAX_LENGTH).encode(rows))
    kept = [(row.exchanges[0], example) for row, example in zip(rows, examples, strict=True) if example]
    alpaca = [{"instruction": e.instruction, "input": e.input, "output": e.output} for e, _ in kept]
    return alpaca, [example for _, example in kept]


def rates_of_steps(examples: list[Example], steps: int, rows_a_step: int) -> tuple[int, float]:
    """Tokens of an average timed step, and the share of them that is learnt from."""
    drawn = order(len(examples), SEED, 0)[WARM_UP * rows_a_step : (WARM_UP + steps) * rows_a_step]
    chosen = [examples[index] for index in drawn]
    if not chosen:
        raise SystemExit(f"{len(examples)} rows are too few: give a larger file, or fewer --steps")
    tokens = sum(len(example.input_ids) for example in chosen)
    labels = num_labels(chosen)
    return round(tokens * rows_a_step / len(chosen)), labels / tokens


def timed_rounds(task: Task, names: list[str], rounds: int, tokens: int) -> tuple[dict[str, list[Any]], list[Any]]:
    """Every contender's runs, and the matrix products of each round. Who goes first changes from round to round."""
    runs: dict[str, list[Any]] = {name: [] for name in names}
    products = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            products.append(measure_gemm(task.model, tokens))
            first = number % len(names)
            for name in names[first:] + names[:first]:
                if name not in runs:
                    continue
                print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
                try:
                    runs[name].append(run_contender(name, task, Path(folder)))
                except ContenderError as error:
                    print(f"{name} is left out: {error}", file=sys.stderr)
                    del runs[name]
    return runs, products


def main() -> None:
    options = options_given()
    names = []
    for name in CONTENDERS:
        reason = why_left_out(name, options.only, options.trl_path)
        if reason:
            print(f"{name} is left out: {reason}", file=sys.stderr)
        else:
            names.append(name)
    if not names:
        raise SystemExit("no contender is left")
    folder = resolve_model(QUICKSTART).path if options.model == QUICKSTART else random_model(options.tokenizer)
    rows, examples = usable_rows(resolve_data(options.data).path, folder)
    tokens, labelled = rates_of_steps(examples, options.steps, options.rows_a_step)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "rows.json")
        file.write_text(json.dumps(rows), encoding="utf-8")
        task = Task(str(folder), str(file), options.steps + WARM_UP, options.rows_a_step, options.trl_path)
        runs, products = timed_rounds(task, names, options.rounds, tokens)
    if not runs:
        raise SystemExit("every contender failed")
    gflops = {dtype: statistics.median(p[dtype] for p in products if dtype in p) for dtype in products[0]}
    date = time.strftime("%Y-%m-%d")
    rows_name = QUICKSTART if options.data == QUICKSTART else Path(options.data).name
    facts = Facts(
        options.model,
        rows_name,
        date,
        options.steps,
        options.rounds,
        tokens,
        labelled,
        options.trl_path,
        WARM_UP,
        options.rows_a_step,
    )
    result = summary(facts, runs, gflops, read_config(folder))
    print(table(result))
    if max(result["ceiling_share"].values(), default=0) > 1:
        print("a share above 1: something else slowed the matrix products down. Measure again", file=sys.stderr)
    if options.write:
        card = f"-{options.rows_a_step}-rows-on-a-card" if torch.cuda.is_available() else ""
        target = Path(__file__).parent / "results" / f"train_speed-{options.model}{card}-{date}.json"
        target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    if len(runs) < len(names):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
