r"""Time of a training step: what S2SD adds to the plain objective, where it goes, and the same step in PyTorch.

    pip install torch==2.13.0
    python benchmarks/train_step.py --output=benchmarks/results/train_step.json

Trains two networks in float32 with multi-similarity and Adam: four convolution blocks on 112 drawings of 28 x 28, and
ResNet-50 with frozen batch statistics on 32 images of 224 x 224. S2SD is the variant "msdfa", with features that teach
from the first step on. If PyTorch is installed, it takes a step that is written here: the same network, heads, losses
and optimizer, with the memory format and the Adam that suit a CPU. Before anything is timed, all implementations take
steps from equal weights on the same images and must have the same losses.

One process times everything in turns, with the same number of threads. Every turn reverses the order, and ratios are of
times in the same turn. Timed are the variants of the step; the parts of a step, each alone; a dense product and a pass
over memory, whose speeds give a lower bound for the cost of the target heads; and for ResNet-50 the input pipeline
alone, on generated JPEGs. Writes the JSON and a table (.md) of the same name. ResNet-50 with PyTorch needs 13 GiB of
memory.
"""

import contextlib
import ctypes
import functools
import os
import pathlib
import tempfile
import time
from collections import OrderedDict
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from absl import app, flags
from machine import describe, set_threads, torch
from photos import generate
from tqdm import tqdm

from s2sd_tf import S2SDModel, data, preset, similarity_kl
from s2sd_tf.data.augmentation import preset as augmentation_preset
from s2sd_tf.files import write_json
from s2sd_tf.keras_compat import keras
from s2sd_tf.models import backbones
from s2sd_tf.models.pooling import pool

FLAGS = flags.FLAGS
flags.DEFINE_bool("small_only", False, "Skip ResNet-50 and the input pipeline.")
flags.DEFINE_integer("threads", 2, "Threads of every implementation.", lower_bound=1)
flags.DEFINE_integer("repeats", 9, "Turns.", lower_bound=1)
flags.DEFINE_string("output", None, "JSON file to write; the table gets the same name.")


class Network(NamedTuple):
    """A network to time: backbone, batches and embedding dimensions."""

    backbone: str
    settings: dict
    image_shape: tuple
    classes: int
    samples: int
    embedding_dim: int
    target_dims: tuple
    learning_rate: float
    options: bool = False  # whether S2SD's options are timed too; each needs its own model
    input_batches: int = 0  # per turn of the input pipeline; 0: not timed

    @property
    def batch(self):
        return self.classes * self.samples

    @property
    def frozen(self):
        return "frozen_bn" in self.settings


NETWORKS = {
    "four convolution blocks": Network(
        backbone="conv_blocks",
        settings={"filters": (64, 64, 64, 64), "pools": 3},
        image_shape=(28, 28, 1),
        classes=28,
        samples=4,
        embedding_dim=32,
        target_dims=(128, 256, 512),
        learning_rate=1e-3,
        options=True,
    ),
    "ResNet-50": Network(
        backbone="resnet50_v1_5",
        settings={"frozen_bn": "statistics"},
        image_shape=(224, 224, 3),
        classes=8,
        samples=4,
        embedding_dim=128,
        target_dims=(512, 1024, 1536, 2048),
        learning_rate=1e-5,
        input_batches=24,
    ),
}
SMALL = ("four convolution blocks",)

PLAIN, FUSED, COMPOSED = "plain objective", "S2SD, fused op", "S2SD, composed"
DIAGNOSTICS, MICRO_BATCHES = "S2SD, diagnostics", "S2SD, two micro-batches"
TORCH, TORCH_COMPILED = "S2SD, PyTorch eager", "S2SD, PyTorch compiled"
REFERENCES = {PLAIN: "plain", TORCH: "PyTorch eager", TORCH_COMPILED: "PyTorch compiled"}

