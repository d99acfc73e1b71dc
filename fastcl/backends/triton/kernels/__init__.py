"""The Triton kernels; each file's first lines say what its kernels read and what they alone write.

Importing this package imports Triton, so nothing outside :mod:`fastcl.backends.triton` may.
"""
