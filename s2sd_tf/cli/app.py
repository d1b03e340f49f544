"""What the programs share: help, and user errors that are reported in one line."""

import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging

from s2sd_tf.cli import help

# The flags that `define_path` defines belong to the program that calls it.
flags.disclaim_key_flags()


def run(main: Callable[[list[str]], Any]) -> None:
    """Runs an absl `main(argv)`.

    `--help` and `--version` are answered before anything else, with exit status 0. Bad arguments, configs and files,
    paths that cannot be read or written, a loss that is not finite and a full disk end in one message on stderr and
    exit status 2. An interrupted run, which can be resumed, reports that in one line and ends with exit status 75. If
    the reader of the output ends first, such as `head`, the program ends silently, with exit status 141.

    If the environment variable `S2SD_TF_TRACEBACK` is set, errors are raised instead.
    """
    program = os.path.basename(sys.argv[0])
    if help.answers(sys.argv[1:]):
        try:
            print(help.text(sys.modules[main.__module__], sys.argv[1:]), flush=True)
        except BrokenPipeError:
            _end_without_reader()
        sys.exit(0)
    # A person sees the progress and warnings; files have the rest.
    logging.set_verbosity(logging.WARNING)
    try:
        app.run(_reporting_errors(main, program), flags_parser=_parse)
    except (flags.Error, _BadConfig) as error:
        if os.environ.get("S2SD_TF_TRACEBACK"):
            raise
        _fail(program, error)


def define_path(name: str, default: str | None, about: str, required: bool = False) -> Any:
    """Defines a flag that is a path, see `files.local_path`."""
    return flags.DEFINE(_Path(name), name, default, about, serializer=flags.ArgumentSerializer(), required=required)


def define_paths(name: str, default: list[str] | None, about: str, required: bool = False) -> Any:
    """Defines a flag that is a path, and may be repeated."""
    serializer: Any = flags.ArgumentSerializer()
    return flags.DEFINE_multi(_Path(name), serializer, name, default, about, required=required)


class _Path(flags.ArgumentParser):
    syntactic_help = "a path"

    def __init__(self, name: str) -> None:
        self._name = name

    def parse(self, argument: str) -> str:
        from s2sd_tf.files import local_path

        return local_path(f"--{self._name}", argument)


class _BadConfig(Exception):
    """A config file or override that cannot be used."""


def _parse(argv):
    for argument, following in zip(argv[1:], [*argv[2:], ""]):
        name, equals, value = argument.lstrip("-").partition("=")
        path = os.path.expanduser((value if equals else following).partition(":")[0])
        if argument.startswith("-") and name == "config" and path and not os.path.isfile(path):
            raise _BadConfig(
                "--config: expected a config file, such as those in the folder configs of the repository. "
                f"Received: {path!r}, which does not exist"
            )
    # As the shell does it only for a word that begins with ~.
    argv = [
        re.sub("^(--?config=)(~[^:]*)", lambda found: found[1] + os.path.expanduser(found[2]), word) for word in argv
    ]
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        if error.flagname.startswith("config."):
            raise _BadConfig(f"--{error.flagname}: expected --config=<file> before it. Received: none") from error
        from s2sd_tf.training.config import similar_keys

        raise _BadConfig(f"{error}{'' if 'Did you mean' in str(error) else similar_keys(error.flagname)}") from error
    except flags.Error as error:
        if "Error whilst parsing config file" not in str(error):
            raise
        # ml_collections puts the traceback of the config file's error into the message.
        cause: BaseException = error
        while cause.__context__:
            cause = cause.__context__
        raise _BadConfig(f"config: {cause}") from error
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # For an unknown key ml_collections raises an error around a KeyError, whose argument is the text.
        text: Any = error
        while isinstance(text, BaseException) and text.args:
            text = text.args[0]
        unknown = re.match(r'Key "(\S+)" does not exist', str(text))
        if unknown:
            from s2sd_tf.training.config import similar_keys

            text = f"{unknown[1]!r}{similar_keys(unknown[1])}"
        raise _BadConfig(f"config: unknown or unusable key {text}") from error


def _reporting_errors(main, program):
    import tensorflow as tf

    from s2sd_tf.training import Interrupted
    from s2sd_tf.training.compare import RunFailed

    # What TensorFlow raises where Python raises an OSError.
    files = (tf.errors.NotFoundError, tf.errors.PermissionDeniedError)

    def reporting(argv):
        if len(argv) > 1:
            _fail(program, f"unexpected arguments {argv[1:]}")
        try:
            result = main(argv)
            sys.stdout.flush()
            return result
        except Interrupted as error:
            print(f"{program}: {error}", file=sys.stderr)
            raise
        except BrokenPipeError:
            _end_without_reader()
        except (ValueError, OSError, FloatingPointError, ImportError, RunFailed, *files) as error:
            if os.environ.get("S2SD_TF_TRACEBACK"):
                raise
            _fail(program, error)

    return reporting


def _end_without_reader():
    _drop_output()
    # What a shell reports of a program that SIGPIPE killed.
    sys.exit(128 + signal.SIGPIPE)


def _drop_output():
    # Python would otherwise report at the end that it cannot be written.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _fail(program, error):
    try:
        sys.stdout.flush()
    except OSError:
        # A full disk or a closed pipe.
        _drop_output()
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        error = (
            f"{os.fsdecode(error.filename)}: expected a path that can be read or written. Received: {error.strerror}"
        )
    print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
