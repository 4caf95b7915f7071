import pytest
import torch

from timm_nrpm.jobs.journal import Journal, digest_of


def test_rows_come_back(tmp_path):
    path = tmp_path / "new" / "run.jsonl"
    journal = Journal(path, {"seed": 0, "eps": 0.1})
    journal.add(2, {"images": "a", "right": [True, None]})
    journal.add(0, {"images": "b"})
    again = Journal(path, {"seed": 0, "eps": 0.1})
    assert again.rows == {2: {"images": "a", "right": [True, None]}, 0: {"images": "b"}} == journal.rows
    assert (again.has(2, "a"), again.has(1, "a")) == (True, False)
    with pytest.raises(ValueError, match=r"Row 2 of .* is of other images or labels: .*shuffle=False"):
        again.has(2, "c")


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_end_is_dropped(tmp_path, cut):
    path = tmp_path / "run.jsonl"
    journal = Journal(path, {"seed": 0})
    for number in range(3):
        journal.add(number, {"images": str(number)})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    resumed = Journal(path, {"seed": 0})
    for number in range(3):
        if number not in resumed.rows:
            resumed.add(number, {"images": str(number)})
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", ['{"a": 1}', "", "text\n", "[1]\n", '{"seed": 1}\n', '{"seed": 0}\n{"x": 1}\n'])
def test_files_of_others_are_left_alone(tmp_path, content):
    path = tmp_path / "run.jsonl"
    path.write_text(content)
    if not content:  # empty is as good as new
        Journal(path, {"seed": 0})
        return
    with pytest.raises(ValueError, match=r"or another file|give another file"):
        Journal(path, {"seed": 0})
    assert path.read_text() == content


def test_two_runs_in_one_file_are_told(tmp_path):
    one, two = (Journal(tmp_path / "run.jsonl", {}) for _ in range(2))
    one.add(0, {"images": ""})
    with pytest.raises(ValueError, match="give every run a file of its own"):
        two.add(0, {"images": ""})


def test_in_memory():
    journal = Journal(None, {})
    journal.add(0, {"images": "x"})
    assert journal.has(0, "x")


def test_a_digest_tells_images_and_labels_apart():
    pixels, labels = torch.rand(2, 1, 3, 3), torch.tensor([0, 1])
    same = digest_of(pixels, labels)
    assert digest_of(pixels.clone(), labels.int()) == same
    assert len({same, digest_of(pixels.flip(0), labels), digest_of(pixels, labels.flip(0))}) == 3
