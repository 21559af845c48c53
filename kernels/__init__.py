"""Every device computation that is not a library GEMM, one directory per op.

Each op owns README.md (maths, shapes, layout, sources), reference.py (torch, any device: the meaning of the op) and
kernel.py (Triton: the same meaning, fast). An op knows tensors only: no model, no request, no scheduler, no other op.
`kvlite.ops` is the only importer; nothing here is imported before a backend has been chosen, so that a CPU machine
never imports Triton. Importable as `kvlite.kernels` (a symlink in the source tree, plain files in the wheel).
"""
