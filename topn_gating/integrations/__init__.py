"""Other libraries' names for what this package does. None is imported by ``import topn_gating``."""
