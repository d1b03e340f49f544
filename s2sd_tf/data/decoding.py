"""Decodes images with TensorFlow operations only, so that training, evaluation and exported graphs do the same.

Beyond `tf.io.decode_image` it limits the pixels by the image's header, before anything is allocated for them; it turns
images upright by their EXIF orientation; and it reads the palettes of BMPs.
"""

import functools
import re
from collections.abc import Callable, Sequence

import tensorflow as tf

from s2sd_tf.untrusted import MAX_PIXELS

# The longest file heads worth following: segments before the orientation, and blocks of a GIF's first frame.
_MAX_SEGMENTS, _MAX_BLOCKS = 4096, 2**18
# Orientations whose rows are stored as columns, and those to mirror afterwards (see the EXIF standard, tag 274).
_TRANSPOSED, _MIRRORED, _FLIPPED = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)
_ENCODED = [tf.TensorSpec([], tf.string)]
# The factors by which TensorFlow decodes a JPEG smaller.
_REDUCTIONS = (1, 2, 4, 8)
# A WebP of one pixel.
_WEBP = b"RIFF\x1a\x00\x00\x00WEBPVP8L\x0e\x00\x00\x00/\x00\x00\x00\x00\x07\x10\x11\xfd\x0fDD\xff\x03"

FORMATS = "PNG, JPEG, BMP, GIF or WebP"
NO_WEBP = "WebP, which this version of TensorFlow does not decode"


def rare(*signature: tf.TensorSpec) -> Callable:
    """Decorator of a function that few images need.

    It is neither inlined nor optimised with its callers, as if it were a function of tf.data. So TensorFlow prepares it
    when it first runs, and not at every start of a pass, which then takes half the time; and other images do not pass
    through its operations.
    """
    attributes = {"_noinline": True, "_tf_data_function": True}
    return tf.function(input_signature=signature, autograph=False, experimental_attributes=attributes)


# Traced once for all pipelines and exported graphs.
@tf.function(input_signature=_ENCODED, autograph=False)
def decode_pixels(encoded: tf.Tensor | bytes) -> tf.Tensor:
    """Decodes a PNG, JPEG, BMP, GIF (first frame) or WebP, a string scalar, to upright uint8 RGB `(h, w, 3)`.

    WebP needs a TensorFlow that decodes it (2.20 does, 2.15 does not).

    Raises:
        tf.errors.InvalidArgumentError: the image cannot be decoded, or has more than `MAX_PIXELS` pixels by its header.
    """
    return tf.cond(tf.io.is_jpeg(encoded), lambda: _decode_jpeg(encoded), lambda: decode_other(encoded))


@functools.lru_cache
def decodes_webp() -> bool:
    """Whether this version of TensorFlow decodes WebP."""
    try:
        tf.io.decode_image(_WEBP, channels=3)
    except tf.errors.InvalidArgumentError:
        return False
    return True


def why_not_decoded(encoded: bytes, error: BaseException) -> str:
    """The reason for an error of decoding `encoded`, in one line."""
    return NO_WEBP if encoded[8:12] == b"WEBP" and not decodes_webp() else first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says what is wrong with an image, at most 200 characters."""
    # Without what only says where in the graph it happened.
    where = ("Graph execution error", "Detected at node", "<stack traces", "[[", "File ", "(", "Error in user-defined")
    message = re.sub(r"\{\{.*?\}\} ?| ?\[Op:.*", "", str(getattr(error, "message", error)))
    lines = [line.strip() for line in message.splitlines()]
    reason = next((line for line in lines if line and not line.startswith(where)), type(error).__name__)
    # What `_check` says, and `tf.debugging.Assert`.
    number = "^StringToNumberOp could not correctly convert string: "
    return re.sub(r"^assertion failed: \[(.*)\]$", r"\1", re.sub(number, "", reason))[:200]


@tf.function(input_signature=_ENCODED, autograph=False)
def jpeg_shape(encoded: tf.Tensor | bytes) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Reads a JPEG's header: int32 `(height, width)` when upright, and the EXIF orientation that says how to turn it.

    Raises:
        tf.errors.InvalidArgumentError: the header is broken, or says more than `MAX_PIXELS` pixels.
    """
    height, width, _ = tf.unstack(tf.image.extract_jpeg_shape(encoded))
    encoded = _check_size(height, width, encoded)
    # Most files without EXIF data: a JFIF segment, then the tables.
    begins = _has(encoded, 2, b"\xff\xe0\x00\x10") & _has(encoded, 20, b"\xff\xdb")
    orientation = tf.cond(begins, lambda: 1, lambda: _jpeg_orientation(encoded))
    turned = _is_one_of(orientation, _TRANSPOSED)
    return tf.where(turned, width, height), tf.where(turned, height, width), orientation


