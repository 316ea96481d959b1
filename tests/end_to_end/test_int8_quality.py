"""What int8 does to a real model on real rows: its loss, and the gradient of every LoRA matrix, against fp32."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from huarizo.data.packing import PackedBatch, pack
from huarizo.data.prompts import prompt_format
from huarizo.data.rows import Exchange, Row
from huarizo.data.tokens import Encoder
from huarizo.hub.quickstart import quickstart_model
from huarizo.machine import DTYPES, float_precision
from huarizo.model.frozen.load import load_quantised_base
from huarizo.model.load import load_base, load_tokenizer
from huarizo.model.lora import add_lora
from huarizo.model.loss import PackedLoss
from huarizo.recipe import make_recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows(real_rows_file: Path) -> list[PackedBatch]:
    """Packed batches: eight rows to calibrate on, and three times four to take gradients of."""
    tokenizer = load_tokenizer(quickstart_model())
    encoder = Encoder(tokenizer, prompt_format("alpaca", tokenizer))
    raw = json.loads(real_rows_file.read_text())[:20]
    conversations = [
        Row("rows", i, "", (Exchange(r["instruction"], r["input"], r["output"]),)) for i, r in enumerate(raw)
    ]
    examples = [example for example in encoder.encode(conversations) if example]
    return [pack(examples[:8]), *(pack(examples[i : i + 4]) for i in range(8, 20, 4))]


def loss_and_gradients(base: Any, batches: list[PackedBatch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss without the adapter, and the gradients with B not zero."""
    model = add_lora(base, make_recipe(lora={"dropout": 0}).lora, seed=0)
    packed_loss, count = PackedLoss(base), sum(batch.num_labels for batch in batches)
    with torch.no_grad():
        loss = sum(float(packed_loss(model, batch)) for batch in batches) / count
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    for batch in batches:
        (packed_loss(model, batch) / count).backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_loss_and_gradients_are_those_of_the_float_model(rows: list[PackedBatch]) -> None:
    dtype = DTYPES[float_precision(CPU)]
    folder, batches = quickstart_model(), rows[1:]
    plain_loss, plain = loss_and_gradients(load_base(folder, torch.float32, CPU), batches)
    loss, gradients = loss_and_gradients(load_quantised_base(folder, "int8", dtype, CPU, rows[0]), batches)
    assert abs(loss / plain_loss - 1) < 0.005
    assert gradients.keys() == plain.keys() and len(gradients) == 120
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    ours, theirs = (torch.cat([g[name].flatten() for name in plain]) for g in (gradients, plain))
    assert float(F.cosine_similarity(ours, theirs, dim=0)) > 0.99
    assert abs(float(ours.norm() / theirs.norm()) - 1) < 0.05
    worst = min(float(F.cosine_similarity(gradients[n].flatten(), plain[n].flatten(), dim=0)) for n in plain)
    assert worst > 0.95
