"""Several real ranks over gloo, DDP and FSDP2: the masks and weights of one rank with the same global batch.

What each rank does lies in ``tests/ranks.py``; one set of processes runs all combinations.
"""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.ranks import UNDER
from tests.test_processes import ENVIRONMENT, ROOT

pytestmark = pytest.mark.slow
Found = dict[str, Any]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.full)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    out = tmp_path_factory.mktemp("ranks") / "found.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(request.param)]
    done = subprocess.run(
        [*launch, "-m", "tests.ranks", str(out)], env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, cwd=ROOT,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("engine", "structure", "criterion"), [(engine, *each) for engine, pairs in UNDER.items() for each in pairs]
)
def test_5_all_ranks_choose_the_masks_of_one_rank(found: Found, engine: str, structure: str, criterion: str) -> None:
    """With seeds of their own, gradient accumulation and an uneven last batch."""
    seen = found[engine][f"{structure} {criterion}"]
    assert set(seen["hashes"]) == {seen["hash"]}
    assert seen["sparsity"] == pytest.approx([0.5, 0.5])
    assert seen["apart"] < 1e-5
    assert seen["scores apart"] < 1e-4


def test_11_the_threshold_of_split_scores_is_exact(found: Found) -> None:
    assert found["search"]


@pytest.mark.parametrize("combination", ["unstructured movement", "neuron platon", "n:m magnitude"])
def test_a_checkpoint_of_all_ranks_is_read_by_fewer(found: Found, combination: str) -> None:
    """Split over two ranks (the others hold copies), over one, and not at all."""
    hashes = found["reshard"][combination]
    assert hashes.keys() == {"2", "1", "whole", "undisturbed"}
    assert set(hashes.values()) == {hashes["undisturbed"]}
