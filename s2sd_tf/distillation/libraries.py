"""Finds and builds the libraries of the fused similarity-KL op.

There are two: "similarity_kl", the op itself, and "similarity_kl_xla", which registers the op with XLA and takes longer
to build. A library loads only in the TensorFlow minor version it was built for, so its file name contains that version,
the processor, and a digest of the sources. The search order is `prebuilt/` beside this file, where `setup.py` puts
libraries, then the user's cache.

`setup.py` loads this file by its path. So this file imports nothing from the package, and TensorFlow only in functions.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import os
import pathlib
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

OP = "similarity_kl"
XLA = "similarity_kl_xla"
CACHE_VARIABLE = "S2SD_TF_CACHE_DIR"

# Source files that no library is built from: they are not installed, and changing them does not change library names.
NOT_BUILT = (
    "BUILD",
    "c_interface.cc",
    "cpu_kernel_test.cc",
    "cuda_host_harness.h",
    "cuda_kernel_test.cc",
    "gpu_check.cu",
    "gpu_check.py",
    "gpu_check_torch.py",
    "jax_check.py",
    "jax_handler.cc",
    "reference.h",
    "validate_test.cc",
)

PREBUILT = pathlib.Path(__file__).parent / "prebuilt"

_KERNEL_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-ffp-contract=fast"]
_AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
_KERNEL_SOURCES: dict[str, list[str]] = {"cpu_kernel.cc": [], "cpu_simd_portable.cc": []}
_X86_SOURCES = {
    "cpu_simd_avx2.cc": ["-mavx2", "-mfma", "-mf16c"],
    "cpu_simd_avx512.cc": _AVX512_FLAGS,
    "cpu_simd_avx512_bf16.cc": [*_AVX512_FLAGS, "-mavx512bf16"],
}
_CUDA_SOURCE = "cuda_kernel.cu"
_CUDA_ARCHITECTURES = (80, 86, 89, 90, 100, 120)
OLDEST_CUDA = _CUDA_ARCHITECTURES[0]  # older ones lack asynchronous copies and TF32
_OP_SOURCES = {OP: "op.cc", XLA: "xla_lowering.cc"}


class BuildError(RuntimeError):
    """Raised when a library cannot be built; the message gives the reason in one line."""


def find(library: str, cuda: bool | Sequence[int] = False) -> pathlib.Path | None:
    """Returns the path of a built library that fits this TensorFlow, processor and source tree, or None.

    Args:
        library: `OP` or `XLA`.
        cuda: as for `build`. If `cuda` is a list, a library for all architectures fits too.
    """
    for folder in (PREBUILT, cache_folder()):
        for kind in (cuda, True) if cuda else (False,):
            path = folder / file_name(library, kind)
            if path.exists():
                return path
    return None


def others(library: str) -> list[str]:
    """Returns the names of the prebuilt versions of `library` that do not fit."""
    fitting = file_name(library, False)[: -len(".so")]
    return sorted(path.name for path in PREBUILT.glob(f"{library}-tf*.so") if not path.name.startswith(fitting))


def cache_folder() -> pathlib.Path:
    """Returns the folder for libraries that are built at their first use.

    Raises:
        BuildError: neither an environment variable nor a home directory gives a folder.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return pathlib.Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "s2sd_tf"
    except RuntimeError as error:  # no home directory
        raise BuildError(f"{error} Set {CACHE_VARIABLE} to a folder.") from error


def build(library: str, folder: str | os.PathLike | None = None, cuda: bool | Sequence[int] = False) -> pathlib.Path:
    """Builds a library, unless it is there already, and returns its path.

    Only one process builds at a time; a process that had to wait uses the library that the other one built.

    Args:
        library: `OP` or `XLA`.
        folder: where to put it. Default: the user's cache.
        cuda: False for a CPU-only library, True to add CUDA kernels for all architectures in `_CUDA_ARCHITECTURES` that
            the compiler knows, or a list of compute capabilities such as `[90]`.

    Raises:
        BuildError: there is no compiler, the sources are missing, compilation failed, or `folder` cannot be written.
    """
    folder = pathlib.Path(folder).expanduser() if folder else cache_folder()
    path = folder / file_name(library, cuda)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder) as alone:
            for leftover in folder.glob(".writing-*") if alone else ():  # from a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            if not path.exists():
                _build(library, path, cuda)
    except OSError as error:
        raise BuildError(f"{folder} cannot be written: {error}") from error
    return path


def sources() -> pathlib.Path:
    """Returns the folder of the C++ sources: inside an installed package, beside the package in a source tree.

    Raises:
        BuildError: the sources are not installed.
    """
    package = pathlib.Path(__file__).parents[1]
    for folder in (package / "custom_ops", package.parent / "custom_ops"):
        if (folder / OP / "op.cc").exists():
            return folder / OP
    raise BuildError("the C++ sources are not installed")


def cpu_kernel_sources(machine: str) -> dict[str, list[str]]:
    """Returns the CPU kernel's files, each with the compiler flags for its vector instructions."""
    return {**_KERNEL_SOURCES, **(_X86_SOURCES if machine.lower() in ("x86_64", "amd64") else {})}


def compiler() -> str:
    """Returns the path of the C++ compiler: `$CXX`, else g++, c++ or clang++.

    Raises:
        BuildError: there is none.
    """
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else ("g++", "c++", "clang++"):
        path = shutil.which(name)
        if path:
            return path
    raise BuildError(f"$CXX, {chosen}, is not a program" if chosen else "there is no C++ compiler (g++ or clang++)")


