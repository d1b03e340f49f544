"""The package as a whole: what it exports, how its parts may depend on each other, its version."""

import ast
import graphlib
import importlib.metadata
import pathlib

import pytest

import s2sd_tf

PACKAGE = pathlib.Path(s2sd_tf.__file__).parent
# The parts that each part may import, besides itself and the package's single modules, which import none of them.
LAYERS = {
    "distillation": set(),
    "mining": set(),
    "objectives": {"mining"},
    "losses": {"objectives", "distillation"},
    "data": set(),
    "evaluation": set(),
    "reporting": {"evaluation"},
    "export": {"evaluation"},
    "serving": {"data", "evaluation", "export"},
    "models": {"losses", "objectives"},
    "training": {
        "models", "data", "evaluation", "reporting", "export", "losses", "objectives", "mining", "distillation"
    },
    "cli": {"objectives", "mining", "training", "evaluation", "reporting", "export", "serving", "data", "models"},
}  # fmt: skip


def imports(package):
    """Maps the dotted name of each module of a package to the set of modules that it imports, also inside functions.

    `from package.part import name` imports `package.part.name` if that is a module, otherwise `package.part`. That
    importing a module also runs the `__init__` of the packages around it is ignored: `__init__` imports its modules, so
    every module that imports a sibling would be in a circle.
    """
    modules = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found = {}
    for name, path in modules.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: expected absolute imports"
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                imported.update(module if module in modules else node.module for module in whole)
            elif isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
        found[name] = imported & set(modules)
    return found


def circle(graph):
    """The modules of a circle of imports, each imported by the next; None if there is no circle."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def test_public_names():
    assert all(hasattr(s2sd_tf, name) for name in s2sd_tf.__all__)
    assert s2sd_tf.__version__ == importlib.metadata.version("s2sd_tf")
    assert (PACKAGE / "py.typed").exists()


def test_dependencies_point_one_way():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} <= set(LAYERS), "a part is missing from LAYERS"
    graph = imports(PACKAGE)
    del graph["s2sd_tf"]
    for module, imported in graph.items():
        part = module.split(".")[1]
        allowed = {part, *LAYERS.get(part, ())}
        for other in imported:
            assert set(other.split(".")[1:2]) & set(LAYERS) <= allowed, f"{module} imports {other}"


def test_no_modules_import_each_other():
    assert circle(imports(PACKAGE)) is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"a.py": "import package.b", "b.py": "def f():\n    from package import a"}, {"package.a", "package.b"}),
        ({"a.py": "from package.b import x", "b.py": "from package.c.d import y", "c/d.py": "from package.a import z"},
         {"package.a", "package.b", "package.c.d"}),
        ({"a.py": "from package import c", "c/__init__.py": "from package.c.d import y", "c/d.py": "import package.a"},
         {"package.a", "package.c", "package.c.d"}),
        ({"a.py": "from package.c.e import x", "c/__init__.py": "from package.c.d import y",
          "c/d.py": "from package.c.e import x", "c/e.py": "import os"}, None),
    ],
)  # fmt: skip
def test_circles_are_found(content, expected, tmp_path):
    for name, text in {"__init__.py": "from package import a", **content}.items():
        path = tmp_path / "package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = circle(imports(tmp_path / "package"))
    assert (found and set(found)) == expected


def test_keras_is_tf_keras_everywhere():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        for allowed in ("keras_compat import keras\n", "from tensorflow import keras\n"):
            text = text.replace(allowed, "")
        assert "import keras\n" not in text
        assert "tensorflow.python" not in text
