"""A push to a real HTTP server that speaks the Hub's protocol: what is there then, and after each fault."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from tests import small
from tests.conftest import logits, tiny_model
from tests.hub.finished import QUOTED, report, write_output
from tests.hub.loopback import READ, WRITE, Fault, LoopbackHub
from tests.hub.shell import Done, Shell
from tests.test_faults import contents

pytestmark = pytest.mark.slow

LOAD = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, pipeline
if sys.argv[3] != "alone":
    import finllm_prune
options = json.loads(sys.argv[2])
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], **options).eval()
ids = torch.randint(4, 300, (3, 12), generator=torch.Generator().manual_seed(5))
mask = torch.ones_like(ids)
mask[0, 7:] = 0
with torch.inference_mode():
    print(json.dumps(model(input_ids=ids, attention_mask=mask).logits.tolist()))
if not options:
    assert len(pipeline("text-classification", model=sys.argv[1], device="cpu")("Profit rose.")) == 1
"""


@pytest.fixture
def out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_output(tmp_path / "out", tokenizer)


@pytest.fixture
def name(request: pytest.FixtureRequest, hub: LoopbackHub) -> Iterator[str]:
    """A repository of the test's own."""
    hub.calls.clear()
    hub.blobs.clear()
    hub.faults.clear()
    yield "org/" + "".join(c if c.isalnum() else "-" for c in request.node.name)[:60].strip("-").replace("--", "-")
    assert all(call.token == "" for call in hub.calls if "/_blobs/" in call.line), "storage is shown no token"


def loaded(shell: Shell, name: str, options: dict[str, str], how: str = "alone") -> torch.Tensor:
    """The logits of a model in a fresh process, by the endpoint alone."""
    environment = shell.environment | {"HF_TOKEN": READ}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, name, json.dumps(options), how], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


def uploads(hub: LoopbackHub) -> list[int]:
    """Bytes of the large files that came."""
    return [call.received for call in hub.calls if call.line.startswith("PUT /_blobs/") and call.status == 200]


def refused(done: Done, code: int, *words: str) -> None:
    line = done.err.splitlines()[-1]
    assert done.code == code, done.all
    assert "Traceback" not in done.all
    for word in words:
        assert word in line
    assert WRITE not in done.all


