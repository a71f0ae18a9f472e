"""topn_gating side by side with other routers."""
