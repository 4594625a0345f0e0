"""The kernels in Triton, for PyTorch tensors: one file a stem, each readable alone."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = [
    "HybridMeta",
    "HybridPlan",
    "decay_attention",
    "decay_attention_step",
    "fp8_quantize_blocks",
    "fp8_quantize_cols",
    "fp8_quantize_rows",
    "grouped_gemm",
    "grouped_gemm_dw",
    "hadamard_quantize",
    "hadamard_rotate",
    "hybrid_attention",
    "hybrid_attention_atomic",
    "hybrid_plan",
    "int4_from_awq",
    "int4_from_gptq",
    "int4_matmul",
    "int4_matmul_atomic",
    "int4_prepack",
    "int4_quantize",
    "int4_to_awq",
    "int4_to_gptq",
    "int8_quantize",
    "linear_scan",
    "linear_scan_step",
    "mamba2_ssd",
    "matmul",
    "retention",
    "rglru",
    "rglru_step",
    "rms_norm",
    "softmax",
]
# where a public function lies that has not its file's name
_FILE = {
    "HybridMeta": "hybrid_attention",
    "HybridPlan": "hybrid_attention",
    "fp8_quantize_blocks": "fp8_quantize",
    "fp8_quantize_cols": "fp8_quantize",
    "fp8_quantize_rows": "fp8_quantize",
    "grouped_gemm": "moe_gemm",
    "grouped_gemm_dw": "moe_gemm",
    "hadamard_quantize": "hadamard",
    "hadamard_rotate": "hadamard",
    "hybrid_plan": "hybrid_attention",
    "int4_from_awq": "int4_matmul_checkpoints",
    "int4_from_gptq": "int4_matmul_checkpoints",
    "int4_matmul_atomic": "int4_matmul",
    "int4_prepack": "int4_matmul",
    "int4_quantize": "int4_matmul",
    "int4_to_awq": "int4_matmul_checkpoints",
    "int4_to_gptq": "int4_matmul_checkpoints",
    "linear_scan_step": "linear_scan",
    "rglru_step": "rglru",
}


def __getattr__(name: str) -> Any:
    # Importing the package imports neither torch nor triton; the first use of a name does.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_FILE.get(name, name)}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    # Most functions are named like their files. Importing such a file binds the file here, on the
    # function's name: bind the function instead. `from triton_kernels.matmul import Config` reaches
    # into the file all the same.
    def __setattr__(self, name: str, value: Any) -> None:
        if name in __all__ and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
