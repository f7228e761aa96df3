"""What tests use that the oldest versions have elsewhere, or not at all."""

import jax

#: In ``jax.experimental`` before 0.8.
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
