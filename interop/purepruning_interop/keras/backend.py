"""Which backend Keras runs on, found without importing Keras."""

from __future__ import annotations

import os
import sys
from typing import Any


def require_jax(by: str) -> None:
    """Checks that Keras runs on JAX, or will once it is imported.

    Args:
        by: the module that needs it.

    Raises:
        ImportError: it runs on another backend, or none is chosen, and Keras is not imported yet.
    """
    keras: Any = sys.modules.get("keras")
    if keras is not None:
        active = keras.config.backend()
        if active != "jax":
            raise ImportError(
                f"{by} needs Keras on JAX, but Keras was imported with the backend {active!r}; set "
                "KERAS_BACKEND=jax in the environment before Keras is imported"
            )
    elif os.environ.get("KERAS_BACKEND") != "jax":
        chosen = os.environ.get("KERAS_BACKEND")
        found = f"KERAS_BACKEND is {chosen!r}" if chosen else "KERAS_BACKEND is not set"
        raise ImportError(
            f"{by} needs Keras on JAX, but {found}; set KERAS_BACKEND=jax in the environment, in "
            "Python by os.environ['KERAS_BACKEND'] = 'jax' before Keras is imported"
        )
