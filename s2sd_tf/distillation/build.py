"""Builds and tests the libraries of the fused similarity-KL op:

    python -m s2sd_tf.distillation.build

Without this command the op is built at its first use. The command builds it ahead of time, and can build CUDA kernels
for GPUs that this machine does not have, or write to another folder.
"""

import platform
import time

import tensorflow as tf
from absl import app, flags

from s2sd_tf.distillation import libraries, similarity_kl

_CUDA = flags.DEFINE_enum("cuda", "auto", ["auto", "on", "off"], "CUDA kernels: auto builds them if there is a GPU.")
_XLA = flags.DEFINE_bool("xla", True, "Build the library for jit_compile=True as well.")
_FOLDER = flags.DEFINE_string("folder", None, "Folder for the libraries. Default: the user's cache.")


def main(_: list[str]) -> None:
    gpus = tf.config.get_visible_devices("GPU")
    cuda = _CUDA.value == "on" or (_CUDA.value == "auto" and bool(gpus))
    print(f"TensorFlow {tf.__version__}, {platform.machine()}, {len(gpus)} GPU(s)")
    try:
        print(f"C++ compiler: {libraries.compiler()}")
        print(f"CUDA compiler: {libraries.cuda_compiler() if cuda else 'not used'}")
        print(f"sources: {libraries.sources()}")
        for library in (libraries.OP, libraries.XLA) if _XLA.value else (libraries.OP,):
            found = None if _FOLDER.value else libraries.find(library, cuda)
            start = time.monotonic()
            path = found or libraries.build(library, _FOLDER.value, cuda)
            print(f"{path}: {'already built' if found else f'built in {time.monotonic() - start:.0f} s'}")
    except libraries.BuildError as error:
        raise SystemExit(f"not built: {error}") from error
    if not _FOLDER.value and cuda == bool(gpus):
        _try_out()


def _try_out():
    student = tf.math.l2_normalize(tf.random.stateless_normal((41, 8), [0, 1]), 1)
    teacher = tf.math.l2_normalize(tf.random.stateless_normal((41, 16), [0, 2]), 1)
    expected, _ = similarity_kl(student, [teacher], implementation="composed")
    for jit in (False, True) if _XLA.value else (False,):
        step = tf.function(
            lambda s, t, jit=jit: similarity_kl(s, [t], implementation="fused", jit_compile=jit)[0],
            jit_compile=jit,
            autograph=False,
        )
        try:
            difference = abs(float(step(student, teacher)) - float(expected))
        except NotImplementedError as error:
            raise SystemExit(str(error)) from error
        print(f"tested with jit_compile={jit}: within {difference:.1e} of the composed version")


if __name__ == "__main__":
    app.run(main)
