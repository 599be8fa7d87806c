"""`python -m modeling_bpgcn`: commands are listed, found, and imported only when they run."""

import importlib
import os
import subprocess
import sys
import types

import pytest

from modeling_bpgcn.__main__ import COMMANDS, main, run
from tests.training_factory import ROOT


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    for name, (_, what) in COMMANDS.items():
        assert f"  {name}" in printed
        assert what in printed


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_module_with_help_of_its_own(name, capsys):
    assert importlib.import_module(f"modeling_bpgcn.{COMMANDS[name][0]}").main
    with pytest.raises(SystemExit) as exit_info:
        main([name, "--help"])
    assert exit_info.value.code == 0
    assert f"usage: python -m modeling_bpgcn {name}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["inspekt"], ["--model", "x"]])
def test_what_is_no_command_is_named(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert ("choose from" if arguments == ["inspekt"] else "COMMAND") in capsys.readouterr().err


@pytest.fixture
def fake(monkeypatch):
    """A command whose `main` the test gives it."""
    module = types.ModuleType("modeling_bpgcn.commands.fake")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(COMMANDS, "fake", ("commands.fake", "a command of this test"))
    monkeypatch.setattr(sys, "argv", ["modeling_bpgcn", "fake"])
    return module


def test_a_command_gets_all_that_follows_its_name(fake):
    taken = []
    fake.main = taken.append
    main(["fake", "MODEL", "--option", "-1", "--flag"])
    assert taken == [["MODEL", "--option", "-1", "--flag"]]


def test_it_runs_as_a_module_and_help_imports_no_command():
    show = [sys.executable, "-X", "importtime", "-m", "modeling_bpgcn", "--help"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(show, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    assert "inspect" in run.stdout
    assert "modeling_bpgcn.ranking" in run.stderr
    assert "modeling_bpgcn.commands" not in run.stderr


# --- `| head -1` ------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_reader(monkeypatch):
    """stdout or stderr becomes a pipe that nobody reads."""
    pipes = []

    def without_reader(stream: str, **options):
        read, write = os.pipe()
        os.close(read)
        pipes.append(os.fdopen(write, "w", **options))
        monkeypatch.setattr(sys, stream, pipes[-1])

    yield without_reader
    for pipe in pipes:
        pipe.close()


@pytest.mark.parametrize("buffering", [-1, 1], ids=["at its end", "while it runs"])
@pytest.mark.parametrize("status", [None, 1])
def test_a_command_whose_reader_has_gone_ends_with_the_status_of_a_closed_pipe(fake, without_reader, buffering, status):
    def command(arguments):
        print("some lines\n" * 3)
        if status:
            raise SystemExit(status)

    fake.main = command
    without_reader("stdout", buffering=buffering)
    with pytest.raises(SystemExit) as exit_info:
        run()
    assert exit_info.value.code == 141
    print("what is left in the buffer", flush=True)  # goes nowhere


def test_a_closed_stderr_ends_it_too(fake, without_reader):
    fake.main = lambda arguments: print("a warning", file=sys.stderr, flush=True)
    without_reader("stderr")
    with pytest.raises(SystemExit) as exit_info:
        run()
    assert exit_info.value.code == 141


def test_another_broken_pipe_is_an_error(fake, capfd):
    def command(arguments):
        raise BrokenPipeError("the connection of a command")

    fake.main = command
    with pytest.raises(BrokenPipeError, match="the connection of a command"):
        run()


def test_a_command_that_is_read_to_its_end_keeps_output_and_status(fake, capfd):
    def command(arguments):
        print("all of it")
        raise SystemExit(3)

    fake.main = command
    with pytest.raises(SystemExit) as exit_info:
        run()
    assert exit_info.value.code == 3
    assert capfd.readouterr().out == "all of it\n"


@pytest.mark.parametrize(
    "command",
    ["predict", pytest.param("evaluate", marks=pytest.mark.slow), pytest.param("inspect", marks=pytest.mark.slow)],
)
def test_a_process_whose_reader_has_gone_ends_quietly(command, model_folder, pictures, tmp_path):
    options = ["--output_dir", str(tmp_path), "--labels_per_class", "9"] if command == "inspect" else []
    start = [sys.executable, "-m", "modeling_bpgcn", command, str(model_folder), str(pictures), *options]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(start, cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, **pipes)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=100) == 141, errors
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors
