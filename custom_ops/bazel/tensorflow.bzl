"""Makes the installed TensorFlow available as the repository @installed_tensorflow.

Uses the TensorFlow of the Python that the environment variable PYTHON_BIN_PATH names (relative paths start at the root of
this repository), by default of python3. A change of the variable is detected. An upgrade of TensorFlow in place is not:
run `bazel sync --configure` after it, or `bazel fetch --configure --all` with Bazel 8 or later.
"""

# Imports TensorFlow to get the flags of its ABI. It may print anything before the last line.
_QUESTION = """
import json, sys
import tensorflow as tf
print(json.dumps([sys.executable, tf.sysconfig.get_include(), tf.sysconfig.get_lib(), tf.sysconfig.get_compile_flags()]))
"""

# The headers are what is not excluded, because Eigen's have no extension.
#
# The interpreter is a toolchain, so that Python targets run with this TensorFlow, in a virtual environment or not.
_BUILD = """
load("@rules_cc//cc:defs.bzl", "cc_import", "cc_library")
load("@rules_python//python:defs.bzl", "py_runtime", "py_runtime_pair")

package(default_visibility = ["//visibility:public"])

cc_library(
    name = "headers",
    hdrs = glob(["include/**"], exclude = ["**/*.py", "**/*.so"]),
    defines = {defines},
    includes = ["include"],
)

cc_import(
    name = "framework",
    shared_library = "lib/libtensorflow_framework.so.2",
)

cc_import(
    name = "cc",
    shared_library = "lib/libtensorflow_cc.so.2",
)

py_runtime(
    name = "python_runtime",
    interpreter_path = "{python}",
    python_version = "PY3",
)

py_runtime_pair(
    name = "python_runtime_pair",
    py3_runtime = ":python_runtime",
)

toolchain(
    name = "python",
    toolchain = ":python_runtime_pair",
    toolchain_type = "@bazel_tools//tools/python:toolchain_type",
)
"""

def _python(ctx):
    chosen = ctx.os.environ.get("PYTHON_BIN_PATH", "python3")
    if chosen.startswith("/"):
        return chosen
    if "/" in chosen:
        return str(ctx.path(Label("//:pyproject.toml")).dirname) + "/" + chosen
    return ctx.which(chosen) or fail("Python: expected {} on the PATH, found none; set PYTHON_BIN_PATH.".format(chosen))

def _installed_tensorflow_impl(ctx):
    python = _python(ctx)
    answer = ctx.execute([python, "-c", _QUESTION], environment = {"CUDA_VISIBLE_DEVICES": "-1"})
    if answer.return_code != 0:
        fail("{}: no TensorFlow; set PYTHON_BIN_PATH to a Python that has it.\n{}".format(python, answer.stderr))
    executable, include, lib, flags = json.decode(answer.stdout.strip().split("\n")[-1])
    ctx.symlink(include, "include")
    for library in ("libtensorflow_framework.so.2", "libtensorflow_cc.so.2"):
        ctx.symlink(lib + "/" + library, "lib/" + library)
    defines = [flag[len("-D"):] for flag in flags if flag.startswith("-D")]
    ctx.file("BUILD", _BUILD.format(defines = repr(defines), python = executable))

installed_tensorflow = repository_rule(
    implementation = _installed_tensorflow_impl,
    configure = True,
    environ = ["PYTHON_BIN_PATH"],
)
