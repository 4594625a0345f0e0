"""One harness for GPU kernels written twice: in Triton for PyTorch, in Pallas (Mosaic GPU) for JAX.

Importing this package imports neither framework: problems are declared in `parity.problems`, and
the frameworks are loaded by name, in `parity.frameworks`, when a kernel has to run.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("kernel-parity")
except PackageNotFoundError:  # a bare checkout on PYTHONPATH
    __version__ = "0+checkout"
