"""Scripts that measure tnconv against torch and einconv. See ``benchmarks/README.md``."""
