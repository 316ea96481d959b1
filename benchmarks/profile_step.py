"""Where the time of a training step goes, by kind of work, with the layers compiled.

    python benchmarks/profile_step.py --model quickstart|FOLDER --data ROWS.json [--precision int8] [--write NAME]

Steps of 4 rows, LoRA r=8 on q and v, dropout 0.05, as in train_speed.py; the profiler's own cost is in the figures.
A table goes to stdout, and as its last line one JSON object; --write keeps it under benchmarks/results/.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from gemm import flop_per_token
from summary import machine, versions

from huarizo.data.packing import num_labels, pack
from huarizo.data.tokens import Example
from huarizo.model.compile import compile_layers
from huarizo.model.dropout import DropoutMasks
from huarizo.model.load import read_config
from huarizo.model.loss import PackedLoss
from huarizo.recipe import make_recipe
from huarizo.training.loading import load_model
from huarizo.training.prepare import prepare

STEPS, ROWS_A_STEP, WARM_UP = 4, 4, 2


def kind_of(event: Any, vocabulary: int) -> str | None:
    """The kind of work of a profiled operation; None for those that only call others."""
    name, shapes = event.key, event.input_shapes
    if name in ("aten::_int_mm", "huarizo::int8_forward", "huarizo::int8_backward"):
        return "int8 products"
    if name in ("aten::mm", "aten::addmm", "aten::bmm"):
        if any(vocabulary in shape for shape in shapes):
            return "output head"
        thin = min(min(shape, default=10**9) for shape in shapes if shape) <= 64
        return "LoRA" if thin else "float products"
    if "packed_attention" in name:
        return "attention"
    if "dropped_linear" in name or "hashed_dropout" in name:
        return "LoRA"
    if name == "huarizo::int8_quantise":
        return "quantising"
    if "cpp_fused" in name or "triton" in name:
        return "loss, elementwise" if "exp_gather" in name else "norms, rope, SiLU, sums"
    return "all else"


def profiled(recipe: Any) -> tuple[dict[str, float], int, int, float]:
    """Milliseconds a step by kind, tokens and labels of all steps, and seconds a step without the profiler."""
    import torch._inductor.config as inductor

    inductor.cpp.enable_kernel_profile = True
    prepared = prepare(recipe)
    model = load_model(prepared).train()
    masks = DropoutMasks(model, seed=0)
    if prepared.plan.compiled:
        compile_layers(model)
    loss = PackedLoss(model.get_base_model(), compiled=prepared.plan.compiled)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    rows = prepared.data.train.dataset
    examples = [Example.from_row(rows[index]) for index in range((WARM_UP + STEPS) * ROWS_A_STEP)]
    steps = [examples[at : at + ROWS_A_STEP] for at in range(0, len(examples), ROWS_A_STEP)]

    def step(examples: list[Example]) -> None:
        batch = pack(examples)
        masks.draw(0, batch.places)
        (loss(model, batch) / batch.num_labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    for examples in steps[:WARM_UP]:
        step(examples)
    timed = steps[WARM_UP:]
    began = time.perf_counter()
    for examples in timed:
        step(examples)
    seconds = (time.perf_counter() - began) / STEPS
    with torch.profiler.profile(record_shapes=True) as profile:
        for examples in timed:
            step(examples)
    kinds: dict[str, float] = {}
    vocabulary = model.get_base_model().config.vocab_size
    for event in profile.key_averages(group_by_input_shape=True):
        kind = kind_of(event, vocabulary)
        if kind is not None:
            kinds[kind] = kinds.get(kind, 0) + event.self_cpu_time_total / 1000 / STEPS
    tokens = sum(len(example.input_ids) for examples in timed for example in examples)
    return kinds, tokens, sum(num_labels(examples) for examples in timed), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart")
    parser.add_argument("--data", required=True)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--write", metavar="NAME")
    chosen = parser.parse_args()
    transformers.logging.set_verbosity_error()
    recipe = make_recipe(model=chosen.model, data={"train": chosen.data, "eval": 0, "prompt": "alpaca"},
                         precision=chosen.precision)  # fmt: skip
    kinds, tokens, labels, seconds = profiled(recipe)
    whole = sum(kinds.values())
    print(f"{tokens / STEPS:.0f} tokens a step, {1000 * seconds:.0f} ms without the profiler, {whole:.0f} ms with it")
    for kind, milliseconds in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"{kind:<42}{milliseconds:>9.1f} ms{100 * milliseconds / whole:>7.1f} %")
    config = read_config(prepare(recipe).model_source.path)
    result = {
        "model": chosen.write or Path(chosen.model).name, "precision": chosen.precision,
        "tokens_a_step": tokens / STEPS, "step_ms": round(1000 * seconds, 1),
        "gflop_per_token": round(flop_per_token(config, labels / tokens) * 1e-9, 3),
        "milliseconds": {kind: round(value, 1) for kind, value in kinds.items()},
        "date": time.strftime("%Y-%m-%d"), "machine": machine(), "versions": versions(None),
    }  # fmt: skip
    if chosen.write:
        target = Path(__file__).parent / "results" / f"profile-{chosen.write}-{result['date']}.json"
        target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
