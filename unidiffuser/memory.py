"""Memory that is not enough: a torch error, or Python's own, told from all others without importing torch."""

from __future__ import annotations


def out_of_memory(error: BaseException) -> str | None:
    """Which memory an error says is full, or None for any other error. Imports no torch: an error of it names its kind.

    Example:
        >>> out_of_memory(MemoryError()), out_of_memory(ValueError())
        ('memory', None)
    """
    if type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch"):
        return "the GPU's memory"
    # CUDA's libraries say it in words of their own, and so does torch of a machine's memory.
    text = str(error)
    if isinstance(error, RuntimeError) and ("CUDA error: out of memory" in text or "CUDNN_STATUS_ALLOC_FAILED" in text):
        return "the GPU's memory"
    words = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in text for word in words)):
        return "memory"
    return None
