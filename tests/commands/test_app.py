"""`app`: options and what is missing are named before a page is served."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytest.importorskip("gradio")

from modeling_bpgcn.app.server import bind
from modeling_bpgcn.commands import app
from modeling_bpgcn.commands.app import main
from tests.training_factory import ROOT


@pytest.fixture(autouse=True)
def served(monkeypatch) -> list:
    """What would have been served."""
    served = []
    monkeypatch.setattr("modeling_bpgcn.app.server.build_app", lambda *arguments: arguments)
    monkeypatch.setattr("modeling_bpgcn.app.server.serve", lambda app, listener: served.append(app))
    return served


def test_without_gradio_it_says_what_to_install(run, model_folder, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else found(name, *rest)
    )
    status, _, err = run(main, model_folder)
    assert status == 2
    assert "pip install 'bpgcn[app]'" in err


def test_help_needs_no_gradio():
    block = "import sys; sys.modules['gradio'] = None; from modeling_bpgcn.commands.app import main; main(['--help'])"
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "--max_upload_mib" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "-1"], "argument --port: -1 must be at least 0"),
        (["--port", "65536"], "argument --port: 65536 must be at most 65535"),
        (["--host", "256.0.0.1"], "--host 256.0.0.1 --port 7860 cannot be listened at"),
        (["--max_upload_mib", "0"], "must be at least 1"),
        (["--max_pixels", "0"], "must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_named(run, model_folder, options, message):
    status, _, err = run(main, model_folder, *options)
    assert status == 2
    assert message in err


def test_a_taken_port_and_a_model_without_a_bank_are_named(run, model_folder, empty_model, tmp_path):
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        status, _, err = run(main, model_folder, "--port", port)
        assert status == 2
        assert f"--port {port} cannot be listened at: Address already in use" in err
        assert "or 0 for any" in err
    status, _, err = run(main, empty_model, "--port", 0)
    assert status == 2
    assert "This model has no support bank to answer from." in err
    status, _, err = run(main, tmp_path / "missing", "--port", 0)
    assert status == 2
    assert str(tmp_path / "missing") in err


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_it_warns_where_others_can_reach_it(run, model_folder, served, host, warned):
    status, out, err = run(main, model_folder, "--port", 0, "--host", host, "--max_upload_mib", 3, "--max_pixels", 77)
    assert status == 0
    assert out.startswith(f"The demo is at http://{host}:")
    assert ("Warning: whoever reaches" in err) == warned
    assert app.NO_PICTURES in err
    [(_, _, *bounds, embedded_in)] = served
    assert bounds == [3 * 2**20, 77]
    assert embedded_in == "'none'"
