"""The rules that keep the code base what it is, read from its syntax trees."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = [p for folder in ("layers", "maxlike", "launch", "experiments") for p in (ROOT / folder).rglob("*.py")]
# Flax NNX as plain pytrees: everything else of it is a transform of its own, or breaks between releases.
NNX = {"Module", "Param", "Variable", "Rngs", "List", "split", "merge", "to_pure_dict"}


def names(tree: ast.AST):
    """(dotted name, node) of every attribute access on a plain name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}", node


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.fixture(scope="module")
def trees():
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in SOURCES}


def test_only_eight_names_of_nnx(trees):
    used = {(path, name) for path, tree in trees.items() for name, _ in names(tree) if name.startswith("nnx.")}
    assert {(path, name) for path, name in used if name.removeprefix("nnx.") not in NNX} == set()
    assert not any("flax.linen" in name for tree in trees.values() for name in imported(tree))


def test_gin_is_at_the_edge(trees):
    assert {path for path, tree in trees.items() if any(n.split(".")[0] == "gin" for n in imported(tree))} == {
        "maxlike/config.py",
        "maxlike/gin_check.py",
    }


def test_nothing_that_is_read_is_executed(trees):
    for path, tree in trees.items():
        calls = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"eval", "exec", "compile", "__import__"}, path
        assert not imported(tree) & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "np.load":
                said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert said.get("allow_pickle") == "False", f"{path}:{node.lineno}: np.load without allow_pickle=False"


def test_only_launch_changes_the_environment(trees):
    for path, tree in trees.items():
        if path.startswith("launch/"):
            continue
        for node in ast.walk(tree):
            target = node.targets[0] if isinstance(node, ast.Assign) else None
            if isinstance(target, ast.Subscript) and ast.unparse(target.value) == "os.environ":
                pytest.fail(f"{path}:{node.lineno} changes the environment")


def test_no_swallowed_exceptions(trees):
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno}: a bare except"
                assert not isinstance(node.body[0], ast.Pass), f"{path}:{node.lineno}: an exception is swallowed"


def test_files_fit_in_a_readers_head():
    long = {p.relative_to(ROOT).as_posix(): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 350}
    assert long == {}


def test_the_layers_import_nothing_of_the_rest():
    program = [sys.executable, "-c", "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_style():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--check", "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