# Number of steps from equal weights, and how far apart their losses may be, relative to losses above 1.
AGREEMENT_STEPS, TOLERANCE = 3, 1e-4
# Small, because Keras and PyTorch add it in different places.
EPSILON = 1e-10
PRODUCT, MEMORY, INPUT = "dense product", "pass over memory", "input pipeline"
PRODUCT_SIDE, MEMORY_FLOATS = 2048, 2**25
# Shorter calls are repeated within a turn, for about this long.
MS_A_TURN = 500


def main(_):
    share_freed_memory()
    set_threads(FLAGS.threads)
    names = SMALL if FLAGS.small_only else NETWORKS
    results = {
        "machine": describe(FLAGS.threads),
        "turns": FLAGS.repeats,
        "networks": {name: measure(name, NETWORKS[name]) for name in names},
    }
    text = table(results)
    print(text)
    if FLAGS.output:
        write_json(FLAGS.output, results)
        pathlib.Path(FLAGS.output).with_suffix(".md").write_text(text)


def measure(name, network):
    """Measures a network. Returns a dict with losses, milliseconds of every turn, parameters and FLOPs."""
    images, labels = batch_of(network)
    models = {variant: make_model(network, settings) for variant, settings in variants(network).items()}
    steps = {variant: make_step(model, images, labels) for variant, model in models.items()}
    if torch():
        # Now, while all models still have equal weights.
        for variant in (TORCH, TORCH_COMPILED):
            steps[variant] = make_torch_step(network, models[FUSED], images, labels, variant == TORCH_COMPILED)
    losses, failed = first_losses(name, models, steps)
    distances = distances_of(network, losses)
    steps = {variant: step for variant, step in steps.items() if variant not in failed}
    parts = make_parts(models[FUSED], images, labels)
    speeds = {PRODUCT: make_product(), MEMORY: make_memory_pass()}
    with input_pipeline(network) as read:
        if read:
            speeds[INPUT] = read
        times = take_turns(name, {**steps, **parts, **speeds})
    return {
        "batch": network.batch,
        "image_shape": network.image_shape,
        "embedding_dim": network.embedding_dim,
        "target_dims": network.target_dims,
        "input_images": network.batch * network.input_batches,
        "parameters": {
            "backbone": count(models[FUSED].backbone.trainable_variables),
            "target heads": count(head_variables(models[FUSED])),
        },
        "gflop": gflop(network, models[FUSED]),
        "losses": losses,
        "distances": distances,
        "failed": failed,
        "step_ms": {key: times[key] for key in steps},
        "parts_ms": {key: times[key] for key in parts},
        "speeds_ms": {key: times[key] for key in speeds},
    }


def share_freed_memory():
    """Lets all threads allocate from one glibc arena, so that memory freed by one variant serves the next.

    With one arena per thread, each would keep gigabytes of ResNet-50's freed activations.
    """
    m_arena_max = -8
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(m_arena_max, 1)


