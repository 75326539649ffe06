"""A module whose file the test removes after the installation."""

from broken_plugins import Estimator

__all__ = ["Estimator"]
