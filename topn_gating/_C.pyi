def build_info() -> dict[str, str | list[str] | None]:
    """How the extension was built and what it chose to run: compiler, torch version and CPU level; ``cuda``, the version of
    the toolkit that compiled the CUDA kernels, or None; ``cuda_architectures``, ``sm_*`` machine code and ``compute_*`` PTX."""
