"""Load on `s2sd-serve`: throughput with and without batches, latencies, memory, resets, and slow senders.

    python benchmarks/serve.py --output=benchmarks/results/serve.json

Starts the server with a small untrained encoder of 224 x 224 images, and clients in this process that send JPEGs one
after another, each over its own connection. Then as many connections as --slow that send one byte a second, beside
clients whose requests must still be answered. `--clients=2000 --requests=20` is the largest load that was tried. Server
and clients share the machine's cores. Writes the JSON and a table (.md) of the same name.
"""

import asyncio
import collections
import io
import logging
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import httpx
import numpy as np
from absl import app, flags
from machine import describe
from PIL import Image

import s2sd_tf
from s2sd_tf import data, export
from s2sd_tf.files import write_json

FLAGS = flags.FLAGS
flags.DEFINE_string("output", None, "JSON file to write; the table gets the same name.")
flags.DEFINE_integer("clients", 50, "Clients at the same time.", lower_bound=1)
flags.DEFINE_integer("requests", 40, "Requests of each client; a tenth of them without batches.", lower_bound=1)
flags.DEFINE_integer("slow", 400, "Connections that send slowly.", lower_bound=0)
flags.DEFINE_integer("max_batch", 32, "Most images of a batch.", lower_bound=2)

SIZE, NAME = 224, "encoder"
PATH = f"/v1/models/{NAME}:embed"


def save_encoder(folder):
    backbone = s2sd_tf.models.backbones.conv_blocks((SIZE, SIZE, 3), filters=(16, 32, 64), pools=3)
    export.export_encoder(s2sd_tf.S2SDModel(backbone, 128), data.Preprocessing(SIZE, SIZE, 3, resize_size=256), folder)


def make_images(count=16):
    generator = np.random.default_rng(0)
    images = []
    for _ in range(count):
        small = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((400, 300), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        images.append(buffer.getvalue())
    return images


class Server:
    """A started `s2sd-serve`; `end()` ends it and returns its exit status."""

    def __init__(self, folder, max_batch):
        connections = FLAGS.clients + FLAGS.slow + 50
        command = [sys.executable, "-m", "s2sd_tf.cli.serve", f"--model={folder}", f"--name={NAME}", "--port=0"]
        command += [f"--max_batch={max_batch}", f"--max_connections={connections}", f"--max_queue={FLAGS.clients + 50}"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = self._process.stdout.readline()
        self.port = int(re.fullmatch(r"ready on http://localhost:(\d+)\n", line)[1])
        self.url = f"http://localhost:{self.port}"

    def resident_mib(self):
        status = pathlib.Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) // 1024

    def end(self):
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(120)


async def load(url, images, clients, requests):
    """Sends all requests; returns the seconds of each, the counts of the outcomes, and the seconds of all."""
    seconds, outcomes = [], collections.Counter()

    async def client(number):
        async with httpx.AsyncClient(base_url=url, timeout=120) as session:
            for request in range(requests):
                since = time.perf_counter()
                try:
                    answer = await session.post(PATH, content=images[(number + request) % len(images)])
                    outcomes[str(answer.status_code)] += 1
                except httpx.TransportError as error:
                    outcomes[type(error).__name__] += 1
                seconds.append(time.perf_counter() - since)

    since = time.perf_counter()
    await asyncio.gather(*map(client, range(clients)))
    return seconds, dict(outcomes), time.perf_counter() - since


async def slow_senders(port, count, images, url):
    """Holds slow connections until the server ends them, beside ten clients; returns what happened to both."""
    outcomes = collections.Counter()

    async def sender(number):
        # Half of them do not even end the head of their request.
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
        reader, writer = await asyncio.open_connection("localhost", port)
        try:
            writer.write((head + ("\r\n" if number % 2 else "X-Slow: ")).encode())
            reading = asyncio.ensure_future(reader.read(20))
            while not reading.done():
                writer.write(b"x")
                await asyncio.wait([reading], timeout=1)
            answer = reading.result()
            outcomes[answer.split()[1].decode() if answer else "closed"] += 1
        except OSError:
            outcomes["closed"] += 1
        finally:
            writer.close()

    senders = asyncio.gather(*map(sender, range(count)))
    await asyncio.sleep(1)
    beside = await load(url, images, 10, 10)
    await senders
    return {"slow": dict(outcomes), "beside": figures(*beside)}


def figures(seconds, outcomes, total):
    quantiles = {f"p{q}_ms": round(float(np.percentile(seconds, q)) * 1000, 1) for q in (50, 95, 99, 100)}
    return {"outcomes": outcomes, "requests_per_second": round(len(seconds) / total, 1), **quantiles}


def measure(folder, images, max_batch, requests):
    server = Server(folder, max_batch)
    asyncio.run(load(server.url, images, 4, 4))  # warms up
    row = {"max_batch": max_batch, "resident_mib_before": server.resident_mib()}
    row.update(figures(*asyncio.run(load(server.url, images, FLAGS.clients, requests))))
    row["resident_mib_after"] = server.resident_mib()
    metrics = httpx.get(f"{server.url}/metrics", timeout=60).text
    images_done, batches = (
        float(re.search(rf"^s2sd_batch_size_{name} (\S+)$", metrics, re.MULTILINE)[1]) for name in ("sum", "count")
    )
    row["mean_batch"] = round(images_done / batches, 1)
    if FLAGS.slow and max_batch > 1:
        row["slow_senders"] = asyncio.run(slow_senders(server.port, FLAGS.slow, images, server.url))
    row["exit_status"] = server.end()
    return row


def table(result):
    keys = ("max_batch", "mean_batch", "requests_per_second", "p50_ms", "p95_ms", "p99_ms", "p100_ms",
            "resident_mib_before", "resident_mib_after")  # fmt: skip
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    lines = ["# Load on s2sd-serve", "", f"{result['clients']} clients. {machine}.", ""]
    lines += ["| " + " | ".join((*keys, "outcomes", "exit status")) + " |", "|---" * (len(keys) + 2) + "|"]
    for row in result["rows"]:
        cells = [*(row[key] for key in keys), _counts(row["outcomes"]), row["exit_status"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    for row in result["rows"]:
        if "slow_senders" in row:
            beside = row["slow_senders"]["beside"]
            lines += [
                "",
                f"{result['slow']} slow senders: {_counts(row['slow_senders']['slow'])}. Ten clients beside them: "
                f"{_counts(beside['outcomes'])}, p95 {beside['p95_ms']} ms.",
            ]
    return "\n".join(lines) + "\n"


def _counts(outcomes):
    return ", ".join(f"{count} x {outcome}" for outcome, count in sorted(outcomes.items()))


def main(_):
    # It logs every request.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # Every connection is an open file.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * (FLAGS.clients + FLAGS.slow) + 200
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    images = make_images()
    with tempfile.TemporaryDirectory() as folder:
        save_encoder(folder)
        # One at a time, fewer requests suffice for the throughput.
        rows = [
            measure(folder, images, max_batch, requests)
            for max_batch, requests in ((1, -(-FLAGS.requests // 10)), (FLAGS.max_batch, FLAGS.requests))
        ]
    result = {
        "clients": FLAGS.clients,
        "requests": FLAGS.requests,
        "slow": FLAGS.slow,
        "machine": describe(os.cpu_count()),
        "rows": rows,
    }
    print(table(result))
    if FLAGS.output:
        write_json(FLAGS.output, result)
        pathlib.Path(FLAGS.output).with_suffix(".md").write_text(table(result))


if __name__ == "__main__":
    app.run(main)
