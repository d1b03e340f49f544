"""Writes docs/objectives.md, and the lists of names in README.md, from the registries.

python docs/make_objectives.py
"""

import inspect
import pathlib
import re
import textwrap
from typing import Any

from s2sd_tf import mining, objectives
from s2sd_tf.data import samplers

PATH = pathlib.Path(__file__).with_name("objectives.md")
README = PATH.parent.parent / "README.md"
# Settings that many objectives share; the text above the table describes them once.
SHARED = (
    "num_classes",
    "seed",
    "name",
    "dtype",
    "miner",
    "memory_size",
    "memory_weight",
    "memory_start",
    "normalize",
    "relevance",
)

TEXT = """# Objectives, miners and samplers

This page is generated from the registries by `python docs/make_objectives.py`.

## Objectives

Create an objective with `s2sd_tf.objectives.get(name, **settings)` or `S2SDModel(objective=name)`. In a config file,
`config.objective.name` chooses it and `config.objective.<name>.<setting>` changes a setting. Embeddings are
l2-normalised first, so s is a cosine similarity and d a Euclidean distance. In the formulas a is an anchor, p a
positive, n a negative, y the image's own class, and [x]+ = max(0, x). B is the batch size, C the number of classes and
K the number of proxies per class. Each docstring has the details and the differences from the paper.

Some settings are shared. All objectives have `learning_rate_multiplier`, a factor on the updates of the objective's
own weights (1 unless the table gives another default). Tuple and pair objectives have `miner` and `seed`. Pair
objectives have `memory_size`, `memory_weight` and `memory_start` for a cross-batch memory (XBM, Wang et al., CVPR
2020), which is off by default. `contrastive`, `multi_similarity` and `supcon` have `relevance`, for
[hierarchies and several labels](graded.md). Objectives with weights per class have `num_classes`. Where the paper does
not normalise, `normalize=False` accepts embeddings of any length and adds a penalty of `l2_weight` times their mean
squared length.

{objectives}

### Your own objective

Subclass `PairObjective` (implement `compute_pairs`), `TupleObjective` (`compute_triplets`), `ProxyObjective` or
`Objective` (`compute`), and register the class. Return its settings from `get_config`, so that a saved model has them:

```python
import tensorflow as tf

import s2sd_tf


@s2sd_tf.objectives.register("soft_margin_triplet")
class SoftMarginTriplet(s2sd_tf.objectives.TupleObjective):
    # The mean of log(1 + exp(scale * (s_an - s_ap))) over the triplets, with cosine similarities s.
    def __init__(self, scale=10.0, miner="semi_hard", **kwargs):
        super().__init__(miner=miner, **kwargs)
        self.scale = scale

    def compute_triplets(self, embeddings, labels, triplets, seed):
        positive, negative = triplets.of(1.0 - tf.matmul(embeddings, embeddings, transpose_b=True))
        losses = tf.math.softplus(self.scale * (positive - negative))
        losses = tf.where(triplets.valid, losses, 0.0)
        return tf.reduce_sum(losses) / tf.maximum(tf.reduce_sum(tf.cast(triplets.valid, losses.dtype)), 1.0)

    def get_config(self):
        return {{**super().get_config(), "scale": self.scale}}
```

Compute with TensorFlow operations, and choose with `tf.where` or `tf.cond`: Python's `if` on a tensor fails with
Keras 3, which does not use AutoGraph.

Now `S2SDModel(backbone, 64, objective="soft_margin_triplet")` works. For `s2sd-train`, define the class in the config
file: its settings are then `config.objective.soft_margin_triplet`. `s2sd-evaluate` and `s2sd-export` take the file by
`--register=<config file>`. In a script, define the class before you load a saved model.
[Contributing](contributing.md#an-objective) says how to add one to the package.

### As a Keras loss

`objectives.as_keras_loss(name, **settings)` returns a loss for `compile` of any Keras model that outputs embeddings:

```python
import tensorflow as tf

import s2sd_tf

keras = tf.keras
train, test, preprocessing = s2sd_tf.data.load_digits()
batches = s2sd_tf.data.class_balanced_batches(train, preprocessing, 5, 16)
layers = [keras.layers.Flatten(), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(16)]
model = keras.Sequential([keras.Input((8, 8, 1)), *layers])
model.compile("adam", loss=s2sd_tf.objectives.as_keras_loss("multi_similarity"))
model.fit(batches, epochs=5)
```

An objective with weights (the proxy objectives and `margin`) must be in an `ObjectiveHolder` of the model, which then
trains and saves the weights:

```python
objective = s2sd_tf.objectives.get("proxy_anchor", num_classes=train.num_classes)
model = keras.Sequential([keras.Input((8, 8, 1)), *layers, s2sd_tf.objectives.ObjectiveHolder(objective)])
model.compile("adam", loss=s2sd_tf.objectives.as_keras_loss(objective))
model.fit(batches, epochs=5)
model.save("digits.keras")
keras.models.load_model("digits.keras").fit(batches, epochs=5)
```

- With several replicas, each compares only the images in its own part of the batch; the loss is the mean over the
  replicas. `S2SDModel` compares the images of the whole batch.
- Labels are integers of any size. Floating-point labels must be whole numbers below 2^24. Sample and class weights are
  not supported.
- A stochastic miner makes new draws at every call, in evaluation too. Without an `ObjectiveHolder`, the draws of a
  loaded model start again from the seed.
- A cross-batch memory is not supported, because a Keras loss cannot tell training from evaluation, and
  `learning_rate_multiplier` has no effect. Both work in `S2SDModel`.

### Losses of tensorflow-addons

These names work on the classic stack. On the default stack the error says what to install, and which objective above to
use instead. They have no miner and no memory. Quote the name in flags:
`'--config.objective["addons/triplet_hard"].margin=0.5'`.

{addons}

## Miners

The setting `miner` accepts a name or a `mining.Miner`. Triplet miners work with tuple objectives, and with pair
objectives, which use the pairs of the triplets. Pair miners work only with pair objectives. Create a miner with
`mining.get(name, **settings)`. In a config file, `config.objective.<name>.miner` chooses it and
`config.miner.<name>.<setting>` changes a setting.

{miners}

## Samplers

A sampler chooses the images of each batch: set `config.sampler.name`, or call
`data.training_batches(images, preprocessing, sampler)`.

{samplers}

"""


