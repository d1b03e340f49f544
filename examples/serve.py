"""Serves a retrieval SavedModel over HTTP, with only TensorFlow and ScaNN.

    python examples/serve.py <folder of the SavedModel> 8501
    curl --data-binary @query.jpg http://localhost:8501/

Answers {"matches": [{"id": ..., "label": ..., "score": ...}, ...]}, or {"error": ...} with status 400, 413 or 500.
"""

import http.server
import json
import sys

import tensorflow as tf
from scann.scann_ops.py import scann_ops  # noqa: F401  registers the index's ops

MODEL, MAX_BYTES = tf.saved_model.load(sys.argv[1]), 2**24
SEARCH = MODEL.signatures.get("encoded_images")
if SEARCH is None or "ids" not in SEARCH(tf.zeros([0], tf.string)):  # the first call also prepares the graph
    sys.exit(f"expected a SavedModel of export_retrieval. Received: {sys.argv[1]}")


class Handler(http.server.BaseHTTPRequestHandler):
    timeout = 30  # seconds

    def do_POST(self):
        status, answer = 413, {"error": f"expected a Content-Length of at most {MAX_BYTES} bytes"}
        length = self.headers.get("Content-Length", "")
        if length.isdecimal() and len(length) < 15 and int(length) <= MAX_BYTES:
            try:
                found = SEARCH(tf.constant([self.rfile.read(int(length))]))
                rows = zip(*(found[name].numpy()[0].tolist() for name in ("ids", "labels", "scores")))
                matches = [{"id": i.decode(), "label": n.decode(), "score": s} for i, n, s in rows if i]
                status, answer = 200, {"matches": matches}
            except tf.errors.InvalidArgumentError:
                status, answer = 400, {"error": "expected a PNG, JPEG, BMP or GIF image of at most 89478485 pixels"}
            except tf.errors.OpError:
                status, answer = 500, {"error": "the search failed"}
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())


http.server.ThreadingHTTPServer(("localhost", int(sys.argv[2])), Handler).serve_forever()
