"""What its owner wrote on a card stays, and no doubted number leaves the card without its flag, whatever these are."""

from huggingface_hub import ModelCard, ModelCardData
from hypothesis import example, given, settings
from hypothesis import strategies as st
from report_pages import attack

from timm_nrpm import RobustnessReport, Threat
from timm_nrpm.attacks.flags import COMPARISON, MEANINGS
from timm_nrpm.hub.model_index import evaluated
from timm_nrpm.hub.templates import AFTER, BEFORE, BEGIN, END, is_edited, kept_of, written
from timm_nrpm.hub.verdict import verdict

ABOUT = {
    "name": "me/v",
    "architecture": "resnet18",
    "layers": ("fc",),
    "size": 3,
    "natural": "a",
    "robust": "b",
    "start": None,
}
DATA = {"library_name": "timm_nrpm", "license": "mit", "tags": ["timm"]}

pieces = [*"a \n\u00e4", "\r\n", "---\n", "# Mine\n", "{{ name }}", "{% if %}", "\\1", "<b>", BEFORE, AFTER, END]
texts_before = st.lists(st.sampled_from(pieces), max_size=6).map("".join)
texts_after = st.lists(st.sampled_from([*pieces, BEGIN]), max_size=6).map("".join)


def card_of(existing):
    return str(written("signature.md", DATA, kept_of(existing, "me/v"), ABOUT))


def lines(text):
    """What is left of a text where ends of lines and gaps at its own ends do not count."""
    return text.replace("\r\n", "\n").strip()


@settings(max_examples=80)
@given(before=texts_before, after=texts_after, again=st.booleans())
@example(before=f"See {AFTER} here.", after="", again=False)
def test_what_its_owner_wrote_around_the_generated_part_stays(before, after, again):
    first = card_of(None)
    head, begin, rest = first.partition(BEGIN)
    front = head[: head.index("---\n", 4) + 4]
    body, end, _ = rest.partition(END)
    edited = f"{front}{before}{begin}{body}{end}{after}"
    card = card_of(edited)
    if again:
        card = card_of(card)
    assert not is_edited(card)
    mine, _, rest = ModelCard(card).text.partition(BEGIN)
    generated, _, theirs = rest.partition(END)
    assert (lines(mine), lines(theirs)) == (lines(before), lines(after))
    assert generated == body
    assert card_of(card) == card


flags = st.lists(st.sampled_from(sorted(MEANINGS)), max_size=3, unique=True)
cases = st.tuples(flags, st.integers(0), st.sampled_from(["adaptive", "quick"]), st.booleans())


def outcome_of(right, broken):
    """A digit for each image, `-` where the model was wrong already; the bits of `broken` say which images fell."""
    return "".join("-" if not each else "01"[broken >> i & 1 == 0] for i, each in enumerate(right))


def reported(number, right, case):
    """A report under a bound of its own, of one attack: PGD along the model's own gradient, or another."""
    raised, broken, suite, own = case
    attacks = (attack("pgd" if own else "square", "own" if own else "scores", outcome_of(right, broken)),)
    about = {"correct": tuple(right), "attacks": attacks, "flags": tuple(raised), "data": "digits, test"}
    return RobustnessReport(Threat("Linf", number / 10), suite, 1, 1, 0, **about)


@settings(max_examples=80)
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.lists(cases, min_size=1, max_size=3))
def test_no_number_under_attack_leaves_the_card_without_its_flags(right, found):
    """As the Hub reads them back, whose tables show a name and a number, and nothing else."""
    reports = [reported(number, right, case) for number, case in enumerate(found, 1)]
    data = ModelCardData(library_name="timm_nrpm", **evaluated("me/v", reports))
    read = ModelCard(f"---\n{data}\n---\n# v\n").data.eval_results
    numbers = {result.metric_name: result.metric_value for result in read}
    assert len(numbers) == len(read)
    assert numbers.pop(f"clean accuracy, {len(right)} images, %") == round(100 * sum(right) / len(right), 1)
    for report, (raised, broken, suite, own) in zip(reports, found, strict=True):
        mine = {name: numbers.pop(name) for name in list(numbers) if f" {report.threat}, " in name}
        doubts = [flag for flag in raised if flag not in COMPARISON]
        assert set(mine.values()) == {round(100 * outcome_of(right, broken).count("1") / len(right), 1)}
        assert all(flag in name.split() or f"{flag}," in name.split() for name in mine for flag in doubts)
        assert any("own gradient" in name for name in mine) == (own and not doubts)
        assert any(name.startswith("worst-case") for name in mine) == (suite == "adaptive")
    assert numbers == {}
    assert all(f"`{flag}`" in verdict(reports) for raised, *_ in found for flag in raised)
