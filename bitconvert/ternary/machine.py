"""What this machine has for the arithmetic: instructions for bf16 and int8, and a compiler."""

from __future__ import annotations

from functools import cache

import torch


def has_fast_bf16() -> bool:
    """Whether a product in bf16 is faster than one in float32: the GPU, or else the CPU, has instructions for it."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    instructions = torch.cpu.get_capabilities()
    return bool(instructions.get("avx512_bf16") or instructions.get("amx_bf16"))


def cpu_has_fast_int8() -> bool:
    """Whether oneDNN has this CPU's int8 dot products; without them an integer product is slower than a float one."""
    return bool(torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported())  # type: ignore[no-untyped-call]


@cache
def cuda_has_int8(index: int) -> bool:
    """Whether cuBLAS multiplies int8 on the GPU of this index."""
    return torch.cuda.get_device_capability(index) >= (7, 5)


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would call for code on the CPU, as a command or a path; None without one."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return str(get_cpp_compiler())
    except InvalidCxxCompiler:
        return None
