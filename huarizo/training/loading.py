"""Loads the model that a run trains: the frozen base in the planned precision, with a new LoRA."""

from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from huarizo.data.packing import pack_within
from huarizo.data.padding import Within, each_alone, pad_within
from huarizo.data.tokens import Example
from huarizo.machine import device
from huarizo.model.added_tokens import lengthen, rows_to_train
from huarizo.model.batching import planned_batching
from huarizo.model.frozen.load import load_quantised_base
from huarizo.model.frozen.storages import STORAGES
from huarizo.model.load import load_base, read_config
from huarizo.model.lora import add_lora
from huarizo.plan import Batching, Choice
from huarizo.training.prepare import Prepared

CALIBRATION_ROWS, CALIBRATION_TOKENS = 16, 2048  # at most; from the training rows


def load_frozen(folder: Path, choice: Choice, rows: Dataset, over_all: bool | None = None) -> PreTrainedModel:
    """Load the frozen base onto this device, in the chosen precision.

    rows: the tokenised training rows. A quantised base is calibrated on the first few: they show its outlier channels.
    over_all: whether a float base is spread over all GPUs; None: if one can't hold it.
    """
    if choice.precision not in STORAGES:
        return load_base(folder, choice.dtype, device(), over_all)
    first = rows.select(range(min(CALIBRATION_ROWS, len(rows)))).to_list()
    examples = [Example.from_row(row) for row in first]
    batching, _ = planned_batching(read_config(folder))
    within: dict[Batching, Within] = {"packed": pack_within, "padded": pad_within, "alone": each_alone}
    batch = next(within[batching](CALIBRATION_TOKENS, examples, None))
    return load_quantised_base(folder, choice.precision, choice.dtype, device(), batch)


def load_model(prepared: Prepared) -> PeftModel:
    """Load the frozen base and add a new LoRA."""
    recipe, tokenizer = prepared.recipe, prepared.data.encoder.tokenizer
    plan = prepared.plan
    model = load_frozen(prepared.model_source.path, plan.choice, prepared.data.train.dataset, plan.spread)
    tokens = rows_to_train(tokenizer, recipe.data.special_tokens or [], model.config.vocab_size)
    lengthen(model, max(tokens, default=-1) + 1)
    model = add_lora(model, recipe.lora, recipe.training.seed, tokens)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = prepared.model_source.reference, prepared.model_source.revision
    return model
