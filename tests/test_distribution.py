"""Training under MirroredStrategy on two virtual CPUs."""

import json

import numpy as np

SCRIPT = """
import json
import numpy as np, tensorflow as tf
import s2sd_tf
keras = tf.keras
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
images = np.random.default_rng(0).normal(size=(8, 8, 8, 1)).astype(np.float32)
labels = np.arange(8) % 3

def train(strategy, images, labels):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        backbone = s2sd_tf.models.backbones.conv_blocks((8, 8, 1), filters=(4, 6), pools=1)
        model = s2sd_tf.S2SDModel(
            backbone, 4, objective="proxy_anchor", num_classes=3, target_dims=(8,), feature_distill_delay=2, l2=0.01
        )
        model.compile(optimizer=keras.optimizers.SGD(0.01))
    dataset = tf.data.Dataset.from_tensors((images, labels))
    history = model.fit(dataset, epochs=5, verbose=0).history
    layers = (model.backbone, model.embedding_head, *model.auxiliary_heads, model.objective)
    weights = [w.tolist() for layer in layers for w in layer.get_weights()]
    return weights, history["loss"], int(tf.convert_to_tensor(model.step))

one = train(tf.distribute.get_strategy(), images, labels)
# Both replicas get the same images: the mean of their losses is the loss of one.
two = train(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), np.tile(images, (2, 1, 1, 1)), np.tile(labels, 2))
print(json.dumps([one, two]))
"""


def test_two_replicas_with_the_same_images_are_one(tmp_path, run_python):
    (tmp_path / "script.py").write_text(SCRIPT)
    output = run_python("script.py", cwd=tmp_path).stdout
    one, two = json.loads(output.splitlines()[-1])
    assert one[2] == two[2] == 5
    np.testing.assert_allclose(one[1], two[1], rtol=1e-4)
    for a, b in zip(one[0], two[0]):
        np.testing.assert_allclose(a, b, atol=1e-5)


MEMORY_SCRIPT = """
import json
import numpy as np, tensorflow as tf
import s2sd_tf
keras = tf.keras
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
images = np.random.default_rng(0).normal(size=(16, 8, 8, 1)).astype(np.float32)
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    backbone = s2sd_tf.models.backbones.conv_blocks((8, 8, 1), filters=(4, 6), pools=1)
    objective = s2sd_tf.objectives.get("contrastive", memory_size=10, memory_start=0)
    model = s2sd_tf.S2SDModel(backbone, 4, objective=objective, target_dims=(8,))
    model.compile(optimizer=keras.optimizers.SGD(0.01))
dataset = tf.data.Dataset.from_tensors((images, np.arange(16) // 2))
model.fit(dataset, epochs=3, verbose=0)
values = (objective.memory, objective.memory_labels, objective.draws)
print(json.dumps([tf.convert_to_tensor(value).numpy().tolist() for value in values]))
"""


def test_a_cross_batch_memory_under_a_strategy_holds_embeddings_of_one_replica(tmp_path, run_python):
    (tmp_path / "script.py").write_text(MEMORY_SCRIPT)
    memory, labels, draws = json.loads(run_python("script.py", cwd=tmp_path).stdout.splitlines()[-1])
    np.testing.assert_allclose(np.linalg.norm(memory, axis=1), 1.0, atol=1e-5)
    # The newest first: eight images of this replica, and two of the step before.
    assert labels == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0]
    assert draws == 3
