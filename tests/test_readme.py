"""The README's scripts run unchanged, and everything it refers to exists."""

import re

import numpy as np
import tensorflow as tf
from conftest import REPOSITORY
from PIL import Image

import s2sd_tf
from s2sd_tf import data
from s2sd_tf.keras_compat import keras

README = (REPOSITORY / "README.md").read_text()
SCRIPTS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_scripts_run_and_the_saved_model_loads(tmp_path, run_python):
    script, _, load = SCRIPTS
    assert len(script.strip().splitlines()) <= 25
    (tmp_path / "script.py").write_text(script)
    output = run_python("script.py", cwd=tmp_path).stdout
    assert "'recall@1':" in output

    model = keras.models.load_model(str(tmp_path / "digits.keras"))
    assert type(model) is s2sd_tf.S2SDModel
    _, test, preprocessing = data.load_digits()
    Image.fromarray(test.images[3, :, :, 0]).save(tmp_path / "query.png")
    (tmp_path / "load.py").write_text(load + "\nprint(*embedding.numpy()[0])\n")
    output = run_python("load.py", cwd=tmp_path).stdout
    found = np.array(output.split(), float)
    expected = model.predict(preprocessing.from_pixels(test.images[3:4]), verbose=0)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)

    train, _, _ = data.load_digits()
    before = int(tf.convert_to_tensor(model.s2sd_loss.step))
    model.fit(data.class_balanced_batches(train, preprocessing, 5, 16), epochs=1, verbose=0)
    assert int(tf.convert_to_tensor(model.s2sd_loss.step)) == before + 901 // 80


def test_the_loss_in_a_loop():
    train, _, preprocessing = data.load_digits()
    dense = [keras.layers.Dense(dim) for dim in (8, 64, 128)]
    names = {
        "s2sd_tf": s2sd_tf,
        "tf": tf,
        "batches": data.class_balanced_batches(train, preprocessing, 5, 8).take(3),
        "backbone": s2sd_tf.models.backbones.conv_blocks(preprocessing.output_shape, filters=(8,), pools=1),
        "pool": keras.layers.GlobalAveragePooling2D(),
        "head": dense[0],
        "targets": dense[1:],
        "optimizer": keras.optimizers.Adam(),
    }
    exec(compile(SCRIPTS[1], "README.md", "exec"), names)
    assert int(names["loss"].step) == 3
    assert np.isfinite(names["terms"]["loss"])


def test_links_and_names():
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        if target.startswith("s2sd_tf/"):
            __import__(target.removesuffix(".py").replace("/", "."))
        else:
            assert (REPOSITORY / target).exists(), target


def test_tables_and_lists_match_the_registries(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "docs")
    import make_objectives

    advice = "run python docs/make_objectives.py"
    assert (REPOSITORY / "docs" / "objectives.md").read_text() == make_objectives.text(), advice
    assert make_objectives.with_names(README) == README, advice
