"""Checks and times the CUDA kernels on this machine's GPU, in at most 8 minutes on an H100.

    python custom_ops/similarity_kl/gpu_check.py OUT             # 2 minutes with --quick
    python custom_ops/similarity_kl/gpu_check.py OUT --without_gpu

Needs nvcc, g++ and a GPU, PyTorch for the times and JAX for the XLA handler, but not TensorFlow. Every step has a time
limit, and so has the whole check. As soon as a step ends, its result is in OUT/gpu_check.json and, as a table, in
OUT/gpu_check.md; its output is in OUT/gpu_check.log. Exits with 1 if a step failed or could not run. `--steps` chooses
the steps to run, as in `--steps=memcheck,PyTorch`.

--without_gpu does what a machine without a GPU can: it builds everything with nvcc, runs the checks in the emulator and
the XLA handler on the CPU, and lists the commands of the other steps.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time

SOURCES = pathlib.Path(__file__).resolve().parent
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG")


def load_libraries():
    """The package's module that builds the kernels, loaded alone: it imports nothing from the package."""
    package = SOURCES.parents[1] / "s2sd_tf"
    if not package.exists():
        package = pathlib.Path(importlib.util.find_spec("s2sd_tf").origin).parent
    spec = importlib.util.spec_from_file_location("libraries", package / "distillation" / "libraries.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


libraries = load_libraries()


class Check:
    """Runs the steps and writes their results to the files."""

    def __init__(self, out, folder, machine):
        self.out = out
        # Folders of this machine mean nothing to other readers.
        self.names = {f"{folder}/": "", f"{SOURCES}/": "", sys.executable: "python"}
        self.results = {"machine": machine, "steps": []}
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu_check.log").write_text("")
        self.write()

    def run(self, name, command, seconds, lines=None):
        """Runs a step, whose JSON lines are in the file `lines` or else in its output. Returns whether it passed."""
        command = [str(part) for part in command]
        print(f"== {name}: {' '.join(command)}", flush=True)
        start = time.monotonic()
        # A file, so that the output of a step that is killed at its limit is kept.
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            # A separate session, because children of some steps would otherwise stay on the GPU during the next step.
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                status = process.wait(timeout=max(seconds, 1))
            except subprocess.TimeoutExpired:
                status = "time limit"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            text = output.read()
        written = text if lines is None else lines.read_text(errors="replace") if lines.exists() else ""
        self.add(name, command, status, time.monotonic() - start, parse(written), text)
        return status == 0

    def add(self, name, command, status, seconds, lines, text=""):
        command = " ".join(map(str, command))
        for long, short in self.names.items():
            command, text = command.replace(long, short), text.replace(long, short)
        step = {"step": name, "command": command, "status": status, "seconds": round(seconds, 1)}
        step["summary"] = next((line[:200] for line in reversed(text.splitlines()) if line[:1] not in ("", "{")), "")
        step["lines"] = lines
        self.results["steps"].append(step)
        with open(self.out / "gpu_check.log", "a") as log:
            log.write(f"== {name}: {step['command']}\n{text}\n")
        print(f"   {'passed' if status == 0 else status}, {seconds:.0f} s. {step['summary']}", flush=True)
        self.write()

    def not_run(self, name, command, why):
        self.add(name, command, why, 0, [])

    def write(self):
        for name, text in (
            ("gpu_check.json", json.dumps(self.results, indent=1)),
            ("gpu_check.md", table(self.results)),
        ):
            temporary = self.out / f".{name}"
            temporary.write_text(text)
            temporary.replace(self.out / name)

    def failed(self):
        return [step["step"] for step in self.results["steps"] if step["status"] not in (0, "no GPU")]


def parse(text):
    found = []
    for line in text.splitlines():
        if '{"' in line:  # a warning without a line break may come before it
            try:
                found.append(json.loads(line[line.index('{"') :]))
            except ValueError:  # the last line of a killed step
                continue
    return found


def describe(gpu):
    def first_line(*command):
        try:
            return run_quietly(command).stdout.strip().splitlines()[-1]
        except (OSError, IndexError):
            return "none"

    return {
        "date": datetime.date.today().isoformat(),
        "gpu": gpu["name"] if gpu else "none",
        "driver": gpu["driver_version"] if gpu else "none",
        "compute capability": gpu["compute_cap"] if gpu else "none",
        "nvcc": first_line(libraries.cuda_compiler() or "nvcc", "--version"),
        "g++": first_line(libraries.compiler(), "-dumpfullversion"),
        "python": platform.python_version(),
        "torch": version("torch"),
        "jax": version("jax"),
    }


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_gpu():
    """The name, driver and compute capability of the first visible GPU, or None."""
    fields = ("name", "driver_version", "compute_cap")
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    try:
        done = run_quietly(["nvidia-smi", "-i", first, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"])
    except OSError:
        return None
    rows = [line.split(", ") for line in done.stdout.splitlines()]
    return dict(zip(fields, rows[0])) if done.returncode == 0 and rows and len(rows[0]) == len(fields) else None


def build(check, folder, architecture, emulate):
    """Builds the check program and the library for PyTorch and JAX, compiling all files in parallel."""
    nvcc, cxx = libraries.cuda_compiler(), libraries.compiler()
    toolkit = libraries.cuda_toolkit(nvcc)
    targets = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    on_gpu = [nvcc, *FLAGS, targets, "-Xcompiler", "-fPIC", "-ccbin", cxx, "-c"]
    on_cpu = [cxx, *FLAGS, "-fPIC", "-ffp-contract=fast", "-c"]
    objects = {"cuda_kernel.cu": on_gpu, "gpu_check.cu": on_gpu, "c_interface.cc": on_cpu}
    objects |= {name: [*on_cpu, *flags] for name, flags in libraries.cpu_kernel_sources(platform.machine()).items()}
    headers = run_quietly([sys.executable, "-c", "import jax; print(jax.ffi.include_dir())"])
    if headers.returncode == 0:  # otherwise only the JAX step fails
        includes = [f"-I{headers.stdout.split()[-1]}", f"-I{toolkit / 'include'}"]
        objects["jax_handler.cc"] = [*on_cpu, "-w", "-DS2SD_TF_CUDA=1", *includes]
    commands = [[*command, SOURCES / name, "-o", folder / f"{name}.o"] for name, command in objects.items()]
    if emulate:
        source = SOURCES / "gpu_check.cu"
        commands.append([cxx, "-x", "c++", "-std=c++17", "-O2", "-w", source, "-o", folder / "gpu_check_emulated"])
    failed = run_together(check, "build", commands)
    # If only the handler for JAX cannot be compiled, all steps but JAX's run.
    if not failed <= {SOURCES / "jax_handler.cc"}:
        sys.exit(1)
    in_library = [folder / f"{name}.o" for name in objects if name != "gpu_check.cu" and SOURCES / name not in failed]
    links = [
        [nvcc, targets, folder / "gpu_check.cu.o", folder / "cuda_kernel.cu.o", "-o", folder / "gpu_check"],
        [nvcc, targets, "-shared", *in_library, "-o", folder / "libsimilarity_kl.so"],
    ]
    if run_together(check, "link", links):
        sys.exit(1)


def run_together(check, step, commands):
    """Runs commands that end in `<source> -o <target>` in parallel; returns the sources of those that failed."""
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(run_quietly, commands))
    text = "".join(f"$ {' '.join(map(str, c))}\n{d.stdout}{d.stderr}" for c, d in zip(commands, done))
    text += f"{len(commands)} files\n"
    failed = {command[-3] for command, one in zip(commands, done) if one.returncode != 0}
    check.add(step, commands[0], int(bool(failed)), time.monotonic() - start, [], text)
    if failed:
        print(text)
    return failed


def run_quietly(command):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--quick", action="store_true", help="take 2 minutes: no large problems, no compiled PyTorch")
    parser.add_argument("--without_gpu", action="store_true", help="run only what needs no GPU")
    parser.add_argument("--steps", type=lambda text: text.split(","), help="comma-separated steps to run; default: all")
    options = parser.parse_args()
    if libraries.cuda_compiler() is None:
        sys.exit("gpu_check: there is no nvcc; install the CUDA toolkit, or set CUDA_HOME")
    gpu = None if options.without_gpu else find_gpu()
    if not gpu and not options.without_gpu:
        sys.exit("gpu_check: nvidia-smi finds no GPU; --without_gpu does what needs none")
    with tempfile.TemporaryDirectory() as folder:
        check = Check(options.out, folder, describe(gpu))
        run_steps(check, pathlib.Path(folder), gpu, options)
    failed = check.failed()
    print(f"failed: {', '.join(failed)}" if failed else "all passed", "->", options.out / "gpu_check.md")
    sys.exit(bool(failed))


def sanitizer_path():
    """The path of compute-sanitizer, which the toolkit has in a folder that is not always on the PATH."""
    toolkit = libraries.cuda_toolkit(libraries.cuda_compiler())
    places = [toolkit / "bin" / "compute-sanitizer", toolkit / "compute-sanitizer" / "compute-sanitizer"]
    found = shutil.which("compute-sanitizer") or next((str(path) for path in places if path.exists()), None)
    return found or "compute-sanitizer"


def run_steps(check, folder, gpu, options):
    end = time.monotonic() + (110 if options.quick else 470)
    build(check, folder, gpu["compute_cap"].replace(".", "") if gpu else 90, emulate=not gpu)
    program, library, lines = folder / "gpu_check", folder / "libsimilarity_kl.so", folder / "lines"
    quickly = ["--quick"] if options.quick else []
    # (name, command, time limit, file of its JSON lines, requirements)
    steps = [("correctness", [program, f"--lines={lines}", *quickly], 80, lines, "gpu")]
    sanitizer = sanitizer_path()
    for tool in SANITIZERS[: 1 if options.quick else None]:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", program, "--sanitize"]
        steps.append((tool, command, 60, None, "gpu"))
    jax_script = [sys.executable, SOURCES / "jax_check.py", library]
    steps.append(("XLA handler", [*jax_script, "CUDA"], 90, None, "gpu jax"))
    # Last, because it uses all the remaining time. Its most informative comparisons come first.
    torch_script = [sys.executable, SOURCES / "gpu_check_torch.py", library, *quickly]
    steps.append(("PyTorch", torch_script, 300, None, "gpu torch"))
    if not gpu:
        emulated = [folder / "gpu_check_emulated", "--sanitize", f"--lines={lines}"]
        steps.insert(0, ("correctness in the emulator", emulated, 300, lines, ""))
        steps.append(("XLA handler on the CPU", [*jax_script, "cpu"], 120, None, "jax"))
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the same first GPU as nvidia-smi
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    for name, command, limit, file, needs in steps:
        if options.steps and name not in options.steps:
            continue
        limit = min(limit, end - time.monotonic()) if gpu else limit
        if name == "PyTorch":
            # Minus the time for its imports and for one comparison that it starts at the last moment.
            command = [*command, f"--seconds={max(limit - 45, 1):.0f}"]
        missing = [package for package in ("torch", "jax") if package in needs and not version(package)]
        if not shutil.which(command[0]):
            missing.append(command[0])
        if "gpu" in needs and not gpu:
            check.not_run(name, command, "no GPU")
        elif missing:
            check.not_run(name, command, "not installed")
        else:
            check.run(name, command, limit, file)


def table(results):
    lines = ["# The CUDA kernels on a GPU", ""]
    lines += [f"- {key}: {value}" for key, value in results["machine"].items()]
    lines += ["", "| step | result | seconds | last line of output |", "|---|---|---|---|"]
    for step in results["steps"]:
        result = "passed" if step["status"] == 0 else f"**{step['status']}**"
        lines.append(f"| {step['step']} | {result} | {step['seconds']:.0f} | {step['summary'].replace('|', '/')} |")
    found = [line for step in results["steps"] for line in step["lines"]]
    failures = [line for line in found if line.get("ok") is False]
    if failures:
        lines += ["", "Failed:", "", *(f"- `{json.dumps(line)}`" for line in failures)]
    lines += times_table([line for line in found if "ms" in line])
    lines += ["", "Commands:", "", *(f"- {step['step']}: `{step['command']}`" for step in results["steps"])]
    return "\n".join(lines) + "\n"


def times_table(rows):
    if not rows:
        return []
    names = ["fused", "fused_graph", "eager", "compiled", "compiled_graph"]
    lines = ["", "Loss and gradient, student 128, teachers 512, 1024, 1536, 2048, 2048; milliseconds, median.", ""]
    lines += [
        f"| batch | precision | {' | '.join(name.replace('_', ', ') for name in names)} | fused MiB | eager MiB |"
    ]
    lines += ["|---" * (len(names) + 4) + "|"]
    for row in rows:
        cells = [f"{row['ms'][name]:.4g}" if name in row["ms"] else "" for name in names]
        cells += [f"{row['mib'][name]:.0f}" if name in row["mib"] else "" for name in ("fused", "eager")]
        lines.append(f"| {row['times']} | {row['precision']} | {' | '.join(cells)} |")
    lines += ["", "| goal | measured | |", "|---|---|---|"]
    for goal, measured, met in goals(rows):
        lines.append(f"| {goal} | {measured} | {'met' if met else '**not met**'} |")
    return lines


def goals(rows):
    """Yields `(goal, measured, met)` for every goal that was measured."""
    for row in rows:
        where, ms = f"batch {row['times']}, {row['precision']}", row["ms"]
        if row["times"] == 112 and {"eager", "fused"} <= ms.keys():
            ratio = ms["eager"] / ms["fused"]
            yield f"{where}: at least 5 times as fast as PyTorch eager", f"{ratio:.2f}", ratio >= 5
        if row["times"] == 112 and {"compiled_graph", "fused_graph"} <= ms.keys():
            ratio = ms["compiled_graph"] / ms["fused_graph"]
            yield f"{where}: not slower than compiled PyTorch, both as CUDA graphs", f"{ratio:.2f}", ratio >= 1
        if row["times"] in (4096, 16384) and {"compiled", "fused"} <= ms.keys():
            ratio = ms["compiled"] / ms["fused"]
            yield f"{where}: at least as fast as compiled PyTorch", f"{ratio:.2f}", ratio >= 1
        if row["times"] == 65536:
            mib = row["mib"]["fused"]
            yield f"{where}: less than 2,048 MiB besides the inputs", f"{mib:.0f} MiB", mib < 2048


if __name__ == "__main__":
    main()
