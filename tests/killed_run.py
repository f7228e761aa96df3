"""A scheduled run that is killed again and again; started by test_resume.py, in its own process.

It forks before JAX starts, so that a new process costs little: the first is left alone, the next
ones are killed at random moments, and the last one may finish. All read the compiled step that the
first one wrote.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import purepruning as pp

STEPS = 150
SIZES = {"a": (12, 16), "b": (16, 8)}
RULES = [
    {"op_names": ["a"], "final_sparsity": 0.9, "end_epoch": 120, "frequency": 10},
    {"op_names": ["b"], "final_sparsity": 0.75, "start_epoch": 25, "end_epoch": 140},
]


def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - jnp.sin(3 * x[:, :8])) ** 2)


def run(file, report):
    """Trains from where the file is, if there is one, to the end; saves after every step."""
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in SIZES.items()}
    layers = [pp.make_layer(params, n, "Linear", name=n, out_axes=1, in_axes=0) for n in SIZES]
    config = pp.resolve(RULES, layers)
    pruning = pp.prune_on_schedule(pp.level, pp.agp(frequency=20), config)
    tx = optax.chain(optax.sgd(0.05, momentum=0.9), pruning)

    @jax.jit
    def step(state):
        key, batch = jax.random.split(state["key"])
        grads = jax.grad(loss)(state["params"], jax.random.normal(batch, (8, 12)))
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state, "key": key}

    fresh = {"params": params, "opt_state": tx.init(params), "key": jax.random.key(0)}
    state = pp.load_state(file, fresh, config=config) if file.exists() else fresh
    # The state knows where it is.
    while int(state["opt_state"][-1].schedule.step) < STEPS:
        state = step(state)
        pp.save_state(file, state, config=config)
        os.write(report, b".")


def fork(file, last_words):
    """Starts a run; returns its process and where it reports every step."""
    read, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        return pid, read
    os.close(read)
    status = 1
    try:
        run(file, write)
        status = 0
    finally:
        with last_words.open("a") as words:
            if status:
                import traceback

                traceback.print_exc(file=words)
        os._exit(status)


def main(folder, kills):
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    words, file = folder / "errors.txt", folder / "killed.safetensors"
    pid, read = fork(folder / "whole.safetensors", words)
    while os.read(read, 4096):
        pass
    _, status = os.waitpid(pid, 0)
    moments = random.Random(0)
    killed = []
    while status == 0:
        pid, read = fork(file, words)
        done = 0
        # At any moment: before the first step, in the middle of one, while it writes.
        for _ in range(moments.randrange(6) if len(killed) < kills else STEPS + 1):
            if not os.read(read, 1):
                break
            done += 1
        if len(killed) < kills:
            time.sleep(moments.uniform(0, 0.004))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if len(killed) == kills:
            break
        if os.WIFSIGNALED(status):
            killed.append(done)
            status = 0
        os.close(read)
    print(json.dumps({"status": status, "steps_before_kill": killed}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
