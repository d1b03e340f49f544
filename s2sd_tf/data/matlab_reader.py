"""Program that prints the variables of a MATLAB file as JSON.

`annotations.read_matlab` runs it as a process of its own, because some broken files crash the native code of scipy.
"""

import contextlib
import json
import math
import sys

# Only a broken file makes the reader ask for more.
_MEMORY_BYTES = 4 * 2**30
_MOST_ENTRIES = 2**24


def main(path: str) -> int:
    """Prints the variables of the file at `path` and returns 0, or prints the error to stderr and returns 1."""
    _limit_memory()
    import scipy.io

    try:
        for name, shape, _ in scipy.io.whosmat(path):
            if math.prod(shape) > _MOST_ENTRIES:
                raise ValueError(f"{name} of shape {shape}")
        content = scipy.io.loadmat(path, simplify_cells=True)
        variables = {name: value for name, value in content.items() if not name.startswith("__")}
        print(json.dumps(variables, default=lambda value: value.tolist()))
    except Exception as error:  # scipy raises errors of all kinds for broken content
        print(error or type(error).__name__, file=sys.stderr)
        return 1
    return 0


def _limit_memory():
    with contextlib.suppress(ImportError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
