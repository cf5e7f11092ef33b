"""The `qalign` command, and how every command ends: which exit code, and what is said."""

import errno
import importlib
import os
import platform
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from qalign import cli
from qalign.errors import Stopped, UserError
from tests.conftest import ROOT
from tests.helpers import leaving


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        (lambda: None, 0, ""),
        (raising(UserError("one line", "another")), 2, "one line\nanother\n"),
        (
            raising(PermissionError(errno.EACCES, "Permission denied", "/runs")),
            2,
            "/runs: Permission denied; choose a folder that you may write to\n",
        ),
        (
            raising(OSError(errno.ENOSPC, "No space left on device")),
            2,
            "disk: No space left on device; free some space\n",
        ),
        (raising(KeyboardInterrupt()), 130, "stopped by SIGINT\n"),
        (raising(Stopped(signal.SIGINT)), 130, "stopped by SIGINT\n"),
        (raising(Stopped(signal.SIGTERM)), 143, "stopped by SIGTERM\n"),
    ],
)
def test_exit_codes(work, code, said, capsys):
    assert cli.exit_code(work) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "No such file", "a"), RuntimeError("a bug of ours")])
def test_an_unexpected_error_is_not_hidden(error):
    with pytest.raises(type(error)):
        cli.exit_code(raising(error))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "WORLD_SIZE is '2', but RANK, MASTER_ADDR, MASTER_PORT is not set; "),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: 'abc' is not a number"),
        ({"ACCELERATE_USE_FSDP": "true"}, "accelerate's config asks for FSDP"),
        ({}, "this command runs in one process"),
    ],
)
def test_a_launch_that_can_not_be_is_one_line(monkeypatch, capsys, more, said):
    place = {} if "RANK" in said else {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in ({"WORLD_SIZE": "2"} | place | more).items():
        monkeypatch.setenv(name, value)
    assert cli.exit_code(lambda: None) == 2
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("name", ["goodhart", "compare", "h3", "fit", "__main__"])
def test_a_command_for_one_process_says_so(name, monkeypatch, capsys):
    for key, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    assert leaving(importlib.import_module(f"qalign.{name}").main, "a.yaml") == 2
    assert (
        capsys.readouterr().err == "this command runs in one process; start it with `python -m`, not with a launcher\n"
    )


def test_each_process_of_a_host_sees_a_gpu_of_its_own(monkeypatch, capsys):
    launch = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in (launch | {"CUDA_VISIBLE_DEVICES": "6,7", "ACCELERATE_MIXED_PRECISION": "fp16"}).items():
        monkeypatch.setenv(name, value)
    assert cli.exit_code(lambda: None) == 2  # a command that isn't shared
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    assert not {*launch, "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
    assert capsys.readouterr().err == "", "the first process says it"


def test_a_current_folder_that_was_deleted_is_one_line(tmp_path, monkeypatch, capsys):
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert cli.exit_code(lambda: None) == 2
    assert capsys.readouterr().err == "the current folder was deleted; change to one that is there\n"


@pytest.mark.parametrize(("before", "after"), [(None, "0"), ("1,0", "1"), ("", "")])
def test_one_gpu_is_seen(monkeypatch, before, after):
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    cli.exit_code(lambda: None)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == after


@pytest.mark.parametrize(
    ("kernel", "given", "expected"),
    [
        ("6.8.0-generic", {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ("6.8.0-generic", {"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        ("6.8.0-generic", {"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
        ("5.15.90.1-microsoft-standard-WSL2", {}, {}),
    ],
)
def test_memory_is_taken_in_segments_that_grow_where_the_driver_has_them(monkeypatch, kernel, given, expected):
    monkeypatch.setattr(os, "environ", {"HOME": "/nowhere", **given})
    monkeypatch.setattr(platform, "release", lambda: kernel)
    cli.exit_code(lambda: None)
    assert {name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")} == expected


@pytest.mark.parametrize("given", [{}, {"TRITON_CACHE_DIR": "mine"}])
def test_what_is_compiled_is_kept_in_the_cache(monkeypatch, tmp_path, given):
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(tmp_path), **given})
    cli.exit_code(lambda: None)
    folder = tmp_path / "qalign" / "compiled"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == given.get("TRITON_CACHE_DIR", str(folder / "triton"))
    assert not (tmp_path / "qalign").exists()  # before something is compiled


def test_a_cache_that_cannot_be_written_is_not_used_for_what_is_compiled(monkeypatch, tmp_path, capsys):
    (tmp_path / "qalign").write_text("a file in its place")
    for given in ({"XDG_CACHE_HOME": str(tmp_path)}, {"XDG_CACHE_HOME": "~nobody-by-this-name/.cache"}):
        monkeypatch.setattr(os, "environ", dict(given))
        assert cli.exit_code(lambda: None) == 0
        assert not {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"} & os.environ.keys()
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_torch_finds_these_settings(tmp_path):
    """It is imported after them, by a command's own work."""
    code = """if True:
        import sys
        from qalign import cli
        def work():
            assert "torch" not in sys.modules
            from torch._inductor.runtime import cache_dir_utils
            print(cache_dir_utils.cache_dir(), cache_dir_utils.triton_cache_dir(0))
        sys.exit(cli.exit_code(work))
    """
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        environment.pop(name, None)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert found.stdout.split() == [str(tmp_path / "qalign" / "compiled" / name) for name in ("inductor", "triton")]


def test_out_of_memory_anywhere_is_one_line(capsys):
    assert cli.exit_code(raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))) == 2
    assert capsys.readouterr().err.startswith("out of GPU memory (CUDA out of memory). Try nf4")


@pytest.mark.parametrize("name", ["ENAMETOOLONG", "ELOOP", "ENOTDIR", "EISDIR", "EFBIG", "ENOSPC", "EACCES"])
def test_what_a_disk_refuses_is_one_line(capsys, name):
    assert cli.exit_code(raising(OSError(getattr(errno, name), "it can't\x1b", "a/\x1bfile"))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("a/\\x1bfile: it can't\\x1b; ")


@pytest.mark.parametrize("words", [["--help"], ["dpo", "--help"], ["init"]])
def test_a_reader_that_is_gone_ends_a_command_quietly(words):
    """As in `qalign --help | head -1`."""
    code = f"import os, sys; os.dup2(int(sys.argv[1]), 1); from qalign import cli; cli.main({words})"
    reading, writing = os.pipe()
    os.close(reading)

    found = subprocess.run(
        [sys.executable, "-c", code, str(writing)], pass_fds=[writing], capture_output=True, text=True, cwd=ROOT
    )

    os.close(writing)
    assert found.stderr == ""
    assert found.returncode in (0, 141)  # argparse itself is silent where Python writes without a buffer


def test_a_pipe_of_a_library_that_breaks_is_not_hidden():
    with pytest.raises(BrokenPipeError):
        cli.exit_code(raising(BrokenPipeError(errno.EPIPE, "a worker died")))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dpo"], "arguments are required: recipe;"),
        (["dpo", "a.yaml", "--resume", "--overwrite"], "not allowed with argument --resume"),
        (["score", "a", "b", "--limit", "9" * 5000], "--limit: invalid int value"),
        (["export", "a", "--to", "\x1b[31m"], "invalid choice"),
        (["page", "--port", "many"], "--port: invalid int value"),
        (["init", "a", "\x1b", "--no-such"], "unrecognized arguments"),
        (["\x1b" * 500], "there is no command"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    (line,) = err.splitlines()
    assert said in line
    assert len(line) <= 300
    assert line.isprintable()


@pytest.mark.parametrize(
    ("stage", "recipe"),
    [
        *((stage, "smollm2_demo") for stage in ("sft", "reward", "dpo", "ppo")),
        ("kto", "smollm2_kto"),
        ("grpo", "smollm2_grpo"),
    ],
)
def test_check_says_which_rows_a_stage_uses_and_loads_no_model(stage, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "qalign.train.loop", None)  # it can't be imported
    with pytest.raises(SystemExit) as ended:
        cli.main([stage, str(ROOT / "recipes" / f"{recipe}.yaml"), f"output={tmp_path / 'run'}", "--check"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert re.search(r"\n  data +[1-9][0-9,]* rows are used, 0 refused\n", said)
    assert "columns read: " in said
    assert not (tmp_path / "run").exists()


# --- the console script ----------------------------------------------------------------------------------------------


@pytest.fixture
def called(monkeypatch) -> list[tuple[str, list[str]]]:
    """What `qalign` would run: (module, its words)."""
    found = []
    module = lambda name: SimpleNamespace(main=lambda words: found.append((name, words)))  # noqa: E731
    monkeypatch.setattr(cli.importlib, "import_module", module)
    return found


@pytest.mark.parametrize(
    ("words", "module", "others"),
    [
        *((f"{name} a b=1 --resume", f"qalign.{name}", "a b=1 --resume") for name in cli.COMMANDS if name != "page"),
        ("page --port 1", "qalign.page.launch", "--port 1"),
        ("my.yaml dpo.beta=1", "qalign.__main__", "my.yaml dpo.beta=1"),
        ("--resume my.yaml", "qalign.__main__", "--resume my.yaml"),
    ],
)
def test_the_first_word_says_which_command_runs(words, module, others, called):
    cli.main(words.split())
    assert called == [(module, others.split())]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 0, "qalign RECIPE"),
        (["--help"], 0, "qalign RECIPE"),
        (["evalute", "a.yaml"], 2, "no command 'evalute'; did you mean 'evaluate'?"),
        (["xyz"], 2, "no command 'xyz'; `qalign --help`"),
        (["merge", "runs/x"], 2, "`qalign export RUN --to merged`"),
    ],
)
def test_help_and_unknown_commands(words, code, said, called, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == code
    out, err = capsys.readouterr()
    assert said in (err if code else out)
    assert (len(err.splitlines()) == 1) if code else all(f"\n  {name} " in out for name in cli.COMMANDS)
    assert not called


def test_every_command_has_a_module_with_a_main():
    code = (
        "import sys\nfrom importlib import import_module\nfrom qalign import cli\n"
        "assert not {'torch', 'qalign.dpo'} & set(sys.modules), 'the command line itself imports no command'\n"
        "for name in cli.COMMANDS: import_module(cli.MODULES.get(name, f'qalign.{name}')).main"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(("script", "usage"), [("/bin/qalign", "qalign dpo"), ("dpo.py", "python -m qalign.dpo")])
def test_usage_lines_say_what_was_typed(script, usage, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit) as ended:
        cli.main(["dpo", "--help"])
    assert ended.value.code == 0
    assert f"usage: {usage} [-h]" in capsys.readouterr().out
