"""Compares the CUDA kernel with PyTorch on the same tensors: error, time and memory. Run by gpu_check.py.

    python gpu_check_torch.py LIBRARY [--quick] [--seconds=200] > lines

LIBRARY holds c_interface.cc and the kernel. Writes one line of JSON after every comparison, the most informative first.
Starts no new comparison after `--seconds`. Exits with 1 if the kernel's distance from float64 is more than twice
PyTorch's in the same precision, or if two runs differ in any bit.
"""

import argparse
import ctypes
import json
import statistics
import sys
import time

import torch

PAPER = (128, 512, 1024, 1536, 2048, 2048)  # dimensions: student, teachers
KEPT_BYTES = 256 << 20  # the default budget
SCALARS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
PRECISIONS = {"float32": (torch.float32, False), "TF32": (torch.float32, True), "bfloat16": (torch.bfloat16, False)}


class Fused:
    """The kernel on given tensors. Calling it enqueues the kernel on PyTorch's current stream."""

    def __init__(self, library, student, teachers, temperature, tf32, rows=None):
        self.library = library
        self.tensors = student, teachers, torch.tensor([temperature], device="cuda"), weights_of(teachers)
        self.total = torch.full((1,), torch.nan, device="cuda")
        self.per_teacher = torch.full((len(teachers),), torch.nan, device="cuda")
        self.gradient = torch.full(tuple(student.shape), torch.nan, device="cuda")
        offset, count = rows or (0, len(student))
        number = ctypes.c_int64
        self.problem = [
            SCALARS[student.dtype],
            *map(number, (len(student), offset, count, student.shape[1])),
            pointer(student),
            len(teachers),
            (ctypes.c_void_p * len(teachers))(*[teacher.data_ptr() for teacher in teachers]),
            (number * len(teachers))(*[teacher.shape[1] for teacher in teachers]),
            *map(pointer, self.tensors[2:]),
            int(tf32),
            number(KEPT_BYTES),
        ]
        self.workspace_bytes = library.s2sd_workspace_bytes(*self.problem)
        self.workspace = torch.full((self.workspace_bytes,), 255, dtype=torch.uint8, device="cuda")

    def __call__(self):
        outputs = (self.total, self.per_teacher, self.gradient, self.workspace)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = self.library.s2sd_run(*self.problem, *map(pointer, outputs), stream)
        if error:
            raise RuntimeError(error.decode())


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def weights_of(teachers):
    return torch.full((len(teachers),), 1 / len(teachers), device="cuda")


