"""Runs code, scripts and modules in new processes, forked from one that has imported TensorFlow.

Importing TensorFlow takes longer than most of what the tests run. The parent process has not used it yet.
"""

import contextlib
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


class Started:
    """A running process in its own session; its output goes to files in `folder`."""

    def __init__(self, arguments, folder, cwd=None, environment=None):
        arguments = [str(argument) for argument in arguments]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2", **(environment or {})}
        self.arguments = arguments
        self._streams = [pathlib.Path(folder, name) for name in ("stdout", "stderr")]
        self._process = FORKS.Process(
            target=_child, args=(arguments, environment, str(cwd or os.getcwd()), self._streams)
        )
        self._process.start()

    def is_alive(self):
        return self._process.is_alive()

    def stdout(self):
        """What the process has printed so far."""
        return self._streams[0].read_text() if self._streams[0].exists() else ""

    def send_signal(self, number):
        """Sends the signal to the process and its children."""
        os.killpg(self._process.pid, number)

    def wait(self, timeout=300):
        """Waits and returns the finished process; kills it after the timeout."""
        try:
            self._process.join(timeout)
        finally:
            late = self._process.is_alive()
            if late:
                self.send_signal(signal.SIGKILL)
                self._process.join()
        stdout, stderr = (path.read_text() for path in self._streams)
        assert not late, f"{self.arguments}: not done in {timeout} seconds\n{stdout}{stderr}"
        return subprocess.CompletedProcess(self.arguments, self._process.exitcode, stdout, stderr)


@contextlib.contextmanager
def start_python(*arguments, cwd=None, environment=None):
    """Starts `python` with these arguments (`-c`, `-m` or a script); kills what still runs at the end of the block."""
    with tempfile.TemporaryDirectory() as folder:
        started = Started(arguments, folder, cwd, environment)
        try:
            yield started
        finally:
            if started.is_alive():
                started.send_signal(signal.SIGKILL)


def run_python(*arguments, cwd=None, check=True, timeout=300):
    """Runs `python` with these arguments (`-c`, `-m` or a script) in its own session; returns the finished process."""
    with start_python(*arguments, cwd=cwd) as started:
        done = started.wait(timeout)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


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
