"""What differs between CPUs and GPUs: kinds of arithmetic, deterministic kernels, memory, names. Imports torch only."""

import contextlib
import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# cuBLAS repeats its bits only with a workspace of a fixed size; it reads this when its first product is computed.
CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
PROC = Path("/proc/self")
# Parameters of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def set_arithmetic(precision: str, deterministic: bool, device: torch.device) -> None:
    """Make this process's kernels on a GPU compute in `precision`; does nothing on a CPU, where there is no choice.

    By default torch computes fp32 convolutions on GPUs in TF32, of 10 bits, and fp32 matrix products in fp32. Here
    `fp32` is fp32 in both, and `tf32` is TF32 in both. Matrix products of bf16 add up in fp32 throughout; by default
    cuBLAS may add the parts of a long sum in bf16. `deterministic` takes kernels that repeat their bits on the same
    kind of GPU, and raises where there are none.
    """
    if device.type != "cuda":
        return
    kind: Any = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = kind
    torch.backends.cudnn.conv.fp32_precision = kind  # type: ignore[attr-defined]  # torch sets it when imported
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if deterministic:
        os.environ.setdefault(*CUBLAS_WORKSPACE)
    # Set in both cases: a process of Ray may have computed for another run before.
    torch.use_deterministic_algorithms(deterministic)
    # Every batch has the same shape, so cuDNN's search for the fastest kernel pays; it may choose another in each run.
    torch.backends.cudnn.benchmark = not deterministic


def cpu_has_bf16() -> bool:
    """Return whether this CPU computes products of bf16 numbers: avx512_bf16 or amx_bf16, and oneDNN may use them."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper().startswith(("SSE", "AVX2")):
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def kind_of(device: torch.device) -> str:
    """Return `cpu`, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device`, without waiting for the work that a GPU still has to do.

    From ordinary memory the copy would first wait for all of that; from page-locked memory it takes its turn.
    """
    if device.type != "cuda" or tensor.device.type != "cpu" or not torch.cuda.is_available():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextlib.contextmanager
def on_side_stream(device: torch.device) -> Iterator[None]:
    """Run the block's kernels on another stream of a GPU, after those launched before it and before those after it.

    What a CUDA graph captures later must have been made and warmed up on such a stream. Does nothing on a CPU.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def share_of_memory(share: float, device: torch.device) -> None:
    """Let this process take at most `share`, 0..1, of a GPU's memory, so that those beside it keep theirs."""
    if device.type == "cuda" and 0 < share < 1:
        # By its number, None for the present GPU: torch refuses a device without a number here, and only here.
        torch.cuda.set_per_process_memory_fraction(share, device.index)


# --- memory of the host -----------------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks for reuse.

    By default glibc returns every large activation to the kernel, and the next step faults its pages in again: 6 % of a
    step's time on two Zen 3 cores. Does nothing under another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peaks of this process so far, and give back memory that an earlier run in it has left free.

    Ray's processes may have computed something else before. On other systems than Linux, the host's peak stays that of
    the process's whole life.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc: `keep_freed_memory` has kept what the earlier run freed
        trim(0)
    with contextlib.suppress(OSError):  # there is no such file, or a container forbids to write to it: see above
        (PROC / "clear_refs").write_text("5")  # man 5 proc: resets the peak resident set size
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.empty_cache()  # torch keeps freed memory of a GPU as well
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes() -> int:
    """Return the largest resident set size, in bytes, that this process has had since `reset_peak_memory`."""
    try:
        lines = (PROC / "status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_memory_bytes(device: torch.device) -> int | None:
    """Return the most memory, in bytes, that torch has held on the GPU since `reset_peak_memory`; None on a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
