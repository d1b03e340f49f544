"""Runs pytest with the fused similarity-KL op that Bazel built. Passes its arguments on to pytest."""

import os
import pathlib
import sys
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # the op is built without its CUDA kernel
folder = tempfile.TemporaryDirectory()
os.environ["S2SD_TF_CACHE_DIR"] = folder.name

import pytest  # noqa: E402

from s2sd_tf.distillation import fused, libraries  # noqa: E402

# Put them where the package would have put its own.
for library in (libraries.OP, libraries.XLA):
    built = pathlib.Path("custom_ops", "similarity_kl", f"{library}.so").resolve(strict=True)
    pathlib.Path(folder.name, libraries.file_name(library, cuda=False)).symlink_to(built)
reason = fused.unavailable(xla=True)
written = [path.name for path in pathlib.Path(folder.name).iterdir() if not path.is_symlink()]
if reason or written:
    sys.exit(reason or f"expected Bazel's libraries to be used, but the package built its own: {written}")

sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))
