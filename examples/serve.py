"""Serves a retrieval SavedModel over HTTP, with TensorFlow and ScaNN alone.

    python examples/serve.py <folder of the SavedModel> 8501
    curl --data-binary @query.jpg http://localhost:8501/

answers {"matches": [{"id": ..., "label": ..., "score": ...}, ...]}, or {"error": ...} with status 400.
"""

import http.server
import json
import sys

import tensorflow as tf
from scann.scann_ops.py import scann_ops  # noqa: F401  registers the operations of the index

MODEL = tf.saved_model.load(sys.argv[1])
SEARCH = MODEL.signatures["encoded_images"]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        image = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            found = SEARCH(encoded_images=tf.constant([image]))
            ids, labels, scores = (found[name].numpy()[0].tolist() for name in ("ids", "labels", "scores"))
            matches = [{"id": i.decode(), "label": n.decode(), "score": s} for i, n, s in zip(ids, labels, scores) if i]
            status, answer = 200, {"matches": matches}
        except tf.errors.OpError as error:
            status, answer = 400, {"error": error.message.splitlines()[0]}
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())


http.server.ThreadingHTTPServer(("localhost", int(sys.argv[2])), Handler).serve_forever()
