"""``python -m topn_gating demo``: a small Mixture-of-Experts language model, trained through the compact path."""
