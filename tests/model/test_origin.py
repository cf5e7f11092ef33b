"""A base that isn't there, is broken or can't be used as it is stored: one line each, before torch is imported."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qalign.config.recipe import Model
from qalign.errors import UserError
from qalign.model.origin import Stored, check, find
from tests.data.fake_hub import COMMIT, FakeHub

CONFIG = json.dumps({"model_type": "llama", "hidden_size": 8}).encode()
ASK = """
import json, sys
from qalign.config.recipe import Model
from qalign.errors import UserError
from qalign.model import origin
for line in sys.stdin:
    try:
        found = origin.find(Model(**json.loads(line)))
        said = {"revision": found.revision, "source": found.source, "reached": found.is_reached}
    except UserError as error:
        said = {"error": error.lines}
    heavy = sorted({"torch", "transformers", "datasets"} & set(sys.modules))
    print(json.dumps({**said, "heavy": heavy}), flush=True)
"""


@pytest.fixture(scope="module")
def hub():
    return FakeHub({"config.json": CONFIG})


def asking(endpoint: str, home: Path, offline: str = "0") -> subprocess.Popen:
    """A process that looks for bases; it reads the hub's address when the hub's client is imported."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": offline, "HF_HOME": str(home)}
    return subprocess.Popen([sys.executable, "-c", ASK], stdin=-1, stdout=-1, text=True, env=environment)


def asked(process: subprocess.Popen, **model) -> dict:
    process.stdin.write(json.dumps(model) + "\n")
    process.stdin.flush()
    found = json.loads(process.stdout.readline())
    assert found["heavy"] == []
    return found


@pytest.fixture(scope="module")
def ask(hub, tmp_path_factory):
    with asking(hub.url, tmp_path_factory.mktemp("home")) as process:
        yield lambda **model: asked(process, **model)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("org/gated", "gated: accept its terms at http://127.0.0.1:"),
        ("org/gone", "there is no such model on the hub; check the name, or log in"),
        ("org/secret", "the hub refuses access (error 401); log in with `hf auth login`"),
        ("org/sick", "the hub answers with error 500; try again later"),
        ("org--/..bad", "neither a file or folder here nor a name on the hub"),
    ],
)
def test_what_the_hub_refuses_is_one_line_and_is_asked_once(name, reason, ask, hub):
    (line,) = ask(base=name)["error"]
    assert line.startswith(f"model.base: '{name}' can't be fetched: ")
    assert reason in line
    assert len(line) <= 300
    assert hub.asked[f"/{name}/resolve/main/config.json"] <= 1  # the library itself asks six times, for 23 seconds


def test_what_the_hub_has_is_found_under_its_commit(ask):
    found = ask(base="org/set")
    assert (found["source"], found["revision"], found["reached"]) == ("org/set", COMMIT, True)


def test_without_a_network_the_cache_is_used_and_what_is_not_in_it_is_one_line(hub, tmp_path):
    with asking(hub.url, tmp_path) as process:
        assert asked(process, base="org/set")["reached"] is True
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"  # bound and not listening
        with asking(nobody, tmp_path) as process:
            found = asked(process, base="org/set")
            assert (found["revision"], found["reached"]) == (COMMIT, False)
            (line,) = asked(process, base="org/other")["error"]
            assert line.startswith("model.base: 'org/other' can't be fetched: the hub can't be reached")
    with asking(nobody, tmp_path, offline="1") as process:
        assert asked(process, base="org/set")["revision"] == COMMIT
        (line,) = asked(process, base="org/other")["error"]
        assert "HF_HUB_OFFLINE" in line


@pytest.mark.slow
def test_a_hub_that_never_answers_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        nobody = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with asking(nobody, tmp_path) as process:
            (line,) = asked(process, base="org/other")["error"]
    assert "the hub can't be reached" in line


def test_fit_says_so_without_the_hubs_own_retries(hub, recipe_file, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    words = [sys.executable, "-m", "qalign.fit", recipe_file(), "model.base=org/sick"]
    hub.asked.clear()
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("model.base: 'org/sick' can't be fetched: the hub answers with error 500")
    assert hub.asked["/org/sick/resolve/main/config.json"] == 1


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def without(name: str):
    return lambda folder: (folder / name).unlink()


def cut(name: str, kept: int):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:kept])


