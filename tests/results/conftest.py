"""Fixtures that several tests of results share."""

import json
import shutil
from pathlib import Path

import pytest

from huarizo.inference.samples import samples_as_text
from huarizo.model.lora import add_lora
from huarizo.recipe import make_recipe, to_yaml
from huarizo.results.publish import CARD
from huarizo.runs import Run
from tests.results.finished import BROKEN_ANSWER, SAMPLES, SECRET, change_json, write_gguf
from tests.tiny import make_model, make_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a local base, with much in it that is nobody else's business."""
    root = tmp_path_factory.mktemp("somewhere")
    base, run = root / "my-llama", Run(root / "runs" / "hello")
    model = make_model()
    model.save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    recipe = make_recipe(
        model=str(base),
        data={"train": str(root / "letters.json"), "prompt": "chat"},
        lora={"r": 4, "target_modules": ["q_proj", "v_proj"]},
    )
    run.path.mkdir(parents=True)
    tuned = add_lora(model.requires_grad_(False), recipe.lora, 0)
    tuned.save_pretrained(str(run.adapter), save_embedding_layers=False)
    make_tokenizer().save_pretrained(run.adapter)
    change_json(run.adapter / "adapter_config.json", base_model_name_or_path=str(base))
    change_json(run.adapter / "tokenizer_config.json", name_or_path=str(base), deep=[{"cache": "~/models", "kept": 1}])
    (run.adapter / CARD).write_text(f"trained in {root}")
    for name in (".env", "adapter/.env", "adapter/optimizer.pt", "adapter/training_args.bin", "adapter/rows.json"):
        (run.path / name).write_text(SECRET)
    run.recipe_file.write_text(to_yaml(recipe))
    run.metrics.write_text('{"step": 0, "eval_loss": 3.5}\n{"step": 1, "loss": 3.0}\n{"step": 2, "eval_loss": 1.25}\n')
    lines = samples_as_text([s for s in SAMPLES if s.after != BROKEN_ANSWER])
    surrogate = json.dumps({"prompt": "", "instruction": "Break out", "input": "of it", "before": "```", "after": BROKEN_ANSWER, "expected": ""})  # fmt: skip
    run.samples.write_text(surrogate + "\n" + lines)
    write_gguf(run.path / "hello-f16.gguf")
    shutil.copytree(base, run.path / "merged")
    change_json(run.path / "merged" / "config.json", _name_or_path=str(base))
    for name in ("LICENSE.txt", "USE_POLICY.md", "NOTICE"):
        (run.path / "merged" / name).write_text("terms")
    for name in ("notes.txt", "pytorch_model.bin", ".env"):
        (run.path / "merged" / name).write_text(SECRET)
    return root


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Run:
    """A copy of that run, to be changed; its base is where it was."""
    shutil.copytree(made / "runs", tmp_path / "runs", symlinks=True)
    return Run(tmp_path / "runs" / "hello")
