"""The Triton kernels, one to a file; each file's first lines say what its kernel reads and what it alone writes.

Importing this package imports Triton, so nothing outside :mod:`fastcl.backends.triton` may.
"""