def cuda_compiler() -> str | None:
    """Returns the path of nvcc, or None."""
    candidates = [shutil.which("nvcc")]
    candidates += [os.path.join(os.environ.get(name, ""), "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates.append("/usr/local/cuda/bin/nvcc")
    return next((path for path in candidates if path and os.path.exists(path)), None)


def _build(library, path, cuda):
    import tensorflow as tf

    cxx, folder = compiler(), sources()
    tensorflow_flags = [*tf.sysconfig.get_compile_flags(), "-Wno-deprecated-declarations"]
    link_flags = ["-shared", *tf.sysconfig.get_link_flags()]
    if library == XLA:
        link_flags.append("-l:libtensorflow_cc.so.2")

    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as work:
        commands = []
        op_flags = ["-O2", *tensorflow_flags]
        if cuda:
            nvcc = cuda_compiler()
            if nvcc is None:
                raise BuildError("there is no nvcc")
            toolkit = cuda_toolkit(nvcc)
            op_flags += ["-DS2SD_TF_CUDA=1", "-DGOOGLE_CUDA=1", f"-I{toolkit / 'include'}"]
            command = [nvcc, "-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-ccbin", cxx]
            targets = _cuda_targets(nvcc, cuda)
            # `--threads 0`: architectures are compiled in parallel, on as many threads as there are processors.
            commands.append([*command, "--threads", "0", *targets, "-c", folder / _CUDA_SOURCE])
            # TensorFlow's own library stubs out the CUDA runtime's functions, so this library links its own copy.
            runtime = next(iter(toolkit.glob("lib*/libcudart_static.a")), "-lcudart_static")
            link_flags[1:1] = [runtime, "-Wl,--exclude-libs,libcudart_static.a"]
            link_flags += ["-lpthread", "-ldl", "-lrt"]
        commands.append([cxx, *_KERNEL_FLAGS, *op_flags, "-c", folder / _OP_SOURCES[library]])
        commands += [
            [cxx, *_KERNEL_FLAGS, *flags, "-c", folder / source]
            for source, flags in cpu_kernel_sources(platform.machine()).items()
        ]
        objects = [os.path.join(work, f"{index}.o") for index in range(len(commands))]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(_run, [[*command, "-o", target] for command, target in zip(commands, objects)]))
        built = os.path.join(work, path.name)
        _run([cxx, *objects, *link_flags, "-o", built])
        os.replace(built, path)


def _run(command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        cause = re.compile("error:|fatal|cannot find|undefined reference", re.IGNORECASE)
        lines = [line for line in done.stderr.splitlines() if cause.search(line)] or done.stderr.splitlines()
        source = next((str(part) for part in command if str(part).endswith((".cc", ".cu"))), "linking")
        raise BuildError(f"{os.path.basename(source)}: {lines[0].strip() if lines else f'exit {done.returncode}'}")


def cuda_toolkit(nvcc: str) -> pathlib.Path:
    """Returns the folder of the CUDA toolkit as nvcc reports it: `nvcc` itself may be a script in another folder."""
    done = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    tops = [line.split("=", 1)[1] for line in done.stderr.splitlines() if line.startswith("#$ TOP=")]
    return pathlib.Path(tops[0] if tops else os.path.dirname(os.path.dirname(nvcc))).resolve()


def _cuda_targets(nvcc, cuda):
    """Returns nvcc's options: code for the architectures it knows, and PTX that other GPUs compile for themselves."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout
    known = {number for number in map(int, re.findall(r"\bsm_(\d+)\b", listed)) if number >= OLDEST_CUDA}
    wanted = _CUDA_ARCHITECTURES if cuda is True else sorted(cuda)
    chosen = [number for number in wanted if number in known]
    # A GPU runs PTX of its architecture or an older one.
    older = [[number for number in known if number <= limit] for limit in wanted]
    if not (chosen if cuda is True else all(older)):
        raise BuildError(f"{nvcc} cannot build for the compute capabilities {list(wanted)}")
    if cuda is True:
        virtual = {chosen[0], chosen[-1]}
    else:
        virtual = {max(numbers) for numbers, limit in zip(older, wanted) if limit not in known} or {chosen[-1]}
    return [
        *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in chosen),
        *(f"-gencode=arch=compute_{number},code=compute_{number}" for number in sorted(virtual)),
    ]


def file_name(library: str, cuda: bool | Sequence[int]) -> str:
    """Returns the file name of a library for this TensorFlow, this processor and these sources."""
    import tensorflow as tf

    minor = ".".join(tf.__version__.split(".")[:2])
    try:
        digest = _digest()
    except BuildError:
        digest = "unknown"
    kind = "-cuda" + "_".join(map(str, () if cuda is True else sorted(cuda))) if cuda else ""
    return f"{library}-tf{minor}-{platform.machine().lower()}-{digest}{kind}.so"


@functools.lru_cache(maxsize=1)
def _digest():
    """Returns ten hexadecimal digits that depend on the sources and on this file, which has the compiler flags."""
    digest = hashlib.sha256(pathlib.Path(__file__).read_bytes())
    for path in sorted(sources().iterdir()):
        if path.suffix in (".cc", ".h", ".cu", ".cuh") and path.name not in NOT_BUILT:
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:10]


@contextlib.contextmanager
def _lock(folder):
    """Locks the folder for this process. Yields whether that worked, so that no other process builds there."""
    try:
        import fcntl
    except ImportError:  # not Unix: two processes may build at once, and each moves a complete file into place
        yield False
        return
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield True
