"""Types without a row that packs train on padded rows as stock Transformers and PEFT do, row by row.

With the rows of test_registry.py these are more than forty types; benchmarks/model_types.py tries all there are.
"""

from pathlib import Path

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.small_models import Trained, difference, save_small, small_config, stock, trained
from huarizo.model.architectures.registry import ARCHITECTURES
from huarizo.model.frozen.linear import FrozenLinear
from huarizo.model.merge import MergedWeights

DENSE = (
    "bloom", "exaone4", "falcon", "gemma4_text", "gpt_neo", "gptj",
    "hunyuan_v1_dense", "lfm2", "ministral3", "mpt", "nemotron", "olmo", "opt", "phi", "stablelm", "starcoder2",
)  # fmt: skip
EXPERTS = "deepseek_v3", "deepseek_v4", "gpt_oss", "granitemoe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"
ALONE = ("doge",)
INT8_COSINE = {"opt": 0.99, "nemotron": 0.99, "gemma4_text": 0.9}
"""Where rounding shows more: past the corner of a ReLU a gradient is another one, and Gemma 4's scores are not scaled,
so that with random weights its softmax takes one key or another."""


@pytest.fixture(scope="module", params=(*DENSE, *EXPERTS, *ALONE))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Trained]:
    """A small model of a type, its folder, and a step of it as Huarizo trains it."""
    folder = save_small(small_config(request.param), tmp_path_factory.mktemp("model"))
    return request.param, folder, trained(folder)


def test_a_step_equals_stocks(case: tuple[str, Path, Trained]) -> None:
    kind, folder, ours = case
    lora = ours.model.peft_config["default"]
    loss, gradients = stock(folder, lora)
    packs = kind in ARCHITECTURES and ARCHITECTURES[kind].packs
    assert ours.batching == ("packed" if packs else "alone" if kind in ALONE else "padded") and not ours.faults
    assert ours.loss == pytest.approx(loss, rel=1e-5)
    assert difference(ours.gradients, gradients) < 1e-5 and len(gradients) >= 4
    assert not lora.target_parameters, "experts have no LoRA"


def test_its_adapter_is_merged(case: tuple[str, Path, Trained], tmp_path: Path) -> None:
    _, folder, ours = case
    ours.model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    weights, merged = MergedWeights(folder, tmp_path), ours.model.merge_and_unload().state_dict()
    assert weights.changes
    for name in weights.changes:
        torch.testing.assert_close(weights[f"{name}.weight"], merged[f"{name}.weight"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", DENSE)
def test_an_int8_base_is_close_to_the_float_one(kind: str, tmp_path: Path) -> None:
    folder = save_small(small_config(kind), tmp_path / "model")
    plain, int8 = trained(folder), trained(folder, precision="int8")
    assert any(isinstance(module, FrozenLinear) for module in int8.model.modules())
    assert int8.batching == "padded" and int8.loss == pytest.approx(plain.loss, rel=1e-2)
    ours, exact = (torch.cat([g[name].flatten() for name in sorted(g)]) for g in (int8.gradients, plain.gradients))
    assert torch.cosine_similarity(ours, exact, dim=0) > INT8_COSINE.get(kind, 0.998)


def test_there_are_forty_types() -> None:
    tried = {name for name, row in ARCHITECTURES.items() if row.packs} | {*DENSE, *EXPERTS, *ALONE}
    assert len(tried) >= 40 and tried <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
