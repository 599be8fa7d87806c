"""`python -m modeling_bpgcn`: commands are listed, found, and imported only when they run."""

import importlib
import os
import subprocess
import sys
import types

import pytest

from modeling_bpgcn.__main__ import COMMANDS, main
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


def test_a_command_gets_all_that_follows_its_name(monkeypatch):
    taken = []
    fake = types.ModuleType("modeling_bpgcn.commands.fake")
    fake.main = taken.append
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setitem(COMMANDS, "fake", ("commands.fake", "a command of this test"))
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