def main() -> None:
    PATH.write_text(text())
    README.write_text(with_names(README.read_text()))


def text() -> str:
    """Returns the page."""
    addons = objectives.names("addons")
    ours = [name for name in objectives.names() if name not in addons]
    return TEXT.format(
        objectives=table(
            ["name", "kind", "formula", "defaults", "miner", "paper", "cost"],
            [
                [
                    f"`{name}`",
                    objectives.lookup(name).kind,
                    code(objectives.lookup(name).formula),
                    defaults(objectives.settings(name), SHARED),
                    objectives.settings(name).get("miner", ""),
                    objectives.lookup(name).paper,
                    objectives.lookup(name).cost,
                ]
                for name in ours
            ],
        ),
        addons=table(
            ["name", "defaults", "instead"],
            [
                [f"`{name}`", defaults(objectives.settings(name), SHARED), objectives.lookup(name).instead]
                for name in addons
            ],
        ),
        miners=table(
            ["name", "chooses", "settings", ""],
            [
                [
                    f"`{name}`",
                    "pairs" if issubclass(mining.lookup(name), mining.PairMiner) else "triplets",
                    defaults(mining.settings(name)),
                    first_sentence(mining.lookup(name)),
                ]
                for name in mining.names()
            ],
        ),
        samplers=table(
            ["name", "settings", ""],
            [
                [f"`{name}`", defaults(samplers.settings(name)), first_sentence(samplers.lookup(name))]
                for name in samplers.names()
            ],
        ),
    )


def with_names(readme: str) -> str:
    """Returns the README with the current names in its paragraphs on objectives and miners."""
    ours = [name for kind in ("pair", "tuple", "proxy") for name in objectives.names(kind)]
    for title, found in (("Objectives", ours), ("Miners", mining.names())):
        opening = rf"\*\*{title}\*\*[^:]*: "
        start = re.search(rf"^{opening}", readme, re.MULTILINE)
        assert start, f"README.md: expected a paragraph that matches {opening}"
        listed = ", ".join(f"`{name}`" for name in found)
        paragraph = textwrap.fill(f"{start.group()}{listed}.", 120, break_on_hyphens=False)
        end = readme.index("\n\n", start.start())
        readme = readme[: start.start()] + paragraph + readme[end:]
    return readme


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(formula: str) -> str:
    return f"`{formula}`".replace("|", "\\|") if formula else ""


def defaults(settings: dict[str, Any], omitted: tuple[str, ...] = ()) -> str:
    empty = inspect.Parameter.empty
    shown = {key: value for key, value in settings.items() if key not in omitted and value is not empty}
    if shown.get("learning_rate_multiplier") == 1.0:
        del shown["learning_rate_multiplier"]
    return ", ".join(f"{key} {value}" for key, value in shown.items()).replace("|", "\\|")


def first_sentence(cls: type) -> str:
    paragraph = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[a-z0-9)])[.:](?= [A-Z]|$)", paragraph)[0].rstrip(".:").replace("|", "\\|") + "."


if __name__ == "__main__":
    main()
