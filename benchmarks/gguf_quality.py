"""How near a run's GGUF files come to Transformers: likelihoods in llama.cpp, in every type that is exported.

    python benchmarks/gguf_quality.py RUN [--data ROWS.json] [--types f32,f16,bf16,q8_0]

Two sets of contexts: 20 prompts, and 200 places inside the rows' own answers (10 in each of 20 rows, evenly spread).
Transformers computes base and adapter in fp32. The last line of stdout is one JSON object; --write keeps it under
benchmarks/results/. The merged model's own rounding is measured as well: the largest difference of a logit between
base and adapter in fp32 and the merged weights, kept in fp32 and rounded to bf16; beside it what that rounding does to
the base alone.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from summary import machine, versions

from huarizo.data.prompts import OpenExchange
from huarizo.data.rows import Row, read_rows, require_good
from huarizo.hub.names import resolve_data
from huarizo.inference.artifact import Tuned, find_tuned
from huarizo.inference.generate import generating
from huarizo.model.adapter import load_adapter
from huarizo.model.load import load_base
from huarizo.model.merge import MergedWeights
from huarizo.results.gguf import export_gguf
from huarizo.results.verify import LlamaCpp, compare_contexts, expectations

ROWS, PLACES = 20, 10


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data", default="quickstart")
    parser.add_argument("--types", default="f32,f16,bf16,q8_0")
    parser.add_argument("--write", action="store_true")
    return parser.parse_args()


def contexts(tuned: Tuned, rows: list[Row]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the rows' prompts, and of the rows up to places inside their answers."""
    prompts, places = [], []
    for row, example in zip(rows, tuned.encoder.encode(rows), strict=True):
        first = row.exchanges[0]
        prompts.append(tuned.encoder.encode_prompt(row.system, [OpenExchange(first.instruction, first.input)]))
        assert example is not None
        begin, end = len(prompts[-1]), len(example.input_ids) - 1
        places += [example.input_ids[: begin + (end - begin) * n // PLACES] for n in range(PLACES)]
    return prompts, places


@torch.no_grad()
def logits(model: Any, prompts: list[list[int]]) -> list[torch.Tensor]:
    with generating(model):
        return [model(torch.tensor([ids])).logits[0].double() for ids in prompts]


def merging(tuned: Tuned, prompts: list[list[int]]) -> dict[str, float]:
    """Largest difference of a logit between base and adapter in fp32 and the merged weights, by their dtype."""
    cpu, found = torch.device("cpu"), {}
    base = logits(load_base(tuned.base, torch.float32, cpu), prompts)
    tuned_logits = logits(load_adapter(load_base(tuned.base, torch.float32, cpu), tuned.adapter), prompts)
    for name, dtype, adapter, expected in (
        ("fp32", torch.float32, tuned.adapter, tuned_logits),
        ("bf16", torch.bfloat16, tuned.adapter, tuned_logits),
        ("base rounded to bf16", torch.bfloat16, None, base),
    ):
        weights, model = MergedWeights(tuned.base, adapter), load_base(tuned.base, torch.float32, cpu)
        model.load_state_dict({key: weights[key].to(dtype).float() for key in weights.names()}, strict=False)
        pairs = zip(logits(model, prompts), expected, strict=True)
        found[name] = max(float((actual - wanted).abs().max()) for actual, wanted in pairs)
        print(f"merged, {name}: logits differ by {found[name]:.6f} at most", flush=True)
    return found


def main() -> None:
    chosen = options()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tuned = find_tuned(chosen.run)
    rows = require_good(read_rows(resolve_data(chosen.data, heldout=True).path), "fail")
    prompts, places = contexts(tuned, [row for row in rows if len(row.exchanges[0].output) > 40][:ROWS])
    contexts_of = {"prompts": prompts, "places": places}
    expected = {name: expectations(tuned, ids) for name, ids in contexts_of.items()}
    result: dict[str, Any] = {"merged_logits": merging(tuned, prompts), "types": {}}
    with tempfile.TemporaryDirectory() as folder:
        for kind in chosen.types.split(","):
            file = export_gguf(tuned, Path(folder) / f"{kind}.gguf", kind)
            found = {"bytes": file.stat().st_size}
            for name, ids in contexts_of.items():
                compared = compare_contexts(LlamaCpp(file), ids, expected[name])
                found[name] = dataclasses.asdict(compared)
                del found[name]["other_tokens"]  # `huarizo export --verify` compares those
                print(
                    f"{kind:<5} {name:<8} likeliest the same in {compared.same_likeliest} of {compared.prompts}, "
                    f"log-probabilities differ by {compared.largest_difference:.4f} at most, "
                    f"{compared.mean_difference:.4f} on average",
                    flush=True,
                )
            result["types"][kind] = found
            file.unlink()
    about = {"model": tuned.recipe.model, "rows": chosen.data, "date": time.strftime("%Y-%m-%d")}
    result = about | result | {"machine": machine(), "versions": versions(None)}
    if chosen.write:
        target = Path(__file__).parent / "results" / f"gguf_quality-{Path(about['model']).name}-{about['date']}.json"
        target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
