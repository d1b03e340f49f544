"""The module extension of MODULE.bazel, in a file of its own: Bazel 4 has none."""

load("//custom_ops/bazel:tensorflow.bzl", "installed_tensorflow")

def _tensorflow_impl(_):
    installed_tensorflow(name = "installed_tensorflow")

tensorflow = module_extension(implementation = _tensorflow_impl)
