"""Takes what Bazel 4 fetches from the network at its start from Debian's bazel-bootstrap and bazel-rules-java instead.

Debian's Bazel is recognised by its missing version number. Other versions fetch, as they would without this file.
"""

_SHARE = "/usr/share/bazel/"

# Debian's rules_cc package needs a later Bazel than Debian has.
_RULES_CC = """
cc_binary = native.cc_binary
cc_import = native.cc_import
cc_library = native.cc_library
cc_test = native.cc_test
cc_toolchain = native.cc_toolchain
cc_toolchain_suite = native.cc_toolchain_suite
"""

_RULES_PYTHON = """
load("@bazel_tools//tools/python:toolchain.bzl", _py_runtime_pair = "py_runtime_pair")

py_binary = native.py_binary
py_library = native.py_library
py_runtime = native.py_runtime
py_runtime_pair = _py_runtime_pair
py_test = native.py_test
"""

# Every test refers to these two, with or without coverage.
_REMOTE_COVERAGE_TOOLS = """
package(default_visibility = ["//visibility:public"])

filegroup(name = "coverage_report_generator")

filegroup(name = "lcov_merger")
"""

def _stand_in_impl(ctx):
    for path, content in ctx.attr.files.items():
        ctx.file(path, content)

_stand_in = repository_rule(
    implementation = _stand_in_impl,
    attrs = {"files": attr.string_dict(mandatory = True)},
)

def repositories():
    """Defines the repositories. Call it first in WORKSPACE."""

    # These rules are built into every Bazel that reads WORKSPACE.
    _stand_in(name = "rules_python", files = {"python/BUILD": "", "python/defs.bzl": _RULES_PYTHON})
    if native.bazel_version:
        return
    _stand_in(name = "rules_cc", files = {"cc/BUILD": "", "cc/defs.bzl": _RULES_CC})
    _stand_in(name = "remote_coverage_tools", files = {"BUILD": _REMOTE_COVERAGE_TOOLS})
    native.local_repository(name = "platforms", path = _SHARE + "platforms")
    native.local_repository(name = "rules_java", path = _SHARE + "rules/java")