def batch_of(network):
    """Returns `(images, labels)`: noise around a mean image per class."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(network.classes, dtype=np.int32), network.samples)
    means = random.standard_normal((network.classes, *network.image_shape), dtype=np.float32)
    noise = random.standard_normal((network.batch, *network.image_shape), dtype=np.float32)
    return 0.3 * means[labels] + noise, labels


def variants(network):
    """Returns a dict from variant to settings of `S2SDModel`."""
    s2sd = {**preset("msdfa"), "target_dims": network.target_dims, "feature_distill_delay": 0}
    fused = {**s2sd, "similarity_kl_implementation": "fused"}
    found = {
        PLAIN: preset("plain"),
        FUSED: fused,
        COMPOSED: {**s2sd, "similarity_kl_implementation": "composed"},
    }
    if network.options:
        found[DIAGNOSTICS] = {**fused, "diagnostics": True}
        found[MICRO_BATCHES] = {**fused, "micro_batch_size": network.batch // 2}
    return found


def make_model(network, settings):
    """Returns a compiled model. Weights that two models share have equal values."""
    keras.utils.set_random_seed(0)
    backbone = backbones.get(network.backbone, network.image_shape, **network.settings)
    model = S2SDModel(backbone, network.embedding_dim, objective="multi_similarity", **settings)
    model.compile(keras.optimizers.Adam(network.learning_rate, epsilon=EPSILON))
    return model


def make_step(model, images, labels):
    images, labels = tf.constant(images), tf.constant(labels)
    return lambda: float(model.train_on_batch(images, labels, return_dict=True)["loss"])


def make_torch_step(network, model, images, labels, compiled):
    """Returns the same step in PyTorch, starting from the current weights of `model`."""
    module = make_torch_module(network)
    missing, unexpected = module.load_state_dict(torch_state(model), strict=False)
    if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
        raise ValueError(f"model: expected the parameters of the PyTorch module. Received: {missing}, {unexpected}")
    channels_last = torch().channels_last
    module = module.to(memory_format=channels_last)
    images = torch().from_numpy(images.transpose(0, 3, 1, 2)).contiguous(memory_format=channels_last)
    labels = torch().from_numpy(labels)
    optimizer = torch().optim.Adam(module.parameters(), network.learning_rate, eps=EPSILON, fused=True)
    loss_of = torch().compile(module) if compiled else module

    def step():
        optimizer.zero_grad()
        loss = loss_of(images, labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def make_torch_module(network):
    """`S2SDModel` as a PyTorch module from images and labels to the loss. Its names match `torch_state`."""
    library = torch()
    nn, functional = library.nn, library.nn.functional

    class Bottleneck(nn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(4 * width)
            self.relu = nn.ReLU(inplace=True)
            self.downsample = nn.Identity()
            if inputs != 4 * width:
                projection = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
                self.downsample = nn.Sequential(projection, nn.BatchNorm2d(4 * width))

        def forward(self, features):
            residual = self.relu(self.bn1(self.conv1(features)))
            residual = self.relu(self.bn2(self.conv2(residual)))
            return self.relu(self.bn3(self.conv3(residual)) + self.downsample(features))

    def resnet50():
        layers = [
            ("conv1", nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)),
            ("bn1", nn.BatchNorm2d(64)),
            ("relu", nn.ReLU(inplace=True)),
            ("maxpool", nn.MaxPool2d(3, 2, padding=1)),
        ]
        inputs = 64
        for stage, (blocks, width) in enumerate(backbones.resnet.STAGES, 1):
            strides = [1 if stage == 1 else 2] + [1] * (blocks - 1)
            widths = [inputs] + [4 * width] * (blocks - 1)
            blocks = [Bottleneck(before, width, stride) for before, stride in zip(widths, strides)]
            layers.append((f"layer{stage}", nn.Sequential(*blocks)))
            inputs = 4 * width
        return nn.Sequential(OrderedDict(layers)), inputs

    def conv_blocks(filters, pools):
        layers, inputs = [], network.image_shape[-1]
        for block, outputs in enumerate(filters):
            layers += [
                (f"conv{block}", nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)),
                (f"norm{block}", nn.BatchNorm2d(outputs)),
                (f"relu{block}", nn.ReLU(inplace=True)),
            ]
            if block < pools:
                layers.append((f"pool{block}", nn.MaxPool2d(2)))
            inputs = outputs
        return nn.Sequential(OrderedDict(layers)), inputs

    def target_head(inputs, dim):
        layers = OrderedDict(hidden=nn.Linear(inputs, dim), relu=nn.ReLU(inplace=True), linear=nn.Linear(dim, dim))
        return nn.Sequential(layers)

    class S2SD(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, features = resnet50() if network.frozen else conv_blocks(**network.settings)
            self.embedding_head = nn.Sequential(OrderedDict(linear=nn.Linear(features, network.embedding_dim)))
            self.target_heads = nn.ModuleList(target_head(features, dim) for dim in network.target_dims)

        def forward(self, images, labels):
            maps = self.backbone(images)
            average = functional.adaptive_avg_pool2d(maps, 1).flatten(1)
            both = average + functional.adaptive_max_pool2d(maps, 1).flatten(1)
            embedding = functional.normalize(self.embedding_head(average))
            targets = [functional.normalize(head(both)) for head in self.target_heads]
            target_objective = sum(multi_similarity(target, labels) for target in targets) / len(targets)
            log_student = (embedding @ embedding.T).log_softmax(1)
            features = functional.normalize(both)
            *kls, feature_kl = (kl(teacher.detach(), log_student) for teacher in (*targets, features))
            weights = preset("msdfa")
            return (
                (multi_similarity(embedding, labels) + target_objective) / 2
                + weights["distill_weight"] * sum(kls) / len(kls)
                + weights["feature_distill_weight"] * feature_kl
            )

    def kl(teacher, log_student):
        log_teacher = (teacher @ teacher.T).log_softmax(1)
        return functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)

    def multi_similarity(embeddings, labels, alpha=2.0, beta=40.0, base=0.5, epsilon=0.1):
        similarities = embeddings @ embeddings.T
        same = labels[:, None] == labels[None, :]
        itself = library.eye(len(labels), dtype=library.bool)
        fixed, limits = similarities.detach(), library.finfo(similarities.dtype)
        positive, negative = same & ~itself, ~same
        least_positive = fixed.masked_fill(~positive, limits.max).amin(1, keepdim=True)
        greatest_negative = fixed.masked_fill(~negative, limits.min).amax(1, keepdim=True)
        positive = positive & (fixed - epsilon < greatest_negative)
        negative = negative & (fixed + epsilon > least_positive)
        kept = (positive.any(1) & negative.any(1)).to(similarities.dtype)

        def term(values, mask):
            return functional.softplus(values.masked_fill(~mask, limits.min).logsumexp(1))

        losses = term(-alpha * (similarities - base), positive) / alpha
        losses = losses + term(beta * (similarities - base), negative) / beta
        return (losses * kept).sum() / kept.sum().clamp(min=1)

    module = S2SD().train()
    for layer in module.modules():
        if network.frozen and isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    return module


def torch_state(model):
    """Returns the weights of an `S2SDModel` as a state dict for `make_torch_module`."""
    layers = {f"backbone.{layer.name}": layer for layer in model.backbone.layers if layer.weights}
    layers["embedding_head.linear"] = model.embedding_head.linear
    for k, head in enumerate(model.target_heads):
        layers[f"target_heads.{k}.hidden"] = head.hidden
        layers[f"target_heads.{k}.linear"] = head.linear
    state = {}
    for name, layer in layers.items():
        arrays = layer.get_weights()
        if isinstance(layer, keras.layers.BatchNormalization):
            names = ("weight", "bias", "running_mean", "running_var")
        else:
            names = ("weight", "bias")
            # Keras kernels have their output axis last, PyTorch's have it first.
            arrays[0] = np.ascontiguousarray(np.moveaxis(arrays[0], (-1, -2), (0, 1)))
        state.update({f"{name}.{parameter}": torch().from_numpy(array) for parameter, array in zip(names, arrays)})
    return state


def first_losses(name, models, steps):
    """Takes the first steps, which also compile and warm up. Returns losses and error messages, by variant."""
    losses, failed = {}, {}
    for variant, step in tqdm(steps.items(), desc=f"{name}, first steps", leave=False):
        found = []
        try:
            for _ in range(AGREEMENT_STEPS):
                if variant in models:
                    # Keras returns means since the last reset.
                    models[variant].reset_metrics()
                found.append(step())
        except RuntimeError as error:
            # The compiler is missing or does not know the processor.
            if variant != TORCH_COMPILED:
                raise
            failed[variant] = str(error).splitlines()[0]
        else:
            losses[variant] = found
    return losses, failed


def distances_of(network, losses):
    """Returns the largest distance from the loss of `FUSED` for each of the first steps.

    Raises:
        RuntimeError: if a variant that computes the same loss is further away than `TOLERANCE`.
    """
    # Unless statistics are frozen, batch normalisation takes them from a micro-batch.
    others = (PLAIN,) if network.frozen else (PLAIN, MICRO_BATCHES)
    expected = np.array(losses[FUSED])
    distances = {variant: np.abs(values - expected) for variant, values in losses.items() if variant not in others}
    for variant, values in distances.items():
        if not np.all(values <= TOLERANCE * np.maximum(1.0, np.abs(expected))):
            raise RuntimeError(f"{variant}: expected losses of {losses[FUSED]}. Received: {losses[variant]}")
    return np.max(list(distances.values()), axis=0).tolist()


def make_parts(model, images, labels):
    """Returns functions that compute parts of the step of `model`, by name. They leave the weights unchanged."""
    images, labels = tf.constant(images), tf.constant(labels)

    def backbone(images):
        return model.backbone(images, training=True)

    forward = functools.partial(tf.function(backbone).get_concrete_function(images), images)
    maps = forward()
    average, both = pool(maps, "avg"), pool(maps, "avg+max")
    embedding = model.embedding_head(average)
    targets = [head(both) for head in model.target_heads]
    features = tf.math.l2_normalize(both, axis=1)
    heads = head_variables(model)
    others = [*model.backbone.trainable_variables, *model.embedding_head.trainable_variables]

    def base(maps):
        return model.s2sd_loss.objective(model.embedding_head(pool(maps, "avg")), labels, training=True)

    def targets_of(maps):
        pooled = pool(maps, "avg+max")
        return [head(pooled) for head in model.target_heads]

    def target_objectives(*targets):
        return [
            objective(target, labels, training=True)
            for objective, target in zip(model.s2sd_loss.target_objectives, targets)
        ]

    def kl(implementation):
        return lambda student, *teachers: similarity_kl(student, teachers, implementation=implementation)[0]

    return {
        "backbone, forward": forward,
        "backbone, forward and backward": _gradients(backbone, [images], model.backbone.trainable_variables, 0),
        "base embedding and its objective": _gradients(base, [maps], model.embedding_head.trainable_variables),
        "target heads": _gradients(targets_of, [maps], heads),
        "objectives of the targets": _gradients(target_objectives, targets, []),
        "similarity-KL, fused": _gradients(kl("fused"), [embedding, *targets, features], [], 1),
        "similarity-KL, composed": _gradients(kl("composed"), [embedding, *targets, features], [], 1),
        "Adam, backbone and base head": _adam(others),
        "Adam, target heads": _adam(heads),
    }


def _gradients(function, inputs, variables, watched=None):
    """A call that computes the gradients of `function` for `variables` and for its first `watched` inputs."""
    watched = len(inputs) if watched is None else watched

    @tf.function
    def run(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs[:watched])
            outputs = function(*inputs)
        return tape.gradient(outputs, [*inputs[:watched], *variables])

    return functools.partial(run.get_concrete_function(*inputs), *inputs)


def _adam(variables):
    # A learning rate of 0 takes as long and leaves the weights unchanged.
    optimizer = keras.optimizers.Adam(0.0)
    optimizer.build(variables)
    gradients = [tf.random.stateless_normal(tuple(variable.shape), [0, 0]) for variable in variables]

    @tf.function
    def run(*gradients):
        optimizer.apply_gradients(zip(gradients, variables))

    return functools.partial(run.get_concrete_function(*gradients), *gradients)


def make_product():
    random = np.random.default_rng(0)
    a, b = (tf.constant(random.standard_normal([PRODUCT_SIDE] * 2, dtype=np.float32)) for _ in range(2))
    product = tf.function(tf.matmul)
    return functools.partial(product.get_concrete_function(a, b), a, b)


def make_memory_pass():
    """Returns a call that reads two arrays of `MEMORY_FLOATS` floats and writes one."""
    values, variable = tf.ones(MEMORY_FLOATS), tf.Variable(tf.zeros(MEMORY_FLOATS))

    @tf.function
    def run(values):
        variable.assign_add(values)

    return functools.partial(run.get_concrete_function(values), values)


@contextlib.contextmanager
def input_pipeline(network):
    """A function that reads and augments `input_batches` batches of generated JPEGs, or None if these are 0."""
    if not network.input_batches:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(folder)
        paths = sorted(str(path) for path in pathlib.Path(folder).glob("*.jpg"))
        paths = np.array(paths * (network.batch * network.input_batches // len(paths) + 1))
        labels = np.arange(len(paths), dtype=np.int32) % network.classes
        images = data.ImageSet(paths, labels, tuple(str(k) for k in range(network.classes)))
        batches = data.class_balanced_batches(
            images,
            data.Preprocessing(*network.image_shape[:2], **backbones.normalization(network.backbone)),
            network.classes,
            network.samples,
            steps_per_epoch=network.input_batches,
            augmentation=data.Augmentation(**augmentation_preset("base")),
        )
        yield lambda: [batch[1].shape[0] for batch in batches]


def take_turns(name, calls):
    """Returns the milliseconds of each call in every turn, the median if it is repeated within a turn."""
    counts = {}
    for key, call in tqdm(calls.items(), desc=f"{name}, how often", leave=False):
        ms = timed(call)
        # The first call of a quick function may be slow.
        ms = ms if ms > 4 * MS_A_TURN else timed(call)
        counts[key] = int(np.clip(MS_A_TURN / ms, 1, 100))
    times = {key: [] for key in calls}
    order = list(calls)
    for _ in tqdm(range(FLAGS.repeats), desc=f"{name}, turns", leave=False):
        for key in order:
            # The previous one's threads may still be spinning, and its data may be in the caches.
            time.sleep(0.05)
            if counts[key] > 1:
                calls[key]()
            found = [timed(calls[key]) for _ in range(counts[key])]
            times[key].append(round(float(np.median(found)), 4))
        order.reverse()
    return times


def timed(call):
    """Runs `call` and returns its milliseconds."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def head_variables(model):
    return [variable for head in model.target_heads for variable in head.trainable_variables]


