"""Whole Mixture-of-Experts layers side by side."""
