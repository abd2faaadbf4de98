"""``bitconvert doctor``: what is there of all that bitconvert can use, and how to get the rest.

Nothing heavy is imported at the top: a package that does not import is what this command is asked about.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from bitconvert.errors import BitconvertError
from bitconvert.models.llama_cpp_library import INSTALL, find_library
from bitconvert.report.doctor import DoctorReport, Finding, State
from bitconvert.report.reporter import Reporter, Silent

_MODULES = {"protobuf": "google.protobuf", "pyyaml": "yaml", "lm-eval": "lm_eval"}
"""What packages are imported as, where that is not their name."""

_VERSION_SECONDS = 20  # a program that does not tell its version by then hangs


class Part(NamedTuple):
    """A package that bitconvert can do without.

    Attributes:
        package: its name on PyPI.
        use: what it is good for.
        install: what to give to pip.
    """

    package: str
    use: str
    install: str


OPTIONAL = (
    Part("xllamacpp", "run and measure GGUF files in a real llama.cpp", "'bitconvert[llamacpp]'"),
    Part("onnx", "pack --format onnx", "'bitconvert[onnx]'"),
    Part("onnxruntime", "run what pack --format onnx wrote", "onnxruntime"),
    Part("bitsandbytes", "optimizer.name: adamw8bit", "'bitconvert[optim8bit]'"),
    Part("lm-eval", "eval --tasks", "'bitconvert[tasks]'"),
    Part("compressed-tensors", "load --format compressed-tensors in transformers", "compressed-tensors"),
    Part("tensorboard", "warmup --tracker tensorboard", "'bitconvert[tensorboard]'"),
    Part("trackio", "warmup --tracker trackio", "'bitconvert[trackio]'"),
    Part("wandb", "warmup --tracker wandb", "'bitconvert[wandb]'"),
)

_PROGRAMS = {
    "llama-cli": "chat with a GGUF file",
    "llama-server": "serve a GGUF file",
    "llama-perplexity": "eval --runtime llama.cpp without xllamacpp",
    "ollama": "run a packed Modelfile",
}


def doctor(reporter: Reporter | None = None) -> DoctorReport:
    """Look at packages, hardware, runtimes and disk; nothing is raised for what is missing or broken.

    Args:
        reporter: told about the progress.
    """
    reporter = reporter or Silent()
    reporter.stage("import what is needed")
    needed = tuple(_needed())
    reporter.stage("look at the hardware")
    hardware = tuple(_hardware())
    reporter.stage("import what is optional")
    optional = tuple(_optional(part) for part in OPTIONAL)
    reporter.stage("look for runtimes")
    runtimes = tuple(_runtimes())
    return DoctorReport(
        healthy=all(finding.state == "ok" for finding in needed),
        needed=needed,
        hardware=hardware,
        optional=optional,
        runtimes=runtimes,
        disk=tuple(_disk()),
    )


# ---- packages -----------------------------------------------------------------------------------------------------


def _needed() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")
    try:
        requirements = importlib.metadata.requires("bitconvert") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("bitconvert", "broken", "not installed as a package", remedy="pip install .")
        return
    yield Finding("bitconvert", "ok", importlib.metadata.version("bitconvert"))
    for requirement in requirements:
        if "extra ==" not in requirement:
            yield _required(requirement.partition(";")[0].strip())


def _required(requirement: str) -> Finding:
    """A package of the wanted version that imports."""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    found, state = _imported(wanted.name)
    if state == "ok" and not wanted.specifier.contains(found, prereleases=True):
        found, state = f"{found}, but {requirement} is needed", "broken"
    if state == "ok":
        return Finding(wanted.name, "ok", found)
    return Finding(wanted.name, "broken", found, remedy=f"pip install --upgrade '{requirement}'")


def _optional(part: Part) -> Finding:
    found, state = _imported(part.package)
    commands = {"missing": f"pip install {part.install}", "broken": f"pip install --upgrade {part.install}"}
    return Finding(part.package, state, found, part.use, commands.get(state, ""))


def _imported(package: str) -> tuple[str, State]:
    """The version of a package, or why it does not work."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed", "missing"
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the report
            importlib.import_module(_MODULES.get(package, package.replace("-", "_")))
    except Exception as error:  # what a broken package raises is its own choice
        return f"{version} does not import: {_one_line(error)}", "broken"
    return version, "ok"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---- hardware -----------------------------------------------------------------------------------------------------


def _hardware() -> Iterator[Finding]:
    yield _asked("CPU", _cpu)
    yield _asked("GPU", _gpus)
    yield _asked("bf16", _bf16)
    yield _asked("int8", _int8)
    yield _asked("C++ compiler", _compiler)


