"""The part of the build that pyproject.toml cannot express: packages the C++ sources and builds them if possible.

An installation without build isolation (`pip install --no-build-isolation .`) sees TensorFlow and builds the fused op.
Any other installation builds it at its first use. `S2SD_TF_BUILD_CUDA=1` builds it with CUDA kernels.
"""

import importlib.util
import os
import pathlib
import shutil
import sys

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

HERE = pathlib.Path(__file__).parent
SOURCES = pathlib.Path("custom_ops", "similarity_kl")
PREBUILT = pathlib.Path("s2sd_tf", "distillation", "prebuilt")


class BuildWithOp(build_py):
    """Copies the C++ sources into the package, and builds the op if TensorFlow and a compiler are present."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = pathlib.Path(self.build_lib, "s2sd_tf") / SOURCES
        for leftover in (target, pathlib.Path(self.build_lib, PREBUILT)):
            shutil.rmtree(leftover, ignore_errors=True)
        spec = importlib.util.spec_from_file_location("libraries", HERE / "s2sd_tf" / "distillation" / "libraries.py")
        assert spec
        assert spec.loader
        libraries = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(libraries)
        shutil.copytree(HERE / SOURCES, target, ignore=shutil.ignore_patterns(*libraries.NOT_BUILT))
        if importlib.util.find_spec("tensorflow") is None:
            return
        cuda = os.environ.get("S2SD_TF_BUILD_CUDA") == "1"
        try:
            for library in (libraries.OP, libraries.XLA):
                print(f"built {libraries.build(library, pathlib.Path(self.build_lib) / PREBUILT, cuda)}")
        except Exception as error:  # not a reason to fail the installation
            print(f"s2sd_tf: the fused op will be built at its first use, as this failed: {error}", file=sys.stderr)
        pathlib.Path(self.build_lib, PREBUILT, ".lock").unlink(missing_ok=True)


class WithOp(Distribution):
    """A distribution that is specific to this platform if it may contain the built op."""

    def has_ext_modules(self) -> bool:
        return importlib.util.find_spec("tensorflow") is not None


setup(cmdclass={"build_py": BuildWithOp}, distclass=WithOp)
