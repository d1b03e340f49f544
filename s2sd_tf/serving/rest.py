"""The JSON of TensorFlow Serving's REST protocol, for signatures with one input.

https://www.tensorflow.org/tfx/serving/api_rest describes it. A request has rows, `{"instances": [...]}`, which are
answered with `{"predictions": [...]}`, or columns, `{"inputs": ...}`, which are answered with `{"outputs": ...}`.
"""

import base64
import itertools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from google.protobuf import json_format

from s2sd_tf.serving.servable import Signature

_SIGNATURE = "serving_default"


class Predict(NamedTuple):
    """A request.

    Attributes:
        signature: the signature that is asked for.
        in_rows: whether the answer has rows, not columns.
        values: the rows of its input: a list of bytes for strings, else an array of the signature's dtype.
    """

    signature: Signature
    in_rows: bool
    values: Any


def read_predict(body: bytes, signatures: Mapping[str, Signature], max_items: int) -> Predict:
    """Reads the body of a `:predict` request.

    Args:
        body: JSON.
        signatures: those to choose from, by name.
        max_items: most rows.

    Raises:
        ValueError: the body is something else, or its input is not what the signature takes.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"body: expected JSON. Received: {str(error)[:100]}") from None
    if not isinstance(request, dict) or ("instances" in request) == ("inputs" in request):
        raise ValueError("body: expected an object with either 'instances' or 'inputs'")
    name = request.get("signature_name", _SIGNATURE)
    if not isinstance(name, str) or name not in signatures:
        raise ValueError(f"signature_name: expected one of {sorted(signatures)}. Received: {str(name)[:100]!r}")
    signature, in_rows = signatures[name], "instances" in request
    values = request["instances"] if in_rows else _only(request["inputs"], signature.input)
    if not isinstance(values, list) or not 1 <= len(values) <= max_items:
        found = len(values) if isinstance(values, list) else type(values).__name__
        what = "instances" if in_rows else "inputs"
        raise ValueError(f"{what}: expected a list of 1 to {max_items} items. Received: {found}")
    if in_rows:
        values = [_only(value, signature.input) for value in values]
    if signature.dtype == tf.string:
        return Predict(signature, in_rows, [_bytes(value, signature.input) for value in values])
    return Predict(signature, in_rows, _array(values, signature))


def predict_answer(outputs: Mapping[str, np.ndarray], in_rows: bool) -> bytes:
    """Returns the body of the answer: JSON, in which numbers may be Infinity and NaN, as in the protocol.

    Args:
        outputs: the outputs of the signature by name, with as many rows as the request.
        in_rows: see `Predict`.
    """
    columns = {name: plain(rows) for name, rows in outputs.items()}
    if in_rows and len(columns) == 1:
        answer: Any = {"predictions": next(iter(columns.values()))}
    elif in_rows:
        answer = {"predictions": [dict(zip(columns, row)) for row in zip(*columns.values())]}
    else:
        answer = {"outputs": next(iter(columns.values())) if len(columns) == 1 else columns}
    return json.dumps(answer).encode()


def status_answer(version: int) -> dict[str, Any]:
    """Returns the answer to a request for the status of a model that is served."""
    status = {"error_code": "OK", "error_message": ""}
    return {"model_version_status": [{"version": str(version), "state": "AVAILABLE", "status": status}]}


def metadata_answer(name: str, version: int, signature_defs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the answer to a request for the signatures of a model, SignatureDef messages by name."""
    signatures = {
        key: json_format.MessageToDict(signature, preserving_proto_field_name=True)
        for key, signature in signature_defs.items()
    }
    return {
        "model_spec": {"name": name, "signature_name": "", "version": str(version)},
        "metadata": {"signature_def": {"signature_def": signatures}},
    }


def plain(rows: np.ndarray) -> list:
    """The rows as lists of numbers and texts; bytes of a text that are not UTF-8 become escapes."""
    if rows.dtype.kind != "O":
        return rows.tolist()
    texts = [text.decode(errors="backslashreplace") for text in rows.ravel()]
    return np.array(texts, dtype=object).reshape(rows.shape).tolist()


def _only(value, name):
    """The value of the one input, which may be in an object by its name."""
    if not isinstance(value, dict) or set(value) == {"b64"}:
        return value
    if set(value) != {name}:
        raise ValueError(f"expected the input {name!r}. Received: {str(sorted(value))[:100]}")
    return value[name]


def _bytes(value, name):
    wanted = f'{name}: expected {{"b64": "..."}} with base64'
    if isinstance(value, dict) and set(value) == {"b64"} and isinstance(value["b64"], str):
        try:
            return base64.b64decode(value["b64"], validate=True)
        except ValueError as error:
            raise ValueError(f"{wanted}. Received: {error}") from None
    if isinstance(value, str):
        return value.encode()
    raise ValueError(f"{wanted}. Received: {type(value).__name__}")


def _array(values, signature):
    dtype = signature.dtype.as_numpy_dtype
    wanted = f"{signature.input}: expected nested lists of {signature.dtype.name} numbers of one shape"
    numbers, shape = _flat(values)
    if numbers is None:
        raise ValueError(f"{wanted}. Received: other values, or lists of several shapes")
    array = np.array(numbers).reshape(shape)
    if array.dtype.kind not in ("iuf" if signature.dtype.is_floating else "iu") and array.size:
        raise ValueError(f"{wanted}. Received: other values, or lists of several shapes")
    if not signature.dtype.is_floating and array.size:
        limits = np.iinfo(dtype)
        if array.min() < limits.min or array.max() > limits.max:
            raise ValueError(f"{wanted}. Received: {array.min()} to {array.max()}")
    with np.errstate(over="ignore"):  # infinity, which the model refuses
        return array.astype(dtype)


def _flat(values):
    """The numbers in nested lists, a list, and the shape; None and None if there is something else or no one shape."""
    # Not by NumPy, which would make every number as long as the longest text among them.
    shape = [len(values)]
    while set(map(type, values)) == {list}:
        lengths = set(map(len, values))
        if len(lengths) > 1:
            return None, None
        shape += lengths
        values = list(itertools.chain.from_iterable(values))
    return (values, shape) if set(map(type, values)) <= {int, float} else (None, None)
