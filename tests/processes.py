"""Code, scripts and modules in processes of their own, forked from one that has imported TensorFlow.

Importing it takes longer than most of what the tests run. That process has done nothing with it yet.
"""

import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tensorflow", "sklearn.cluster", "sklearn.manifold"])


def run_python(*arguments, cwd=None, check=True, timeout=300):
    """Runs what `python` would (`-c` code, `-m` module or script), in its own session; returns the finished process."""
    arguments = [str(argument) for argument in arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    with tempfile.TemporaryDirectory() as folder:
        streams = [pathlib.Path(folder, name) for name in ("stdout", "stderr")]
        child = FORKS.Process(target=_child, args=(arguments, environment, str(cwd or os.getcwd()), streams))
        child.start()
        try:
            child.join(timeout)
        finally:
            late = child.is_alive()
            if late:
                os.killpg(child.pid, signal.SIGKILL)
                child.join()
        stdout, stderr = (path.read_text() for path in streams)
    assert not late, f"{arguments}: not done in {timeout} seconds\n{stdout}{stderr}"
    assert not check or child.exitcode == 0, stdout + stderr
    return subprocess.CompletedProcess(arguments, child.exitcode, stdout, stderr)


def _child(arguments, environment, folder, streams):
    os.setsid()
    for descriptor, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    what, *rest = arguments
    if what == "-m":
        sys.path[:0], sys.argv = [folder], rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.path[:0], sys.argv = [""], ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.path[:0], sys.argv = [os.path.dirname(os.path.abspath(what))], arguments
        runpy.run_path(what, run_name="__main__")
