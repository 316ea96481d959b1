"""A random base with a random adapter on it, as the parts of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GemmaTokenizer, PreTrainedTokenizerFast

from huarizo.data.prompts import prompt_format
from huarizo.data.tokens import Encoder
from huarizo.inference.artifact import Tuned
from huarizo.model.load import load_tokenizer
from huarizo.model.lora import add_lora
from huarizo.recipe import make_recipe
from huarizo.results.verify import PROMPTS
from tests.tiny import CHATML, SPECIALS, make_model, make_tokenizer


def trained_tokenizer(texts: Sequence[str] = (), steps: Sequence[Any] = ()) -> Any:
    """A byte-level BPE of 400 tokens that was trained on a few texts.

    texts: others to train it on, as they are, so that tokens reach over everything that `steps` splits."""
    backend = make_tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=1200 if texts else 400, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    fresh = Tokenizer(models.BPE())
    fresh.pre_tokenizer, fresh.decoder = backend.pre_tokenizer, backend.decoder
    if texts:
        fresh.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fresh.train_from_iterator([text * 3 for text in texts or PROMPTS], trainer)
    if texts:
        fresh.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return PreTrainedTokenizerFast(
        tokenizer_object=fresh, bos_token="<s>", eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )


def gemma_tokenizer(template: str | None = CHATML) -> Any:
    """SentencePiece as Gemma has it: BPE with byte fallback over texts with ▁ for each space, and none in front."""
    texts = [prompt.replace(" ", "▁") for prompt in PROMPTS] * 3
    trained = Tokenizer(models.BPE())
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, max_token_length=8))
    first = ["<pad>", "</s>", "<bos>", "<unk>", *SPECIALS[:2], "\n\n", "▁▁"]
    pieces = [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    names = list(dict.fromkeys([*first, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]))
    vocabulary = {name: number for number, name in enumerate(names)}
    merges: Any = [
        (piece[:cut], piece[cut:])
        for piece in ["▁▁", *pieces]
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    made: Any = GemmaTokenizer(vocab=vocabulary, merges=merges, eos_token="</s>", mask_token="<pad>")
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIALS[:2]]
    made.add_tokens([*special, AddedToken("\n\n", normalized=False), AddedToken("▁▁", normalized=False)])
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    made.chat_template = template
    return made


def make_other(model_type: str, **config: Any) -> Any:
    """A small model of another type with random weights; norms and biases are random too."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 2, "eos_token_id": 1,
        "pad_token_id": 1,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**sizes | config))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.2)
    return model


def make_tuned(
    folder: Path,
    tokenizer: Any = None,
    options: Any = None,
    prompt: str = "auto",
    targets: Sequence[str] | str = ("q_proj", "v_proj"),
    model_type: str = "llama",
    **config: Any,
) -> Tuned:
    """A random base, a random adapter, and the prompts of a chat template, or Alpaca's."""
    base, adapter = folder / "base", folder / "adapter"
    tokenizer = tokenizer or trained_tokenizer()
    config = {"initializer_range": 0.2, "vocab_size": len(tokenizer)} | config
    model: Any = make_model(**config) if model_type == "llama" else make_other(model_type, **config)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    recipe = make_recipe(lora={"r": 4, "target_modules": targets, "options": options or {}})
    tuned = add_lora(model.requires_grad_(False), recipe.lora, 0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(str(adapter), save_embedding_layers=False)
    loaded = load_tokenizer(base)
    return Tuned(recipe, base, adapter, Encoder(loaded, prompt_format(prompt, loaded)))
