"""The installed command in processes of their own: interrupted, out of space, without its extra.

Whatever happens, what is at the target is whole or not there, and what is said is one line.
"""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from purepruning_interop.checkpoints import NotWritten, write
from purepruning_interop.cli.app import run
from tests.cli import models_to_shrink as nets
from tests.cli.calls import ROOT, call, failed, finished, save, start, tensors
from tests.study import tiny


def left(folder, *names):
    """Returns what is in a folder beside these."""
    return sorted({p.name for p in folder.iterdir()} - set(names))


def test_help_is_quick_and_loads_no_framework():
    code = (
        "import sys; from purepruning_interop.cli.app import run\n"
        "assert run(['prune', '--help']) == 0\n"
        "print({'jax', 'torch', 'numpy', 'purepruning'} & set(sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'interop'}"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "set()"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2  # it takes 0.3


def test_without_its_extra_the_command_says_how_to_get_it():
    code = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'typer' else find(n, *a)\n"
        "from purepruning_interop.cli.__main__ import main\n"
        "status = main()\n"
        "assert 'rich' not in sys.modules\n"
        "sys.exit(status)"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'interop'}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "purepruning: error: the command needs typer; pip install 'purepruning[cli]'\n"
    )


def test_from_checkpoint_to_pruned_file_in_a_process(tmp_path):
    source, out = save(tmp_path / "m.safetensors"), tmp_path / "o.safetensors"
    done = finished(start("prune", source, "--sparsity", "0.5", "-o", out))
    assert (done.status, done.err) == (0, "")
    assert "336 of 624" not in done.out
    assert out.exists()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint that takes a while: 48 MB."""
    content = {f"blocks.{i}.fc.weight": np.ones((1000, 1000), np.float32) for i in range(12)}
    return save(tmp_path_factory.mktemp("large") / "m.safetensors", content)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)]
)
def test_interrupted_at_any_time_the_target_is_whole_or_not_there(tmp_path, large, number):
    out = tmp_path / "out"
    process = start("prune", large, "--sparsity", "0.5", "-o", out)
    # Until it writes, and then for a random while.
    while process.poll() is None and not left(tmp_path):
        time.sleep(0.005)
    time.sleep(random.Random(int(number)).uniform(0, 0.02))
    check_interrupted(process, number, out)


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seed", range(15))
def test_interrupted_from_its_start_on(tmp_path, large, number, seed):
    process = start("prune", large, "--sparsity", "0.5", "-o", tmp_path / "out")
    time.sleep(random.Random(seed).uniform(0.5, 4))
    check_interrupted(process, number, tmp_path / "out")


def check_interrupted(process, number, out):
    process.send_signal(number)
    done, tmp_path = finished(process), out.parent
    assert "Traceback" not in done.err
    if done.status == 0:
        assert left(tmp_path) == ["out"]
        assert (out / "purepruning" / "masks.safetensors").exists()
    else:
        early = number == signal.SIGTERM and done.status == -number  # nothing was begun
        assert early or done.status == 128 + number
        assert done.err.count("\n") == (not early)
        assert left(tmp_path) == []


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A folder of six shards of 8 MB, with its index."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    folder.mkdir()
    rng, where = np.random.default_rng(0), {}
    for i in range(6):
        name, file = f"blocks.{i}.fc.weight", f"model-{i}.safetensors"
        save(folder / file, {name: rng.standard_normal((1000, 2000)).astype(np.float32)})
        where[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.full)]
)
def test_a_folder_goes_on_behind_its_whole_files(tmp_path, sharded, number):
    """What is there is not written again, and comes out as if nothing had happened."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    arguments = ("prune", sharded, "--sparsity", "0.5", "--scope", "global")
    process = start(*arguments, "-o", out)
    while process.poll() is None and not list(tmp_path.glob(".out.*/.pruning/model-1.*.json")):
        time.sleep(0.002)
    process.send_signal(number)
    done = finished(process)
    if number == signal.SIGTERM:
        assert (done.status, done.err) == (
            143,
            "purepruning: terminated; the same command goes on from there\n",
        )
    (work,) = tmp_path.iterdir()
    before = {p.name: p.stat().st_mtime_ns for p in work.glob("model-[01].safetensors")}
    assert len(before) == 2
    assert finished(start(*arguments, "-o", out)).status == 0
    assert finished(start(*arguments, "-o", whole)).status == 0
    assert left(tmp_path) == ["out", "whole"]
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert left(out) == left(whole)
    for name in (*before, "model-5.safetensors", "purepruning/masks.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.full
def test_what_was_begun_for_another_sparsity_is_removed(tmp_path, sharded):
    process = start("prune", sharded, "--sparsity", "0.5", "-o", tmp_path / "out")
    while process.poll() is None and not list(tmp_path.glob(".out.*/.pruning/*.json")):
        time.sleep(0.002)
    process.kill()
    finished(process)
    assert len(left(tmp_path)) == 1
    done = finished(start("prune", sharded, "--sparsity", "0.2", "-o", tmp_path / "out", "--json"))
    assert done.json["weights_removed"] == 6 * 400_000
    assert left(tmp_path) == ["out"]


def test_two_at_the_same_work(tmp_path):
    with write.Aside(tmp_path / "out", asked="0" * 16) as aside:
        with (
            pytest.raises(ValueError, match="another process is writing it"),
            write.Aside(tmp_path / "out", asked="0" * 16),
        ):
            pass
        assert aside.folder.exists()
        assert aside.leave()
    assert left(tmp_path) == []


MEMORY = """
import sys, threading
import purepruning_interop.cli.prune, purepruning_interop.cli.pruned_files
from purepruning_interop.cli.app import run

def anonymous():
    rows = open("/proc/self/status").read().splitlines()
    return next(int(r.split()[1]) for r in rows if r.startswith("RssAnon")) / 1024

peak, start, done = 0, anonymous(), threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
status = run(["prune", *sys.argv[1:]])
done.set()
watcher.join()
print(peak - start, file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
@pytest.mark.parametrize("scope", ["global", pytest.param("layer", marks=pytest.mark.full)])
def test_memory_is_that_of_one_tensor(tmp_path, scope):
    """Of 320 MB, half of which is one tensor of 80 MiB: what all masks take is more."""
    content = {f"{i}.fc.weight": np.ones((1024, 10 * 1024), np.float32) for i in range(6)}
    content["embed_tokens.weight"] = np.ones((2048, 10 * 1024), np.float32)
    source = save(tmp_path / "m.safetensors", content)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'interop'}"}
    command = [sys.executable, "-c", MEMORY, source, "--sparsity", "0.5", "--scope", scope]
    command += ["-o", tmp_path / "o.safetensors"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stderr) < 1.5 * 80 + 64


def test_interrupted_between_renames_all_of_them_are_done(tmp_path, capsys, monkeypatch, request):
    """A signal that comes between two files of one result waits for the second."""
    source, out = save(tmp_path / "m.safetensors"), tmp_path / "o.safetensors"
    replace = Path.replace
    # A process in the background of a shell may have been started with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def interrupted(self, target):
        found = replace(self, target)
        if self.name.endswith("masks.safetensors"):
            os.kill(os.getpid(), signal.SIGINT)
        return found

    monkeypatch.setattr(Path, "replace", interrupted)
    found = call(capsys, "prune", source, "--sparsity", "0.5", "-o", out)
    assert found.status == 130
    assert left(tmp_path, source.name) == ["o.masks.safetensors", "o.report.json", "o.safetensors"]


def test_no_space_left(tmp_path, large):
    out = tmp_path / "o.safetensors"

    limit = ["bash", "-c", 'ulimit -f 20000 && exec "$@"', "bash"]  # in KiB
    done = finished(start("prune", large, "--sparsity", "0.5", "-o", out, inside=limit))
    assert done.status == 3
    assert done.err == f"purepruning: error: {out} cannot be written: File too large\n"
    assert left(tmp_path) == []


@pytest.mark.parametrize("nth", range(5))
@pytest.mark.parametrize("folder", [False, True])
def test_write_errors_wherever_they_come(tmp_path, capsys, monkeypatch, nth, folder):
    """Every write to the disk fails in turn: what was there before stays as it was."""
    source = save(tmp_path / "m.safetensors")
    out = tmp_path / ("out" if folder else "o.safetensors")
    if not folder:
        out.write_text("before")
    calls = iter(range(100))

    def full(number):
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    arguments = ("prune", source, "--sparsity", "0.5", "-o", out, "--overwrite")
    failed(capsys, 3, *arguments, says="No space left on device")
    if folder:
        assert left(tmp_path, source.name) == []
    elif nth < 4:
        assert left(tmp_path, source.name) == [out.name]
        assert out.read_text() == "before"
    else:  # all of it is in its place, and only the folder's own entry may be lost
        assert len(safetensors.numpy.load_file(out)) == len(tensors())


def test_targets_that_cannot_be_made(tmp_path, capsys):
    source = save(tmp_path / "m.safetensors")
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "o.safetensors"
    failed(capsys, 3, "prune", source, "--sparsity", "0.5", "-o", out, says="cannot be written")


def test_what_killed_writers_left_is_removed_and_living_ones_are_let_be(tmp_path):
    target = tmp_path / "out"
    for name in (".out.dead", ".out.alive"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".lock").touch()
    with write.Aside(target) as living:
        with write.Aside(target) as aside:
            assert left(tmp_path) == sorted([living.folder.name, aside.folder.name])
            aside.write("a", b"1")
            aside.commit_folder()
        assert left(target) == ["a"]
    assert left(tmp_path) == ["out"]


def test_what_is_raised_inside_is_no_error_of_writing_unless_it_is(tmp_path):
    def raised(error):
        with write.Aside(tmp_path / "out"):
            raise error

    with pytest.raises(ValueError, match="mine"):
        raised(ValueError("mine"))
    with pytest.raises(NotWritten, match="out cannot be written: full"):
        raised(OSError(errno.ENOSPC, "full"))


def test_errors_that_are_ours_say_so_and_show_where_when_asked(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("purepruning_interop.checkpoints.read_checkpoint", lambda _: 1 / 0)
    found = failed(capsys, 4, "prune", "m", "--sparsity", "0.5", "-o", "o", says="report it")
    assert "ZeroDivisionError" in found
    assert run(["--traceback", "prune", "m", "--sparsity", "0.5", "-o", "o"]) == 4
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.full
def test_a_reader_that_goes_away_is_no_error(tmp_path):
    source = save(tmp_path / "m.safetensors")
    process = start("inspect", source, "--json")
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    assert process.wait() != 0


SIGNALLED = """
import os, sys
from purepruning_interop.cli.__main__ import main
number, left, fsync = int(sys.argv[1]), [int(sys.argv[2])], os.fsync
def signalled(file):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), number)
    fsync(file)
