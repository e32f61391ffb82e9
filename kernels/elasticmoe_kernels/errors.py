"""Errors of the kernels.

KernelError(ValueError)
├── ShapeError   tensors that do not belong together: shapes, dtypes, strides
└── NoBackend    no backend serves these tensors, or the one asked for cannot
"""


class KernelError(ValueError):
    """Base of every error raised by `elasticmoe_kernels`."""


class ShapeError(KernelError):
    """Tensors whose shapes, dtypes or strides do not belong together."""


class NoBackend(KernelError):
    """No backend serves these tensors; the message names the ones that exist."""
