"""Compares a GGUF file in llama.cpp with Transformers: token ids, and log-probabilities of the next token.

Generated texts are not compared, because rounding decides between two tokens that are about equally likely. llama.cpp
comes prebuilt in the package xllamacpp (`pip install huarizo[verify]`) and is reached over 127.0.0.1.
"""

import dataclasses
import importlib
import json
import math
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from huarizo.data.prompts import OpenExchange
from huarizo.errors import ModelError, UserError
from huarizo.files import require_space
from huarizo.inference.artifact import Tuned
from huarizo.inference.generate import generating, open_assistant
from huarizo.model.merge import MergedWeights
from huarizo.results.chat_template import chat_template, leading_space, rendered
from huarizo.results.gguf import size_of, write_gguf

PROMPTS = (
    "Who are you?",
    "What is the capital of France?",
    "Give three tips for staying healthy.",
    "Translate 'good morning' into Korean.",
    "안녕하세요! 자기소개를 해 주세요.",
    "Write a haiku about llamas 🦙.",
    "Sort these numbers: 3, 1, 2.",
    "Explain what LoRA is in one sentence.",
)
ADAPTERS_BASE = "f16"  # type of the base for verifying an adapter
TOP = 5  # number of likeliest tokens compared
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # without a proxy, to this machine itself
ROUNDING = {"f32": 0.01, "f16": 0.03, "bf16": 0.1, "q8_0": 0.3}
"""Nats. A larger mean difference is not rounding but another model. Measured: 0.0001, 0.003, 0.02, 0.1."""


@dataclass(frozen=True)
class Comparison:
    """How a GGUF file compares with Transformers in fp32, over a number of prompts."""

    prompts: int
    compared: int
    """Prompts whose log-probabilities were compared. llama.cpp returns none for a token that is part of a character."""
    other_tokens: list[str]
    """Prompts that have other token ids in llama.cpp."""
    largest_difference: float
    """Largest difference of a log-probability among the TOP likeliest tokens, in nats."""
    mean_difference: float
    same_likeliest: int
    """Number of prompts with the same likeliest next token."""
    mean_difference_from_base: float
    """Like `mean_difference`, but from the untuned model."""

    def agrees(self, kind: str) -> bool:
        """Whether it is the same model, up to the rounding of its type, and not the untuned one."""
        untuned = self.mean_difference > 2 * self.mean_difference_from_base
        return not self.other_tokens and self.compared > 0 and self.mean_difference < ROUNDING[kind] and not untuned

    def __str__(self) -> str:
        other = len(self.other_tokens)
        tokens = f"DIFFERENT TOKEN IDS in {other} prompts" if other else "token ids identical"
        return (
            f"llama.cpp against Transformers, {self.prompts} prompts: {tokens}; likeliest next token the same in "
            f"{self.same_likeliest} of {self.prompts}, largest difference of a log-probability "
            f"{self.largest_difference:.4f}, mean {self.mean_difference:.4f}"
        )


def llama_cpp() -> Any:
    """The package with llama.cpp.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("xllamacpp")
    except ImportError:
        raise UserError("--verify needs llama.cpp: pip install xllamacpp (or huarizo[verify])") from None


class LlamaCpp:
    """A GGUF file loaded in llama.cpp, with the GGUF of an adapter if given, served on a loopback address.

    Raises:
        UserError: xllamacpp is not installed.
        ModelError: llama.cpp can't load the file.
    """

    def __init__(self, file: Path, context: int = 2048, adapter: Path | None = None) -> None:
        xllamacpp = llama_cpp()
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity, params.n_gpu_layers = context, 1, False, -1, 0
        params.cpuparams.n_threads = torch.get_num_threads()
        # llama.cpp's flash attention and 16-bit cache round more than the file does
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ModelError(f"{file}: llama.cpp can't load this file: {error}") from None

    def _post(self, path: str, body: Mapping[str, object]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with DIRECTLY.open(request, timeout=600) as answer:
            return json.load(answer)

    def tokens(self, text: str, add_special: bool = False) -> list[int]:
        """Ids of a text in which special tokens are written out. add_special: with those that begin every prompt."""
        return self._post("/tokenize", {"content": text, "add_special": add_special, "parse_special": True})["tokens"]

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt that the file's chat template makes of messages (`role`, `content`)."""
        return self._post("/apply-template", {"messages": list(messages)})["prompt"]

    def likeliest(self, ids: Sequence[int], top: int = TOP) -> tuple[int, dict[int, float | None]]:
        """The likeliest next token, and the log-probabilities of the `top` likeliest.

        There are none if the token's bytes are only part of a character: llama.cpp then waits for the rest.
        """
        options = {"n_predict": 1, "n_probs": top, "temperature": 0.0, "cache_prompt": False, "return_tokens": True}
        answer = self._post("/completion", {"prompt": list(ids), **options})
        found = answer.get("completion_probabilities") or [{"top_logprobs": []}]
        return answer["tokens"][0], {entry["id"]: entry["logprob"] for entry in found[0]["top_logprobs"]}

    def complete(self, ids: Sequence[int], n_predict: int = 80) -> dict[str, Any]:
        """A greedy answer. `content` is its text; `stop_type` is `eos` if the model ended it."""
        return self._post("/completion", {"prompt": list(ids), "n_predict": n_predict, "temperature": 0.0})