def count(variables):
    return int(sum(np.prod(variable.shape) for variable in variables))


def gflop(network, model):
    """The arithmetic of a step in GFLOP, forward and backward, for each kind of product."""
    kernels = {
        layer: np.prod(layer.output.shape[1:3])
        for layer in model.backbone.layers
        if isinstance(layer, keras.layers.Conv2D)
    }
    backbone = sum(positions * count([layer.kernel]) for layer, positions in kernels.items())
    dims = [*network.target_dims, model.backbone.output_shape[-1]]
    # Forward, plus the gradients of both factors. The teachers' similarities have no gradient.
    similarities = sum(dims) + 3 * network.embedding_dim
    return {
        "backbone": 6e-9 * network.batch * float(backbone),
        "target heads": 6e-9 * network.batch * count(head_variables(model)),
        "similarities": 2e-9 * network.batch**2 * similarities,
    }


def floor_ms(found):
    """The minimum cost of the target heads at the speeds of the same turns. Returns `(products, Adam)` in ms.

    The products are bound by arithmetic or by memory traffic: the weights are read forward and backward, and the
    gradient is written. Adam reads the gradient, the weight and both moments, and writes the latter three.
    """
    gflops, gigabytes = speeds(found)
    gigabyte = 4e-9 * found["parameters"]["target heads"]
    products = max(found["gflop"]["target heads"] / gflops, 3 * gigabyte / gigabytes)
    return 1000 * products, 1000 * 7 * gigabyte / gigabytes


