"""Cost tables in CSV files, and problems whose resource is one."""

import numpy as np
import pytest

import purepruning as pp
from tests.messages import raises
from tests.search import nets

MEASURED = {
    "latency": {"l1": {2: 0.25, 5: 1.5}, ("l0", "l1"): {(4, 5): 2.0, (10, 5): 3.0}},
    "energy": {"l0": np.arange(11.0)},
}
TEXT = """resource,unit,device,group,kept,other,other_kept,cost
energy,,,l0,0,,,0.0
energy,,,l0,1,,,1.0
"""


def saved(tmp_path, tables=MEASURED, **options):
    file = tmp_path / "phone.csv"
    pp.search.save_tables(file, tables, **options)
    return file


def test_tables_come_back_with_units_and_devices(tmp_path):
    file = saved(tmp_path, units={"latency": "ms"}, devices={"latency": "Pixel 1, one core"})
    found = pp.search.load_tables(file)
    assert found.costs["latency"] == MEASURED["latency"]
    assert found.costs["energy"] == {"l0": {k: float(k) for k in range(11)}}
    assert found.units == {"latency": "ms", "energy": ""}
    assert found.devices == {"latency": "Pixel 1, one core", "energy": ""}
    lines = file.read_text().splitlines()
    assert lines[:3] == TEXT.splitlines()
    assert lines[12:] == [
        'latency,ms,"Pixel 1, one core",l0,4,l1,5,2.0',
        'latency,ms,"Pixel 1, one core",l0,10,l1,5,3.0',
        'latency,ms,"Pixel 1, one core",l1,2,,,0.25',
        'latency,ms,"Pixel 1, one core",l1,5,,,1.5',
    ]
    backwards = {name: dict(reversed(MEASURED[name].items())) for name in reversed(MEASURED)}
    options = {"units": found.units, "devices": found.devices}
    other = saved(tmp_path, backwards, **options)
    assert other.read_text().splitlines() == lines


def test_what_was_not_measured_costs_what_the_next_larger_does(tmp_path):
    tables = pp.search.load_tables(saved(tmp_path)).costs
    of = pp.search.problem(nets.table_of((10, 5)), {"latency": 0.9}, tables=tables)
    by_kept = {(10, 5): 4.5, (9, 5): 4.5, (5, 5): 4.5, (4, 5): 3.5, (1, 3): 3.5, (4, 2): 2.25}
    for (l0, l1), cost in by_kept.items():
        left = of.measure({"l0": 10 - l0, "l1": 5 - l1})
        assert left["latency"] == pytest.approx(cost, rel=1e-9)
    assert of.measure({"l0": 4, "l1": 0})["energy"] == pytest.approx(6, rel=1e-9)
    # Of 4.5, nine tenths may be left.
    assert [bool(of.within(of.levels({"l0": n, "l1": 0}))) for n in (5, 6)] == [False, True]


def test_files_of_others(tmp_path):
    file = tmp_path / "t.csv"
    # As a spreadsheet writes it: a mark at the beginning, other columns, another order.
    file.write_text(
        "\ufeffgroup,kept,other,other_kept,cost,resource,unit,device,note\r\n"
        "a,4,,,2e-1,ms,,,slow\r\na,2,,,0.1,ms,,,\r\n",
        "utf-8",
    )
    assert pp.search.load_tables(file).costs == {"ms": {"a": {4: 0.2, 2: 0.1}}}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ms,,,a,x,,,1", ("line 2", "kept", "'x'")),
        ("ms,,,a,1,b,,1", ("other_kept", "''")),
        ("ms,,,a,1,,,nan", ("cost", "'nan'")),
        ("ms,,,a,1,,,fast", ("fast",)),
        (",,,a,1,,,1", ("resource",)),
        ("ms,,,a,1,,,1\nms,,,a,1,,,2", ("line 3", "twice")),
        ("ms,us,,a,1,,,1\nms,s,,a,2,,,2", ("'us'", "'s'")),
    ],
)
def test_mistakes_in_files(tmp_path, line, words):
    file = tmp_path / "t.csv"
    file.write_text(TEXT.splitlines()[0] + "\n" + line + "\n")
    with raises(ValueError, "load_tables", "t.csv", *words):
        pp.search.load_tables(file)


def test_other_mistakes(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("group,cost\na,1\n")
    with raises(ValueError, "load_tables", "resource", "kept"):
        pp.search.load_tables(file)
    with pytest.raises(FileNotFoundError):
        pp.search.load_tables(tmp_path / "none.csv")
    for tables, words in (
        ({"ms": {"a": {1: -1.0}}}, ("'a'", "-1.0")),
        ({"ms": {"a": {(1, 2): 1.0}}}, ("'a'", "(1, 2)")),
        ({"ms": {("a", "b"): np.ones(3)}}, ("'b'",)),
    ):
        with raises(ValueError, "save_tables", *words):
            pp.search.save_tables(file, tables)
    with raises(TypeError, "save_tables", "3"):
        pp.search.save_tables(file, {"ms": {3: [1.0]}})
    with raises(KeyError, "units", "'s'", "'ms'"):
        pp.search.save_tables(file, {"ms": {}}, units={"s": "ms"})


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"l0": {4: 1.0}}, ("nothing pruned", "10")),
        ({"l0": {11: 1.0}}, ("at most 10", "11")),
        ({("l0", "l1"): {(10, 5): 1.0, (4, 2): 0.5}}, ("(4, 5)", "all pairs")),
    ],
)
def test_grids_that_say_too_little(table, words):
    with raises(ValueError, "tables['ms']", *words):
        pp.search.problem(nets.table_of((10, 5)), {"ms": 0.5}, tables={"ms": table})
