"""Writes docs/objectives.md, and the lists of names in README.md, from the registries.

python docs/make_objectives.py
"""

import inspect
import pathlib
import re
import textwrap

from s2sd_tf import mining, objectives
from s2sd_tf.data import samplers

PATH = pathlib.Path(__file__).with_name("objectives.md")
README = PATH.parent.parent / "README.md"
# Settings that many objectives share, told once above the table.
SHARED = ("num_classes", "seed", "name", "dtype", "miner", "memory_size", "memory_weight", "memory_start", "normalize")

TEXT = """# Objectives, miners and samplers

Made from the registries by `python docs/make_objectives.py`.

## Objectives

`s2sd_tf.objectives.get(name, **settings)` makes one, `S2SDModel(objective=name)` too; in a config file
`config.objective.name` chooses and `config.objective.<name>.<setting>` sets. Embeddings are l2-normalised before
anything else, so s is a cosine similarity and d a Euclidean distance; a is an anchor, p a positive, n a negative, y
the own class, [x]+ = max(0, x). B is the batch, C the number of classes, K proxies a class, D and H dimensions.
Details, and what differs from a paper, are in each docstring.

Settings that all of a kind have: `learning_rate_multiplier` (1 where no other is given), a factor on the updates of
the objective's own weights; tuple and pair objectives: `miner` and `seed`; pair objectives: `memory_size`,
`memory_weight` and `memory_start` of a cross-batch memory (XBM, Wang et al., CVPR 2020), off by default; objectives
with weights a class: `num_classes`. Where the paper does not normalise, `normalize=False` takes embeddings of any
length, with a penalty of `l2_weight` times their mean square.

{objectives}

An objective of your own is a subclass of `objectives.Objective`, `PairObjective`, `TupleObjective` or
`ProxyObjective` with `@s2sd_tf.objectives.register("my_objective")`.

### As a Keras loss

`objectives.as_keras_loss(name, **settings)` is a loss for `compile` of any Keras model whose outputs are embeddings:

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

An objective with weights (the proxy objectives, and `margin`) needs a place in the model, which trains and saves them:

```python
objective = s2sd_tf.objectives.get("proxy_anchor", num_classes=train.num_classes)
model = keras.Sequential([keras.Input((8, 8, 1)), *layers, s2sd_tf.objectives.ObjectiveHolder(objective)])
model.compile("adam", loss=s2sd_tf.objectives.as_keras_loss(objective))
model.fit(batches, epochs=5)
model.save("digits.keras")
keras.models.load_model("digits.keras").fit(batches, epochs=5)
```

- Several replicas: each compares the images of its own part of the batch; the loss is the mean over the replicas.
  `S2SDModel` compares those of the whole batch.
- Labels are integers. In floating point they have to be whole and below 2^24. There are no sample or class weights.
- Every call draws anew from a stochastic miner, in evaluation too. Without an `ObjectiveHolder` the draws of a loaded
  model start again from the seed.
- A cross-batch memory is refused, since a Keras loss cannot tell training from evaluation; `learning_rate_multiplier`
  has no effect. Both work in `S2SDModel`.

### Of tensorflow-addons

On the classic stack, by name; on the default stack the name says what to install and which of the above does the same.
They have neither miner nor memory. Flags quote the name: `'--config.objective["addons/triplet_hard"].margin=0.5'`.

{addons}

## Miners

A name or a `mining.Miner` for `miner`. Miners of triplets serve tuple objectives, and pair objectives by the pairs of
their triplets; miners of pairs serve pair objectives. `mining.get(name, **settings)` makes one; in a config file
`config.objective.<name>.miner` chooses and `config.miner.<name>.<setting>` sets.

{miners}

## Samplers

What is in a batch: `config.sampler.name`, or `data.training_batches(images, preprocessing, sampler)`.

{samplers}

"""


def main():
    PATH.write_text(text())
    README.write_text(with_names(README.read_text()))


def text():
    """The whole page."""
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
            ["name", "defaults", "ours"],
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


def with_names(readme):
    """The README with the names of today in its paragraphs of objectives and miners."""
    ours = [name for kind in ("pair", "tuple", "proxy") for name in objectives.names(kind)]
    for title, found in (("Objectives", ours), ("Miners", mining.names())):
        opening = rf"\*\*{title}\*\*[^:]*: "
        start = re.search(rf"^{opening}", readme, re.MULTILINE)
        listed = ", ".join(f"`{name}`" for name in found)
        paragraph = textwrap.fill(f"{start.group()}{listed}.", 120, break_on_hyphens=False)
        end = readme.index("\n\n", start.start())
        readme = readme[: start.start()] + paragraph + readme[end:]
    return readme


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(formula):
    return f"`{formula}`".replace("|", "\\|") if formula else ""


def defaults(settings, but=()):
    shown = {key: value for key, value in settings.items() if key not in but and value is not inspect.Parameter.empty}
    if shown.get("learning_rate_multiplier") == 1.0:
        del shown["learning_rate_multiplier"]
    return ", ".join(f"{key} {value}" for key, value in shown.items()).replace("|", "\\|")


def first_sentence(cls):
    paragraph = " ".join(inspect.getdoc(cls).split("\n\n")[0].split())
    return re.split(r"(?<=[a-z0-9)])[.:](?= [A-Z]|$)", paragraph)[0].rstrip(".:").replace("|", "\\|") + "."


if __name__ == "__main__":
    main()
