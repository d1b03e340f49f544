"""The cost of the CUDA kernels' machine code: instructions, registers, shared memory, spills. Needs no GPU.

    pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
    python benchmarks/cuda_instructions.py --output=benchmarks/results/cuda_instructions.json

Compiles cuda_kernel.cu for one architecture (sm_90) and reads its SASS. The two kernels that matter work in stages, on
128 bytes of every row of a tile each. For a stage, all instructions are counted, except those for rows that allow no
16-byte loads, and how many of them are matrix products (HMMA). Each of a multiprocessor's four schedulers starts one
instruction per clock: the fewer instructions are not products, the busier the tensor cores are. `--before` names a
folder with other sources, such as an earlier commit's, to compare with.
"""

import itertools
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile

from absl import app, flags

from s2sd_tf.distillation import libraries
from s2sd_tf.files import write_json

FLAGS = flags.FLAGS
flags.DEFINE_integer("architecture", 90, "Compute capability without the dot.")
flags.DEFINE_string("before", None, "Folder with other sources to compare with.")
flags.DEFINE_string("output", None, "JSON file to write; the table gets the same name.")

MODES = {"0, false": "TF32", "0, true": "float32, compensated", "1, true": "float16", "2, true": "bfloat16"}
KERNELS = {"SumsKernel": "first pass", "GradientKernel": "second pass"}


def main(_):
    results = {
        "architecture": f"sm_{FLAGS.architecture}",
        "nvcc": nvcc_version(),
        "after": measure(libraries.sources()),
    }
    if FLAGS.before:
        results["before"] = measure(pathlib.Path(FLAGS.before))
    text = table(results)
    print(text)
    if FLAGS.output:
        write_json(FLAGS.output, results)
        pathlib.Path(FLAGS.output).with_suffix(".md").write_text(text)


def nvcc_version():
    done = subprocess.run([libraries.cuda_compiler(), "--version"], capture_output=True, text=True, check=True)
    return re.search(r"release (\S+),", done.stdout)[1]


def cuobjdump():
    """Returns the path of cuobjdump, from the toolkit or from the pip package."""
    found = shutil.which("cuobjdump")
    packaged = pathlib.Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin/cuobjdump")
    path = found or next((str(path) for path in packaged), None)
    if path is None:
        sys.exit("cuobjdump: not found; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return path


def measure(sources):
    """Compiles the sources. Returns a dict from every kernel's name to its counts."""
    number = FLAGS.architecture
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder, "kernels.cubin")
        command = [libraries.cuda_compiler(), "-std=c++17", "-O3", "-DNDEBUG", "--resource-usage", "-cubin"]
        command += [
            f"-gencode=arch=compute_{number},code=sm_{number}",
            str(sources / "cuda_kernel.cu"),
            "-o",
            str(cubin),
        ]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        sass = subprocess.run(
            [cuobjdump(), "--dump-sass", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    resources = {}
    for name, text in re.findall(
        r"Compiling entry function '(\S+)'.*?\n(.*?)(?=ptxas info\s+: Compiling|\Z)", usage, re.S
    ):
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", text))
        resources[name] = {"registers": int(re.search(r"Used (\d+) registers", text)[1]), "spilled_bytes": spills}
    found = {}
    for name, text in re.findall(r"Function : (\S+)\n(.*?)(?=\n\s+Function :|\Z)", sass, re.S):
        name, mangled = readable(name), name
        found[name] = {**resources[mangled], **count(instructions_of(text), products_of_stage(name))}
    return dict(sorted(found.items()))


def readable(name):
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"s2sd::cuda::|\(s2sd::Scalar\)|void |\([\w:]+\)$", "", text)


def instructions_of(sass):
    """Returns the instructions of a kernel's SASS as `[(address, text)]`."""
    return [(int(a, 16), t) for a, t in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)]


def target(text):
    match = re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", text)
    return int(match[1], 16) if match else None


