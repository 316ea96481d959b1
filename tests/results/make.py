"""A random base with a random adapter on it, as the parts of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from huarizo.data.prompts import prompt_format
from huarizo.data.tokens import Encoder
from huarizo.inference.artifact import Tuned
from huarizo.model.load import load_tokenizer
from huarizo.model.lora import add_lora
from huarizo.recipe import make_recipe
from huarizo.results.verify import PROMPTS
from tests.tiny import CHATML, SPECIALS, make_model, make_tokenizer


def trained_tokenizer() -> Any:
    """A byte-level BPE of 400 tokens that was trained on a few texts."""
    backend = make_tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    fresh = Tokenizer(models.BPE())
    fresh.pre_tokenizer, fresh.decoder = backend.pre_tokenizer, backend.decoder
    fresh.train_from_iterator([prompt * 3 for prompt in PROMPTS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=fresh, bos_token="<s>", eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )


def make_tuned(
    folder: Path,
    tokenizer: Any = None,
    options: Any = None,
    prompt: str = "auto",
    targets: Sequence[str] = ("q_proj", "v_proj"),
    **config: Any,
) -> Tuned:
    """A random base, a random adapter, and the prompts of a chat template, or Alpaca's."""
    base, adapter = folder / "base", folder / "adapter"
    tokenizer = tokenizer or trained_tokenizer()
    model = make_model(**({"initializer_range": 0.2, "vocab_size": len(tokenizer)} | config))
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    recipe = make_recipe(lora={"r": 4, "target_modules": list(targets), "options": options or {}})
    tuned = add_lora(model.requires_grad_(False), recipe.lora, 0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(str(adapter), save_embedding_layers=False)
    loaded = load_tokenizer(base)
    return Tuned(recipe, base, adapter, Encoder(loaded, prompt_format(prompt, loaded)))
