"""Tasks of lm-eval, which is stood in for by a small module."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from huarizo.errors import UserError
from huarizo.inference.generate import open_assistant
from huarizo.results.harness import run_harness
from tests.results.make import make_tuned


def test_the_harness_is_given_the_base_and_the_tuned_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assistant = open_assistant(make_tuned(tmp_path), "fp32")
    with pytest.raises(UserError, match="names of tasks"):
        run_harness(lambda: assistant, [])
    with pytest.raises(UserError, match="pip install lm-eval"):
        run_harness(lambda: assistant, ["hellaswag"])
    seen: list[Any] = []

    def simple_evaluate(model: Any, tasks: list[str], limit: int | None, **_: Any) -> dict[str, Any]:
        if tasks == ["unknown"]:
            raise KeyError("unknown task")
        active = model["pretrained"].base_model.model.model.layers[0].self_attn.q_proj.disable_adapters
        seen.append((active, model["pretrained"].get_base_model().config._attn_implementation, limit))
        return {"results": {"hellaswag": {"acc,none": 0.25 * len(seen), "alias": "hellaswag"}}}

    package, evaluator = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.evaluator")
    wrapper = types.ModuleType("lm_eval.models.huggingface")
    evaluator.simple_evaluate, wrapper.HFLM = simple_evaluate, dict  # pyright: ignore
    modules = {"lm_eval": package, "lm_eval.evaluator": evaluator, "lm_eval.models": types.ModuleType("lm_eval.models")}
    for name, module in (modules | {"lm_eval.models.huggingface": wrapper}).items():
        monkeypatch.setitem(sys.modules, name, module)
    assert run_harness(lambda: assistant, ["hellaswag"], 5) == {"hellaswag": {"acc": {"before": 0.25, "after": 0.5}}}
    assert seen == [(True, "sdpa", 5), (False, "sdpa", 5)]
    with pytest.raises(UserError, match="lm-eval stopped at unknown"):
        run_harness(lambda: assistant, ["unknown"])
