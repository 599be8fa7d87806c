"""Rules of the repository that no linter knows."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "modeling_bpgcn"
FLAT_FILES = sorted(PACKAGE.glob("*.py"))
PACKAGE_FILES = sorted(PACKAGE.rglob("*.py"))
CORE_FILES = [*PACKAGE_FILES, ROOT / "train.py"]
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _tracked_files() -> list[Path]:
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: no list of tracked files")
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def test_there_is_something_to_check():
    assert len(FLAT_FILES) >= 2
    assert len(PACKAGE_FILES) > len(FLAT_FILES)


@pytest.mark.parametrize("path", CORE_FILES, ids=_name)
def test_core_files_stay_under_300_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 300


# --- the flat files are pushed to the Hub as remote code --------------------------------------------------------------


def _remote_code_faults(tree: ast.Module) -> list[str]:
    """Imports that the remote-code loader cannot copy or that its requirements check would refuse."""
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    optional = {
        id(statement)
        for block in tree.body
        if isinstance(block, ast.Try)
        and any(isinstance(h.type, ast.Name) and h.type.id == "ImportError" for h in block.handlers)
        for statement in block.body
    }
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots = [node.module.split(".")[0]]
        elif isinstance(node, ast.ImportFrom):
            siblings = {path.stem for path in FLAT_FILES}
            if node.level > 1 or node.module not in siblings:  # `from . import x` has module None
                faults.append(f"line {node.lineno}: only `from .sibling import name` is copied to the Hub")
            continue
        else:
            continue
        permitted = allowed | {"torch_scatter", "triton"} if id(node) in optional else allowed
        faults += [f"line {node.lineno}: imports {root}" for root in roots if root not in permitted]
    return faults


@pytest.mark.parametrize("path", FLAT_FILES, ids=_name)
def test_modeling_files_import_only_torch_transformers_and_each_other(path):
    assert not _remote_code_faults(_tree(path))


@pytest.mark.parametrize(
    "source",
    [
        "import numpy",
        "from datasets import Dataset",
        "from . import ranking",
        "from ..ranking import soft_topk",
        "from .training import sampler",
        "from modeling_bpgcn.ranking import soft_topk",
        "import torch_scatter",
        "def f():\n    import sklearn",
    ],
)
def test_the_import_rule_catches(source):
    assert _remote_code_faults(ast.parse(source))


def test_the_import_rule_lets_optional_scatter_pass():
    source = "import math\nimport torch.nn as nn\nfrom transformers import PreTrainedModel\n"
    source += "try:\n    import torch_scatter\nexcept ImportError:\n    torch_scatter = None\n"
    assert not _remote_code_faults(ast.parse(source))


# --- safety -----------------------------------------------------------------------------------------------------------


def _defaults(function: ast.FunctionDef) -> list[tuple[str, ast.expr]]:
    positional = [*function.args.posonlyargs, *function.args.args]
    pairs = list(zip(reversed(positional), reversed(function.args.defaults), strict=False))
    pairs += zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    return [(argument.arg, default) for argument, default in pairs if default is not None]


def _unsafe(tree: ast.Module) -> list[str]:
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"]
        else:
            names = []
        for name in names:
            if name.split(".")[0] in {"pickle", "cPickle", "dill", "joblib"} or name == "torch.load":
                faults.append(f"line {node.lineno}: {name} runs code from the file it reads")

        trusted = []
        if isinstance(node, FUNCTION):
            trusted = [default for name, default in _defaults(node) if name == "trust_remote_code"]
        elif isinstance(node, ast.Call):
            trusted = [keyword.value for keyword in node.keywords if keyword.arg == "trust_remote_code"]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            trusted = [node.value] if node.target.id == "trust_remote_code" else []
        if any(isinstance(value, ast.Constant) and value.value is True for value in trusted):
            faults.append(f"line {node.lineno}: trust_remote_code=True is the caller's decision")
    return faults


@pytest.mark.parametrize("path", CORE_FILES, ids=_name)
def test_nothing_loads_code_unasked(path):
    assert not _unsafe(_tree(path))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "from torch import load",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "def f(name, trust_remote_code=True): ...",
        "def f(*, trust_remote_code=True): ...",
        "class A:\n    trust_remote_code: bool = True",
    ],
)
def test_the_safety_rule_catches(source):
    assert _unsafe(ast.parse(source))


# --- reading ----------------------------------------------------------------------------------------------------------


def _undocumented(tree: ast.Module) -> list[str]:
    """Public module, classes and functions without a docstring; methods may inherit theirs from the base class."""
    missing = [] if ast.get_docstring(tree) else ["module"]
    for node in tree.body:
        public = isinstance(node, (*FUNCTION, ast.ClassDef)) and not node.name.startswith("_")
        if public and not ast.get_docstring(node):
            missing.append(node.name)
    return missing


@pytest.mark.parametrize("path", CORE_FILES, ids=_name)
def test_everything_public_has_a_docstring(path):
    assert not _undocumented(_tree(path))


def test_no_tracked_file_is_over_1_mb():
    large = {_name(path): path.stat().st_size for path in _tracked_files() if path.stat().st_size > 1_000_000}
    assert not large


def test_tracked_files_name_no_home_or_scratch_directories():
    # Spelled in two parts so that this file passes its own test.
    prefixes = tuple("/" + name + "/" for name in ("home", "root", "work", "Users"))
    places = [
        f"{_name(path)}:{number}"
        for path in _tracked_files()
        if path.suffix in {".py", ".md", ".toml", ".yaml", ".txt", ".cfg"} or path.name == "Makefile"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if any(prefix in line and "://" not in line for prefix in prefixes)
    ]
    assert not places


# --- packaging --------------------------------------------------------------------------------------------------------


def test_the_wheel_holds_the_package_and_the_model_card_template(tmp_path):
    wheel = pytest.importorskip("hatchling.builders.wheel")
    import zipfile

    [artifact] = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(artifact) as archive:
        names = set(archive.namelist())
        assert archive.read("modeling_bpgcn/training/model_card.md") == (ROOT / "model_card.md").read_bytes()
    assert {_name(path) for path in PACKAGE_FILES} <= names
    assert not any(name.startswith(("tests/", "train.py", "shared/")) for name in names)


def test_constraints_pin_torch_first_and_every_direct_dependency():
    import tomllib

    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert pins[0].startswith("torch==")
    pinned = {pin.split("==")[0] for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    specs = project["dependencies"] + [spec for name in ("test", "app", "faiss", "onnx") for spec in extras[name]]
    assert f"{project['name']}[app,faiss,onnx]" in extras["test"]
    assert {spec.split(">=")[0] for spec in specs if not spec.startswith(f"{project['name']}[")} <= pinned
