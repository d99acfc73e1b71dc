"""Times fastcl against the dense loss and against the libraries it replaces: ``python -m benchmarks --help``."""
