"""Answers in batches and streamed: their text, their end, the settings that hold, and memory that runs short."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

from huarizo.data.packing import pack
from huarizo.data.prompts import OpenExchange, Question
from huarizo.data.tokens import Example
from huarizo.errors import MachineError, UserError
from huarizo.inference import generate
from huarizo.inference.artifact import Tuned
from huarizo.inference.generate import Assistant, Sampling, answers, open_assistant, stream_answer
from huarizo.model.attention import NAME as PACKED_ATTENTION
from huarizo.model.frozen.linear import FrozenLinear
from huarizo.model.frozen.load import load_quantised_base
from huarizo.model.frozen.peaks import peaks_of, read_peaks, write_peaks
from huarizo.plan import ModelSize, choose_precision, make_plan
from huarizo.runs import Run
from tests.cpus import AVX2, NO_COMPILER, pretend
from tests.inference.make import NO_MEMORY, PROMPTS, failing
from tests.results.make import make_tuned

CPU = torch.device("cpu")


def test_a_list_of_prompts_keeps_within_what_the_model_was_made_for(assistant: Assistant) -> None:
    length = len(assistant.encoder.encode_prompt("", [OpenExchange("x?" * 50)]))
    long = Question(OpenExchange("x?" * (50 + (256 - length - 8) // 2)))
    given = answers(assistant, [Question(OpenExchange("Hi")), long], 40)
    room = 256 - len(assistant.encoder.encode_prompt("", [long.turn]))
    assert given[1].tokens <= room < 40 and given[0].tokens > room
    with pytest.raises(UserError, match="the model supports at most 256"):
        answers(assistant, [Question(OpenExchange("Hi")), Question(OpenExchange("x?" * 400))])


def test_a_seed_draws_the_same_answer(assistant: Assistant) -> None:
    def drawn(seed: int, **options: Any) -> str:
        sampling = Sampling(12, temperature=1.5, top_p=1.0, seed=seed, **options)
        return stream_answer(assistant, [OpenExchange("Hi")], lambda _: None, "", sampling).text

    assert drawn(1) == drawn(1) and len({drawn(seed) for seed in range(5)}) > 1
    greedy = stream_answer(assistant, [OpenExchange("Hi")], lambda _: None, "", Sampling(12)).text
    assert drawn(1, top_k=1) == greedy


def test_answers_in_batches_are_those_given_one_by_one(assistant: Assistant) -> None:
    questions = [Question(OpenExchange(prompt)) for prompt in PROMPTS]
    assert answers(assistant, questions, 12, at_once=5) == [answers(assistant, [each], 12)[0] for each in questions]


def test_a_question_is_asked_with_its_system_text(assistant: Assistant) -> None:
    turn, systems = OpenExchange("Hi"), ("", "Be rude.", "Be kind.")
    single = [stream_answer(assistant, [turn], lambda _: None, system, Sampling(12)) for system in systems]
    assert answers(assistant, [Question(turn, system) for system in systems], 12) == single
    assert len({answer.text for answer in single}) == 3


@pytest.mark.parametrize("kind", ["gemma2", "gpt2"])
def test_other_architectures_answer_with_an_attention_that_they_support(kind: str) -> None:
    fields = {"n_embd": 32, "n_layer": 1, "n_head": 2} if kind == "gpt2" else {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "attn_logit_softcapping": 1.0,
    }  # fmt: skip
    config_class: Any = CONFIG_MAPPING[kind]
    config = config_class(vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2, **fields)
    model, ids = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval(), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(ids).logits
    model.set_attn_implementation(PACKED_ATTENTION)
    assistant: Any = SimpleNamespace(model=model)
    with generate.generating(model):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert generate._most_at_once(assistant, 20) >= 1
    assert model.config._attn_implementation == PACKED_ATTENTION


STREAMED = [
    "Here is the code:\n\ndef f(x):\n    if x:\n\t\treturn [1,  2]\n    return None\n\n\nf(1)",
    "뷁쀍은 낱말이 아니다.\n  훈민정음 🦙👩🏽‍🚀 끝\n",
    "  two spaces , and a blank before a comma . Isn't it ?\n",
    "🏔️",
    "half a letter \ufffd stays",
]


def stream(tokenizer: Any, ids: list[int], stops: list[int]) -> tuple[list[str], str]:
    """What is written while a model says these tokens, and the text of its answer."""
    written: list[str] = []
    config = GenerationConfig(eos_token_id=stops)
    streamer = generate._Streamer(tokenizer, config, written.append)
    streamer.put(torch.tensor([[1, 2, 3]]))
    for each in ids:
        streamer.put(torch.tensor([each]))
    streamer.end()
    assistant: Any = SimpleNamespace(encoder=SimpleNamespace(tokenizer=tokenizer))
    return written, generate._answer(assistant, ids, config).text


@pytest.mark.parametrize("text", STREAMED)
@pytest.mark.parametrize("name", ["sentencepiece", "bytes"])
def test_what_is_written_as_it_comes_is_the_answer(name: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue("tinyllama_tokenizer" if name == "sentencepiece" else "tiny_tokenizer")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    written, answer = stream(tokenizer, [*ids, tokenizer.eos_token_id], [tokenizer.eos_token_id])
    assert "".join(written) == answer == text.strip()
    assert "".join(written).count("\ufffd") == text.count("\ufffd")
    assert len(written) > len(text.split()) / 2


def test_a_letter_that_is_never_finished_is_written_at_the_end(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer("ab 라", add_special_tokens=False)["input_ids"][:-1]
    written, answer = stream(tiny_tokenizer, ids, [])
    assert "".join(written) == answer == "ab \ufffd" and "\ufffd" in written[-1]


def test_a_byte_that_spoils_the_letter_before_it_does_not_silence_the_rest(tinyllama_tokenizer: Any) -> None:
    letter, rest = (
        tinyllama_tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("A 뷁", "hello and more")
    )
    ids = [*letter, tinyllama_tokenizer.convert_tokens_to_ids("<0xE3>"), *rest]
    written, _ = stream(tinyllama_tokenizer, ids, [])
    assert "".join(written).endswith("hello and more")


def test_a_stop_that_is_an_ordinary_token_is_not_written(tiny_tokenizer: Any) -> None:
    *ids, stop = tiny_tokenizer("One.\nTwo#", add_special_tokens=False)["input_ids"]
    written, answer = stream(tiny_tokenizer, [*ids, stop], [stop])
    assert "".join(written) == answer == "One.\nTwo"


def test_a_streamed_answer_is_that_of_a_batch(assistant: Assistant) -> None:
    for prompt in PROMPTS:
        written: list[str] = []
        streamed = stream_answer(assistant, [OpenExchange(prompt)], written.append, "", Sampling(40))
        assert "".join(written) == streamed.text
        assert answers(assistant, [Question(OpenExchange(prompt))], 40) == [streamed]


def test_settings_of_generation_that_a_base_brings_have_no_say(tmp_path: Path) -> None:
    tuned, questions = make_tuned(tmp_path), [Question(OpenExchange(prompt)) for prompt in PROMPTS]
    expected = answers(open_assistant(tuned, "fp32"), questions, 12)
    likely = tuned.encoder.tokenizer(expected[0].text, add_special_tokens=False)["input_ids"]
    settings = {
        "num_beams": 4, "suppress_tokens": likely, "stop_strings": [expected[1].text[:2]], "min_new_tokens": 11, "top_k": 3,
        "repetition_penalty": 9.0, "do_sample": True, "temperature": 2.0, "forced_eos_token_id": 5, "max_length": 20,
    }  # fmt: skip
    (tuned.base / "generation_config.json").write_text(json.dumps(settings))
    assistant = open_assistant(tuned, "fp32")
    assert answers(assistant, questions, 12) == expected
    for question, answer in zip(questions, expected, strict=True):
        assert stream_answer(assistant, [question.turn], lambda _: None, "", Sampling(12)) == answer


@pytest.mark.parametrize("settings", ["[]", '{"num_beams": "x", "max_new_tokens": {}}', '{"to_dict": 1}'])
def test_odd_settings_of_generation_are_not_even_read(tmp_path: Path, settings: str) -> None:
    tuned = make_tuned(tmp_path)
    (tuned.base / "generation_config.json").write_text(settings)
    assert answers(open_assistant(tuned, "fp32"), [Question(OpenExchange("Say it"))], 3)
    rows = pack([Example([1], [1])])
    model = load_quantised_base(tuned.base, "int8", torch.float32, torch.device("cpu"), rows)
    assert model.generation_config.to_diff_dict().keys() <= {"transformers_version"}


@pytest.mark.parametrize("init", ["pissa", "olora", "gaussian", True])
def test_the_untuned_model_is_the_base_as_it_was(tmp_path: Path, init: Any) -> None:
    tuned = make_tuned(tmp_path, options={"init_lora_weights": init})
    plain = LlamaForCausalLM.from_pretrained(tuned.base)
    model = (assistant := open_assistant(tuned, "fp32")).model
    model.get_base_model().set_attn_implementation("sdpa")
    ids = torch.arange(20, 40)[None]

    @torch.no_grad()
    def logits() -> torch.Tensor:
        return model(input_ids=ids).logits

    before, expected = logits(), plain(input_ids=ids).logits.detach()
    with assistant.untuned():
        torch.testing.assert_close(logits(), expected, rtol=0, atol=1e-5)
    assert torch.equal(logits(), before) and float((before - expected).abs().max()) > 0.1
    with pytest.raises(KeyboardInterrupt), assistant.untuned():
        raise KeyboardInterrupt
    with assistant.untuned(False):
        assert torch.equal(logits(), before)


def test_a_layer_that_was_trained_whole_is_the_bases_own_in_the_untuned_model(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    tuned = make_tuned(tmp_path)
    plain, adapted = (LlamaForCausalLM.from_pretrained(tuned.base) for _ in range(2))
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    peft = get_peft_model(adapted, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "modules_to_save" in name or "lora_B" in name:
                parameter += 0.1
    peft.save_pretrained(str(tuned.adapter), save_embedding_layers=False)
    assistant = open_assistant(tuned, "fp32")
    assistant.model.get_base_model().set_attn_implementation("sdpa")
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(assistant.model(input_ids=ids).logits, peft(input_ids=ids).logits)
        with assistant.untuned():
            torch.testing.assert_close(assistant.model(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("no memory"), NO_MEMORY, MemoryError()])
def test_where_memory_is_short_batches_get_smaller(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    questions = [Question(OpenExchange(prompt)) for prompt in PROMPTS]
    expected, answered, sizes, fitting = answers(assistant, questions, 8), generate._answered, [], 2

    def short_of_memory(assistant: Assistant, prompts: Any, config: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > fitting:
            raise error
        return answered(assistant, prompts, config)

    monkeypatch.setattr(generate, "_answered", short_of_memory)
    assert answers(assistant, questions, 8, at_once=5) == expected and sizes == [5, 2, 2, 1]
    fitting = 0
    with pytest.raises(MachineError, match="not enough memory"):
        answers(assistant, questions, 8)


def test_another_error_is_not_taken_for_a_lack_of_memory(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(assistant.model), "generate", failing(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        stream_answer(assistant, [OpenExchange("Hi")], lambda _: None)
    with pytest.raises(RuntimeError, match="shapes differ"):
        answers(assistant, [Question(OpenExchange("Hi"))] * 2)


@pytest.mark.parametrize("error", [NO_MEMORY, MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory")])
def test_a_model_that_memory_does_not_hold_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    tuned = make_tuned(tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", failing(error))
    with pytest.raises(MachineError, match="not enough memory for this model"):
        open_assistant(tuned, "fp32")


def test_a_batch_takes_no_more_than_its_share_of_memory(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    answered, questions = generate._answered, [Question(OpenExchange(prompt)) for prompt in PROMPTS]
    monkeypatch.setattr(generate, "_answered", lambda a, p, c: sizes.append(len(p)) or answered(a, p, c))
    answers(assistant, questions, 20)
    assert sizes == [len(PROMPTS)]
    config = assistant.model.config
    keys_and_values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    monkeypatch.setattr(generate, "available_memory", lambda on: 100 * keys_and_values)
    sizes.clear()
    answers(assistant, questions, 20)
    assert max(sizes) <= 100 / 20 and sum(sizes) == len(PROMPTS)


@pytest.mark.parametrize("prompt", ["chat", "alpaca"])
def test_an_answer_ends_at_the_stop_token(tmp_path: Path, prompt: str) -> None:
    tuned = make_tuned(tmp_path, prompt=prompt)
    assistant = open_assistant(tuned, "fp32")
    prompt_length = len(tuned.encoder.encode_prompt("", [OpenExchange("Hi")]))
    seen: list[int] = []

    def ends_after_three(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        seen.append(len(seen))
        stop = torch.zeros(logits.shape[-1])
        stop[tuned.encoder.stop_id] = 1e4 if len(seen) > 3 else -1e4
        return logits + stop

    assistant.model.get_base_model().lm_head.register_forward_hook(ends_after_three)
    (answer,) = answers(assistant, [Question(OpenExchange("Hi"))], 8)
    assert answer.finished and answer.tokens == 3 and prompt_length > 3


@pytest.mark.parametrize("precision", ["int8", "nonsense"])
def test_no_other_precision_can_be_asked_for(tmp_path: Path, precision: str) -> None:
    with pytest.raises(UserError, match="in auto, float, bf16, fp16, fp32"):
        open_assistant(make_tuned(tmp_path), precision)


def trained_in(precision: str, tuned: Tuned, folder: Path) -> Tuned:
    """The same in a folder of a run, which was trained in this precision."""
    cpu, size = torch.device("cpu"), ModelSize(weights=1, trained=1, activations=1, checkpoints=1)
    run = Run(folder)
    run.plan_file.write_text(make_plan(tuned.recipe, choose_precision(precision, cpu), size, cpu, "").to_json())
    if precision == "int8":
        base = load_quantised_base(tuned.base, "int8", torch.float32, cpu, pack([Example([1, 2, 3], [1, 2, 3])]))
        write_peaks(run.calibration, peaks_of(base))
    return replace(tuned, run=run)


def stored_in(assistant: Assistant) -> str:
    """The format of the base's linear layers."""
    layer = assistant.model.get_base_model().model.layers[0].mlp.down_proj
    return layer.storage if isinstance(layer, FrozenLinear) else str(layer.weight.dtype)