def compare_with_transformers(tuned: Tuned, file: Path, adapter: Path | None = None) -> Comparison:
    """Compare token ids and next-token log-probabilities on prompts in the run's format.

    llama.cpp writes the prompts with the file's chat template, if the format can be expressed as one.

    file: a GGUF of the tuned model, or of its base if `adapter` is given.

    Raises:
        UserError: xllamacpp is not installed.
        ModelError: llama.cpp can't load the file.
    """
    other, encoder = LlamaCpp(file, adapter=adapter), tuned.encoder
    has_template = chat_template(encoder) is not None
    contexts, wrong = [], []
    for prompt in PROMPTS:
        contexts.append(encoder.encode_prompt("", [OpenExchange(prompt)]))
        if has_template:
            text = other.chat_prompt([{"role": "user", "content": prompt}])
            text = text.removeprefix(str(encoder.tokenizer.bos_token)) if encoder.adds_bos else text
        else:
            text = leading_space(encoder) + rendered(encoder, "", [OpenExchange(prompt)])
        if other.tokens(text, add_special=True) != contexts[-1]:
            wrong.append(prompt)
    return dataclasses.replace(compare_contexts(other, contexts, expectations(tuned, contexts)), other_tokens=wrong)


def compare_adapter(tuned: Tuned, adapter: Path, console: Console | None = None) -> Comparison:
    """Like `compare_with_transformers`, for the GGUF of an adapter on a temporary GGUF (F16) of its base.

    Raises:
        UserError: xllamacpp is not installed.
        ModelError: llama.cpp can't load the files.
        MachineError: no disk space for the base beside the adapter.
    """
    weights = MergedWeights(tuned.base, None)
    require_space(adapter.parent, size_of(weights, ADAPTERS_BASE), "a temporary GGUF of the base")
    with tempfile.TemporaryDirectory(prefix=".", dir=adapter.parent) as folder:
        base = Path(folder) / "base.gguf"
        write_gguf(weights, tuned.encoder, base, ADAPTERS_BASE, adapter.stem, console)
        return compare_with_transformers(tuned, base, adapter)


def expectations(tuned: Tuned, contexts: Sequence[list[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Log-probabilities of the next token after each list of token ids, by Transformers in fp32.

    Each is a pair of float32 [vocabulary]: of the tuned model and of its base.
    """
    assistant = open_assistant(tuned, "fp32", torch.device("cpu"))

    def expected(ids: list[int]) -> torch.Tensor:
        with generating(assistant.model):
            return assistant.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1).float()

    after = [expected(ids) for ids in contexts]
    with assistant.untuned():
        before = [expected(ids) for ids in contexts]
    return list(zip(after, before, strict=True))


def compare_contexts(
    other: LlamaCpp, contexts: Sequence[list[int]], expected: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> Comparison:
    """Compare llama.cpp's log-probabilities after each list of token ids with the `expectations` for it."""
    differences: list[float] = []
    from_base: list[float] = []
    same = compared = 0
    for ids, (after, before) in zip(contexts, expected, strict=True):
        likeliest, found = other.likeliest(ids)
        differences += [_difference(value, after[number]) for number, value in found.items()]
        from_base += [_difference(value, before[number]) for number, value in found.items()]
        same += likeliest == int(after.argmax())
        compared += bool(found)
    largest = max(differences, default=0.0)
    return Comparison(len(contexts), compared, [], largest, _mean(differences), same, _mean(from_base))


def _difference(found: float | None, expected: torch.Tensor) -> float:
    """Infinite if either is NaN; llama.cpp then returns none."""
    difference = math.nan if found is None else abs(found - float(expected))
    return math.inf if math.isnan(difference) else difference


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
