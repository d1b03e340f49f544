"""The module extension for MODULE.bazel, in a separate file because Bazel 4 has no module extensions."""

load("//custom_ops/bazel:tensorflow.bzl", "installed_tensorflow")

def _tensorflow_impl(_):
    installed_tensorflow(name = "installed_tensorflow")

tensorflow = module_extension(implementation = _tensorflow_impl)