def inputs(batch, dims, dtype):
    """Returns student and teachers with unit rows, in pairs of one class."""
    generator = torch.Generator("cuda").manual_seed(batch)
    tensors = []
    for dim in dims:
        classes = torch.randn((batch + 1) // 2, dim, device="cuda", generator=generator).repeat_interleave(2, 0)[:batch]
        rows = torch.randn(batch, dim, device="cuda", generator=generator) + classes
        tensors.append(torch.nn.functional.normalize(rows, dim=1).to(dtype))
    return tensors[0], tensors[1:]


def loss(student, teachers, temperature, rows=None):
    """The loss in plain PyTorch: softmax in float32 (float64 for float64 inputs), products in the inputs' precision."""
    own = slice(None) if rows is None else slice(rows[0], rows[0] + rows[1])
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    log_student = (student[own] @ student.T / temperature).to(wide).log_softmax(1)
    total = 0.0
    for teacher in teachers:
        log_teacher = (teacher[own] @ teacher.T / temperature).to(wide).log_softmax(1)
        total = total + torch.nn.functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return total / len(teachers) * temperature**2


def value_and_gradient(function, student, *arguments):
    student = student.detach().requires_grad_()
    value = function(student, *arguments)
    value.backward()
    return value.detach(), student.grad


def median_ms(function, repeats):
    for _ in range(min(repeats, 3)):
        function()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def graph_of(function):
    """Captures the function as a CUDA graph, which avoids the launch costs of its kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def compare_errors(library, batch, dims, precision, temperature, rows=None):
    dtype, tf32 = PRECISIONS[precision]
    student, teachers = inputs(batch, dims, dtype)
    fused = Fused(library, student, teachers, temperature, tf32, rows)
    fused()
    first = fused.total.clone(), fused.gradient.clone()
    fused.gradient.fill_(torch.nan)
    fused.workspace.fill_(255)
    fused()
    same = torch.equal(first[0], fused.total) and torch.equal(first[1], fused.gradient)
    truth = value_and_gradient(loss, student.double(), [teacher.double() for teacher in teachers], temperature, rows)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    # bfloat16 inputs are only rounded to bfloat16: both compute with them in float32.
    composed = value_and_gradient(loss, student.float(), [teacher.float() for teacher in teachers], temperature, rows)

    def distance(gradient):
        return float((gradient - truth[1]).norm() / truth[1].norm())

    floor = 1e-4 if tf32 else 1e-6
    losses = abs(float(fused.total) - float(truth[0])), abs(float(composed[0]) - float(truth[0]))
    # Eight roundings of the terms, which are at most T^2 times a similarity over T.
    loss_floor = 8 * (2**-11 if tf32 else 2**-24) * max(temperature, temperature**2)
    close = losses[0] <= 2 * losses[1] + loss_floor
    return {
        "errors": f"{rows[1] if rows else batch} of {batch}, T {temperature}, {precision}",
        "gradient": distance(fused.gradient),
        "pytorch_gradient": distance(composed[1]),
        "loss": losses[0],
        "pytorch_loss": losses[1],
        "same_bits_twice": same,
        "ok": same and close and distance(fused.gradient) <= 2 * distance(composed[1]) + floor,
    }


def compare_times(library, batch, precision, compiled):
    dtype, tf32 = PRECISIONS[precision]
    student, teachers = inputs(batch, PAPER, dtype)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    repeats = 50 if batch <= 4096 else 5 if batch <= 16384 else 1
    result = {"times": batch, "precision": precision, "ms": {}, "mib": {}, "ok": True}

    def measure(name, function):
        try:
            result["ms"][name] = median_ms(function() if name.endswith("_graph") else function, repeats)
        except Exception as error:  # a failure of one leaves the others
            result["ok"] &= not name.startswith("fused")
            result.setdefault("not_measured", {})[name] = f"{type(error).__name__}: {error}"[:300]

    fused = Fused(library, student, teachers, 1.0, tf32)
    result["mib"]["fused"] = fused.workspace_bytes / 2**20
    measure("fused", fused)
    if batch <= 16384:
        run = lambda function: lambda: value_and_gradient(function, student, teachers, 1.0)  # noqa: E731
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        measure("eager", run(loss))
        result["mib"]["eager"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        if compiled:
            torch.compiler.reset()
            step = run(torch.compile(loss))
            measure("compiled", step)
    if batch <= 4096:
        measure("fused_graph", lambda: graph_of(fused))
    if batch <= 512 and "compiled" in result["ms"]:
        measure("compiled_graph", lambda: graph_of(step))  # last, because a failed capture may corrupt memory
    return result


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=200)
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    library = ctypes.CDLL(options.library)
    library.s2sd_workspace_bytes.restype = ctypes.c_int64
    library.s2sd_run.restype = ctypes.c_char_p

    steps = [
        (compare_errors, (batch, dims, precision, temperature, rows))
        for batch, dims, rows in (
            (112, PAPER, None),
            (257, (100, 33, 300), None),
            (4001, (128, 300), None),
            (4096, (33, 96), (1000, 2500)),
        )
        for temperature in (1.0, 0.05)
        for precision in PRECISIONS
    ]
    sizes = (112, 4096) if options.quick else (112, 65536, 4096, 16384, 512)
    steps += [(compare_times, (size, precision, not options.quick)) for size in sizes for precision in PRECISIONS]
    failed = False
    for step, arguments in steps:
        if time.monotonic() > end:
            break
        try:
            result = step(library, *arguments)
        except Exception as error:  # a failed comparison leaves the others
            result = {step.__name__: str(arguments), "ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
        failed = failed or not result["ok"]
        print(json.dumps(result), flush=True)
        torch.cuda.empty_cache()
    sys.exit(failed)


if __name__ == "__main__":
    main()
