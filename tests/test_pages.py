"""report.html: what a run and many runs look like, from their files alone; inert, complete, and the same without a network."""

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from finllm_prune.errors import InputError
from finllm_prune.pages import PAGE, compare_runs, run_page, write_page
from finllm_prune.pages.charts import Chart, Label, Mark, axis
from finllm_prune.recipe import parse
from finllm_prune.run import run
from tests import small
from tests.conftest import Call, tiny_model
from tests.test_suite import Page

NASTY = "<script>alert('x')</script><img src=https://example.org/x.png> & \"profit\" is up 5%"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A run with all that is measured by default, whose classes and texts try to be more than text."""
    home = tmp_path_factory.mktemp("pages")
    tiny_model(layers=2, seed=1).save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    for split in small.SPLITS:
        rows = [{**row, "label": f"<i>{row['label']}</i>"} for row in small.rows(split)]
        small.write_jsonl(home / "data" / f"{split}.jsonl", rows)
    content = {
        "model": str(home / "model"),
        "task": {"name": "sentiment", "dataset": str(home / "data"), "max_length": 32},
        "pruning": {"rules": [{"target": "mlp", "structure": "neuron", "criterion": "movement", "sparsity": 0.5}]},
        "dense": {"training": {"max_steps": 4, "learning_rate": 1e-2}},
        "training": {"max_steps": 6, "learning_rate": 2e-3, "use_cpu": True, "disable_tqdm": True},
        "gates": {"macro_f1_retention": 0.0},
        "output": str(home / "runs" / "first"),
    }
    with pytest.MonkeyPatch.context() as patch:
        small.few_resamples(patch)
        report = run(parse(content))
    assert report is not None
    return home / "runs" / "first"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """What a page is made of, to be changed; one text in it is a script."""
    folder = tmp_path / "second"
    folder.mkdir()
    for name in ("report.json", "recorder.parquet"):
        shutil.copy(finished / name, folder)
    flip = {"text": NASTY, "dense": "<b>up</b>", "pruned": "down", "truth": "<b>up</b>", "lost": True}
    (folder / "flips.json").write_text(json.dumps([flip]))
    return folder


def changed(folder: Path, **keys: Any) -> Path:
    figures = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps(figures | keys))
    return folder


def test_a_run_writes_its_page_and_nothing_in_it_is_more_than_text(finished: Path, copied: Path) -> None:
    assert (finished / PAGE).read_text() == run_page(finished), "from the files alone"
    text = run_page(copied)
    seen = Page(text)
    assert NASTY in seen.text
    assert "<i>positive</i>" in seen.text
    assert not {"script", "link", "img", "iframe", "i"} & set(seen.tags)
    assert not re.search(r"url\(|@import|https?:", text.replace("https://example.org", ""))

    for what in (
        "Density:", "Sparsity:", "Training loss:", "Mask churn:", "Scores until", "Most changed:", "Calibration", "Slices",
        "Texts changed a little", "Which class pays", "CPU latency by batch", "against CPU time: on the front", "1 × 64",
    ):  # fmt: skip
        assert what in seen.text, what
    assert "Not measured" not in seen.text
    assert seen.tags.count("svg") == text.count('role="img" aria-label='), "each drawing has its text"


def test_texts_can_be_left_out(copied: Path, call: Call) -> None:
    assert call("report", copied, "--no-texts") == 0
    page = (copied / PAGE).read_text()
    assert "profit" not in page
    assert "Texts were left out as asked." in page


def test_what_a_run_did_not_measure_is_said(copied: Path) -> None:
    (copied / "recorder.parquet").unlink()
    figures = json.loads((copied / "report.json").read_text())
    for name in ("evidence", "exported", "warnings", "target", "paired_p", "unit"):  # as a first version left them out
        figures.pop(name)
    figures["history"][1]["loss"] = float("nan")
    (copied / "report.json").write_text(json.dumps(figures))
    text = run_page(copied)
    assert "Not measured by this run: the test against a margin" in text
    assert "Not recorded by this run" in text
    assert "nan" not in Page(text).text.replace("finance", "")


@pytest.mark.parametrize("content", ["{", "[]", '{"gates": []}', '{"gates": {}, "accuracy": 1}'])
def test_a_damaged_report_is_one_sentence(copied: Path, content: str) -> None:
    (copied / "report.json").write_text(content)
    with pytest.raises(InputError, match="second: its files are not those that a run writes"):
        run_page(copied)
    (copied / "report.json").unlink()
    with pytest.raises(InputError, match=r"second holds no report\.json; name the folder of a finished run"):
        compare_runs([copied, copied], copied / "all.html")
    assert not (copied / "all.html").exists()


def test_many_runs_are_compared_where_they_were_tested_alike(
    finished: Path, copied: Path, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    better = changed(copied, latency_ratio=0.01, gates={})
    value = json.loads((finished / "report.json").read_text())["macro_f1"]
    third = shutil.copytree(copied, tmp_path / "<b>third & last")
    changed(third, latency_ratio=2.0, passed=False, macro_f1=value | {"pruned": value["dense"] - 0.2})
    fourth = changed(shutil.copytree(copied, tmp_path / "fourth"), task="filings", bytes={"dense": 9, "packed-int8": 1})
    changed(fourth, exported={"packed-int8": {"metrics": {"accuracy": value}, "collapsed": True}})
    assert "The packed-int8 model answers everything alike" in Page(run_page(fourth)).text
    assert call("report", finished, better, third, fourth, "--out", tmp_path / "all.html") == 0
    assert "Written: " in capsys.readouterr().out
    seen = Page((tmp_path / "all.html").read_text())
    assert "4 runs compared" in seen.text
    passed = sum(json.loads((each / "report.json").read_text())["passed"] for each in (finished, better, third, fourth))
    assert f"{passed} of 4 passed" in seen.text
    assert "<b>third & last" in seen.text
    assert "profit" not in seen.text
    assert "sentiment, macro-F1" in seen.text
    assert "filings, accuracy" in seen.text
    assert "against CPU time: on the front" in seen.text
    rows = re.findall(r"<tr><td>(\d).*?</tr>", (tmp_path / "all.html").read_text(), re.DOTALL)
    assert rows == ["1", "2", "3", "1"]
    (link,) = seen.links
    assert (tmp_path / link).resolve() == (finished / PAGE).resolve(), "the one that has a page"


def test_names_of_marks_are_not_written_over_each_other() -> None:
    marks = [Mark(x, y, "front", f"number {n}") for n, (x, y) in enumerate([(1, 1), (1, 1.1), (1.02, 1), (5, 5)])]
    ends = [0.0, 6.0]
    labels = Chart("", axis("x", ends), axis("y", ends), marks=marks).labels()
    assert not any(one.meets(other) for place, one in enumerate(labels) for other in labels[:place])
    assert Label(0, 0, "start", "aaaaa").meets(Label(30, 5, "end", "b"))


# The page in a frame as wide as a screen, measured from outside: its own policy lets no script run in it.
HARNESS = """<!doctype html><meta name="color-scheme" content="light dark"><body><script>
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function rgb(color, below) {
  canvas.fillStyle = `rgb(${below})`; canvas.fillRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
}
function light(c) {
  const [r, g, b] = c.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function ground(element, style) {
  return element ? rgb(style(element).backgroundColor, ground(element.parentElement, style)) : [255, 255, 255];
}
async function look(name, width) {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:900px;border:0`; frame.src = name;
  document.body.append(frame);
  await new Promise(done => frame.onload = done);
  const page = frame.contentDocument, style = e => frame.contentWindow.getComputedStyle(e), faint = [], tiny = [];
  page.querySelectorAll("details").forEach(e => e.open = true);
  for (const e of page.querySelectorAll("main *")) {
    if (![...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()) || !e.getClientRects().length) continue;
    const below = ground(e, style), ink = rgb(e.closest("svg") ? style(e).fill : style(e).color, below);
    const [low, high] = [light(below), light(ink)].sort((a, b) => a - b);
    if ((high + 0.05) / (low + 0.05) < 4.5) faint.push(e.textContent.slice(0, 40));
    if (e.getBoundingClientRect().height < 8) tiny.push(e.textContent.slice(0, 40));
  }
  const root = page.documentElement, asked = frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name);
  return {room: root.clientWidth, inside: root.scrollWidth, asked, ground: ground(page.body, style), faint, tiny,
    drawn: page.querySelectorAll("svg").length, title: page.title};
}
(async () => {
  const found = [];
  for (const name of ["run.html", "runs.html"]) for (const width of [390, 1280]) found.push(await look(name, width));
  document.body.innerHTML = "<pre></pre>"; document.querySelector("pre").textContent = JSON.stringify(found);
})();
</script>"""


@pytest.fixture
def served(finished: Path, copied: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """A folder with the two pages and the frame, its address, and what is asked of it."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            asked.append(self.path)

    place = copied.parent
    write_page(copied, place / "run.html")
    compare_runs([finished, copied], place / "runs.html")
    (place / "look.html").write_text(HARNESS)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(place)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield place, f"127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium in PATH to look at the pages with")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser_it_is_readable_and_asks_for_nothing(served: tuple[Path, str, list[str]], dark: bool) -> None:
    place, address, asked = served
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        "--disable-component-update", "--disable-sync", "--disable-default-apps", f"--user-data-dir={place / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom", f"http://{address}/look.html",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "CONSOLE" not in done.stderr
    said = re.search(r"<pre>(.*)</pre>", done.stdout, re.DOTALL)
    assert said is not None, done.stdout[:2000]
    pages = json.loads(html.unescape(said[1]))
    assert len(pages) == 4
    for seen in pages:
        assert seen["inside"] <= seen["room"], "nothing sticks out at the side"
        assert not seen["asked"]
        assert not seen["faint"], "contrast below 4.5"
        assert not seen["tiny"]
        assert seen["drawn"] >= 3
        assert (max(seen["ground"]) < 80) == dark
    assert set(asked) - {"/favicon.ico"} == {"/look.html", "/run.html", "/runs.html"}
