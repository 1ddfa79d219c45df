"""What cannot be imported here has no doctests: kernels of our own need Triton."""

from importlib.util import find_spec

KERNELS = ("codegen/kernels/triton_grams.py", "tnconv/codegen/kernels/triton_grams.py")
collect_ignore = [] if find_spec("triton") else [*KERNELS]
