"""A small Mixture-of-Experts language model, trained with the compact path of topn_gating."""
