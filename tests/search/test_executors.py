"""Real executors: processes, and a Dask cluster of which a worker dies."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
import time

import jax
import pytest

import purepruning as pp
from tests.search import nets

pytestmark = pytest.mark.full  # starts processes, each of which imports JAX

OF = pp.search.problem(nets.table_of((10, 10, 10)), {"weights": 0.5})


def evaluate(trial):
    """Slow enough for a worker to be killed while it runs."""
    time.sleep(0.05)
    return -float(sum((i + 1) * k**2 for i, k in enumerate(trial.counts.values())))


def searches():
    return {
        "netadapt": pp.search.netadapt(OF, step=0.1, decay=1.0),
        "evolution": pp.search.evolution(OF, generations=4, offspring=6, survivors=(3,)),
    }


def history(search, submit=None):
    state = search.init(jax.random.key(3))
    found = pp.search.run_search(search, state, evaluate, problem=OF, submit=submit)
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found.history]


def test_processes_give_the_serial_history():
    search = searches()["netadapt"]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        assert history(search, pool.submit) == history(search)


@pytest.mark.filterwarnings("ignore")  # of distributed, about the worker that is killed
@pytest.mark.parametrize("name", ["netadapt", "evolution"])
def test_a_dask_cluster_whose_worker_is_killed_gives_the_serial_history(name):
    distributed = pytest.importorskip("distributed")
    search = searches()[name]
    serial = history(search)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        pids = list(client.run(os.getpid).values())
        killed = threading.Timer(0.4, os.kill, (pids[0], signal.SIGKILL))
        killed.start()
        found = history(search, client.submit)
        killed.join()
        assert len(set(pids)) == 2
        assert pids[0] not in client.run(os.getpid).values()
    assert found == serial