def products_of_stage(name):
    """A warp's products: 16 x 8 tiles, 4 steps of 32 bytes, 3 products each if factors are split. Else None."""
    match = re.match(r"(?:SumsKernel|GradientKernel)<(.*), (\d+)>", name)
    return match and (int(match[2]) // 32) ** 2 * 4 * (3 if match[1] == "0, true" else 1)


def count(code, products):
    """Counts the instructions of the whole kernel and, if `products` are given, of a stage with that many products."""
    result = {"instructions": len(code)}
    if not products:
        return result

    def within(loop, what):
        return [text for address, text in code if loop[0] <= address <= loop[1] and what in text]

    loops = [(target(text), address) for address, text in code if target(text) is not None and target(text) <= address]
    stages = [loop for loop in loops if within(loop, "LDGSTS") and within(loop, "HMMA")]
    stage = min(stages, key=lambda loop: loop[1] - loop[0])
    slices = [loop for loop in loops if stage[0] < loop[0] and loop[1] < stage[1] and within(loop, "HMMA")]
    once = [a for a, _ in fast_path(code, stage) if not any(low <= a <= high for low, high in slices)]
    result["stage_products"], result["stage_instructions"] = products, len(once)
    if slices:
        a_slice = len(within(slices[0], ""))
        result["slice_instructions"] = a_slice
        result["stage_instructions"] += a_slice * products // len(within(slices[0], "HMMA"))
    return result


def fast_path(code, loop):
    """The loop's instructions on all paths through it without loads of less than 16 bytes."""
    body = [(address, text) for address, text in code if loop[0] <= address <= loop[1]]
    starts = {body[0][0]}
    for (_, text), (following, _) in itertools.pairwise(body):
        if re.search(r"\b(BRA|EXIT|BSYNC|BRX)\b", text):
            starts.add(following)
    starts |= {target(text) for _, text in body if target(text) is not None and loop[0] <= target(text) <= loop[1]}
    blocks = {}
    for address, text in body:
        if address in starts:
            current = blocks.setdefault(address, [])
        current.append((address, text))
    order = sorted(blocks)
    after = dict(zip(order, [*order[1:], None]))
    ways = {start: [] for start in order}
    for start in order:
        _, last = blocks[start][-1]
        jump = target(last)
        if jump in blocks and jump > start:
            ways[start].append(jump)
        if after[start] is not None and not (re.match(r"\s*BRA\b", last) and jump is not None):
            ways[start].append(after[start])
    slow = {
        start for start in order if any(re.search(r"\bLDG\b|LDGSTS\.E (?!.*128)", text) for _, text in blocks[start])
    }
    forward, backward = {order[0]}, {order[-1]}
    for start in order:
        if start in forward:
            forward |= {way for way in ways[start] if way not in slow}
    for start in reversed(order):
        if start not in slow and any(way in backward for way in ways[start]):
            backward.add(start)
    return [line for start in order if start in forward & backward for line in blocks[start]]


def table(results):
    lines = [
        "# Machine code of the CUDA kernels",
        "",
        f"{results['architecture']}, nvcc {results['nvcc']}; a stage is 128 bytes of every row of a tile.",
        "A block has 98,304 bytes of shared memory with tiles of 128 x 128, and 49,152 with 64 x 64.",
        "",
        "| kernel, tile | | instructions per stage | of these products | per product | registers | spilled bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    versions = [name for name in ("before", "after") if name in results]
    for kernel, label in KERNELS.items():
        for tile in (128, 64):
            for mode, precision in MODES.items():
                for version in versions:
                    found = results[version].get(f"{kernel}<{mode}, {tile}>")
                    if found is None:
                        continue
                    each = found["stage_instructions"] / found["stage_products"]
                    lines.append(
                        f"| {label}, {precision}, {tile} x {tile} | {version} | {found['stage_instructions']} | "
                        f"{found['stage_products']} | {each:.1f} | {found['registers']} | {found['spilled_bytes']} |"
                    )
    others = [name for name in results["after"] if not name.startswith(tuple(KERNELS))]
    lines += ["", "| other kernels | registers | spilled bytes |", "|---|---|---|"]
    lines += [
        f"| {name} | {results['after'][name]['registers']} | {results['after'][name]['spilled_bytes']} |"
        for name in others
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app.run(main)
