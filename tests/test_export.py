"""The encoder SavedModel, loaded in a process that cannot import this package."""

import io
import json

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from s2sd_tf import data, export
from s2sd_tf.files import replacing

LOADER = """
import sys, json
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("s2sd_tf", "keras_cv", "tensorflow_addons"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import numpy as np, tensorflow as tf
try:
    import s2sd_tf
    sys.exit("s2sd_tf could be imported")
except ImportError:
    pass
loaded = tf.saved_model.load(sys.argv[1])
inputs = np.load(sys.argv[2], allow_pickle=True).item()
floats = loaded.signatures["serving_default"](images=tf.constant(inputs["images"]))["embedding"]
encoded = {
    kind: loaded.signatures["encoded_images"](encoded_images=tf.constant(inputs[kind]))["embedding"].numpy().tolist()
    for kind in ("png", "jpeg", "mixed")
}
print(json.dumps({"floats": floats.numpy().tolist(), **encoded}))
"""


def encode(pixels, kind):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def test_float_images_and_bytes_give_the_models_embeddings(small_model, tmp_path, run_python):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (5, 20, 15, 3), dtype=np.uint8)
    preprocessing = data.Preprocessing(8, 8, 1, invert=True, mean=0.2, std=0.7)
    model = small_model(embedding_dim=6, target_pooling="avg+max")
    model.compile(optimizer="adam")
    model.fit(generator.normal(size=(8, 8, 8, 1)).astype(np.float32), np.arange(8) % 2, batch_size=8, verbose=0)
    export.export_encoder(model, preprocessing, str(tmp_path / "encoder"))

    png = [encode(image, "PNG") for image in pixels]
    jpeg = [encode(image, "JPEG") for image in pixels]
    other_size = encode(generator.integers(0, 256, (31, 12, 3), dtype=np.uint8), "PNG")
    grays = np.stack([preprocessing.decode(image) for image in png])
    inputs = {"images": grays, "png": png, "jpeg": jpeg, "mixed": [png[0], other_size, jpeg[1]]}
    np.save(tmp_path / "inputs.npy", inputs, allow_pickle=True)
    (tmp_path / "loader.py").write_text(LOADER)
    arguments = (tmp_path / "loader.py", tmp_path / "encoder", tmp_path / "inputs.npy")
    found = json.loads(run_python(*arguments, cwd=tmp_path).stdout)

    expected = model(preprocessing(grays), training=False).numpy()
    np.testing.assert_allclose(found["floats"], expected, atol=1e-5)
    np.testing.assert_allclose(found["png"], expected, atol=1e-5)
    from_jpeg = model(np.stack([preprocessing.from_bytes(image) for image in jpeg]), training=False).numpy()
    np.testing.assert_allclose(found["jpeg"], from_jpeg, atol=1e-5)
    np.testing.assert_allclose(np.array(found["mixed"])[[0, 2]], [expected[0], from_jpeg[1]], atol=1e-5)


def test_it_contains_only_the_encoder(small_model, tmp_path):
    model = small_model(embedding_dim=6, target_dims=(512,))
    export.export_encoder(model, data.Preprocessing(8, 8, 1), str(tmp_path / "encoder"))
    stored = tf.train.list_variables(str(tmp_path / "encoder" / "variables" / "variables"))
    assert not any(512 in shape for _, shape in stored)


def test_it_contains_a_learned_pooling(small_model, tmp_path):
    model = small_model(pooling="gem", target_pooling="avg")
    model.gem.p.assign(2.5)
    export.export_encoder(model, data.Preprocessing(8, 8, 1), str(tmp_path / "encoder"))
    images = np.random.default_rng(0).random((3, 8, 8, 1), np.float32)
    found = tf.saved_model.load(str(tmp_path / "encoder")).signatures["serving_default"](images=tf.constant(images))
    np.testing.assert_allclose(found["embedding"], model.predict(images, verbose=0), atol=1e-5)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "folder"
    for content in ("old", "new"):
        with replacing(str(target)) as path:
            (tmp_path / path).mkdir()
            (tmp_path / path / "file").write_text(content)
        assert (target / "file").read_text() == content
    with pytest.raises(RuntimeError), replacing(str(target)) as path:  # noqa: PT012
        (tmp_path / path).mkdir()
        raise RuntimeError
    assert (target / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
