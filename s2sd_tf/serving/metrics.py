"""Counts what a server does, in the text format of Prometheus."""

import bisect
import collections
from collections.abc import Sequence

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counts of requests, their latencies and the sizes of batches."""

    def __init__(self) -> None:
        self._requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self._seconds: dict[str, _Histogram] = {}
        self._sizes = _Histogram(_SIZES)

    def count_request(self, kind: str, status: int, seconds: float) -> None:
        """Counts a request.

        Args:
            kind: what was asked for, one of few words.
            status: HTTP status of the answer.
            seconds: time until the answer was sent.
        """
        self._requests[kind, status] += 1
        self._seconds.setdefault(kind, _Histogram(_SECONDS)).observe(seconds)

    def count_batch(self, size: int) -> None:
        """Counts a batch of `size` items."""
        self._sizes.observe(size)

    def text(self, queue_length: int) -> str:
        """Returns all metrics as text; `queue_length` is the number of items that wait now."""
        requests = sorted(self._requests.items())
        lines = [
            "# HELP s2sd_requests_total Requests by kind and HTTP status.",
            "# TYPE s2sd_requests_total counter",
            *(f's2sd_requests_total{{kind="{kind}",status="{status}"}} {count}' for (kind, status), count in requests),
            "# HELP s2sd_errors_total Requests that were answered with a status of 400 or more.",
            "# TYPE s2sd_errors_total counter",
            f"s2sd_errors_total {sum(count for (_, status), count in requests if status >= 400)}",
            "# HELP s2sd_request_seconds Time from the head of a request to the end of its answer.",
            "# TYPE s2sd_request_seconds histogram",
        ]
        for kind, histogram in sorted(self._seconds.items()):
            lines += histogram.lines("s2sd_request_seconds", f'kind="{kind}"')
        lines += [
            "# HELP s2sd_batch_size Items of a batch.",
            "# TYPE s2sd_batch_size histogram",
            *self._sizes.lines("s2sd_batch_size"),
            "# HELP s2sd_queue_length Items that wait for a batch.",
            "# TYPE s2sd_queue_length gauge",
            f"s2sd_queue_length {queue_length}",
        ]
        return "\n".join(lines) + "\n"


class _Histogram:
    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, labels: str = "") -> list[str]:
        own = f"{labels}," if labels else ""
        found, total = [], 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts):
            total += count
            found.append(f'{name}_bucket{{{own}le="{bound}"}} {total}')
        braces = f"{{{labels}}}" if labels else ""
        return [*found, f"{name}_sum{braces} {self._sum}", f"{name}_count{braces} {total}"]
