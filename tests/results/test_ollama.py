"""Ollama's prompt is the prompt format's: in a small Go text/template here, and in Go's own where that is installed.

The readers follow Ollama's parser/parser.go (a Modelfile's values) and template/template.go (what a template is given).
"""

import ast
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from huarizo.data.prompts import OpenExchange, prompt_format
from huarizo.data.rows import Exchange
from huarizo.data.tokens import Encoder
from huarizo.errors import ModelError, UserError
from huarizo.inference.artifact import Tuned
from huarizo.recipe import make_recipe
from huarizo.results.chat_template import leading_space
from huarizo.results.ollama import commands, modelfile, write_modelfile
from tests.tiny import CHATML, make_tokenizer

LOOP = "{% for message in messages %}"
BODY = CHATML.removeprefix(LOOP)
TEMPLATES = {
    "chatml": CHATML,
    "default system": LOOP + "{% if loop.first and message.role != 'system' %}{{ '<|im_start|>system\nBe kind.' }}"
    "{{ '<|im_end|>\n' }}{% endif %}" + BODY,
    "system in the first turn": LOOP + "{% if message.role == 'system' %}{{ '<s>[INST] <<SYS>>' + message.content }}"
    "{{ '<</SYS>>\n\n' }}{% elif message.role == 'user' %}{{ '' if loop.index0 == 1 and messages[0].role == 'system' "
    "else '<s>[INST] ' }}{{ message.content + ' [/INST]' }}{% else %}{{ message.content + '</s>' }}"
    "{% endif %}{% endfor %}",
    "hostile": "{% macro lead(role) %}{{ '{{- if }} {{{ `\\\\' + '\"\"\"\n\"\"\"\" \\r\\t\\u00a0\\u200b }}-' + role }}"
    "{{ '\"\"\n-}} {{- {' }}{% endmacro %}" + LOOP + "{{ lead(message.role) + message.content + '<|im_end|>{' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ lead('assistant') }}{% endif %}",
    "no system": LOOP + "{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + BODY,
    "drops the system": LOOP + "{% if message.role != 'system' %}" + BODY.replace("{% end", "{% endif %}{% end", 1),
    "trims": CHATML.replace("message['content']", "message['content'] | trim"),
}  # fmt: skip
FAMILIES = {
    "gemma 2": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + LOOP + "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}"
    "{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "gemma 3": "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set prefix = messages[0]['content'] + "
    "'\n\n' -%}{%- set rest = messages[1:] -%}{%- else -%}{%- set prefix = '' -%}{%- set rest = messages -%}"
    "{%- endif -%}{%- for message in rest -%}{%- set role = 'model' if message['role'] == 'assistant' else "
    "message['role'] -%}{{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}"
    "{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}",
    "llama 3": "{{ bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n' + system + "
    "'<|eot_id|>' }}" + LOOP + "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
    "mistral 1": "{{ bos_token }}" + LOOP + "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}",
    "mistral 3": "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}{{- bos_token }}"
    "{%- for message in rest %}{%- if message['role'] == 'user' %}{%- if loop.last and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}{%- else %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}{%- else %}"
    "{{- ' ' + message['content'] | trim + eos_token }}{%- endif %}{%- endfor %}",
    "phi 3": LOOP + "{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% else %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "granite": "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set rest = messages[1:] %}{%- else %}{%- set system = 'You are Granite.' %}{%- set rest = messages %}"
    "{%- endif %}{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}"
    "{%- for message in rest %}{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + "
    "'<|end_of_text|>\n' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}",
    "command r": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + messages[0]['content'] + '<|END_OF_TURN_TOKEN|>' }}{% else %}"
    "{% set rest = messages %}{% endif %}{% for message in rest %}{{ '<|START_OF_TURN_TOKEN|>' }}"
    "{% if message['role'] == 'user' %}{{ '<|USER_TOKEN|>' }}{% else %}{{ '<|CHATBOT_TOKEN|>' }}{% endif %}"
    "{{ message['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
    "zephyr": LOOP + "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "glm 4": "[gMASK]<sop>" + LOOP + "{{ '<|' + message['role'] + '|>\n' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "olmo 2": "{{ bos_token }}" + LOOP + "{% if message['role'] == 'assistant' %}{{ '<|assistant|>\n' + "
    "message['content'] + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}{% else %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
}  # fmt: skip
"""How the families of models write a conversation, in their templates' own way."""
TEMPLATES |= FAMILIES
FORMATS = ["alpaca", "stanford", "Q: {{ instruction }}\nA:", '{{ instruction }}"""', *TEMPLATES]
TEXTS = ["Say {{ .System }} <&> \"'\\", 'A "" b `{% x %}', "é {{end}}\n  last", "one", "two"]
GO = """package main

import ("encoding/json"; "os"; "strings"; "text/template")

func main() {
    var cases []struct { Template string; Data map[string]any }
    if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
    var texts []string
    for _, c := range cases {
        var b strings.Builder
        t := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
        if err := t.Execute(&b, c.Data); err != nil { panic(err) }
        texts = append(texts, b.String())
    }
    json.NewEncoder(os.Stdout).Encode(texts)
}
"""


def make_tuned(format: str, tokenizer: Any = None, eos: bool = True) -> Tuned:
    """A result of which only the prompt format is looked at."""
    tokenizer = tokenizer or make_tokenizer(chat_template=TEMPLATES.get(format), eos="</s>")
    name = "chat" if format in TEMPLATES else format
    encoder = Encoder(tokenizer, prompt_format(name, tokenizer, eos))
    return Tuned(make_recipe(model="base"), Path("base"), Path("adapter"), encoder)


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Commands and their values as Ollama reads them: what is not printable is lost, a value ends with its line."""
    commands, buffer = [], ""
    for character in text:
        if character not in "\r\n":
            buffer += character if character.isprintable() or character == "\t" else ""
            continue
        if buffer.startswith("#") or not buffer.strip():
            buffer = ""
            continue
        name, _, value = buffer.partition(" ")
        value = value.strip()
        for quotes in ('"""', '"'):
            if value.startswith(quotes):
                ends = len(value) >= 2 * len(quotes) and value.endswith(quotes)
                value = value[len(quotes) : -len(quotes)] if ends else None
                break
        if value is None:
            buffer += character
        else:
            commands.append((name, value))
            buffer = ""
    assert not buffer
    return commands


def value_of(text: str, name: str) -> str:
    (value,) = [value for command, value in read_modelfile(text) if command == name]
    return value


def data_of(messages: list[dict[str, str]]) -> dict[str, Any]:
    """What Ollama gives a template: system texts gathered, neighbours of one role joined."""
    collated: list[dict[str, str]] = []
    for message in messages:
        if collated and collated[-1]["Role"] == message["Role"]:
            collated[-1]["Content"] += "\n\n" + message["Content"]
        else:
            collated.append(dict(message))
    system = "\n\n".join(message["Content"] for message in messages if message["Role"] == "system")
    return {"System": system, "Messages": collated, "Response": ""}


class GoTemplate:
    """The part of Go's text/template that a Modelfile here uses: if, else if, else, range, eq, a variable, strings."""

    def __init__(self, source: str) -> None:
        action = r"\{\{(?!-) ((?:\"[^\"]*\"|[^\"{}])*) (?<!-)\}\}"
        self.parts = re.split(action, source)  # text and actions by turns
        assert not any("{{" in text for text in self.parts[::2])

    def render(self, data: dict[str, Any]) -> str:
        self.variables: dict[str, Any] = {}
        text, position = self._block(0, data, True)
        assert position == len(self.parts)
        return text

    def _value(self, expression: str, dot: dict[str, Any]) -> Any:
        if expression.startswith("eq "):
            first, second = expression.split()[1:]
            return self._value(first, dot) == self._value(second, dot)
        if expression.startswith("."):
            return dot[expression[1:]]
        if expression.startswith("$"):
            return self.variables[expression]
        return {"true": True, "false": False}[expression] if expression[0] in "tf" else ast.literal_eval(expression)

    def _block(self, position: int, dot: dict[str, Any], active: bool) -> tuple[str, int]:
        """Text up to the `else` or `end` that closes the block, and the position of that action."""
        text = self.parts[position] if active else ""
        position += 1
        while position < len(self.parts) and not re.match(r"(else|end)\b", self.parts[position]):
            action = self.parts[position]
            word, _, expression = action.partition(" ")
            if word == "if":
                more, position = self._choice(position, dot, active)
                text += more
            elif word == "range":
                items = self._value(expression, dot) if active else []
                _, end = self._block(position + 1, {}, False)
                text += "".join(self._block(position + 1, item, True)[0] for item in items)
                position = end
            elif active and (assignment := re.fullmatch(r"(\$\w+) :?= (\w+)", action)):
                self.variables[assignment[1]] = self._value(assignment[2], dot)
            elif active:
                text += self._value(action, dot)
            text += self.parts[position + 1] if active else ""
            position += 2
        return text, position

    def _choice(self, position: int, dot: dict[str, Any], active: bool) -> tuple[str, int]:
        """The text of the branch that is taken, and the position of the `end`."""
        text, taken = "", not active
        while self.parts[position] != "end":
            condition = self.parts[position].removeprefix("else").strip().removeprefix("if ")
            now = not taken and (not condition or bool(self._value(condition, dot)))
            more, position = self._block(position + 1, dot, now)
            text, taken = text + more, taken or now
        return text, position


def conversation(system: str, count: int) -> tuple[str, list[Any], list[dict[str, str]]]:
    """`count` turns, the last one open: for the prompt format, and as Ollama's messages."""
    turns: list[Any] = [Exchange(TEXTS[n], "", TEXTS[-1 - n]) for n in range(count - 1)]
    turns.append(OpenExchange(TEXTS[count - 1]))
    messages = [{"Role": "system", "Content": system}] if system else []
    for turn in turns:
        messages.append({"Role": "user", "Content": turn.instruction})
        if turn.output is not None:
            messages.append({"Role": "assistant", "Content": turn.output})
    return system, turns, messages


def cases(tuned: Tuned) -> list[tuple[dict[str, Any], str]]:
    """What Ollama's template is given, and the prompt of the format, less the BOS that Ollama adds itself."""
    found = []
    refuses = "# The model's chat template has no place for a system" in modelfile(tuned, "a.gguf")
    for system in ("", 'Be "brief" {{ .Content }}'):
        for count in (1, 2, 3):
            system, turns, messages = conversation(system, count)
            pieces = tuned.encoder.prompt.pieces("" if refuses else system, turns)
            prompt = leading_space(tuned.encoder) + "".join(piece.text for piece in pieces)
            if tuned.encoder.adds_bos:
                prompt = prompt.removeprefix(tuned.encoder.tokenizer.bos_token)
            found.append((data_of(messages), prompt))
    return found


@pytest.mark.parametrize("format", FORMATS)
def test_the_prompt_is_the_formats(format: str) -> None:
    tuned = make_tuned(format)
    template = value_of(modelfile(tuned, "a.gguf"), "TEMPLATE")
    for data, prompt in cases(tuned):
        assert GoTemplate(template).render(data) == prompt


def test_the_prompt_is_tinyllamas(tinyllama_tokenizer: Any) -> None:
    tuned = make_tuned("auto", tinyllama_tokenizer)
    text = modelfile(tuned, "a.gguf")
    assert tuned.encoder.adds_bos and "<s>" not in text
    for data, prompt in cases(tuned):
        assert GoTemplate(value_of(text, "TEMPLATE")).render(data) == prompt


def test_go_reads_the_templates_in_the_same_way(tmp_path: Path) -> None:
    go = shutil.which("go")
    if go is None:
        pytest.skip("there is no Go here")
    (tmp_path / "main.go").write_text(GO)
    given, prompts = [], []
    for format in FORMATS:
        tuned = make_tuned(format)
        template = value_of(modelfile(tuned, "a.gguf"), "TEMPLATE")
        for data, prompt in cases(tuned):
            given.append({"Template": template, "Data": data})
            prompts.append(prompt)
    done = subprocess.run([go, "run", "main.go"], cwd=tmp_path, input=json.dumps(given).encode(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout) == prompts


def test_an_answer_begun_stays_open_and_one_without_a_question_is_left_out() -> None:
    template = GoTemplate(value_of(modelfile(make_tuned("chatml"), "a.gguf"), "TEMPLATE"))
    _, _, messages = conversation("", 1)
    stray, begun = ({"Role": "assistant", "Content": text} for text in ("stray", "Well, "))
    prompt = template.render(data_of(messages))
    assert template.render(data_of([*messages, begun])) == prompt + "Well, "
    assert template.render(data_of([stray, *messages])) == prompt


def test_a_bos_is_left_to_ollama_only_where_it_adds_one() -> None:
    tokenizer = make_tokenizer(chat_template="{{ bos_token }}" + CHATML)
    written = value_of(modelfile(make_tuned("auto", tokenizer), "a.gguf"), "TEMPLATE")
    assert written.count("<s>") == 2  # with a system text and without
    encoder = make_tuned("auto", tokenizer).encoder
    encoder._bos = tokenizer.bos_token_id
    left = modelfile(Tuned(make_recipe(model="base"), Path(), Path(), encoder), "a.gguf")
    assert "<s>" not in left and value_of(left, "TEMPLATE") == written.replace("<s>", "")


@pytest.mark.parametrize(
    ("format", "stops"),
    [
        ("chatml", ["<|im_end|>", "</s>"]),
        ("alpaca", ["</s>", "### Instruction:"]),
        ("Q: {{ instruction }}\nA:", ["</s>"]),
    ],
)
@pytest.mark.parametrize("eos", [True, False])
def test_answers_stop(format: str, stops: list[str], eos: bool) -> None:
    text = modelfile(make_tuned(format, eos=eos), "a.gguf")
    assert [value for name, value in read_modelfile(text) if name == "PARAMETER"] == [
        f'stop "{stop}"' for stop in stops
    ]


@pytest.mark.parametrize(
    ("role", "content"),
    [
        ("user", "message.content | upper"),
        ("user", "message.content | tojson"),
        ("user", "message.content.split() | join(' ')"),
        ("user", "loop.index ~ message.content"),
        ("system", "''"),
        ("system", "message.content | e"),
    ],
)
def test_a_template_that_rewrites_is_refused(role: str, content: str) -> None:
    choice = f"({content} if message.role == '{role}' else message.content)"
    tokenizer = make_tokenizer(chat_template=CHATML.replace("message['content']", choice))
    with pytest.raises(ModelError, match="without --ollama"):
        modelfile(make_tuned("auto", tokenizer), "a.gguf")


def test_what_can_not_be_the_same_is_said() -> None:
    assert "strips white space" in modelfile(make_tuned("trims"), "a.gguf").splitlines()[0]
    assert "no place for a system" in modelfile(make_tuned("no system"), "a.gguf").splitlines()[0]
    dated = make_tokenizer(chat_template="{{ strftime_now('%Y') }}" + CHATML)
    assert "today's date" in modelfile(make_tuned("auto", dated), "a.gguf").splitlines()[0]
    assert modelfile(make_tuned("alpaca"), "a.gguf").startswith("FROM")


def test_the_file_stands_beside_the_gguf_and_is_not_replaced_unasked(tmp_path: Path) -> None:
    gguf = tmp_path / "My model.Q8_0.gguf"
    file = write_modelfile(make_tuned("chatml"), gguf)
    assert file == tmp_path / "Modelfile"
    assert value_of(file.read_text(encoding="utf-8"), "FROM") == "./My model.Q8_0.gguf"
    with pytest.raises(UserError, match="--force"):
        write_modelfile(make_tuned("alpaca"), gguf)
    assert write_modelfile(make_tuned("alpaca"), gguf, force=True).read_text() == modelfile(
        make_tuned("alpaca"), gguf.name
    )
    with pytest.raises(UserError, match="file name"):
        modelfile(make_tuned("alpaca"), "a\nb.gguf")


@pytest.mark.parametrize(
    ("stem", "name"),
    [("model-q8_0", "model-q8_0"), ("My Model (v2)..x", "my-model-v2-.x"), (".--", "model"), ("ü" * 9, "model"),
     ("a" * 200, "a" * 80)],
)  # fmt: skip
def test_the_commands_can_be_typed(stem: str, name: str) -> None:
    create, run = commands(Path(f"some where/{stem}.gguf"), Path("some where/Modelfile"))
    assert create == f"ollama create {name} -f 'some where/Modelfile'"
    assert run == f"ollama run {name}"
