"""Stands in for Colab's package of this name; see ``tests/doubles/colab``."""

from google.colab import drive, errors, output  # noqa: F401 - as attributes, as in Colab
