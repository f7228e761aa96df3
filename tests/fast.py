"""What takes time in tests and nobody looks at, made cheaper."""

import functools

import jax

#: Compiles faster and runs slower: for programs that run once, and whose last bits do not matter.
jit_once = functools.partial(
    jax.jit,
    compiler_options={
        "xla_llvm_disable_expensive_passes": True,
        "xla_backend_optimization_level": 0,
    },
)


def some_key(seed=0):
    """A key for weights that only have to be random: its numbers compile ten times faster."""
    return jax.random.key(seed, impl="rbg")
