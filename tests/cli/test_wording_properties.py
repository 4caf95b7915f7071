"""What a message of the library says of an argument is said as the flags that somebody would type."""

import argparse
import math
import shlex

from hypothesis import example, given, settings
from hypothesis import strategies as st

from timm_nrpm.cli.values import number
from timm_nrpm.cli.wording import worded

PARSER = argparse.ArgumentParser(allow_abbrev=False)
PARSER.add_argument("--batch-size", type=int)
PARSER.add_argument("--estimator-eps", type=number)
PARSER.add_argument("--root")
PARSER.add_argument("--trainable", nargs="+")
PARSER.add_argument("--std", type=number, nargs="+")
PARSER.add_argument("--drop-last", action="store_true")

letters = st.sampled_from(["batch_size", "root=3", *"ab= ,.'\"()[]\\/*$\n\u00e4"])
words = st.lists(letters, max_size=6).map("".join)
numbers = st.floats(1e-300, 1e300)
given_values = {
    "batch_size": st.integers(0),
    "estimator_eps": numbers,
    "root": words,
    "trainable": st.lists(words, min_size=1, max_size=3).map(tuple),
    "std": st.lists(numbers, min_size=1, max_size=3).map(tuple),
    "drop_last": st.just(True),
}
several = st.lists(st.sampled_from(sorted(given_values)), min_size=1, max_size=3, unique=True)


@settings(max_examples=150)
@given(st.data(), several)
def test_what_a_message_says_can_be_typed_and_means_the_same(data, names):
    values = {name: data.draw(given_values[name], label=name) for name in names}
    text = worded(" ".join(f"{name}={value!r}" for name, value in values.items()), PARSER, {})
    typed = PARSER.parse_args(shlex.split(text))
    for name, value in values.items():
        got = getattr(typed, name)
        assert (tuple(got) if isinstance(value, tuple) else got) == value


@settings(max_examples=200)
@given(
    st.from_regex(r"-?[0-9]{1,3}(\.[0-9]{1,3})?(e-?[0-9]{1,9})?(/[0-9]{1,3})?", fullmatch=True) | st.text(max_size=6)
)
@example("1e400")
@example("1e999999999")
def test_whatever_is_typed_is_a_finite_number_or_refused_in_a_sentence(text):
    try:
        value = number(text)
    except argparse.ArgumentTypeError as error:
        said = str(error)
    else:
        said = "" if math.isfinite(value) else f"it is read as {value}"
    assert said in ("", f"{text!r} is no number, such as 0.03 or 8/255")


@settings(max_examples=100)
@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-999, 999), st.integers(1, 999))
def test_a_number_is_read_as_python_reads_it(value, above, below):
    assert number(repr(value)) == value
    assert number(f"{above}/{below}") == above / below