def test_the_precision_is_that_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(generate, "float_precision", lambda on: "bf16")
    caplog.set_level("INFO", "huarizo")
    elsewhere = make_tuned(tmp_path)
    in_fp32, in_int8 = (trained_in(each, elsewhere, tmp_path) for each in ("fp32", "int8"))
    cases = [
        (elsewhere, "auto", "torch.bfloat16", "bf16, the fastest float format here"),
        (in_int8, "auto", "int8", "int8, as in training"),
        (in_int8, "float", "torch.bfloat16", "bf16, the fastest float format here"),
        (in_int8, "fp32", "torch.float32", ""),
    ]
    for tuned, asked, stored, said in cases:
        assert stored_in(open_assistant(tuned, asked, CPU)) == stored
        assert caplog.messages == ([f"precision: {said}"] if said else [])
        caplog.clear()
    trained_in("fp32", elsewhere, tmp_path)
    for asked in ("auto", "float"):
        assert stored_in(open_assistant(in_fp32, asked, CPU)) == "torch.float32"


@pytest.mark.parametrize("missing", ["compiler", "calibration", "weights"])
def test_where_int8_is_not_possible_floats_answer_and_the_reason_is_said(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"init_lora_weights": "pissa"} if missing == "weights" else {}
    tuned = trained_in("int8", make_tuned(tmp_path, options=options), tmp_path)
    if missing == "compiler":
        pretend(monkeypatch, AVX2, NO_COMPILER)
    if missing == "calibration":
        Run(tmp_path).calibration.unlink()
    caplog.set_level("INFO", "huarizo")
    assert stored_in(open_assistant(tuned, on=CPU)).startswith("torch.")
    reasons = {"compiler": "compiler", "calibration": "doesn't hold the calibration", "weights": "started from a part"}
    assert "not int8 as in training: " in caplog.text and reasons[missing] in caplog.text


def test_base_and_tuned_model_answer_in_the_same_int8(tmp_path: Path) -> None:
    tuned = trained_in("int8", make_tuned(tmp_path), tmp_path)
    assistant, ids = open_assistant(tuned, on=CPU), torch.arange(20, 40)[None]
    plain: Any = load_quantised_base(
        tuned.base, "int8", assistant.model.dtype, CPU, read_peaks(Run(tmp_path).calibration)
    )
    with generate.generating(plain), generate.generating(assistant.model):
        expected, found = plain(input_ids=ids).logits, assistant.model(input_ids=ids).logits
        with assistant.untuned():
            assert torch.equal(assistant.model(input_ids=ids).logits, expected)
    assert float((found - expected).abs().max()) > 0.1
