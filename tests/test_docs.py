"""The scripts of the documentation run as they are printed, and the messages that it explains exist."""

import json
import pathlib
import re

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

import s2sd_tf
from s2sd_tf import export

DOCS = REPOSITORY / "docs"


def scripts(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def test_the_scripts_of_the_first_page_are_those_of_the_readme():
    readme = (REPOSITORY / "README.md").read_text()
    assert all(script in readme for script in scripts("getting_started.md"))


def test_the_scripts_for_images_of_ones_own(monkeypatch, tmp_path):
    for name in range(8):
        (tmp_path / "photos" / str(name)).mkdir(parents=True)
        for image in range(4):
            pixels = np.random.default_rng([name, image]).integers(0, 256, (80, 90, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / str(name) / f"{image}.png")
    monkeypatch.chdir(tmp_path)
    train, train_longer = (re.sub(r"epochs=\d+", "epochs=1", script) for script in scripts("your_images.md"))
    names = {}
    exec(compile(train, "docs/your_images.md", "exec"), names)
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (tmp_path / "photos.keras").rename(run / "best.keras")
    (run / "preprocessing.json").write_text(json.dumps(names["preprocessing"].get_config()))
    exec(compile(train_longer, "docs/your_images.md", "exec"), names)
    assert isinstance(export.load_model("runs/mine/best.keras"), s2sd_tf.S2SDModel)
    assert int(names["model"].optimizer.iterations) == 2


def test_the_script_for_nested_embeddings(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (script,) = scripts("nested.md")
    assert len(script.strip().splitlines()) <= 25
    names = {}
    exec(compile(re.sub(r"epochs=\d+", "epochs=1", script), "docs/nested.md", "exec"), names)
    assert re.findall(r"^(\d+) [01]\.\d+ \d+ \d", capsys.readouterr().out, re.MULTILINE) == ["4", "8", "32"]
    assert names["small"].shape == (len(names["rows"]), 8)
    assert names["encoder"].dims == (4, 8, 32)
    assert names["index"].tuned["measured"] > 0.9


def test_the_script_for_hierarchies(capsys):
    (script,) = scripts("graded.md")
    assert len(script.strip().splitlines()) <= 20
    script = re.sub(r"epochs=\d+", "epochs=1", script).replace("28, 4,", "4, 2, steps_per_epoch=1,")
    names = {}
    exec(compile(script, "docs/graded.md", "exec"), names)
    assert "'level1_recall@1': " in capsys.readouterr().out
    assert {objective.relevance for objective in names["model"].s2sd_loss.target_objectives} == {(0.3, 1.0)}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples").glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_notebooks_were_run_from_top_to_bottom(path):
    """`make notebooks` runs them."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}, "something was written to stderr"
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert [output for output in outputs if "image/png" in output.get("data", ())]
    assert path.stat().st_size < 500_000


def test_the_messages_are_those_of_the_code():
    # Without the seams of strings that go over several lines.
    sources = sorted(pathlib.Path(s2sd_tf.__file__).parent.rglob("*.py"))
    code = "".join(re.sub(r'"\s+f?"', "", path.read_text()) for path in sources)
    messages = re.findall(r"^### `(.*)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) >= 20
    for message in messages:
        missing = [part for part in re.split(r"…", message) if part.strip(" .:") and part not in code]
        assert not missing, f"{message}: not in the code: {missing}"
