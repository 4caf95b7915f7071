"""A journal survives a kill at any byte, whatever its rows hold, and never mixes two measurements."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from timm_nrpm.jobs.journal import Journal

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
names = st.text(max_size=4).filter(lambda name: name != "number")
identities = st.dictionaries(names, values, max_size=3)
rows = st.dictionaries(st.integers(0, 99), st.dictionaries(names, values, max_size=3), max_size=5)


@settings(max_examples=60)
@given(identity=identities, rows=rows, data=st.data())
def test_whatever_bytes_a_kill_leaves_the_first_rows_come_back_and_going_on_gives_the_whole(identity, rows, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        journal, ends = Journal(path, identity), []
        for number, row in rows.items():
            journal.add(number, row)
            ends.append(path.stat().st_size)
        whole = path.read_bytes()
        kept = data.draw(st.integers(0, len(whole)), label="bytes that the kill left")
        path.write_bytes(whole[:kept])
        resumed = Journal(path, identity)
        complete = sum(end <= kept for end in ends)
        assert list(resumed.rows.items()) == list(rows.items())[:complete]
        for number in [number for number in rows if number not in resumed.rows]:
            resumed.add(number, rows[number])
        assert path.read_bytes() == whole
        assert Journal(path, identity).rows == rows


@settings(max_examples=60)
@given(one=identities, other=identities, row=st.dictionaries(names, values, max_size=2))
@example(one={"eps": 0.1, "gradient": "own"}, other={"eps": 0.1}, row={})
@example(one={"eps": 0.1}, other={"eps": 0.1, "gradient": None}, row={})
def test_rows_are_taken_over_by_a_run_of_the_same_settings_alone(one, other, row):
    """A setting that is None says the same as one that is not there."""

    def told(identity):
        return {name: value for name, value in identity.items() if value is not None}

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        Journal(path, one).add(0, row)
        whole = path.read_bytes()
        if told(one) == told(other):
            assert Journal(path, other).rows == {0: row}
        else:
            with pytest.raises(ValueError, match="holds another run"):
                Journal(path, other)
        assert path.read_bytes() == whole
