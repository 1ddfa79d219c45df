"""What the library does on an accelerator, in one command: ``python -m benchmarks.device``.

It needs a machine with torch, the library's dependencies and hypothesis, and a few minutes.
"""
