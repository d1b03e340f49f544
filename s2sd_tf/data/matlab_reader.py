"""Prints the variables of a MATLAB file as JSON. A program of its own, see `annotations.read_matlab`: the scipy that it
calls is native code, which some broken files crash.
"""

import contextlib
import json
import math
import sys

# A reader that asks for more has met a broken file.
_MEMORY_BYTES = 4 * 2**30
_MOST_ENTRIES = 2**24


def main(path):
    """Reads the file at `path`; what is wrong with it goes to stderr, with exit status 1."""
    _limit_memory()
    import scipy.io

    try:
        for name, shape, _ in scipy.io.whosmat(path):
            if math.prod(shape) > _MOST_ENTRIES:
                raise ValueError(f"{name} of shape {shape}")
        content = scipy.io.loadmat(path, simplify_cells=True)
        variables = {name: value for name, value in content.items() if not name.startswith("__")}
        print(json.dumps(variables, default=lambda value: value.tolist()))
    except Exception as error:  # scipy raises whatever comes of broken content
        print(error or type(error).__name__, file=sys.stderr)
        return 1
    return 0


def _limit_memory():
    with contextlib.suppress(ImportError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
