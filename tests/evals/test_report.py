"""`newcompute report`: the figures in the page are those of the runs, and a real browser shows it as it should be."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import chromium, find_chromium
from support import read_metrics, tiny_flags

from evals.report import write_report
from evals.runs import read_run
from launch.cli import main
from train.config_sources import load_config
from train.run_folder import RunFolder

FLIPS = """
[[transforms]]
kind = "bitflip"
weight = { mantissa = 1e-3 }
"""
HEADINGS = ["Summary", "Curves", "Configuration", "Hardware effects", "Checkpoints", "Events", "Samples"]
CHARTS = ["loss", "bits_per_byte", "grad_norm", "lr", "tokens_per_second", "memory_gib", "data_wait"]
ATTACK = "</script></title></pre><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, text_corpus) -> Path:
    """Three trained runs: clean, under a hardware effect, and a shorter one with another learning rate."""
    from train.job import run_job
    from train.prepare import prepare

    folder = tmp_path_factory.mktemp("outputs")
    (folder / "flips.toml").write_text(FLIPS)
    for name, files, changes in (
        ("clean", [], {}),
        ("flips", [str(folder / "flips.toml")], {"validation__transforms": "both"}),
        ("short", [], {"training__stop_after": 8, "optimizer__lr": 1e-3}),
    ):
        config = load_config(files, tiny_flags(folder, text_corpus, name, **changes), world_size=1)
        prepare(config, say=lambda text: None)
        run_job(config)
    event = {"step": 7, "event": "spike", "message": "loss 9.1 is 7 deviations above", "time": 1e9}
    with open(folder / "flips" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")
    return folder


@pytest.fixture(scope="module")
def report(outputs) -> Path:
    return write_report([str(outputs / name) for name in ("clean", "flips", "short")], outputs / "three.html", ["def "])


@pytest.fixture(scope="module")
def tab():
    program = find_chromium()
    if program is None:
        pytest.skip("needs a Chromium or Chrome, and there is none on PATH")
    with chromium(program) as page:
        yield page


def data_of(file: Path) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', file.read_text(encoding="utf-8"), re.DOTALL)[1])


class Tags(HTMLParser):
    def __init__(self, file: Path):
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def test_curves_are_what_the_runs_logged(report, outputs):
    data = data_of(report)
    assert list(data["charts"]) == CHARTS
    for number, name in enumerate(("clean", "flips", "short")):
        logged = read_metrics(outputs / name)
        for key, factor in (("loss", 1), ("grad_norm", 1), ("lr", 1), ("data_wait", 100)):
            (curve,) = (c for c in data["charts"][key]["curves"] if c["run"] == number and not c["dotted"])
            assert [step for step, _ in curve["points"]] == [row["step"] for row in logged if key in row]
            values = [factor * row[key] for row in logged if key in row]
            assert [value for _, value in curve["points"]] == pytest.approx(values, rel=1e-5)
    dotted = {c["label"]: c["points"] for c in data["charts"]["loss"]["curves"] if c["dotted"]}
    assert list(dotted) == ["clean, validation", "flips, validation", "flips, validation without hardware effects",
                            "short, validation"]  # fmt: skip
    clean = [[row["step"], row["val_loss_clean"]] for row in read_metrics(outputs / "flips") if "val_loss" in row]
    assert dotted["flips, validation without hardware effects"] == [pytest.approx(pair, rel=1e-5) for pair in clean]


def test_tables_tell_the_runs_apart(report, outputs):
    text = report.read_text(encoding="utf-8")
    last = {name: [r for r in read_metrics(outputs / name) if "loss" in r][-1]["loss"] for name in ("clean", "short")}
    assert f"{last['short']:.4f}<small>{last['short'] - last['clean']:+.4f}" in text
    differing = text.partition("What differs between the runs")[2].partition("</table>")[0]
    keys = re.findall(r"<th scope=row>([^<]+)", differing.replace("<wbr>", ""))
    assert {"run.name", "optimizer.lr", "training.stop_after", "transforms[0].weight.mantissa"} <= set(keys)
    assert not {"run.seed", "training.steps", "model.shape.dim"} & set(keys)
    assert "1. bitflip: 14 layers; transient" in text
    assert "loss 9.1 is 7 deviations above" in text
    checkpoints = text.partition('<h2 id="checkpoints"')[2].partition("</table>")[0]
    assert re.findall(r"<th scope=row>(\d+)", checkpoints) == ["5", "10", "15", "20"]


def test_samples_are_those_of_generate(report, outputs, capsys):
    main(
        ["generate", "--model", str(outputs / "clean"), "--prompt", "def ", "--max-new-tokens", "64", "--device", "cpu"]
    )
    generated = capsys.readouterr().out.removesuffix("\n")
    (sample,) = read_run(outputs / "clean").samples
    assert sample == {"step": 20, "prompt": "def ", "text": generated}
    assert "Step 20, greedy" in report.read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_a_browser_shows_it(report, tab, width, scheme):
    tab.open(report, width, 900, scheme)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.evaluate("innerWidth") == width
    assert tab.evaluate("[...document.querySelectorAll('h2')].map(e => e.textContent)") == HEADINGS
    assert tab.evaluate("[...document.querySelectorAll('figure.chart[data-key]')].map(e => e.dataset.key)") == CHARTS
    boxes = tab.evaluate(
        "[...document.querySelectorAll('.plot path.line:not(.thin)')].map(e => [e.getBoundingClientRect().width, "
        "getComputedStyle(e).stroke, getComputedStyle(e).strokeDasharray])"
    )
    assert len(boxes) == 3 * len(CHARTS)
    assert all(box[0] > 80 for box in boxes)
    assert (
        len({tuple(box[1:]) for box in boxes}) == len({box[1] for box in boxes}) == len({box[2] for box in boxes}) == 3
    )
    assert tab.evaluate("document.querySelectorAll('#chart-loss .mark').length") == 1
    # No text of an axis is smaller than 11 pixels, or outside the window.
    places = tab.evaluate(
        "[...document.querySelectorAll('.rows span, .columns span')].map(e => [parseFloat(getComputedStyle(e).fontSize), "
        "e.getBoundingClientRect().left, e.getBoundingClientRect().right])"
    )
    assert all(size >= 11 and left >= 0 and right <= width for size, left, right in places)
    light = sum(map(int, re.findall(r"\d+", tab.evaluate("getComputedStyle(document.body).backgroundColor")))) > 380
    assert light == (scheme == "light")
    assert tab.errors == []
    assert tab.requests == [report.as_uri()]


def test_controls_draw_the_curves_anew(report, tab):
    tab.open(report, 1400, 900, "light")
    shown = "document.querySelector('#chart-loss path.line').getAttribute('d')"
    first = tab.evaluate(shown)

    def change(name: str, value: str) -> None:
        tab.evaluate(
            f"e = document.forms.controls.elements.{name}; {value}; e.dispatchEvent(new Event('input', {{bubbles: true}}))"
        )

    change("smoothing", "e.value = '0'")
    again = [float(x) for x in re.findall(r"-?[\d.]+", tab.evaluate(shown))]
    assert again == pytest.approx([float(x) for x in re.findall(r"-?[\d.]+", first)], abs=0.2)  # one arithmetic, twice
    change("axis", "e.value = 'tokens'")
    ticks = tab.evaluate("[...document.querySelectorAll('#chart-loss .columns span')].map(e => e.textContent)")
    assert ticks[-1] == "10k"  # of 20 steps of 8 rows of 64 tokens
    assert tab.evaluate("document.querySelector('#chart-loss .axis').textContent") == "tokens"
    change("log", "e.checked = true")
    logarithmic = tab.evaluate(shown)
    assert logarithmic != first
    change("smoothing", "e.value = '0.9'")
    assert tab.evaluate(shown) != logarithmic
    assert "NaN" not in tab.evaluate("document.body.innerHTML")
    tab.evaluate(
        "s = document.querySelector('#chart-lr svg'); b = s.getBoundingClientRect(); s.dispatchEvent(new PointerEvent("
        "'pointermove', {clientX: b.right, clientY: b.top}))"
    )
    assert "clean: 0.0003 at 10,240" in tab.evaluate("document.querySelector('#chart-lr .reading').textContent")
    assert tab.errors == []


def test_it_is_whole_without_scripts(report, tab):
    tab.open(report, 390, 900, "light", script=False)
    assert tab.evaluate("document.forms.controls.getBoundingClientRect().height") == 0
    widths = "[...document.querySelectorAll('.plot path.line:not(.thin)')].map(e => e.getBoundingClientRect().width)"
    assert min(tab.evaluate(widths)) > 80
    assert tab.evaluate("document.querySelectorAll('.rows span').length") >= 2 * len(CHARTS)
    text = report.read_text(encoding="utf-8")
    assert text.count('class="line') == 3 * len(CHARTS) + 8 + 3  # curves, validation, legend


def hostile_run(folder: Path) -> Path:
    config = load_config([], ["--run.dir", str(folder), "--data.source", "files", "--data.paths", json.dumps([ATTACK]),
                              "--checkpoint.dir", "nonsense://user:hunter2@host/x"])  # fmt: skip
    RunFolder.of(config).write_config(config)
    path = folder / "run"
    rows = [
        {"step": 1, "loss": 2.0, ATTACK: 1.0},
        {"step": 1, "event": ATTACK, "message": ATTACK + " \ud800", "time": 1e30},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "samples.jsonl").write_text(json.dumps({"step": 1, "prompt": ATTACK, "text": ATTACK}) + "\n")
    return path.rename(folder / "run<script>window.hacked = 1<script>")


def test_text_of_a_run_stays_text(tmp_path, monkeypatch, request):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_this_test")
    page = write_report([str(hostile_run(tmp_path))], tmp_path / "page.html")
    tags = Tags(page)
    assert tags.tags.count("script") == 2
    assert "img" not in tags.tags
    assert tags.text.count(ATTACK) >= 4
    for secret in ("hf_secret_of_this_test", "hunter2"):
        assert secret not in page.read_text(encoding="utf-8")
    tab = request.getfixturevalue("tab")
    tab.open(page, 390, 900, "dark")
    assert tab.evaluate("window.hacked === undefined && document.images.length === 0")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert (tab.errors, tab.requests) == ([], [page.as_uri()])


def test_injected_script_would_not_run(report, tab):
    """The policy is a second line of defence: it holds where something was not escaped."""
    open_page = report.with_name("injected.html")
    text = report.read_text(encoding="utf-8")
    open_page.write_text(text.replace("<main>", "<main><script>window.hacked = 1</script>"), encoding="utf-8")
    tab.open(open_page, 390, 900, "light")
    assert tab.evaluate("window.hacked === undefined")
    assert any("Content Security Policy" in error for error in tab.errors)


def rows_of(count: int, loss) -> str:
    return "".join(
        json.dumps({"step": i, "loss": loss(i), "grad_norm": 1.0, "tokens": i}) + "\n" for i in range(1, count + 1)
    )


def test_runs_of_every_length(tmp_path, request):
    """No row, one row, nothing finite, and thousands of rows, alone and together."""
    contents = {
        "empty": "", "one": rows_of(1, lambda i: 3.0), "null": rows_of(5, lambda i: None),
        "long": rows_of(30_000, lambda i: None if i == 500 else 99.0 if i == 20_000 else 3.0 + i % 7),
    }  # fmt: skip
    for name, text in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    for name in contents:
        assert write_report([str(tmp_path / name)], None) == tmp_path / name / "report.html"
    page = write_report([str(tmp_path / name) for name in contents], tmp_path / "all.html")
    curves = {c["label"]: c["points"] for c in data_of(page)["charts"]["loss"]["curves"]}
    assert curves["one"] == [[1, 3.0]]
    assert [20_000, 99.0] in curves["long"]
    assert [500, None] in curves["long"]
    assert len(curves["long"]) <= 1000
    assert page.stat().st_size < 300_000
    assert "6 logged losses or gradient norms are not finite" in page.read_text(encoding="utf-8")
    tab = request.getfixturevalue("tab")
    for file in (page, *(tmp_path / name / "report.html" for name in contents)):
        tab.open(file, 390, 900, "light")
        assert tab.errors == []
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        tab.evaluate("e = document.forms.controls; if (e) e.dispatchEvent(new Event('input', {bubbles: true}))")
        assert tab.errors == []


def test_samples_need_something_to_generate_with(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit) as error:
        main(["report", str(tmp_path), "--sample", "def "])
    assert error.value.code == 2
    assert "neither a complete checkpoint nor an export/" in capsys.readouterr().err


def luminance(color: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colors_have_the_contrast_that_accessibility_asks_for():
    css = Path(write_report.__globals__["__file__"]).with_name("report.css").read_text(encoding="utf-8")
    themes = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colors = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        for name, least in {"text": 7, "quiet": 4.5, "link": 4.5, **{f"c{i}": 3 for i in range(6)}}.items():
            for ground in ("page", "panel"):
                bright, dark = sorted((luminance(colors[name]), luminance(colors[ground])), reverse=True)
                assert (bright + 0.05) / (dark + 0.05) >= least, (name, ground)