def speeds(found):
    """Returns the GFLOP/s of the dense product and the GB/s of the pass over memory."""
    product, memory = (np.median(found["speeds_ms"][key]) / 1000 for key in (PRODUCT, MEMORY))
    return 2e-9 * PRODUCT_SIDE**3 / product, 3 * 4e-9 * MEMORY_FLOATS / memory


def table(results):
    lines = ["# Time of a training step", ""]
    lines += [f"- {key}: {value}" for key, value in results["machine"].items()]
    for name, found in results["networks"].items():
        shape = " x ".join(map(str, found["image_shape"]))
        dims = f"dimension {found['embedding_dim']}, targets {list(found['target_dims'])}"
        lines += ["", f"## {name}: {found['batch']} images of {shape}, {dims}", ""]
        lines += [f"Median (minimum to maximum) of {results['turns']} turns. Ratios are of times in the same turn.", ""]
        lines += _steps_table(found) + _parts_table(found) + _floor_lines(found) + _input_lines(found)
    return "\n".join(lines) + "\n"


def _steps_table(found):
    times = {variant: np.array(values) for variant, values in found["step_ms"].items()}
    references = [variant for variant in REFERENCES if variant in times]
    header = " | ".join(f"over {REFERENCES[variant]}" for variant in references)
    lines = [f"| | ms per step | {header} |", "|---" * (2 + len(references)) + "|"]
    for variant, values in times.items():
        ratios = ["" if other == variant else _spread(values / times[other], ".2f") for other in references]
        lines.append(f"| {variant} | {_spread(values)} | {' | '.join(ratios)} |")
    lines += [f"\n{variant}: failed, {why}" for variant, why in found["failed"].items()]
    apart = ", ".join(f"{distance:.1e}" for distance in found["distances"])
    return [*lines, "", f"Before: losses of {AGREEMENT_STEPS} steps from equal weights differ by at most {apart}.", ""]


