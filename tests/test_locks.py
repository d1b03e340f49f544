"""One writer at a time: locks on folders, and what killed writers leave."""

import contextlib
import errno
import fcntl
import multiprocessing.connection
import os
import pathlib
import re
import shutil
import signal
import subprocess

import numpy as np
import pytest
from conftest import REPOSITORY, small_config
from processes import start_python

from s2sd_tf import data, files
from s2sd_tf.files import LEFTOVER, only_writer, replacing
from s2sd_tf.training import resolve, train

# Holds locks and writes a folder until it is killed. Says so by opening the pipe in its last argument.
HOLDER = """
import signal, sys
from s2sd_tf.files import only_writer, replacing
work, output, unfinished, pipe = sys.argv[1:]
with only_writer("a", work, inside=True), only_writer("b", output), replacing(unfinished) as temporary:
    open(temporary, "w").close()
    open(pipe, "w").close()
    signal.pause()
"""


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """`(folder, kill)`: another process writes the folder's `work`, `output` and `unfinished` until it is killed."""
    folder = tmp_path_factory.mktemp("held")
    os.mkfifo(folder / "pipe")
    with start_python("-c", HOLDER, *(folder / name for name in ("work", "output", "unfinished", "pipe"))) as holder:
        open(folder / "pipe").close()

        def kill():
            holder.send_signal(signal.SIGKILL)
            holder.wait()

        yield folder, kill


def leftovers(folder):
    return [path.name for path in folder.rglob(f"{LEFTOVER}*")]


class TestLocks:
    def test_a_second_writer_is_refused_until_the_first_is_killed(self, held, call):
        folder, kill = held
        named = rf"process \d+ on {re.escape(os.uname().nodename)}, since 20\S+, is writing"
        with pytest.raises(ValueError, match=rf"^workdir: .* Received: '{folder}/work', which {named}$"):
            train(small_config(), folder / "work")
        error = call("shards", "--name=digits", "--root=.", f"--output={folder}/output", status=2).stderr
        assert re.search(rf": error: --output: .* Received: '{folder}/output', which {named}$", error, re.M)
        # The temporary folder of a living writer stays.
        before = leftovers(folder)
        with replacing(folder / "new") as temporary:
            os.mkdir(temporary)
        assert leftovers(folder) == before
        files.remove_leftovers(folder)
        assert leftovers(folder) == before

        kill()
        with only_writer("a", folder / "work", inside=True), only_writer("b", folder / "output"):
            pass
        assert leftovers(folder) == [name for name in before if not name.startswith(f"{LEFTOVER}lock")] != []
        with replacing(folder / "unfinished") as temporary, open(temporary, "w"):
            pass
        assert not leftovers(folder)

    def test_another_users_unfinished_file_is_left_alone(self, tmp_path, monkeypatch):
        (tmp_path / f"{LEFTOVER}of_another").mkdir()
        opened = os.open

        def refusing(path, *arguments, **options):
            if str(path).endswith("of_another"):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return opened(path, *arguments, **options)

        monkeypatch.setattr(os, "open", refusing)
        files.write_json(tmp_path / "mine.json", {})
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"{LEFTOVER}of_another", "mine.json"]

    def test_in_one_process_too(self, tmp_path):
        with only_writer("a", tmp_path, inside=True):
            with only_writer("b", tmp_path), only_writer("c", tmp_path / "other", inside=True):
                pass
            with (
                pytest.raises(ValueError, match=f"^a: .*process {os.getpid()} "),
                only_writer("a", tmp_path, inside=True),
            ):
                pass
        assert not list(tmp_path.iterdir())

    def test_folders_that_stay_empty_are_removed(self, tmp_path):
        with contextlib.suppress(KeyError), only_writer("a", tmp_path / "new" / "run", inside=True):
            raise KeyError
        assert not list(tmp_path.iterdir())
        with only_writer("a", tmp_path / "new" / "run", inside=True):
            (tmp_path / "new" / "file").touch()
        assert [path.name for path in tmp_path.rglob("*")] == ["new", "file"]

    def test_a_file_system_without_locks(self, tmp_path, monkeypatch):
        def flock(*_):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        (tmp_path / f"{LEFTOVER}abcdefgh").mkdir()
        monkeypatch.setattr(fcntl, "flock", flock)
        warnings = []
        monkeypatch.setattr(files.logging, "warning", lambda text, *values: warnings.append(text % values))
        with only_writer("a", tmp_path / "run", inside=True), replacing(tmp_path / "file") as temporary:
            open(temporary, "w").close()
        (warning,) = warnings
        assert warning.startswith(f"{tmp_path}/run is on a file system without locks: make sure that no other process")
        # Its writer may live.
        assert leftovers(tmp_path) == [f"{LEFTOVER}abcdefgh"]
        files.remove_leftovers(tmp_path)
        assert not leftovers(tmp_path)

    def test_a_removed_lock_is_not_held(self, tmp_path, monkeypatch):
        """The holder removes its lock while another process waits to lock the same file."""
        lock = files._lock
        taken = []

        def slow(descriptor):
            if not taken:
                taken.append(descriptor)
                os.unlink(tmp_path / f"{LEFTOVER}lock")
            return lock(descriptor)

        monkeypatch.setattr(files, "_lock", slow)
        with only_writer("a", tmp_path, inside=True):
            assert (tmp_path / f"{LEFTOVER}lock").exists()


