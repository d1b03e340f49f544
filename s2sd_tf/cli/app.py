"""What the programs share: quiet libraries, and errors of the user's making told in one line."""

import os
import sys

# Before TensorFlow is imported by whoever imports this.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags  # noqa: E402


def run(main):
    """Runs an absl `main(argv)`; a bad argument, config or file ends in one line on stderr and exit status 2."""
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
    except flags.Error:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # What ml_collections raises for unknown keys and config files.
        raise _BadConfig(error.args[0] if error.args else error) from error


def _told(main, program):
    def told(argv):
        if len(argv) > 1:
            _fail(program, f"unexpected arguments {argv[1:]}")
        try:
            return main(argv)
        except (ValueError, FileNotFoundError) as error:
            if os.environ.get("S2SD_TF_TRACEBACK"):
                raise
            _fail(program, error)

    return told


def _fail(program, error):
    print(f"{program}: error: {error}", file=sys.stderr)
    sys.exit(2)
