"""Stops a run on SIGTERM or Ctrl-C at a point where it can resume."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

# EX_TEMPFAIL of sysexits.h: nothing is wrong; run it again.
EXIT_STATUS = 75
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(SystemExit):
    """A run was asked to stop. It resumes if `train` is called again with the same arguments.

    It is a `SystemExit`, so `except Exception` does not catch it. A program that does not catch it exits with status 75
    (EX_TEMPFAIL), which shows a scheduler that it should run the program again.

    Attributes:
        code: 75.
        message: why the run stopped, and what was saved.
    """

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_STATUS)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Interruption:
    """Within `with Interruption() as interruption:` SIGTERM and the first Ctrl-C raise `Interrupted`.

    Within `interruptible()` they raise it at once, elsewhere at the next `check()`. A second Ctrl-C always raises
    KeyboardInterrupt at once.

    Ignored signals stay ignored, and the previous handlers are restored at the end. Outside the main thread, where
    Python does not allow signal handlers, this does nothing.

    Attributes:
        requested: name of the received signal ("SIGTERM"), or None.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._interruptible = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # None: a handler that was not installed from Python, which Python cannot restore.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises `Interrupted` if a signal was received."""
        if self.requested:
            raise Interrupted(self.requested)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within the block, a signal raises `Interrupted` at once. The block must not change any state that is kept,
        except for files that are written atomically.
        """
        self.check()
        self._interruptible = True
        try:
            yield
        except Exception as error:
            # TensorFlow turns an exception in a Python function that it called into its own error.
            if self.requested:
                raise Interrupted(self.requested) from error
            raise
        finally:
            self._interruptible = False
        # The exception may have been lost where Python ignores exceptions, as in a destructor.
        self.check()

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = signal.Signals(number).name
        if self._interruptible:
            raise Interrupted(self.requested)
