"""What SIGTERM and Ctrl-C do to a run: it stops at a place from which it can go on."""

import contextlib
import signal
import threading

# EX_TEMPFAIL of sysexits.h: nothing is wrong, and calling again is what helps.
EXIT_STATUS = 75
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(SystemExit):
    """A run was asked to stop, and goes on where it was when `train` is called again with the same arguments.

    As a `SystemExit` it passes by `except Exception`, and a program that does not catch it ends with exit status 75
    (EX_TEMPFAIL), by which a scheduler can tell that the run is to be called again.

    Attributes:
        code: 75.
        message: str, what asked and what was saved.
    """

    def __init__(self, message):
        super().__init__(EXIT_STATUS)
        self.message = message

    def __str__(self):
        return self.message


class Interruption:
    """Within `with Interruption() as interruption:` SIGTERM and the first Ctrl-C raise `Interrupted`.

    At once within `interruptible()`, at the next `check()` elsewhere. A second Ctrl-C raises KeyboardInterrupt at once,
    wherever it is.

    Signals that are ignored remain so, and the handlers are put back at the end. In another thread than the main one,
    where Python hands no signals over, nothing is installed.

    Attributes:
        requested: name of the signal that came ("SIGTERM"), or None.
    """

    def __init__(self):
        self.requested = None
        self._interruptible = False
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # None: a handler that is not Python's, and that Python could not put back.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self):
        """Raises `Interrupted` where a signal has come."""
        if self.requested:
            raise Interrupted(self.requested)

    @contextlib.contextmanager
    def interruptible(self):
        """Within the block a signal raises `Interrupted` wherever it is: the block changes nothing that is to stay, but
        for files that are whole or not there.
        """
        self.check()
        self._interruptible = True
        try:
            yield
        except Exception as error:
            # Such as TensorFlow's for what was raised in a function that it had called.
            if self.requested:
                raise Interrupted(self.requested) from error
            raise
        finally:
            self._interruptible = False
        # What was raised where Python swallows it, as in a destructor.
        self.check()

    def _handle(self, number, _):
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = signal.Signals(number).name
        if self._interruptible:
            raise Interrupted(self.requested)