def test_what_is_pushed_loads_in_a_fresh_process(
    hub: LoopbackHub, shell: Shell, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    out = write_output(tmp_path / "out", tokenizer, ("masked", "compact", "ragged", "packed"))
    before = contents(out)
    done = shell("push", out, name, "--tag", "v1", token=WRITE)
    assert done.code == 0, done.all
    assert f"compact: {name}\n" in done.out
    assert f"packed: {name}, subfolder packed" in done.out
    assert contents(out) == before
    assert hub.repos[name].private
    files = hub.files(name)
    assert files == hub.files(name, "v1")
    assert len(hub.repos[name].branches["main"]) == 2, "one commit on the first, empty one"
    assert {path.partition("/")[0] for path in files if "/" in path} == {"masked", "ragged", "packed", "plots"}
    stays = {
        "report.json",
        "report.html",
        "flips.json",
        "bad_rows.jsonl",
        "governance.yaml",
        "recorder.parquet",
        "dense/model.safetensors",
    }
    assert not stays & set(files)
    assert not any(QUOTED.encode() in content for content in files.values()), "no text of the data leaves"
    assert b"deals" not in files["recipe.yaml"]
    card = files["README.md"].decode()
    assert f'model="{name}"' in card
    assert f'from_pretrained("{name}", subfolder="masked")' in card
    expected = logits(AutoModelForSequenceClassification.from_pretrained(out / "compact"))
    torch.testing.assert_close(loaded(shell, name, {}), expected, rtol=0, atol=1e-6)
    for place, how in (("masked", "alone"), ("packed", "with finllm_prune")):
        got = loaded(shell, name, {"subfolder": place, "revision": "v1"}, how)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    done = shell("verify", name, token=READ)
    assert (done.code, len(done.out.splitlines())) == (0, 4), done.all
    assert f"{name}/ragged: ragged checkpoint holds: hashes" in done.out
    assert WRITE not in "".join(path.read_text() for path in tmp_path.rglob("*.md"))


def test_a_second_push_sends_only_what_changed_and_takes_away_what_is_gone(
    hub: LoopbackHub, shell: Shell, out: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    assert shell("push", out, name, token=WRITE).code == 0
    assert len(uploads(hub)) == 3, "two weights and a plot"
    commits = list(hub.repos[name].branches["main"])
    hub.calls.clear()
    done = shell("push", out, name, token=WRITE)
    assert "Nothing new: " in done.out, done.all
    assert uploads(hub) == []
    assert hub.repos[name].branches["main"] == commits
    (out / "compact" / "README.md").write_text("# out\n\nAnother card.\n")
    assert "Pushed: " in shell("push", out, name, "--format", "compact", token=WRITE).out
    assert uploads(hub) == []
    assert "Another card." in hub.files(name)["README.md"].decode()
    assert not [path for path in hub.files(name) if path.startswith("masked/")], "not of this push"
    other = write_output(tmp_path / "other", tokenizer, ("ragged",), seed=1)
    assert shell("push", other, name, token=WRITE).code == 0
    assert "model.safetensors" not in hub.files(name), "from_pretrained would take the old model"
    assert shell("verify", name, token=READ).code == 0


def test_branches_and_proposals(hub: LoopbackHub, shell: Shell, out: Path, name: str) -> None:
    assert shell("push", out, name, token=WRITE).code == 0
    (out / "compact" / "README.md").write_text("# out\n\nNext.\n")
    main = hub.files(name)
    hub.faults.append(Fault("POST .*/commit/next", 403, message="no"))
    refused(shell("push", out, name, "--revision", "next", token=WRITE), 5, "(403: no)")
    assert set(hub.files(name, "next")) == {".gitattributes"}, "a new branch is never main's model by another name"
    assert shell("push", out, name, "--revision", "next", token=WRITE).code == 0
    assert "Next." in hub.files(name, "next")["README.md"].decode()
    done = shell("push", out, name, "--create-pr", token=WRITE)
    assert done.out.splitlines()[-1].endswith("/discussions/1"), done.all
    assert hub.files(name, "refs/pr/1")["README.md"] == hub.files(name, "next")["README.md"]
    assert hub.files(name) == main
    assert shell("push", out, name, "--tag", "v1", token=WRITE).code == 0
    refused(shell("push", out, name, "--tag", "v1", token=WRITE), 2, "has a tag v1 already")


def test_a_repository_that_is_public_or_somebody_elses_is_left_alone(
    hub: LoopbackHub, shell: Shell, out: Path, name: str
) -> None:
    repo = hub.create(name, private=False)
    refused(shell("push", out, name, token=WRITE), 2, "is public; make it private", "--public")
    assert shell("push", out, name, "--public", token=WRITE).code == 0
    repo.files[repo.branches["main"][-1]] = {"pytorch_model.bin": b"theirs", ".gitattributes": b""}
    refused(
        shell("push", out, name, "--public", token=WRITE), 2, "holds pytorch_model.bin, which finllm-prune did not push"
    )


def test_a_failed_gate_is_the_first_line_of_the_card(hub: LoopbackHub, shell: Shell, out: Path, name: str) -> None:
    report(out, passed=False)
    refused(
        shell("push", out, name, token=WRITE),
        2,
        "failed gates: agreement (0.700, threshold 0.8)",
        "--allow-failed-gates",
    )
    assert hub.calls == []
    assert shell("push", out, name, "--allow-failed-gates", token=WRITE).code == 0
    text = hub.files(name)["README.md"].decode().split("\n---\n")[1].lstrip()
    assert text.startswith(
        "**FAILED gates: agreement (0.700, threshold 0.8). Pushed with --allow-failed-gates.**\n\n# out"
    )


ONCE_AND_FOR_ALL = {
    "no token": (None, None, 2, "there is no token to push to org/"),
    "wrong token": ("hf_" + "x" * 30, None, 5, "the Hub does not take the token (401: Invalid credentials"),
    "reader": (READ, None, 5, "take a token that may write to org"),
    "quota": (
        WRITE, Fault("POST .*lfs/objects/batch", 403, 9, "Private repository storage limit reached"), 5,
        "(403: Private repository storage limit reached); take a token that may write to org, or make room",
    ),
    "payment": (WRITE, Fault("POST .*/preupload/", 402, 9, "Storage is full"), 5, "or make room where its storage is full"),
    "conflict": (WRITE, Fault("POST .*/commit/", 412, 9, "A commit has happened since"), 5, "changed by somebody else"),
    "busy for long": (
        WRITE, Fault("POST .*/commit/", 429, 9, headers={"Retry-After": "3600"}), 5, "run this again in 3600 s",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ONCE_AND_FOR_ALL)
def test_what_does_not_pass_is_told_with_its_remedy(
    hub: LoopbackHub, shell: Shell, out: Path, name: str, case: str
) -> None:
    token, fault, code, words = ONCE_AND_FOR_ALL[case]
    before = contents(out)
    hub.faults += [fault] if fault is not None else []
    refused(shell("push", out, name, token=token), code, words)
    assert contents(out) == before
    assert name not in hub.repos or set(hub.files(name)) == {".gitattributes"}, "no half of it is to be seen"
    hub.faults.clear()
    sent = sum(uploads(hub))
    assert shell("push", out, name, token=WRITE).code == 0
    assert len(uploads(hub)) == 3, f"{sent} bytes were there already"
    assert "model.safetensors" in hub.files(name)


PASSING = {
    "429": Fault("POST .*/commit/", 429, 1, headers={"Retry-After": "1"}),
    "429 at once": Fault("POST /api/repos/create", 429, 1, headers={"Retry-After": "1"}),
    "429 of a file": Fault("PUT /_blobs/", 429, 1, headers={"Retry-After": "0"}),
    "500 while committing": Fault("POST .*/commit/", 500, 2),
    "answer lost": Fault("POST .*/commit/", 0, 1, late=True),
    "500 after committing": Fault("POST .*/commit/", 502, 1, late=True),
    "cut within a large file": Fault("PUT /_blobs/", 0, 2),
    "cut within the commit": Fault("POST .*/commit/", 0, 1),
}


@pytest.mark.parametrize("case", PASSING)
def test_what_passes_is_waited_for(hub: LoopbackHub, shell: Shell, out: Path, name: str, case: str) -> None:
    fault = PASSING[case]
    hub.faults.append(fault)
    done = shell("push", out, name, token=WRITE)
    assert done.code == 0, done.all
    assert fault.times == 0
    assert len(hub.repos[name].branches["main"]) == 2, "no commit is made twice"
    assert len(uploads(hub)) == 3, "no file is taken twice"
    assert WRITE not in done.all


def test_a_hub_that_fails_for_long_shows_nothing_and_the_second_push_goes_on(
    hub: LoopbackHub, shell: Shell, out: Path, name: str
) -> None:
    before = contents(out)
    hub.faults.append(Fault("POST .*/commit/", 500, 5, "out of order"))
    refused(
        shell("push", out, name, token=WRITE), 5, "the Hub failed (500: out of order); run this again later", "is whole"
    )
    assert set(hub.files(name)) == {".gitattributes"}
    assert contents(out) == before
    hub.faults.append(Fault("PUT /_blobs/", 500, 99))  # none is called
    hub.calls.clear()
    assert shell("push", out, name, token=WRITE).code == 0
    assert uploads(hub) == []


@pytest.mark.full
def test_a_connection_that_is_cut_again_and_again(hub: LoopbackHub, shell: Shell, out: Path, name: str) -> None:
    """One of the two weights arrives; it is not sent again."""
    large = hub_oid(out / "masked" / "model.safetensors")
    hub.faults.append(Fault(f"PUT /_blobs/{large}", 0, 99))
    refused(shell("push", out, name, token=WRITE), 5, "the connection was cut", "what the Hub has is not sent again")
    assert set(hub.files(name)) == {".gitattributes"}
    assert len(uploads(hub)) == 2
    hub.faults.clear()
    hub.calls.clear()
    assert shell("push", out, name, token=WRITE).code == 0
    assert uploads(hub) == [(out / "masked" / "model.safetensors").stat().st_size]


def hub_oid(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_run_ends_with_its_push_and_is_whole_without_it(
    hub: LoopbackHub, shell: Shell, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    tiny_model(layers=1, seed=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    small.write_folder(tmp_path / "data")
    content = {
        "model": str(tmp_path / "model"), "task": {"name": "sentiment", "dataset": str(tmp_path / "data"), "max_length": 32},
        "pruning": {"rules": [{"target": "mlp", "structure": "neuron", "criterion": "movement", "sparsity": 0.5}]},
        "dense": {"training": {"max_steps": 12, "learning_rate": 1e-2}}, "gates": {"agreement": 0.2},
        "training": {"max_steps": 6, "learning_rate": 2e-3, "per_device_train_batch_size": 24, "use_cpu": True},
        "hub": {"repo_id": name, "tag": "v1"}, "output": str(tmp_path / "out"),
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    refused(shell("run", tmp_path / "mine.yaml"), 2, f"hub: there is no token to push to {name} with")
    assert not (tmp_path / "out").exists()
    hub.faults.append(Fault("POST .*/preupload/", 403, 9, "no room"))
    done = shell("run", tmp_path / "mine.yaml", token=WRITE)
    refused(done, 5, "no room", f"push it with: finllm-prune push {tmp_path / 'out'} {name} --tag v1")
    assert "macro-F1" in done.out
    assert not (tmp_path / "out.partial").exists()
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or WRITE.encode() not in path.read_bytes(), path
    hub.faults.clear()
    assert set(hub.files(name)) == {".gitattributes"}
    done = shell(*done.err.splitlines()[-1].partition(": finllm-prune ")[2].split(), token=WRITE)
    assert (done.code, "Pushed: " in done.out) == (0, True), done.all
    assert {"README.md", "model.safetensors", "masked/model.safetensors"} <= set(hub.files(name, "v1"))
    data = tmp_path / "data" / "test.jsonl"
    compare = ("pull-and-compare", name, tmp_path / "out" / "dense", "--data", data, "--label", "none")
    done = shell(*compare, token=READ)
    assert (done.code, "same prediction" in done.out) == (0, True), done.all
