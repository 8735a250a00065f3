"""Compare: quality and latency of profiles and of other methods, paired clip by clip."""
