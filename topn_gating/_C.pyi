def build_info() -> dict[str, str | list[str] | None]:
    """How the extension was built and what it chose to run: compiler, torch version, CUDA, CPU level."""
