"""What the programs share: errors of the user's making are told in one line."""

import os
import sys

from absl import app, flags

from s2sd_tf.files import OutOfSpace
from s2sd_tf.training import Interrupted
from s2sd_tf.training.compare import RunFailed


def run(main):
    """Runs an absl `main(argv)`; a bad argument, config or file ends in one message on stderr and exit status 2, as a
    loss that is not finite or a full disk does. An interrupted run, which can be called again, says so in one line and
    ends with exit status 75.

    With the environment variable `S2SD_TF_TRACEBACK` set, the error is raised instead.
    """
    program = os.path.basename(sys.argv[0])
    try:
        app.run(_told(main, program), flags_parser=_parse)
    except (flags.Error, _BadConfig) as error:
        _fail(program, error)


class _BadConfig(Exception):
    """A config file or override that cannot be taken."""


def _parse(argv):
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        if "Error whilst parsing config file" not in str(error):
            raise
        # ml_collections puts the trace of what a config file raises into the message.
        cause = error
        while cause.__context__:
            cause = cause.__context__
        raise _BadConfig(f"config: {cause}") from error
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # What ml_collections raises for an unknown key: an error around a KeyError, whose argument is the text.
        text = error
        while isinstance(text, BaseException) and text.args:
            text = text.args[0]
        raise _BadConfig(f"config: unknown or unusable key {text}") from error


def _told(main, program):
    def told(argv):
        if len(argv) > 1:
            _fail(program, f"unexpected arguments {argv[1:]}")
        try:
            return main(argv)
        except Interrupted as error:
            print(f"{program}: {error}", file=sys.stderr)
            raise
        except (ValueError, FileNotFoundError, FloatingPointError, ImportError, OutOfSpace, RunFailed) as error:
            if os.environ.get("S2SD_TF_TRACEBACK"):
                raise
            _fail(program, error)

    return told


def _fail(program, error):
    print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
