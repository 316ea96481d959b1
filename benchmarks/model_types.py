"""Every causal type of Transformers, small and with random weights: how Huarizo trains it, and whether that is right.

    python benchmarks/model_types.py [TYPE ...] [--write]

Each type is made small (small_models.py), written as a model folder and trained for a step in fp32 in a process of its
own: loss and LoRA gradients of a few rows, beside those of stock Transformers and PEFT, row by row.

- fast: packed without padding, with Huarizo's attention. - general: padded, or row by row, with the model's own.
- refused: told by config.json alone. - not small: no small model can be made of it here.
- wrong: anything else, such as another loss or an error.
"""

import argparse
import json
import multiprocessing
import tempfile
import warnings
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from small_models import difference, save_small, small_config, stock, trained
from summary import machine, versions
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from huarizo.hub.model_types import unsuitable
from huarizo.wording import first_line

SECONDS = 600  # for one type
BAR = 1e-5  # of loss and gradients, relative
RESULTS = Path(__file__).parent / "results"
Kind = Literal["fast", "general", "refused", "not small", "wrong"]


class Found(NamedTuple):
    """What came out for a type."""

    kind: Kind
    why: str
    """The reason, or how it was trained."""
    loss: float | None = None
    """The difference from stock, relative."""
    gradients: float | None = None


def tried(model_type: str) -> Found:
    try:
        config = CONFIG_MAPPING[model_type]().to_dict()
    except Exception:  # a configuration that has no defaults
        config = {"model_type": model_type}
    if problem := unsuitable(config):
        return Found("refused", problem.partition(" (")[0])
    try:
        small = small_config(model_type)
        folder = tempfile.TemporaryDirectory()
        save_small(small, Path(folder.name))
    except Exception as error:  # anything that a model's code raises
        return Found("not small", first_line(error))
    with folder as name:
        try:
            ours = trained(Path(name))
            loss, gradients = stock(Path(name), ours.model.peft_config["default"])
        except Exception as error:  # anything that a model's code raises
            return Found("wrong", first_line(error))
    apart = abs(ours.loss - loss) / loss, difference(ours.gradients, gradients)
    kind: Kind = "fast" if ours.batching == "packed" else "general"
    if max(apart) > BAR:
        kind = "wrong"
    return Found(kind, ", ".join([ours.batching, *ours.faults]), *apart)


def _in_process(model_type: str, sender: Any) -> None:
    sender.send(tried(model_type))


def found_of(model_type: str) -> Found:
    """What comes out for a type, in a process that is ended where it takes too long."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_in_process, args=(model_type, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(SECONDS) else Found("wrong", f"it takes over {SECONDS} seconds")
    except EOFError:
        return Found("wrong", "its process ended")
    finally:
        process.kill()
        process.join()


def line_of(model_type: str, found: Found) -> str:
    """A line of the table."""
    apart = [f"{number:.0e}" if number is not None else "" for number in (found.loss, found.gradients)]
    return f"| {model_type} | {found.kind} | {apart[0]} | {apart[1]} | {found.why} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    lines = ["| type | path | loss | gradients | |", "|---|---|---|---|---|"]
    print("\n".join(lines))
    found = {}
    for model_type in options.types:
        found[model_type] = found_of(model_type)
        lines.append(line_of(model_type, found[model_type]))
        print(lines[-1], flush=True)
    counts = Counter(each.kind for each in found.values())
    facts = {"date": date.today().isoformat(), **counts, "machine": machine(), "versions": versions(None)}
    text = json.dumps(facts)
    if options.write:
        path = RESULTS / f"model_types-{facts['date']}.md"
        path.write_text("\n".join([*lines, "", f"`{text}`", ""]), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