def _parts_table(found):
    parts = {part: np.array(values) for part, values in found["parts_ms"].items()}
    both = parts.pop("backbone, forward and backward")
    rows = {"backbone, forward": parts.pop("backbone, forward")}
    rows["backbone, backward"] = both - rows["backbone, forward"]
    composed = parts.pop("similarity-KL, composed")
    rows.update(parts)
    step = np.array(found["step_ms"][FUSED])
    rows["the rest of the step"] = step - sum(rows.values())
    lines = [
        "Parts of the step with the fused op, each timed alone with its gradients. The rest is the time of the step "
        "minus their sum. It is negative if the parts take longer alone.",
        "",
    ]
    lines += ["| | ms | % of the step |", "|---|---|---|"]
    lines += [f"| {part} | {_spread(ms)} | {100 * np.median(ms / step):.2f} |" for part, ms in rows.items()]
    return [*lines, f"| (similarity-KL, composed) | {_spread(composed)} | |", ""]


def _floor_lines(found):
    products, adam = floor_ms(found)
    gflops, gigabytes = speeds(found)
    plain = np.median(found["step_ms"][PLAIN])
    arithmetic, parameters = found["gflop"], found["parameters"]
    share = 100 * arithmetic["target heads"] / arithmetic["backbone"]
    return [
        f"The target heads have {parameters['target heads']:,} parameters, the backbone "
        f"{parameters['backbone']:,}. Their products are {arithmetic['target heads']:.3g} GFLOP per step, "
        f"{share:.2g}% of the backbone's {arithmetic['backbone']:.3g}; the similarities' are "
        f"{arithmetic['similarities']:.2g}. At {gflops:.0f} GFLOP/s and {gigabytes:.1f} GB/s, measured in the same "
        f"turns, the heads' products take at least {products:.3g} ms and their Adam {adam:.3g} ms: together "
        f"{100 * (products + adam) / plain:.2f}% of a plain step.",
    ]


def _input_lines(found):
    if INPUT not in found["speeds_ms"]:
        return []
    read = 1000 * found["input_images"] / np.array(found["speeds_ms"][INPUT])
    taken = {variant: 1000 * found["batch"] / np.array(found["step_ms"][variant]) for variant in (PLAIN, FUSED)}
    ratio = np.median(read / taken[FUSED])
    bound = "compute" if ratio > 1 else "input"
    lines = ["", "| | images per second |", "|---|---|", f"| input pipeline alone | {_spread(read)} |"]
    lines += [f"| step, {variant} | {_spread(rate)} |" for variant, rate in taken.items()]
    return [*lines, "", f"The input is {ratio:.3g} times as fast as the step with S2SD: training is bound by {bound}."]


def _spread(values, form=None):
    found = (min(values), np.median(values), max(values))
    low, middle, high = (format(value, form or (".4g" if abs(value) < 1000 else ",.0f")) for value in found)
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    app.run(main)
