"""What a push leaves of a repository, and that it says everything that it takes away, whatever there was before."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub import HfApi
from huggingface_hub.utils.sha import git_hash
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_nrpm.checks import printable
from timm_nrpm.hub.cards import PICTURE
from timm_nrpm.hub.contents import BESIDE
from timm_nrpm.hub.earlier import Earlier
from timm_nrpm.hub.losses import lost_files
from timm_nrpm.hub.pushing import Push
from timm_nrpm.hub.templates import CARD
from timm_nrpm.models.downloads import Repository
from timm_nrpm.models.format import CONFIG, TENSORS

OWN = (TENSORS, "config.json", "model.safetensors")
FOREIGN = ("notes.txt", "eval\x1b.csv", "optimizer.pt")

bytes_of = st.sampled_from([b"", b"one", b"two"])
before = st.dictionaries(st.sampled_from([CONFIG, *OWN, *BESIDE, *FOREIGN]), bytes_of)
files = st.dictionaries(st.sampled_from([*OWN, *BESIDE]), bytes_of)
models = st.none() | st.tuples(st.sampled_from(["old", "new"]), st.sets(st.sampled_from(OWN)))


@settings(max_examples=150)
@given(before=before, files=files, model=models)
def test_a_push_leaves_its_files_and_those_of_others_and_names_every_other_that_it_takes(before, files, model):
    """A config in the repository is that of an earlier model, or cannot be read."""
    files = {CONFIG: b"new", **files}
    content = None if model is None else {"base": {"architecture": model[0]}, "files": dict.fromkeys(model[1], "")}
    configs = {CONFIG: content} if CONFIG in before else {}
    sizes = {name: len(data) for name, data in before.items()}
    earlier = Earlier(Repository("me/v"), sizes, configs, None, None, None)
    tree = {name: SimpleNamespace(blob_id=git_hash(data)) for name, data in before.items()}
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        push = Push(HfApi(), "me/v", None, None, Path(folder), dict.fromkeys(files, 0), earlier.owned(BESIDE))
        changed, stale = push.difference(tree)
    left = {name: data for name, data in before.items() if name not in stale} | {name: files[name] for name in changed}

    theirs = set() if not configs else {CONFIG, *BESIDE, *(model[1] if model else ())}
    drawn_alike = TENSORS in before and before[TENSORS] == files.get(TENSORS)  # the picture of the same lambdas
    assert all(left[name] == data for name, data in files.items() if not (name == PICTURE and drawn_alike))
    assert all(left[name] == data for name, data in before.items() if name not in files and name not in theirs)
    assert left.keys() == files.keys() | (before.keys() - theirs)

    lost = lost_files(earlier, SimpleNamespace(title="a variant of new"), changed, stale)
    said = [line.partition(" (")[0] for line in lost if "bytes)" in line]
    taken = {name for name, data in before.items() if left.get(name) != data}
    renewed = {CARD, *(theirs & {*BESIDE, *files})}  # made anew by a push, or a file of the earlier model
    assert sorted(said) == sorted(printable(name) for name in taken - renewed)
    other_model = bool(configs) and (model is None or model[0] == "old")
    assert any("in whose place" in line for line in lost) == other_model