def written(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def instead_of(name: str, make):
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


INDEX = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without("config.json"), "has no config.json, so it is no model folder of transformers"),
        (written("config.json", "{"), "can't be read: its config.json is broken"),
        (written("config.json", "[]"), "can't be read: its config.json holds no settings"),
        (written("config.json", "[" * 100_000), "can't be read: its config.json is broken"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{"), "its config.json is broken"),
        (without("model.safetensors"), "has a config.json but no weights (.safetensors)"),
        (cut("model.safetensors", 100_000), "is cut short or damaged"),
        (cut("model.safetensors", 0), "is cut short or damaged"),
        (written("model.safetensors.index.json", INDEX), "lacks 1 files (model-2.safetensors)"),
        (written("model.safetensors.index.json", "[1]"), "can't be read"),
        (written("model.safetensors.index.json", "[" * 100_000), "can't be read"),
        (
            written("model.safetensors.index.json", '{"weight_map": {"a": "../elsewhere/b.safetensors"}}'),
            "lacks 1 files (../",
        ),
        (written("model.safetensors.index.json", json.dumps({"weight_map": {"a": "x" * 5000}})), "lacks 1 files (xxx"),
        (instead_of("model.safetensors", Path.mkdir), "model.safetensors is no file, or a broken link"),
        (instead_of("model.safetensors", os.mkfifo), "model.safetensors is no file, or a broken link"),
        (instead_of("tokenizer.json", os.mkfifo), "tokenizer.json is no file, or a broken link"),
        (instead_of("model.safetensors", lambda f: f.symlink_to("gone")), "model.safetensors is no file, or a broken"),
        (instead_of("model.safetensors", lambda f: f.symlink_to(f)), "model.safetensors is no file, or a broken link"),
        (
            written("config.json", '{"num_hidden_layers": 10000000}'),
            "num_hidden_layers is 10000000",
        ),
        (written("config.json", '{"text_config": {"vocab_size": 0}}'), "broken config.json: vocab_size is 0"),
        (
            written("config.json", '{"max_position_embeddings": -5}'),
            "max_position_embeddings is -5",
        ),
        (shutil.rmtree, "there is no folder"),
    ],
)
def test_a_broken_folder_is_one_line(damage, reason, folder):
    damage(folder)
    with pytest.raises(UserError) as raised:
        check(Model(base=str(folder)))
    (line,) = raised.value.lines
    assert line.startswith("model.base: ")
    assert str(folder) in line
    assert reason in line


def test_a_file_in_place_of_its_folder(folder):
    with pytest.raises(UserError, match=r"there is no folder '.*'; it is a file, did you mean '"):
        find(Model(base=str(folder / "model.safetensors")))


def test_an_adapter_is_no_base(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(UserError, match="is an adapter, not a model; name its base here, and it in start_from"):
        find(Model(base=str(folder)))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"<html>"])
def test_a_gguf_file_that_is_none(content, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(UserError, match="is no GGUF file"):
        check(Model(base=str(tmp_path / "model.gguf")))
    with pytest.raises(UserError, match=r"other\.gguf' can't be read: No such file"):
        check(Model(base=str(tmp_path / "other.gguf")))


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
TWICE = {"bnb_4bit_use_double_quant": True}


def stored_as(folder: Path, settings: dict) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


@pytest.mark.parametrize(
    ("settings", "expected", "is_said"),
    [
        (NF4 | TWICE, Stored("nf4", True), False),
        (NF4, Stored("nf4", False), True),
        ({"load_in_4bit": True} | TWICE, Stored("fp4", True), True),  # bitsandbytes' own default
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, Stored("int8", True), True),
    ],
)
def test_a_base_that_bitsandbytes_has_quantised_is_used_as_it_is(settings, expected, is_said, folder, capsys):
    stored_as(folder, settings)
    spec = Model(base=str(folder))
    found = find(spec)
    assert found.stored == expected
    assert found.held(spec).quantization == expected.quantization
    assert found.held(spec).double_quant == expected.double_quant
    assert (f"note: '{folder}' is stored in {expected.quantization}" in capsys.readouterr().out) == is_said


@pytest.mark.parametrize("wanted", ["none", "int8", "fp4"])
def test_a_quantisation_that_the_base_is_not_in_is_refused(wanted, folder):
    stored_as(folder, NF4)
    with pytest.raises(UserError, match=rf"model\.quantization: .* stored in nf4, so it can't be in {wanted}; write"):
        find(Model(base=str(folder), quantization=wanted))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"load_in_4bit": "yes"}, "load_in_4bit is 'yes'"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type is 'int4'"),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": [1]}, r"bnb_4bit_use_double_quant is \[1\]"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "it is in 4 or in 8 bits, not in both or none"),
        ({}, "it is in 4 or in 8 bits, not in both or none"),
    ],
)
def test_broken_settings_of_bitsandbytes_are_one_line(settings, said, folder):
    stored_as(folder, {"quant_method": "bitsandbytes", **settings})
    with pytest.raises(UserError, match=f"has a broken quantization_config: {said}$"):
        find(Model(base=str(folder)))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "hqq", ""])
def test_other_formats_are_refused_by_name(method, folder):
    stored_as(folder, {"quant_method": method, "bits": 4})
    name = method.upper() or "AN UNKNOWN FORMAT"
    with pytest.raises(UserError, match=f"is stored in {name}, which can't be trained on here; take the 16-bit"):
        find(Model(base=str(folder)))
