"""s2sd-serve: serves an encoder or a retrieval over HTTP.

Takes images, in uploads or in the REST protocol of TensorFlow Serving, and answers with embeddings or with the most
similar images. Images of different requests are computed together. It has no users and no encryption: put it behind
something that does. SIGTERM and SIGINT end it after the requests in flight.

Examples:
  s2sd-serve --model=encoder --port=8501
  curl --data-binary @query.jpg http://localhost:8501/v1/models/encoder:embed
  s2sd-serve --model=retrieval --host=0.0.0.0 --port=8501
  curl -F image=@a.jpg -F image=@b.jpg http://localhost:8501/v1/models/retrieval:search
"""

import os

from absl import flags

from s2sd_tf.cli import app

_MODEL = app.define_path("model", None, "SavedModel of s2sd-export or of s2sd-index --saved_model.", required=True)
_NAME = flags.DEFINE_string("name", None, "Name of the model in URLs. By default that of its folder.")
_HOST = flags.DEFINE_string("host", "localhost", "Address to listen on; 0.0.0.0 for all of this machine.")
_PORT = flags.DEFINE_integer("port", 8501, "Port; 0 for any that is free.", lower_bound=0, upper_bound=65535)
_MAX_BATCH = flags.DEFINE_integer("max_batch", 32, "Most images that are computed together.", lower_bound=1)
_BATCH_WAIT = flags.DEFINE_float("batch_wait_ms", 2.0, "How long an image waits for others.", lower_bound=0.0)
_MAX_ITEMS = flags.DEFINE_integer("max_items", 64, "Most images of a request.", lower_bound=1)
_MAX_REQUEST = flags.DEFINE_integer("max_request_mib", 16, "Largest request in MiB; else 413.", lower_bound=1)
_MAX_HELD = flags.DEFINE_integer(
    "max_held_mib", 1024, "Most MiB of all requests together; else 503. At least --max_request_mib.", lower_bound=1
)
_MAX_QUEUE = flags.DEFINE_integer("max_queue", 256, "Most images that wait to be computed; else 503.", lower_bound=1)
_MAX_CONNECTIONS = flags.DEFINE_integer("max_connections", 512, "Most connections; else 503.", lower_bound=1)
_READ_TIMEOUT = flags.DEFINE_float(
    "read_timeout_s", 10.0, "Seconds that a request may take to arrive; else 408.", lower_bound=0.1
)
_TIMEOUT = flags.DEFINE_float("timeout_s", 30.0, "Seconds that a request may then take; else 504.", lower_bound=0.1)


def main() -> None:
    """The program `s2sd-serve`."""
    app.run(_main)


def _main(_):
    try:
        from s2sd_tf.serving import listening, server
    except ImportError as error:
        raise ImportError("s2sd-serve needs Starlette and uvicorn: pip install 's2sd_tf[serve]'") from error
    from s2sd_tf.serving.servable import Servable

    limits = server.Limits(
        max_batch=_MAX_BATCH.value,
        batch_wait_ms=_BATCH_WAIT.value,
        max_queue=_MAX_QUEUE.value,
        max_items=_MAX_ITEMS.value,
        max_request_bytes=_MAX_REQUEST.value * 2**20,
        max_held_bytes=_MAX_HELD.value * 2**20,
        read_timeout_s=_READ_TIMEOUT.value,
        timeout_s=_TIMEOUT.value,
    )
    name = _NAME.value or os.path.basename(os.path.abspath(_MODEL.value))
    # Bound first, so that a port in use is reported at once.
    with listening.bound_socket(_HOST.value, _PORT.value) as bound:
        application = server.create_app(Servable(_MODEL.value), name, limits)
        host = f"[{_HOST.value}]" if ":" in _HOST.value else _HOST.value
        listening.run(
            application,
            bound,
            lambda: print(f"ready on http://{host}:{bound.getsockname()[1]}", flush=True),
            _MAX_CONNECTIONS.value,
            patience_s=_READ_TIMEOUT.value,
            grace_s=_READ_TIMEOUT.value + _TIMEOUT.value,
        )


if __name__ == "__main__":
    main()
