"""What Colab's own errors have in common."""


class Error(Exception):
    """One of Colab's errors."""
