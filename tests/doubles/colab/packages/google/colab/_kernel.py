"""The kernel class of the whole machine: by it each kernel has ``google.colab``."""

from ipykernel.ipkernel import IPythonKernel


class Kernel(IPythonKernel):
    """A kernel of Colab."""
