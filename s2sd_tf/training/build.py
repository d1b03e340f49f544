"""What a run is made of, from its resolved config: model, optimizer, sampler, batches, evaluations."""

import contextlib

import tensorflow as tf

from s2sd_tf import mining, objectives, registry
from s2sd_tf.data import EpochBatches, evaluation_batches, samplers
from s2sd_tf.evaluation import RetrievalEvaluation
from s2sd_tf.keras_compat import keras
from s2sd_tf.losses import S2SDLoss
from s2sd_tf.models import S2SDModel, backbones
from s2sd_tf.training import optimizers


def set_up(config):
    """Threads, determinism and seeds, as a resolved config says; before anything of TensorFlow has run."""
    if config.train.threads:
        tf.config.threading.set_intra_op_parallelism_threads(config.train.threads)
        tf.config.threading.set_inter_op_parallelism_threads(config.train.threads)
    if config.train.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(config.seed)


@contextlib.contextmanager
def precision(config):
    """Within the block the layers that are made compute in what a resolved config says; Keras's global policy is put
    back at the end.
    """
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy(config.train.precision)
    try:
        yield
    finally:
        keras.mixed_precision.set_global_policy(before)


def steps_per_epoch(config, run_data):
    """Batches of an epoch of a resolved config."""
    batch = config.data.classes_per_batch * config.data.samples_per_class
    return config.train.steps_per_epoch or max(1, len(run_data.train) // batch)


def build_model(config, run_data):
    """The compiled `S2SDModel` of a resolved config."""
    settings = {}
    if config.model.backbone == "conv_blocks":
        settings = {"filters": tuple(config.model.filters), "pools": config.model.pools}
    backbone = backbones.get(
        config.model.backbone,
        run_data.preprocessing.output_shape,
        weights=config.model.weights or None,
        frozen_bn=config.model.frozen_bn or None,
        **settings,
    )
    target = config.s2sd.target_objective or config.objective.name
    loss = S2SDLoss(
        _objective(config, config.objective.name, run_data),
        _objective(config, target, run_data),
        **{key: value for key, value in config.s2sd.items() if key != "target_objective"},
        name="s2sd_loss",
    )
    own = registry.constructor_arguments([S2SDModel])
    settings = {key: value for key, value in config.model.items() if key in own and key != "backbone"}
    settings["learning_rate_multipliers"] = dict(config.model.learning_rate_multipliers)
    model = S2SDModel(backbone, loss=loss, **settings)
    learning_rate = build_schedule(config, run_data)
    optimizer = optimizers.get(config.optimizer.name, learning_rate, config.optimizer.settings.to_dict())
    model.compile(optimizer=optimizer, jit_compile=config.train.jit_compile)
    return model


def build_schedule(config, run_data):
    """The learning rate of a resolved config, a float or a Keras schedule."""
    return optimizers.schedule(
        config.optimizer.learning_rate,
        steps_per_epoch=steps_per_epoch(config, run_data),
        epochs=config.train.epochs,
        **config.optimizer.schedule,
    )


def build_sampler(config):
    """The `samplers.Sampler` of a resolved config."""
    name = config.sampler.name
    given = {
        "classes_per_batch": config.data.classes_per_batch,
        "samples_per_class": config.data.samples_per_class,
        "batch_size": config.data.classes_per_batch * config.data.samples_per_class,
    }
    known = samplers.settings(name)
    return samplers.get(name, **config.sampler[name], **{key: given[key] for key in given if key in known})


def build_batches(config, run_data, sampler):
    """The `data.EpochBatches` of a resolved config."""
    return EpochBatches(
        run_data.train,
        run_data.preprocessing,
        sampler,
        steps_per_epoch=config.train.steps_per_epoch or None,
        seed=config.seed,
        augmentation=run_data.augmentation,
    )


def build_evaluations(config, run_data):
    """`RetrievalEvaluation` of the held-out part, where there is one, and of the test classes."""
    return [
        _evaluation(config, run_data, images, prefix, gallery)
        for images, prefix, gallery in (
            (run_data.validation, "val_", None),
            (run_data.test, "test_", run_data.gallery),
        )
        if images is not None
    ]


def _evaluation(config, run_data, images, prefix, gallery):
    searched = {}
    if gallery is not None:
        searched = {
            "gallery_images": evaluation_batches(gallery, run_data.preprocessing, cache=None),
            "gallery_labels": gallery.labels,
        }
    return RetrievalEvaluation(
        evaluation_batches(images, run_data.preprocessing, cache=None),
        images.labels,
        every=config.eval.every or config.train.epochs,
        prefix=prefix,
        ks=config.eval.ks,
        **searched,
    )


def _objective(config, name, run_data):
    uses_classes = objectives.lookup(name).uses_classes
    settings = dict(config.objective[name])
    if "miner" in settings:
        settings["miner"] = mining.get(settings["miner"], **config.miner.get(settings["miner"], {}))
    if "seed" in objectives.settings(name):
        settings["seed"] = config.seed
    if uses_classes:
        settings["num_classes"] = run_data.train.num_classes
    return objectives.get(name, **settings)