def test_two_programs_in_one_work_directory(tmp_path):
    command = ["-m", "s2sd_tf.cli.train", f"--config={REPOSITORY}/configs/digits.py:plain", f"--workdir={tmp_path}/run",
               "--config.train.epochs=1000000", "--config.train.steps_per_epoch=1", "--config.eval.every=0",
               "--config.train.threads=1", "--config.model.filters=(4,)"]  # fmt: skip
    with start_python(*command) as one, start_python(*command) as other:
        both = {process._process.sentinel: process for process in (one, other)}
        (first,) = multiprocessing.connection.wait(both)
        refused = both.pop(first)
        (winner,) = both.values()
        done = refused.wait()
        assert done.returncode == 2
        assert f"process {winner._process.pid} on " in done.stderr.splitlines()[-1]
        winner.send_signal(signal.SIGTERM)
        assert winner.wait().returncode in (75, -signal.SIGTERM)
    assert not (tmp_path / "run").exists() or not leftovers(tmp_path / "run")


class TestPaths:
    @pytest.mark.parametrize(
        "url", ["gs://bucket/x", "s3://bucket/x", "hdfs:///x", "file:///x", pathlib.Path("http://x")]
    )
    def test_urls_are_refused(self, url, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        refused = f": expected a path in the file systems of this machine; .* Received: '{url}'$"
        for argument, call in (
            ("workdir", lambda: train(small_config(), url)),
            ("config.data.root", lambda: resolve(small_config(**{"data.root": str(url)}))),
            ("config.data.folder.test_root", lambda: resolve(small_config(**{"data.folder.test_root": str(url)}))),
            ("config.data.lists.train_list", lambda: resolve(small_config(**{"data.lists.train_list": str(url)}))),
            ("config.model.weights", lambda: resolve(small_config(**{"model.weights": str(url)}))),
            ("root", lambda: data.load_image_folder(url)),
            ("test_root", lambda: data.datasets.load("folder", "x", test_root=url)),
            ("path", lambda: files.write_json(url, {})),
            ("folder", lambda: data.write_shards(None, url)),
        ):
            with pytest.raises(ValueError, match=f"^{argument}{refused}"):
                call()
        assert not list(tmp_path.iterdir())

    def test_the_home_folder_is_expanded(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        files.write_json("~/x/y.json", 1)
        assert files.read_json(tmp_path / "x" / "y.json") == 1
        config = resolve(small_config(**{"data.root": "~/a", "data.folder.test_root": "~/b", "model.weights": "~/c"}))
        found = config.data.root, config.data.folder.test_root, config.model.weights
        assert found == (f"{tmp_path}/a", f"{tmp_path}/b", f"{tmp_path}/c")
        assert resolve(small_config(**{"model.weights": "imagenet"})).model.weights == "imagenet"

    def test_the_home_folder_of_a_config_file(self, tmp_path, run_python):
        shutil.copy(REPOSITORY / "configs" / "digits.py", tmp_path / "x.py")
        code = (
            f"import os, sys; os.environ['HOME'] = {str(tmp_path)!r}; from s2sd_tf.cli import train; "
            "sys.argv[1:] = ['--config=~/x.py:plain', '--print_config']; train.main()"
        )
        assert "target_dims" in run_python("-c", code).stdout

    def test_flags(self, call):
        for program, flags in (
            ("shards", ["--name=digits", "--root=.", "--output=gs://bucket/x"]),
            ("search", ["--index=i", "--encoder=e", "--image=a", "--image=gs://bucket/x"]),
            ("serve", ["--model=gs://bucket/x"]),
        ):
            error = call(program, *flags, status=2).stderr.splitlines()[-1]
            assert re.search(r"error: .*--\w+: expected a path in the file systems .*'gs://bucket/x'$", error)


class TestPathsThatCannotBeWritten:
    def test_a_file_in_the_place_of_a_folder(self, tmp_path, call):
        (tmp_path / "file").touch()
        for path, reason in ((tmp_path / "file" / "x", "Not a directory|File exists"), ("/proc/x/y", "No such file.*")):
            with pytest.raises(OSError, match=rf"^workdir: expected a folder .*'{path}': ({reason})$"):
                train(small_config(), path)
            with pytest.raises(OSError, match=rf"^{path}: expected a path that can be written. Received: ({reason})$"):
                files.write_json(path, {})
        error = call("shards", "--name=digits", "--root=.", f"--output={tmp_path}/file/x", status=2).stderr
        assert f"error: --output: expected a folder that can be written. Received: '{tmp_path}/file/x'" in error

    @pytest.mark.parametrize(
        ("options", "reason"), [("size=4k", "expected room|No space"), ("ro", "Read-only|not writable")]
    )
    def test_full_and_read_only_disks(self, options, reason, tmp_path, call):
        # benchmarks/full_disks.py tries all programs.
        np.savez(tmp_path / "rows.npz", embeddings=np.eye(8, 64), labels=np.arange(8) // 2)
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = shutil.which("mount") or "false"
        command = [mount, "-t", "tmpfs", "-o", options, "tmpfs", disk]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("needs the right to mount file systems")
        try:
            if options != "ro":
                (disk / "filler").write_bytes(bytes(4096))
            before = list(disk.iterdir())
            for program, *flags in (
                ("index", "--method=exact", f"--output={disk}/index"),
                ("evaluate", "--methods=exact", f"--output={disk}/x.json", f"--report={disk}/x.html"),
            ):
                error = call(program, f"--embeddings={tmp_path}/rows.npz", *flags, status=2).stderr.splitlines()[-1]
                assert re.search(rf"error: .*{disk}.*({reason})|error: .*({reason}).*{disk}", error)
                assert list(disk.iterdir()) == before
        finally:
            subprocess.run(["umount", "-l", disk], check=True)

    @pytest.mark.parametrize("returned", ["{}", "None"])
    def test_a_config_function_that_returns_something_else(self, returned, tmp_path, call):
        (tmp_path / "config.py").write_text(f"def get_config():\n    return {returned}\n")
        error = call("train", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run", status=2).stderr
        assert "error: --config: expected a file whose get_config returns a config" in error.splitlines()[-1]
