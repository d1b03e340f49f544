"""The package as a whole: what it exports, how its parts may depend on each other, its version."""

import ast
import importlib.metadata
import pathlib

import s2sd_tf

PACKAGE = pathlib.Path(s2sd_tf.__file__).parent
# What each part may import from, beside itself and the single modules of the package.
ALLOWED = {
    "distillation": set(),
    "mining": set(),
    "objectives": {"mining"},
    "data": set(),
    "evaluation": set(),
    "export": {"evaluation"},
    "serving": {"data", "evaluation", "export"},
    "models": {"objectives", "distillation"},
    "training": {"mining", "models", "data", "evaluation", "export", "objectives", "distillation"},
    "cli": {"training", "evaluation", "export", "serving", "data", "models"},
}


def test_public_names():
    assert all(hasattr(s2sd_tf, name) for name in s2sd_tf.__all__)
    assert s2sd_tf.__version__ == importlib.metadata.version("s2sd_tf")
    assert (PACKAGE / "py.typed").exists()


def test_dependencies_point_one_way():
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        if len(parts) == 1:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                pieces = name.split(".")
                if pieces[0] == "s2sd_tf" and len(pieces) > 1 and pieces[1] in ALLOWED:
                    assert pieces[1] == parts[0] or pieces[1] in ALLOWED[parts[0]], f"{path}: {name}"


def test_keras_is_tf_keras_everywhere():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert "import keras\n" not in text.replace("keras_compat import keras\n", "")
        assert "tensorflow.python" not in text
