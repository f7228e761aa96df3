"""What takes time in tests and nobody looks at, made cheaper."""

import functools
from unittest import mock

import jax
from jax._src import compiler

#: With these XLA compiles in half the time what then runs slower, and may round in another order.
QUICKLY = {
    "xla_llvm_disable_expensive_passes": True,
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}

#: For programs that run once, and whose last bits do not matter.
jit_once = functools.partial(jax.jit, compiler_options=QUICKLY)


def compiled_quickly():
    """While this is entered, everything is compiled as by ``jit_once``.

    XLA's flags are read once in a process, and JAX has settings for some of them only.
    """
    options = compiler.get_compile_options

    @functools.wraps(options)
    def quickly(*args, env_options_overrides=None, **kwargs):
        overrides = QUICKLY | (env_options_overrides or {})
        return options(*args, env_options_overrides=overrides, **kwargs)

    return mock.patch.object(compiler, "get_compile_options", quickly)


def some_key(seed=0):
    """A key for weights that only have to be random: its numbers compile ten times faster."""
    return jax.random.key(seed, impl="rbg")
