"""A small Mixture-of-Experts language model, trained through the compact path of topn_gating."""
