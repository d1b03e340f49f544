"""s2sd-serve: the REST protocol, uploads, batches, limits, metrics, and the process from its ready line to its end."""

import asyncio
import base64
import contextlib
import io
import json
import re
import signal
import socket
import threading
import time
import tracemalloc
from concurrent.futures import CancelledError

import httpx
import numpy as np
import pytest
import tensorflow as tf
from conftest import needs_scann
from PIL import Image
from processes import start_python

import s2sd_tf
from s2sd_tf import data, evaluation, export
from s2sd_tf.serving import Encoder
from s2sd_tf.serving.batching import Batcher, QueueFull
from s2sd_tf.serving.rest import read_predict
from s2sd_tf.serving.servable import Servable, Signature
from s2sd_tf.serving.server import Limits, create_app

# One of the two models that are served is a retrieval SavedModel.
pytestmark = needs_scann

IMAGE = {"Content-Type": "image/png"}


def encode(pixels, format="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def b64(content):
    return {"b64": base64.b64encode(content).decode()}


IMAGES = [
    encode(np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8), "JPEG" if seed % 2 else "PNG")
    for seed in range(6)
]
# Headers of images of 60,000 x 60,000 pixels.
HUGE_PNG = bytearray(encode(np.zeros((1, 1), np.uint8)))
HUGE_PNG[16:24] = (60_000).to_bytes(4, "big") * 2
HOSTILE = [
    b"no image",
    __file__.encode(),
    IMAGES[0][:60],
    IMAGES[1][:100],
    bytes(HUGE_PNG),
    b"",
    b"GIF89a" + b"\xff" * 100,
    b"BM" + b"\0" * 9,
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the SavedModels `encoder`, with nested dimensions, and `retrieval`."""
    folder = tmp_path_factory.mktemp("saved")
    tf.keras.utils.set_random_seed(0)
    backbone = s2sd_tf.models.backbones.conv_blocks((8, 8, 1), filters=(6, 8), pools=1)
    model = s2sd_tf.S2SDModel(backbone, 4, target_dims=(8,), nested_dims=(2, 4))
    export.export_encoder(model, data.Preprocessing(8, 8, 1), folder / "encoder")
    rows = Encoder(folder / "encoder")(IMAGES[:4])
    index = evaluation.build_index(rows, ["a", "b", "c", "d"], ["x", "x", "y", "y"])
    index.min_score = 0.0
    export.export_retrieval(folder / "encoder", index, folder / "retrieval", k=3)
    return folder


@pytest.fixture(scope="module")
def encoder(saved):
    return Servable(saved / "encoder")


@pytest.fixture(scope="module")
def retrieval(saved):
    return Servable(saved / "retrieval")


@contextlib.contextmanager
def serving(servable, name="m", answered=None, **limits):
    """An `ask(*requests)` that sends requests `(path, body, headers)` at the same time; a path alone is a GET.

    `answered` is a coroutine function that is called with each answer.
    """
    app = create_app(servable, name, Limits(**limits))

    async def send(requests):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        hooks = {"response": [answered] if answered else []}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://test", timeout=60, event_hooks=hooks
        ) as client:

            def one(path, body=None, headers=None):
                if body is None:
                    return client.get(path)
                if isinstance(body, dict):
                    return client.post(path, json=body)
                return client.post(path, content=body, headers=headers)

            return await asyncio.gather(*(one(*([each] if isinstance(each, str) else each)) for each in requests))

    yield lambda *requests: asyncio.run(send(requests))

    async def end():
        async with app.router.lifespan_context(app):
            pass

    asyncio.run(end())


class Blocked:
    """A servable whose encoder waits until `free` is set. Its embedding is the length of an image."""

    is_retrieval = False
    signature_defs = {}

    def __init__(self):
        self.free, self.started, self.batches = threading.Event(), threading.Event(), []
        self.signatures = {"encoded_images": Signature("encoded_images", tf.string, None, self.run_each)}

    def run_each(self, images):
        self.started.set()
        self.free.wait(60)
        self.batches.append(len(images))
        if b"broken" in images:
            raise tf.errors.InternalError(None, None, "the device /gpu:0 is gone")
        return [{"embedding": np.array([len(image)], np.float32)} for image in images]


class TestProtocol:
    def test_rows_and_columns_of_encoded_images(self, encoder, saved):
        expected = Encoder(saved / "encoder")(IMAGES[:2])
        images = [b64(image) for image in IMAGES[:2]]
        named = [{"encoded_images": image} for image in images]
        signature = {"signature_name": "encoded_images"}
        with serving(encoder) as ask:
            answers = ask(
                *(
                    ("/v1/models/m:predict", {**signature, **request})
                    for request in (
                        {"instances": images},
                        {"instances": named},
                        {"inputs": images},
                        {"inputs": {"encoded_images": images}},
                    )
                ),
                ("/v1/models/m/versions/1:predict", {**signature, "instances": images}),
                ("/v1/models/m:predict", {"signature_name": "encoded_images_2", "instances": images}),
            )
        assert [answer.status_code for answer in answers] == [200] * 6
        for answer, key in zip(answers, ["predictions", "predictions", "outputs", "outputs", "predictions"]):
            assert answer.headers["content-type"] == "application/json"
            assert set(answer.json()) == {key}
            np.testing.assert_allclose(answer.json()[key], expected, atol=1e-6)
        short = expected[:, :2] / np.linalg.norm(expected[:, :2], axis=1, keepdims=True)
        np.testing.assert_allclose(answers[5].json()["predictions"], short, atol=1e-5)

    def test_images_as_numbers(self, encoder):
        pixels = np.random.default_rng(0).integers(0, 256, (2, 9, 7, 1))
        with serving(encoder) as ask:
            floats, integers = ask(
                ("/v1/models/m:predict", {"instances": (pixels / 255).tolist()}),
                ("/v1/models/m:predict", {"signature_name": "pixels", "inputs": {"pixels": pixels.tolist()}}),
            )
        found = np.array(floats.json()["predictions"])
        np.testing.assert_allclose(found, integers.json()["outputs"], atol=1e-5)
        expected = encoder.signatures["pixels"].run(pixels.astype(np.uint8))["embedding"]
        np.testing.assert_allclose(found, expected, atol=1e-5)

    def test_batches_of_rows(self, encoder):
        pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 7, 1))
        expected = encoder.signatures["pixels"].run(pixels.astype(np.uint8))["embedding"]
        with serving(encoder, max_batch=3) as ask:
            (answer,) = ask(("/v1/models/m:predict", {"signature_name": "pixels", "instances": pixels.tolist()}))
            (metrics,) = ask("/metrics")
        np.testing.assert_allclose(answer.json()["predictions"], expected, atol=1e-5)
        assert "s2sd_batch_size_sum 7" in metrics.text
        assert "s2sd_batch_size_count 3" in metrics.text

    def test_a_text_among_numbers_takes_no_memory(self, encoder):
        body = json.dumps({"instances": [["a" * 2000, *[1] * 100_000]]}).encode()
        tracemalloc.start()
        with pytest.raises(ValueError, match="images: expected nested lists of float32 numbers"):
            read_predict(body, encoder.signatures, 64)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(body)
        tracemalloc.stop()

    def test_retrieval(self, retrieval, saved):
        rows = Encoder(saved / "encoder")(IMAGES[:2])
        expected = retrieval.signatures["embeddings"].run(rows)
        images = [b64(image) for image in IMAGES[:2]]
        with serving(retrieval) as ask:
            by_row, by_column, embeddings = ask(
                ("/v1/models/m:predict", {"signature_name": "encoded_images", "instances": images}),
                ("/v1/models/m:predict", {"signature_name": "encoded_images", "inputs": images}),
                ("/v1/models/m:predict", {"signature_name": "embeddings", "instances": rows.tolist()}),
            )
        assert [row["ids"][0] for row in by_row.json()["predictions"]] == ["a", "b"]
        columns = by_column.json()["outputs"]
        assert set(columns) == {"ids", "labels", "scores"}
        for key, kind in (("ids", str), ("labels", str), ("scores", float)):
            assert columns[key] == [row[key] for row in by_row.json()["predictions"]]
            assert all(isinstance(value, kind) for row in columns[key] for value in row)
        assert columns["ids"] == np.char.decode(expected["ids"].astype(bytes)).tolist()
        for found in (columns["scores"], [row["scores"] for row in embeddings.json()["predictions"]]):
            np.testing.assert_allclose(found, expected["scores"], atol=1e-5)

    def test_status_and_metadata(self, encoder, retrieval):
        with serving(encoder, "an-encoder") as ask:
            status, versioned, metadata, *missing = ask(
                "/v1/models/an-encoder",
                "/v1/models/an-encoder/versions/1",
                "/v1/models/an-encoder/metadata",
                "/v1/models/other",
                "/v1/models/an-encoder/versions/2/metadata",
                ("/v1/models/other:predict", {"instances": [0]}),
                ("/v1/models/an-encoder:classify", {"instances": [0]}),
                ("/v1/models/an-encoder:search", IMAGES[0], IMAGE),
                "/v2/health",
            )
        assert status.json() == versioned.json()
        assert status.json()["model_version_status"][0]["state"] == "AVAILABLE"
        assert metadata.json()["model_spec"] == {"name": "an-encoder", "signature_name": "", "version": "1"}
        signatures = metadata.json()["metadata"]["signature_def"]["signature_def"]
        assert set(signatures) >= {"serving_default", "pixels", "encoded_images", "encoded_images_2"}
        images = signatures["serving_default"]["inputs"]["images"]
        assert images["dtype"] == "DT_FLOAT"
        assert [axis["size"] for axis in images["tensor_shape"]["dim"]] == ["-1", "-1", "-1", "1"]
        assert [answer.status_code for answer in missing] == [404] * 6
        assert all(set(answer.json()) == {"error"} for answer in missing)
        with serving(retrieval) as ask:
            (metadata,) = ask("/v1/models/m/metadata")
        signature = metadata.json()["metadata"]["signature_def"]["signature_def"]["embeddings"]
        assert set(signature["outputs"]) == {"ids", "labels", "scores"}

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (b"", "body: expected JSON"),
            (b"{", "body: expected JSON"),
            (b"\xff\xfe", "body: expected JSON"),
            (b"[" * 100_000, "body: expected JSON"),
            (b"[]", "body: expected an object with either 'instances' or 'inputs'"),
            ({"instances": [0], "inputs": [0]}, "body: expected an object with either"),
            ({"signature_name": "other", "instances": [0]}, "signature_name: expected one of .*Received: 'other'"),
            ({"signature_name": [], "instances": [0]}, "signature_name: expected one of"),
            ({"instances": []}, "instances: expected a list of 1 to 64 items. Received: 0"),
            ({"instances": [0] * 65}, "instances: expected a list of 1 to 64 items. Received: 65"),
            ({"inputs": {"images": 3}}, "inputs: expected a list .*Received: int"),
            ({"inputs": {"other": [0]}}, r"expected the input 'images'. Received: \['other'\]"),
            ({"instances": [[[[0]], [[0, 0]]]]}, "images: expected nested lists of float32 numbers of one shape"),
            ({"instances": [[[["0"]]]]}, "images: expected nested lists of float32"),
            ({"instances": [[[[10**400]]]]}, "images: expected nested lists of float32"),
            ({"instances": [0.5]}, "."),
            ({"instances": [[[[0.5, 0.5]]]]}, "."),
            ({"instances": [[[[255]]]]}, r"images: expected numbers in \[0, 1\].*Received: "),
            (b'{"instances": [[[[NaN]]]]}', r"images: expected "),
            ({"signature_name": "pixels", "instances": [[[[256]]]]}, "pixels: expected .*uint8.*Received: 256 to 256"),
            ({"signature_name": "pixels", "instances": [[[[0.5]]]]}, "pixels: expected .*uint8"),
            ({"signature_name": "encoded_images", "instances": [{"b64": "?"}]}, 'encoded_images: expected {"b64": '),
            ({"signature_name": "encoded_images", "instances": [3]}, 'encoded_images: .*Received: int'),
            ({"signature_name": "encoded_images", "instances": ["text"]}, "image 0: "),
        ],
    )  # fmt: skip
    def test_bad_requests(self, encoder, body, message):
        with serving(encoder) as ask:
            (answer,) = ask(("/v1/models/m:predict", body))
        assert answer.status_code == 400, answer.text
        assert set(answer.json()) == {"error"}
        assert re.match(message, answer.json()["error"]), answer.text
        assert len(answer.text) < 600


class TestUploads:
    def test_embed(self, encoder, saved):
        expected = Encoder(saved / "encoder")(IMAGES[:2])
        with serving(encoder) as ask:
            answers = ask(*(("/v1/models/m:embed", image, IMAGE) for image in IMAGES[:2]), multipart(IMAGES[:2]))
        np.testing.assert_allclose([answer.json()["embeddings"][0] for answer in answers[:2]], expected, atol=1e-6)
        np.testing.assert_allclose(answers[2].json()["embeddings"], expected, atol=1e-6)

    def test_search(self, retrieval):
        with serving(retrieval) as ask:
            one, two = ask(("/v1/models/m:search", IMAGES[0], IMAGE), multipart(IMAGES[:2], "search"))
        (matches,) = one.json()["matches"]
        assert matches[0] == {"id": "a", "label": "x", "score": pytest.approx(1.0, abs=1e-5)}
        # The threshold of the index leaves some out.
        assert all(match["score"] >= 0 for match in matches)
        assert [found[0]["id"] for found in two.json()["matches"]] == ["a", "b"]

    def test_bad_forms(self, encoder):
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        with serving(encoder, max_items=2) as ask:
            answers = ask(
                multipart([]),
                multipart(IMAGES[:3]),
                ("/v1/models/m:embed", b"no form", kind),
                ("/v1/models/m:embed", b"--x\r\n\r\n", kind),
                ("/v1/models/m:embed", IMAGES[0], {"Content-Type": "multipart/form-data"}),
            )
        assert [answer.status_code for answer in answers] == [400] * 5
        assert all(set(answer.json()) == {"error"} for answer in answers)


def multipart(images, verb="embed"):
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="image"; filename="{i}"\r\n\r\n'.encode() + image + b"\r\n"
        for i, image in enumerate(images)
    ]
    return f"/v1/models/m:{verb}", b"".join(parts) + b"--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}


class TestBatching:
    def test_images_of_concurrent_requests_are_computed_together(self, encoder, saved):
        expected = Encoder(saved / "encoder").embed(IMAGES)[0]
        with serving(encoder, max_batch=4, batch_wait_ms=10_000) as ask:
            answers = ask(*(("/v1/models/m:embed", image, IMAGE) for image in IMAGES[:4]))
            (metrics,) = ask("/metrics")
        found = [answer.json()["embeddings"][0] for answer in answers]
        np.testing.assert_allclose(found, expected[:4], atol=1e-6)
        assert "s2sd_batch_size_sum 4.0\ns2sd_batch_size_count 1\n" in metrics.text

    def test_a_bad_image_fails_only_its_own_request(self, encoder, saved):
        expected = Encoder(saved / "encoder")(IMAGES)
        requests = [image for pair in zip(IMAGES, HOSTILE) for image in pair] + HOSTILE[len(IMAGES) :]
        with serving(encoder, batch_wait_ms=50) as ask:
            answers = ask(*(("/v1/models/m:embed", image, IMAGE) for image in requests), multipart([IMAGES[0], b"bad"]))
        good = [answer for image, answer in zip(requests, answers) if image in IMAGES]
        bad = [answer for image, answer in zip(requests, answers) if image not in IMAGES] + answers[-1:]
        np.testing.assert_allclose([answer.json()["embeddings"][0] for answer in good], expected, atol=1e-6)
        assert len(bad) == len(HOSTILE) + 1
        for answer in bad:
            assert answer.status_code == 400
            assert answer.json()["error"].startswith(f"image {int(answer is answers[-1])}: ")
            assert "Traceback" not in answer.text

    def test_batches(self):
        servable = Blocked()
        sizes = []
        batcher = Batcher(max_batch=3, wait_ms=0, max_queue=8, observe=sizes.append)
        first = batcher.submit(servable.run_each, [b"1"])
        assert servable.started.wait(60)
        futures = batcher.submit(servable.run_each, [b"12"] * 7)
        (other,) = batcher.submit(lambda items: [len(items)], ["other"])
        with pytest.raises(QueueFull, match="8 items wait, of at most 8"):
            batcher.submit(servable.run_each, [b""])
        assert len(batcher) == 8
        assert futures[1].cancel()
        servable.free.set()
        assert [future.result(60)["embedding"][0] for future in first + futures[:1] + futures[2:]] == [1] + [2] * 6
        assert other.result(60) == 1
        with pytest.raises(CancelledError):
            futures[1].result(60)
        batcher.close()
        assert sizes == [1, 3, 3, 1]
        with pytest.raises(RuntimeError, match="closed"):
            batcher.submit(servable.run_each, [b""])

    def test_failures_reach_their_callers_and_the_thread_lives_on(self):
        batcher = Batcher(wait_ms=0)
        (few,) = batcher.submit(lambda items: [], [1])
        with pytest.raises(RuntimeError, match="expected 1 results"):
            few.result(60)
        one, two = batcher.submit(lambda items: [ValueError("bad"), "good"], [1, 2])
        with pytest.raises(ValueError, match="bad"):
            one.result(60)
        assert two.result(60) == "good"
        # What waits is computed before the end.
        futures = batcher.submit(lambda items: items, [1, 2, 3])
        batcher.close()
        assert [future.result(0) for future in futures] == [1, 2, 3]

    @pytest.mark.parametrize(("name", "value"), [("max_batch", 0), ("wait_ms", -1), ("max_queue", 1.5)])
    def test_bad_arguments(self, name, value):
        with pytest.raises(ValueError, match=f"{name}: expected .*Received: {value}"):
            Batcher(**{name: value})


class TestLimits:
    def test_large_requests(self, encoder):
        async def without_length():
            for _ in range(3):
                yield b"x" * 1000

        with serving(encoder, max_request_bytes=2000) as ask:
            answers = ask(
                ("/v1/models/m:embed", b"x" * 2001, IMAGE),
                ("/v1/models/m:embed", without_length(), IMAGE),
                ("/v1/models/m:predict", b"x", {"Content-Length": "9" * 30}),
                ("/v1/models/m:embed", IMAGES[0], IMAGE),
            )
        assert [answer.status_code for answer in answers] == [413, 413, 413, 200]
        assert answers[0].json() == {"error": "expected a request of at most 2000 bytes"}

    def test_full_queue_and_held_bytes(self):
        servable = Blocked()

        async def answered(answer):
            if answer.status_code == 503:
                servable.free.set()

        limits = {"max_queue": 2, "batch_wait_ms": 0, "max_request_bytes": 50, "max_held_bytes": 60}
        with serving(servable, answered=answered, **limits) as ask:
            answers = ask(*(("/v1/models/m:embed", b"x" * size, IMAGE) for size in (1, 2, 3, 4, 5, 49)))
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses[0] == 200
        assert statuses[-1] == 503
        refused = [answer for answer in answers if answer.status_code == 503]
        assert {answer.headers["retry-after"] for answer in refused} == {"1"}
        assert {answer.json()["error"] for answer in refused} <= {
            "too many images wait; try again later", "too many bytes are being received; try again later"
        }  # fmt: skip

    def test_a_request_that_takes_too_long(self):
        servable = Blocked()
        with serving(servable, timeout_s=0.05) as ask:
            (answer,) = ask(("/v1/models/m:embed", b"x", IMAGE))
            servable.free.set()
        assert (answer.status_code, answer.json()) == (504, {"error": "not computed within 0.05 seconds"})

    def test_a_slow_sender(self, encoder):
        async def slow():
            yield b"x"
            await asyncio.sleep(60)

        with serving(encoder, read_timeout_s=0.05) as ask:
            (answer,) = ask(("/v1/models/m:embed", slow(), IMAGE))
        assert (answer.status_code, answer.headers["connection"]) == (408, "close")

    def test_a_broken_device(self):
        servable = Blocked()
        servable.free.set()
        with serving(servable, batch_wait_ms=0) as ask:
            (broken,) = ask(("/v1/models/m:embed", b"broken", IMAGE))
            (whole,) = ask(("/v1/models/m:embed", b"whole", IMAGE))
        assert (broken.status_code, whole.status_code) == (500, 200)
        assert "gpu" not in broken.text

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"name": "a/b"}, "name: expected a name without .*Received: 'a/b'"),
            ({"name": ""}, "name: "),
            ({"max_items": 0}, "max_items: expected an int >= 1. Received: 0"),
            ({"max_held_bytes": 1}, "max_held_bytes: expected a number >= 16777216. Received: 1"),
            ({"timeout_s": 0}, "timeout_s: expected a number > 0. Received: 0"),
            ({"batch_wait_ms": -1}, "wait_ms: "),
        ],
    )
    def test_bad_arguments(self, settings, message):
        name = settings.pop("name", "m")
        with pytest.raises(ValueError, match=message):
            create_app(Blocked(), name, Limits(**settings))


def test_health_and_metrics(encoder):
    with serving(encoder) as ask:
        ask(("/v1/models/m:embed", IMAGES[0], IMAGE))
        ask(("/v1/models/m:embed", b"no image", IMAGE), "/anything")
        health, metrics = ask("/healthz", "/metrics")
    assert health.status_code == 200
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = metrics.text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['s2sd_requests_total{kind="embed",status="200"}'] == "1"
    assert values['s2sd_requests_total{kind="embed",status="400"}'] == "1"
    assert values['s2sd_requests_total{kind="other",status="404"}'] == "1"
    assert values["s2sd_errors_total"] == "2"
    assert values['s2sd_request_seconds_bucket{kind="embed",le="+Inf"}'] == "2"
    assert values['s2sd_request_seconds_count{kind="embed"}'] == "2"
    assert values["s2sd_queue_length"] == "0"
    # Every metric has its type, before its values.
    for name in {re.sub("(_bucket|_sum|_count)?({.*)?$", "", name) for name in values}:
        assert sum(line.startswith(f"# TYPE {name} ") for line in lines) == 1, name


class TestServable:
    def test_what_cannot_be_served(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="model: expected the folder of a SavedModel"):
            Servable(tmp_path)
        (tmp_path / "saved_model.pb").write_bytes(b"broken")
        with pytest.raises(ValueError, match="model: expected an undamaged SavedModel"):
            Servable(tmp_path)

        class Other(tf.Module):
            @tf.function(input_signature=[tf.TensorSpec([], tf.float32)])
            def __call__(self, x):
                return x

        tf.saved_model.save(Other(), str(tmp_path / "other"))
        with pytest.raises(ValueError, match="encoder: expected a SavedModel of export_encoder"):
            Servable(tmp_path / "other")


class TestProcess:
    def test_from_ready_to_its_end(self, saved):
        arguments = ("-m", "s2sd_tf.cli.serve", f"--model={saved / 'encoder'}", "--port=0", "--batch_wait_ms=0")
        with start_python(*arguments) as server:
            port = ready_port(server)
            # A second server on this port says so.
            with start_python(*arguments, f"--port={port}") as second:
                with httpx.Client(base_url=f"http://localhost:{port}", timeout=60) as client:
                    assert client.get("/healthz").json() == {"status": "ok"}
                    # One that is too large is refused without a reset, and its connection can be used again.
                    for body, status in ((IMAGES[0], 200), (b"x" * (17 * 2**20), 413), (IMAGES[0], 200)):
                        assert client.post("/v1/models/encoder:embed", content=body).status_code == status
                done = second.wait()
            assert (done.returncode, done.stdout) == (2, "")
            error = [line for line in done.stderr.splitlines() if "error:" in line]
            assert re.fullmatch(rf".*error: port: expected one of 'localhost' .*Received: {port}: .*in use", error[-1])
            # A request is in flight when the server asks for its body, and is finished after the signal.
            with socket.create_connection(("localhost", port), 60) as connection:
                head = f"POST /v1/models/encoder:embed HTTP/1.1\r\nHost: x\r\nContent-Length: {len(IMAGES[0])}\r\n"
                connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
                assert connection.recv(1000).startswith(b"HTTP/1.1 100")
                server.send_signal(signal.SIGTERM)
                while accepts(port):
                    time.sleep(0.01)
                connection.sendall(IMAGES[0])
                answer = b"".join(iter(lambda: connection.recv(10_000), b""))
            assert answer.startswith(b"HTTP/1.1 200")
            assert len(json.loads(answer.split(b"\r\n\r\n")[1])["embeddings"][0]) == 4
            done = server.wait()
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"ready on http://localhost:{port}\n"
        assert "Traceback" not in done.stderr

    def test_connections_that_send_nothing_and_too_many(self):
        code = """if True:
            from s2sd_tf.serving import listening
            from starlette.applications import Starlette
            from starlette.responses import Response
            from starlette.routing import Route

            async def answer(request):
                return Response(await request.body())

            app = Starlette(routes=[Route("/", answer, methods=["POST"])])
            with listening.bound_socket("localhost", 0) as bound:
                port = bound.getsockname()[1]
                ready = lambda: print(f"ready on http://localhost:{port}", flush=True)
                listening.run(app, bound, ready, max_connections=2, patience_s=1, grace_s=5)
        """
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\n"

        def received(connection, end):
            """What a connection sends, up to `end`."""
            content = b""
            while not content.endswith(end):
                content += (piece := connection.recv(10_000))
                assert piece, content
            return content

        with start_python("-c", code) as server, contextlib.ExitStack() as stack:
            port = ready_port(server)

            def connect():
                return stack.enter_context(socket.create_connection(("localhost", port), 60))

            held = [connect(), connect()]
            for connection in held:
                connection.sendall(head + b"Expect: 100-continue\r\n\r\n")
                assert received(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 100")
            third = connect()
            third.sendall(head + b"\r\nanswer")
            assert received(third, b"Unavailable").startswith(b"HTTP/1.1 503")
            for connection in held:
                connection.sendall(b"answer")
                assert received(connection, b"answer").startswith(b"HTTP/1.1 200")
            # The head of a request begins, as the first of its connection or as a later one, and stops.
            idle = [connect(), held[0], connect()]
            for connection in idle[:2]:
                connection.sendall(head)
            for connection in idle:
                with contextlib.suppress(ConnectionError):
                    assert connection.recv(10_000) == b""
            server.send_signal(signal.SIGINT)
            done = server.wait()
        assert done.returncode == 0, done.stderr


def ready_port(server):
    while not (found := re.match(r"ready on http://localhost:(\d+)\n", server.stdout())):
        assert server.is_alive(), server.wait().stderr
        time.sleep(0.02)
    return int(found[1])


def accepts(port):
    try:
        with socket.create_connection(("localhost", port), 60):
            return True
    except OSError:
        return False
