"""A hundred kills at random moments, of processes that push and pull: there is always a whole variant on each side."""

from __future__ import annotations

import random
import time

import hub_worker
import pytest
from hub_worker import OURS, Failed, Worker

hub, repo, small, worker = (getattr(hub_worker, name) for name in ("hub", "repo", "small", "worker"))

KILLS = 100
LAMBDAS = (0.2, 0.6)
SPREAD = 1.3
"""A process is killed within so many times the time that a push takes, so that some pushes and most pulls get to the
end."""


@pytest.mark.slow
def test_a_hundred_kills_leave_a_whole_variant(hub, worker, repo, tmp_path):
    """In the repository always, and in a copy except when it is killed between two of its files: that one is refused,
    and whole again after the next pull, which takes what was left of the one before away."""
    chance = random.Random(0)
    known = [worker(f"seen(variant({lam}))") for lam in LAMBDAS]
    worker.push(repo, f"variant({LAMBDAS[0]})", full=True, cost=False)
    whole = set(hub.repo(repo).files()) - {".gitattributes"}
    assert whole == OURS - {"cost.json"} | {"model.safetensors"}
    fresh = Worker(hub, tmp_path / "fresh")  # like those that are killed, of which none has pushed before
    fresh("small")
    start = time.monotonic()
    fresh.push(f"{repo}-beside", f"variant({LAMBDAS[0]})", full=True, cost=False)
    longest = SPREAD * (time.monotonic() - start)
    fresh.kill()
    pulled, pushed, kills, refused = set(), set(), 0, 0
    while kills < KILLS:
        mortal = Worker(hub, tmp_path / "mortal")
        mortal("small")  # it has started
        while True:
            lam = chance.choice(LAMBDAS)
            what = chance.choice(
                (f"push(variant({lam}), {repo!r}, full=True, cost=False)", f"str(nrpm.pull({repo!r}, 'copy'))")
            )
            asked = mortal.start(what)
            time.sleep(chance.uniform(0.0, longest))
            if not asked.done():
                break
            asked.result()  # nothing fails that is not killed
        mortal.kill()
        kills += isinstance(asked.exception(timeout=60), Failed)  # or it had answered just before
        files = {name for name in hub.repo(repo).files() if name != ".gitattributes"}
        assert files == whole
        pushed.add(known.index(worker.load(repo)))
        copy = tmp_path / "mortal" / "copy"
        if copy.exists():
            loaded = worker.start(f"seen(nrpm.from_pretrained({str(copy)!r}))")
            if (broken := loaded.exception(timeout=60)) is None:
                pulled.add(known.index(loaded.result()))
            else:
                assert "get it again" in str(broken)
                refused += 1
                worker(f"nrpm.pull({repo!r}, {str(copy)!r})")
                assert worker(f"seen(nrpm.from_pretrained({str(copy)!r}))") in known
                assert {path.name for path in copy.iterdir()} == whole
    assert pushed == pulled == {0, 1}
    print(f"{kills} kills, {refused} copies refused and pulled again")
    last = worker.push(repo, f"variant({LAMBDAS[1]})", full=True, cost=False)
    assert last["commit"] == hub.repo(repo).commits()[0].oid
    worker(f"nrpm.pull({repo!r}, {str(copy)!r})")
    assert worker(f"seen(nrpm.from_pretrained({str(copy)!r}))") == known[1]
    assert {path.name for path in copy.iterdir()} == whole