os.fsync = signalled
sys.argv[1:] = sys.argv[3:]
sys.exit(main())
"""
SHRINK = ("shrink", f"{nets.__name__}:torch_net", "--sparsity", "0.5")
STUDY = ("study", f"{tiny.__name__}:loop", "--pruners", "level", "--sparsities", "0.5")
STUDY += ("--seeds", "2", "--epochs", "0")


def signalled(number, nth, *arguments):
    """Runs the command, which is sent a signal when it writes for the n-th time."""
    command = [sys.executable, "-c", SIGNALLED, str(int(number)), str(nth), *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'interop'}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done


def whole_shrunk(folder):
    assert left(folder) == [
        "masks.safetensors",
        "plan.safetensors",
        "report.json",
        "weights.safetensors",
    ]
    assert len(safetensors.numpy.load_file(folder / "weights.safetensors")) == 9
    json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize(
    ("number", "nth"),
    [(signal.SIGTERM, 2)]
    + [
        pytest.param(number, nth, marks=pytest.mark.full)
        for number in (signal.SIGINT, signal.SIGTERM)
        for nth in range(1, 8)
    ],
)
def test_shrink_that_is_interrupted_while_it_writes(tmp_path, number, nth):
    out = tmp_path / "small"
    done = signalled(number, nth, *SHRINK, "-o", out)
    if out.exists():  # the signal came when all was written, or waited for the renames
        whole_shrunk(out)
        assert left(tmp_path) == ["small"]
    else:
        words = "interrupted" if number == signal.SIGINT else "terminated"
        assert (done.returncode, done.stderr) == (128 + number, f"purepruning: {words}\n")
        assert left(tmp_path) == []


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seed", range(5))
def test_shrink_that_is_interrupted_at_any_time(tmp_path, number, seed):
    out = tmp_path / "small"
    process = start(*SHRINK, "-o", out)
    time.sleep(random.Random(seed).uniform(0.3, 6))
    process.send_signal(number)
    done = finished(process)
    assert "Traceback" not in done.err
    assert done.status in (0, -number, 128 + number)
    assert left(tmp_path) == (["small"] if done.status == 0 else [])


@pytest.mark.parametrize(
    "nth", [0, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 2, 3, 4))]
)
def test_write_errors_of_shrink(tmp_path, capsys, monkeypatch, nth):
    calls = iter(range(100))

    def full(number):
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    failed(capsys, 3, *SHRINK, "-o", tmp_path / "small", says="No space left on device")
    assert left(tmp_path) == []


@pytest.mark.full
def test_no_space_left_for_shrink(tmp_path):
    limit = ["bash", "-c", 'ulimit -f 1 && exec "$@"', "bash"]  # in KiB
    done = finished(start(*SHRINK, "-o", tmp_path / "small", inside=limit))
    assert done.status == 3
    assert (
        done.err == f"purepruning: error: {tmp_path / 'small'} cannot be written: File too large\n"
    )
    assert left(tmp_path) == []


def whole_study(folder):
    """Makes sure that nothing is half written, but for a last line, which is known by that."""
    if (folder / "study.json").exists():
        json.loads((folder / "study.json").read_text())
    if (folder / "results.jsonl").exists():
        for line in (folder / "results.jsonl").read_text().split("\n")[:-1]:
            json.loads(line)
    for file in folder.glob("networks/*.safetensors"):
        safetensors.numpy.load_file(file)
    if (folder / "report.html").exists():
        assert (folder / "report.html").read_text().rstrip().endswith("</html>")


@pytest.mark.parametrize(
    ("number", "nth"),
    [(signal.SIGTERM, 5)]
    + [
        pytest.param(number, nth, marks=pytest.mark.full)
        for number in (signal.SIGINT, signal.SIGTERM)
        for nth in range(1, 11)
    ],
)
def test_a_study_that_is_interrupted_while_it_writes_goes_on(
    tmp_path, capsys, monkeypatch, number, nth
):
    out = tmp_path / "s"
    done = signalled(number, nth, *STUDY, "-o", out)
    words = "interrupted" if number == signal.SIGINT else "terminated"
    assert done.returncode == 0 or done.stderr == f"purepruning: {words}\n"
    whole_study(out)
    found = call(capsys, *STUDY, "-o", out, "--json")
    assert found.status == 0, found.err
    whole_study(out)
    assert len((out / "results.jsonl").read_text().splitlines()) == 6
    hidden = [p.name for p in out.rglob(".*")]
    assert hidden == []


@pytest.mark.parametrize("nth", [3, *(pytest.param(n, marks=pytest.mark.full) for n in range(10))])
def test_write_errors_of_a_study(tmp_path, capsys, monkeypatch, nth):
    calls = iter(range(100))

    def full(number):
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        failed(capsys, 3, *STUDY, "-o", tmp_path / "s", says="No space left on device")
    whole_study(tmp_path / "s")
    assert call(capsys, *STUDY, "-o", tmp_path / "s", "--json").status == 0
    assert len((tmp_path / "s" / "results.jsonl").read_text().splitlines()) == 6


@pytest.mark.full
def test_no_space_left_for_a_study(tmp_path):
    limit = ["bash", "-c", 'ulimit -f 4 && exec "$@"', "bash"]  # in KiB: the page is larger
    done = finished(start(*STUDY, "-o", tmp_path / "s", inside=limit))
    assert done.status == 3
    assert done.err == f"purepruning: error: {tmp_path / 's'}: File too large\n"
    whole_study(tmp_path / "s")
    assert not (tmp_path / "s" / "report.html").exists()