def with_box(image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """An image `(h, w, channels)` and its whole area, as `decode_jpeg_window` returns them."""
    return image, tf.cast(tf.concat([[0, 0], tf.shape(image)[:2]], axis=0), tf.float64)


def decode_jpeg_window(
    encoded: tf.Tensor,
    window: tf.Tensor,
    height: tf.Tensor,
    width: tf.Tensor,
    orientation: tf.Tensor,
    reduction: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes a part of a JPEG, upright. The rest of the JPEG is not decoded.

    Args:
        encoded: string scalar.
        window: int32 `[top, left, height, width]` in the upright image.
        height, width, orientation: see `jpeg_shape`.
        reduction: int32 scalar, 1, 2, 4 or 8: how many times smaller each side is decoded, see `jpeg_reduction`.

    Returns:
        `(pixels, box)`: uint8 `(h, w, 3)`, and float64 `[top, left, height, width]`, the window in these pixels. If
        `reduction` is 1, they are the window. Otherwise they are the smaller image's pixels that the window touches.
    """
    return tf.cond(
        (orientation == 1) & (reduction == 1),
        lambda: with_box(tf.image.decode_and_crop_jpeg(encoded, window, channels=3)),
        lambda: _decode_any_jpeg_window(encoded, window, height, width, orientation, reduction),
    )


@rare(*_ENCODED, tf.TensorSpec([4], tf.int32), *[tf.TensorSpec([], tf.int32)] * 4)
def _decode_any_jpeg_window(encoded, window, height, width, orientation, reduction):
    """`decode_jpeg_window` of a JPEG that is stored turned, or is decoded smaller."""
    top, left, rows, columns = tf.unstack(window)
    left = tf.where(_is_one_of(orientation, _MIRRORED), width - left - columns, left)
    top = tf.where(_is_one_of(orientation, _FLIPPED), height - top - rows, top)
    turned = _is_one_of(orientation, _TRANSPOSED)
    corner = tf.where(turned, [left, top], [top, left])
    size = tf.where(turned, [columns, rows], [rows, columns])
    first, end = corner // reduction, -(-(corner + size) // reduction)
    stored = tf.concat([first, end - first], axis=0)
    branches = [
        lambda ratio=ratio: tf.image.decode_and_crop_jpeg(encoded, stored, channels=3, ratio=ratio)
        for ratio in _REDUCTIONS
    ]
    image = tf.switch_case(tf.reduce_sum(tf.cast(reduction >= _REDUCTIONS[1:], tf.int32)), branches)
    # Where the window begins and ends in these pixels, as stored; then as they are turned.
    exact = tf.cast(tf.stack([corner, size]), tf.float64) / tf.cast(reduction, tf.float64)
    before = exact[0] - tf.cast(first, tf.float64)
    after = tf.cast(end - first, tf.float64) - before - exact[1]
    before, after, extent = (tf.where(turned, side[::-1], side) for side in (before, after, exact[1]))
    backwards = tf.stack([_is_one_of(orientation, _FLIPPED), _is_one_of(orientation, _MIRRORED)])
    return _upright(image, orientation), tf.concat([tf.where(backwards, after, before), extent], axis=0)


def jpeg_reduction(size: Sequence[tf.Tensor], scaled: Sequence[tf.Tensor]) -> tf.Tensor:
    """How many times smaller each side of a JPEG may be decoded that is to be scaled down.

    At least twice the pixels are left that the result has on each side, so the antialiasing filter still decides what
    the result looks like.

    Args:
        size: height and width of the part that is scaled, int scalars.
        scaled: height and width of the result, int scalars.

    Returns:
        int32 scalar, 1, 2, 4 or 8.
    """
    times = tf.minimum(*(tf.cast(a, tf.float64) / tf.cast(b, tf.float64) for a, b in zip(size, scaled)))
    return tf.reduce_max(tf.where(times >= [2.0 * ratio for ratio in _REDUCTIONS], _REDUCTIONS, 1))


@rare(*_ENCODED)
def _jpeg_orientation(encoded):
    return _orientation(encoded, _find(encoded, 2, _jpeg_segment))


def _decode_jpeg(encoded):
    # All of it, as a window: its size comes from the checked header. A control dependency on a function, such as
    # `jpeg_shape`, waits only for its operations that have a state, so pixels would be allocated beside the check.
    height, width, orientation = jpeg_shape(encoded)
    return decode_jpeg_window(encoded, tf.stack([0, 0, height, width]), height, width, orientation, tf.constant(1))[0]


def _decode(encoded):
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    image.set_shape([None, None, 3])
    return image


def _decode_upright(encoded, start, segment):
    image = _decode(encoded)
    # Not side by side: where decoding fails, a loop that still runs is cancelled, and its error may come first.
    with tf.control_dependencies([image]):
        return _upright(image, _orientation(encoded, _find(encoded, start, segment)))


@rare(*_ENCODED)
def decode_other(encoded: tf.Tensor) -> tf.Tensor:
    """`decode_pixels` of an image that is no JPEG. Of an unknown format, it fails with TensorFlow's own words."""
    head = _bytes(encoded, 0, 32)
    is_png, is_gif = _has(encoded, 0, b"\x89PNG"), _has(encoded, 0, b"GIF8")
    is_webp = _has(encoded, 0, b"RIFF") & tf.reduce_all(_is(head[8:12], b"WEBP"))
    kinds = [is_png, is_gif, is_webp, _has(encoded, 0, b"BM")]

    def png():
        return _decode_upright(
            _check_size(_number(head[20:24], True), _number(head[16:20], True), encoded), 8, _png_chunk
        )

    def gif():
        return _decode(_first_frame(_check_size(_number(head[8:10]), _number(head[6:8]), encoded)))

    def webp():
        height, width = _webp_size(head)
        return _decode_upright(_check_size(height, width, encoded), 12, _webp_chunk)

    branches = [png, gif, webp, lambda: _decode_bmp(encoded), lambda: _decode(encoded)]
    image = tf.switch_case(tf.argmax(tf.cast([*kinds, True], tf.int32), output_type=tf.int32), branches)
    return tf.ensure_shape(image, [None, None, 3])


def _decode_bmp(encoded):
    """Decodes a BMP. TensorFlow knows no palettes, takes compressed rows for pixels, and assumes the usual masks."""
    head = _bytes(encoded, 0, 66)
    header, width, rows = _number(head[14:18]), _number(head[18:22]), _number(head[22:26])
    # A negative height says that the rows run from top to bottom.
    downwards = rows >= 2**31
    height = _where(downwards, 2**32 - rows, rows)
    bits, compression = _number(head[28:30]), _number(head[30:34])
    masks = tf.reduce_all(_is(head[54:66], bytes([0, 0, 255, 0, 0, 255, 0, 0, 255, 0, 0, 0])))
    plain = (header >= 40) & ((compression == 0) | ((compression == 3) & (bits >= 24) & masks))
    encoded = _check_size(height, width, encoded)
    unsupported = "image: expected a BMP without compression. Received: another kind of BMP"
    encoded = _check(plain, unsupported, encoded)
    has_palette = (bits == 1) | (bits == 4) | (bits == 8)

    def palette():
        start, stride = _number(head[10:14]), (width * bits + 31) // 32 * 4
        length = tf.cast(tf.strings.length(encoded), tf.int64)
        whole = (width > 0) & (height > 0) & (start + stride * height <= length)
        checked = _check(whole, "image: expected a whole BMP. Received: one that lacks pixels", encoded)
        content = tf.io.decode_raw(tf.strings.substr(checked, start, stride * height), tf.uint8)
        shifts = tf.range(8 - bits, -1, -bits)
        content = tf.cast(tf.reshape(content, [height, stride, 1]), tf.int32)
        mask = tf.bitwise.left_shift(1, tf.cast(bits, tf.int32)) - 1
        indices = tf.bitwise.bitwise_and(tf.bitwise.right_shift(content, tf.cast(shifts, tf.int32)), mask)
        indices = tf.reshape(indices, [height, -1])[:, :width]
        colors = tf.reshape(_bytes(encoded, 14 + header, 1024), [256, 4])[:, 2::-1]
        used = _number(head[46:50])
        # Indices beyond the palette are black.
        colors = tf.where(tf.range(256, dtype=tf.int64)[:, None] < _where(used == 0, 256, used), colors, 0)
        image = tf.gather(tf.cast(colors, tf.uint8), indices)
        return tf.raw_ops.Reverse(tensor=image, dims=tf.stack([~downwards, False, False]))

    return tf.cond(has_palette, palette, lambda: _decode(encoded))


def _check_size(height, width, value):
    height, width = tf.cast(height, tf.int64), tf.cast(width, tf.int64)
    size = [tf.strings.as_string(height), " x ", tf.strings.as_string(width)]
    message = tf.strings.join([f"image: expected at most {MAX_PIXELS} pixels. Received: ", *size])
    # Each alone first, because the product of two numbers of 32 bits may exceed 64 bits.
    return _check((height <= MAX_PIXELS) & (width <= MAX_PIXELS) & (height * width <= MAX_PIXELS), message, value)


def _check(holds, message, value):
    """Returns `value`, or fails with the message, a string, unless `holds`. Only what uses the result is checked.

    `tf.debugging.Assert` has a state: in deterministic runs tf.data would load one image at a time, and none ahead.
    """
    # A message is no number. Without branches: nested ones cost deterministic runs seconds at every start of a pass.
    return tf.gather(value[None], tf.strings.to_number(tf.where(holds, "0", message), tf.int32))


def _upright(image, orientation):
    """Turns a stored image `(h, w, 3)` as its EXIF orientation says."""

    def turned():
        order = tf.where(_is_one_of(orientation, _TRANSPOSED), [1, 0, 2], [0, 1, 2])
        backwards = tf.stack([_is_one_of(orientation, _FLIPPED), _is_one_of(orientation, _MIRRORED), False])
        return tf.ensure_shape(tf.raw_ops.Reverse(tensor=tf.transpose(image, order), dims=backwards), [None, None, 3])

    return tf.cond(orientation > 1, turned, lambda: image)


def _where(condition, value, other):
    return tf.where(condition, tf.cast(value, tf.int64), tf.cast(other, tf.int64))


def _is_one_of(value, values):
    return tf.reduce_any(value == tf.constant(values))


def _has(encoded, start, content):
    return tf.strings.substr(encoded, start, len(content)) == content


def _is(values, expected):
    return values == tf.constant(list(expected), tf.int64)


def _bytes(encoded, start, count):
    """`count` bytes from `start` on as int64, zeros beyond the end."""
    start = tf.cast(start, tf.int64)
    start = tf.clip_by_value(start, 0, tf.cast(tf.strings.length(encoded), tf.int64))
    part = tf.strings.substr(encoded, start, tf.cast(count, tf.int64))
    values = tf.cast(tf.io.decode_raw(part, tf.uint8, fixed_length=count), tf.int64)
    return tf.ensure_shape(values, [count if isinstance(count, int) else None])


def _number(values, big_endian=False):
    """The unsigned number that a static number of bytes make up."""
    powers = [256**place for place in range(values.shape[0])]
    return tf.reduce_sum(values * tf.constant(powers[::-1] if big_endian else powers, tf.int64))


def _webp_size(head):
    """Height and width by the three kinds of WebP: extended, lossless and lossy."""
    lossless = _number(head[21:25])
    sizes = [
        (_number(head[27:30]) + 1, _number(head[24:27]) + 1),
        (lossless // 2**14 % 2**14 + 1, lossless % 2**14 + 1),
        (_number(head[28:30]) % 2**14, _number(head[26:28]) % 2**14),
    ]
    kind = _where(head[15] == ord("X"), 0, _where(head[15] == ord("L"), 1, 2))
    return tf.unstack(tf.gather(tf.stack([tf.stack(size) for size in sizes]), kind))


def _find(encoded, start, segment):
    """Follows the segments of a file from `start` on to its EXIF data.

    Args:
        segment: a function from the first 14 bytes of a segment to `(its length, where its EXIF data begin or 0,
            whether no segment follows that matters)`.

    Returns:
        int64 scalar, where the EXIF data begin, or 0.
    """
    length = tf.cast(tf.strings.length(encoded), tf.int64)

    def step(position, _):
        size, exif, last = segment(_bytes(encoded, position, 14))
        return _where(last, length, position + size), _where(exif > 0, position + exif, 0)

    _, found = tf.while_loop(
        lambda position, found: (found == 0) & (position < length),
        step,
        [tf.constant(start, tf.int64), tf.constant(0, tf.int64)],
        maximum_iterations=_MAX_SEGMENTS,
    )
    return found


def _jpeg_segment(head):
    marker = head[1]
    is_exif = (marker == 0xE1) & tf.reduce_all(_is(head[4:10], b"Exif\0\0"))
    # Bytes 255 may fill the space before a marker.
    size = _where(marker == 0xFF, 1, 2 + _number(head[2:4], True))
    # Only applications' data and comments precede the tables; EXIF data after those would be unusual.
    goes_on = (head[0] == 0xFF) & ((marker // 16 == 0xE) | (marker == 0xFE) | (marker == 0xFF))
    return size, _where(is_exif, 10, 0), ~goes_on


def _png_chunk(head):
    is_exif = tf.reduce_all(_is(head[4:8], b"eXIf"))
    is_data = tf.reduce_all(_is(head[4:8], b"IDAT"))
    return 12 + _number(head[:4], True), _where(is_exif, 8, 0), is_data


def _webp_chunk(head):
    size = _number(head[4:8])
    is_exif = tf.reduce_all(_is(head[:4], b"EXIF"))
    begin = _where(tf.reduce_all(_is(head[8:14], b"Exif\0\0")), 14, 8)
    return 8 + size + size % 2, _where(is_exif, begin, 0), False


def _orientation(encoded, start):
    """The orientation in the EXIF data that begin at `start`: int32, 1 to 8; 1 for none, and for `start` 0."""
    return tf.cond(start > 0, lambda: _read_orientation(encoded, start), lambda: 1)


@rare(*_ENCODED, tf.TensorSpec([], tf.int64))
def _read_orientation(encoded, start):
    head = _bytes(encoded, start, 8)
    big_endian = head[0] == ord("M")

    def number(values):
        return _where(big_endian, _number(values, True), _number(values))

    entries = start + number(head[4:8])
    count = number(_bytes(encoded, entries, 2))
    table = tf.reshape(_bytes(encoded, entries + 2, tf.cast(12 * count + 12, tf.int32)), [-1, 12])[:-1]
    tags = _where(big_endian, 256 * table[:, 0] + table[:, 1], 256 * table[:, 1] + table[:, 0])
    values = tf.boolean_mask(
        _where(big_endian, 256 * table[:, 8] + table[:, 9], 256 * table[:, 9] + table[:, 8]), tags == 0x0112
    )
    value = tf.concat([values, [1]], axis=0)[0]
    return tf.cast(_where((value >= 1) & (value <= 8), value, 1), tf.int32)


def _first_frame(encoded):
    """A GIF without the frames after its first: TensorFlow would decode them all, and none of their sizes is checked.

    The size of the first frame is checked here.
    """
    end = tf.cast(tf.strings.length(encoded), tf.int64)

    def palette(flags):
        return _where(flags >= 128, 3 * tf.bitwise.left_shift(tf.constant(2, tf.int64), flags % 8), 0)

    def step(position, inside, framed, blocks, _):
        head = _bytes(encoded, position, 10)
        is_frame, is_extension = ~inside & (head[0] == 0x2C), ~inside & (head[0] == 0x21)
        # A frame's descriptor, its palette and one byte; two bytes of an extension; or a block after its length.
        size = _where(is_frame, 11 + palette(head[9]), _where(is_extension, 2, _where(inside, 1 + head[0], 1)))
        height, width = (_where(is_frame, _number(side), 0) for side in (head[7:9], head[5:7]))
        size = _check_size(height, width, size)
        closes = inside & (head[0] == 0)
        done = (closes & framed) | ~(inside | is_frame | is_extension)
        return position + size, ~closes, framed | is_frame, blocks + 1, done

    start = [13 + palette(_bytes(encoded, 10, 1)[0]), tf.constant(False), tf.constant(False), 0, tf.constant(False)]
    stop, _, _, blocks, _ = tf.while_loop(
        lambda position, inside, framed, blocks, done: ~done & (position < end) & (blocks < _MAX_BLOCKS), step, start
    )
    many = f"image: expected a GIF of at most {_MAX_BLOCKS} blocks a frame"
    encoded = _check(blocks < _MAX_BLOCKS, many, encoded)
    return tf.strings.join(
        [tf.strings.substr(encoded, tf.constant(0, tf.int64), tf.minimum(stop, end)), tf.constant(b";")]
    )
