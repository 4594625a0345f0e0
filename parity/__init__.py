"""One harness for GPU kernels written twice: in Triton for PyTorch, in Pallas (Mosaic GPU) for JAX.

Importing this package imports neither framework: problems are declared in `parity.problems`, and
the frameworks are loaded by name, in `parity.frameworks`, when a kernel has to run.
"""

__version__: str


def __getattr__(name: str) -> str:
    # importlib.metadata takes a fifth of the time of `parity list`: only who asks pays for it
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("kernel-parity")
    except PackageNotFoundError:  # a bare checkout on PYTHONPATH
        return "0+checkout"