def _asked(name: str, question: Callable[[], Finding]) -> Finding:
    """An answer, even where torch, which knows most of them, does not work."""
    try:
        return question()
    except Exception as error:  # as above
        return Finding(name, "broken", f"cannot be told: {_one_line(error)}", remedy="mend what is broken above first")


def _cpu() -> Finding:
    import torch

    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    return Finding("CPU", "ok", f"{name}, {os.cpu_count()} logical cores; torch uses {torch.get_num_threads()} threads")


def _gpus() -> Finding:
    import torch

    if not torch.cuda.is_available():
        other = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        if other is not None:
            return Finding("GPU", "ok", f"{other.type}: eval and generate use it; warmup is tested on CPUs and CUDA")
        remedy = "pip install torch for your CUDA or ROCm: https://pytorch.org/get-started/locally"
        return Finding("GPU", "missing", f"none ({built})", "recipes for large models", remedy)
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = [f"{one.name} ({one.total_memory / 1e9:.0f} GB, capability {one.major}.{one.minor})" for one in properties]
    return Finding("GPU", "ok", ", ".join(names))


def _bf16() -> Finding:
    from bitconvert.ternary.machine import has_fast_bf16

    use = "training.precision: auto"
    if has_fast_bf16():
        return Finding("bf16", "ok", "has instructions: training computes in bf16", use)
    return Finding("bf16", "missing", "no instructions: training computes in float32", use)


def _int8() -> Finding:
    import torch

    from bitconvert.ternary.machine import cpu_has_fast_int8, cuda_has_int8

    use = "products of ternary layers"
    gpu = torch.cuda.is_available()
    if cuda_has_int8(0) if gpu else cpu_has_fast_int8():
        return Finding("int8", "ok", f"{'cuBLAS' if gpu else 'oneDNN'} multiplies int8: ternary layers use it", use)
    return Finding("int8", "missing", "no fast products: ternary layers use float32, with the same results", use)


def _compiler() -> Finding:
    from bitconvert.ternary.machine import cpp_compiler

    compiler, use = cpp_compiler(), "training.compile, and stock transformers' BitLinear on CPUs"
    if compiler is None:
        return Finding("C++ compiler", "missing", "none", use, "apt install g++, or xcode-select --install")
    return Finding("C++ compiler", "ok", compiler, use)


# ---- runtimes -----------------------------------------------------------------------------------------------------


def _runtimes() -> Iterator[Finding]:
    yield _llama_cpp()
    for program, use in _PROGRAMS.items():
        yield _program(program, use)


def _llama_cpp() -> Finding:
    use = "eval and generate in a real llama.cpp"
    try:
        library, client, version = find_library()
    except BitconvertError as error:
        state: State = "broken" if "LLAMA_CPP_LIB" in os.environ else "missing"
        return Finding("llama.cpp library", state, error.message, use, INSTALL)
    return Finding("llama.cpp library", "ok", f"{client} {version} ({library})".replace("  ", " "), use)


def _program(program: str, use: str) -> Finding:
    """A program on PATH, by what it says itself; none of these is to be had from pip."""
    path = shutil.which(program)
    if path is None:
        return Finding(program, "missing", "not on PATH", use)
    try:
        done = subprocess.run(
            [path, "--version"],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=_VERSION_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(program, "broken", f"{path} --version: {_one_line(error)}", use)
    said = (done.stdout + b"\n" + done.stderr).decode(errors="replace")
    version = re.search(r"version\S*\s+(?:is\s+)?(\S.*)", said)
    return Finding(program, "ok", f"{version[1].strip() if version else 'of unknown version'} ({path})", use)


# ---- disk ---------------------------------------------------------------------------------------------------------


def _disk() -> Iterator[Finding]:
    yield _free("here", Path.cwd(), "outputs go here unless told otherwise")
    yield _asked("token cache", lambda: _free("token cache", _token_cache(), "token blocks; BITCONVERT_CACHE moves it"))
    yield _asked(
        "hub cache", lambda: _free("hub cache", _hub_cache(), "models of the Hugging Face hub; HF_HOME moves it")
    )


def _token_cache() -> Path:
    from bitconvert.training.data import cache_directory

    return cache_directory()


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _free(name: str, directory: Path, use: str) -> Finding:
    """The space that is free where a directory is, or will be."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        return Finding(
            name, "broken", f"{there}: not writable", use, "give it back to you, or choose another directory"
        )
    return Finding(name, "ok", f"{free / 1e9:.1f} GB free in {directory}", use)


def require_healthy(report: DoctorReport) -> None:
    """Refuse a machine on which something does not work that bitconvert needs.

    Raises:
        BitconvertError: naming it, with the first remedy.
    """
    broken = [finding for finding in report.needed if finding.state != "ok"]
    if broken:
        names = ", ".join(finding.name for finding in broken)
        raise BitconvertError(f"bitconvert needs what does not work here: {names}", broken[0].remedy)
