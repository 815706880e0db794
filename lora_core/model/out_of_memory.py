"""How a device or the machine says that it has no memory left."""

from __future__ import annotations

import torch

# How torch and what is under it say that no memory was left, on a device or the machine; in any case of letters.
_OUT_OF_MEMORY = (
    "out of memory",  # "CUDA error: ...", "HIP error: ..."; NCCL's "Cuda failure 2 '...'"; MPS
    "out_of_memory",  # CUDA_ERROR_...
    "OutOfMemory",  # hipError..., kIOGPUCommandBufferCallbackError... of Metal
    "OUT_OF_DEVICE_MEMORY",  # UR_RESULT_ERROR_... and ZE_RESULT_ERROR_... of XPU
    "OUT_OF_HOST_MEMORY",
    "UR_RESULT_ERROR_OUT_OF_RESOURCES",  # also of XPU, of memory that one kernel wants
    "cudaErrorMemoryAllocation",
    "STATUS_ALLOC_FAILED",  # CUBLAS_, CUDNN_, CUSPARSE_, HIPBLAS_
    "ALLOCATION_FAILED",  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_... since cuDNN 9
    "miopenStatusAllocFailed",
    "rocblas_status_memory_error",
    "Failed to CUDA",  # NCCL: "... calloc 4194304 bytes", "... host alloc"
    "allocate memory",  # torch's CPU allocator on Linux, the system's "Cannot ...", HCCL
    "Allocation failed",  # "PT_DEVMEM ..." of HPU
    "not enough memory",  # torch's CPU allocator on Windows
    "insufficient memory",  # Metal
    "Invalid buffer size",  # MPS, of a tensor that is larger than the device takes
    "bad_alloc",  # C++
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left. (A Linux that overcommits may kill the process instead.)"""
    said = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words.lower() in said for words in _OUT_OF_MEMORY
    )
