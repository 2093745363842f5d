"""The report of a run: self-contained, equal to the metrics, and safe with untrusted texts."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from selenium.webdriver.support.ui import WebDriverWait

from basic.analysis.report.html import script_json
from basic.analysis.report.page import report_page
from basic.common.config_files import save_config
from basic.common.errors import DamagedFileError, NotARunError
from basic.model import ModelConfig
from basic.Tokenizer import Tokenizer
from basic.tokens.flat_file import TokenFileWriter
from basic.training.records.metrics import read_metrics
from basic.training.settings import DataConfig, RunConfig, TrainConfig
from tests.analysis.test_plotting import svg_texts
from tests.helpers.scripts import run_script

HOSTILE = "</script><script>alert('1')</script><img src=x onerror=\"alert(2)\"><!-- & &amp; </blockquote> $title"
VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """The elements of a page, and the texts by kind of element."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data

    @property
    def curves(self) -> dict:
        scripts = [attributes for tag, attributes in self.elements if tag == "script"]
        assert [attributes.get("id") for attributes in scripts] == ["curves", None]
        assert not set("<>&").intersection(self.texts["script"][0]), "nothing in the data can end the script element"
        return json.loads(self.texts["script"][0])

    def rows(self) -> list[str]:
        return [" ".join(row.split()) for row in self.texts["tr"]]


def record(step: int, **more) -> dict:
    numbers = {"learning_rate": 1e-3 / step, "gradient_norm": 1 / 3, "tokens_per_s": 1000.0 + step}
    return {"step": step, "tokens": 640 * step, "wall_s": 40.5 * step, "train_loss": 8 / step, **numbers, **more}


def write_log(folder: Path, records: list[dict]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run with everything that a report shows, moved after its training, with hostile texts in every field."""
    folder = tmp_path / 'a<b>&"c'
    folder.mkdir()
    config = RunConfig(
        model=ModelConfig(vocab_size=11, context_length=8, d_model=16, num_layers=1, num_heads=2),
        train=TrainConfig(steps=50, end_of_text=HOSTILE, max_learning_rate=0.003),
        data=DataConfig(train_tokens="elsewhere/train.bin", valid_tokens="elsewhere/valid.bin"),
    )
    save_config(config, folder / "config.toml")
    samples = [{"kind": "sample", "step": step, "text": f"{HOSTILE} {step}"} for step in range(1, 21)]
    training = [record(step, **({"valid_loss": 9 / step} if step % 5 == 0 else {})) for step in range(1, 21)]
    training[3]["train_loss"] = None  # not finite
    write_log(folder, [*training, *samples, {"kind": "nonfinite", "step": 4, "loss": None}])
    vocab = {0: b"a", 1: b"\xff", 2: HOSTILE.encode(), 3: b" the\n", 4: b"<|end|>"}
    Tokenizer(vocab, [], ["<|end|>"], kernels=False).save(folder / "tokenizer")
    for name, source_bytes in (("train", 50), ("valid", 12)):
        with TokenFileWriter(folder / f"{name}.bin", vocab_size=11) as writer:
            writer.write([1, 2, 3, 4], source_bytes=source_bytes)
    first = {"step": 0, "torch": HOSTILE, "tokens": {"count": 7}, "command": ["train.py", "--resume"]}
    starts = [first, first | {"step": 12, "tokens": {"count": 8}}]
    (folder / "environment.json").write_text(json.dumps({"starts": starts}))
    return folder


def page_of(run_dir: Path, **options) -> Page:
    return Page(report_page(run_dir, **options))


def test_curves_are_the_metrics(run_dir):
    curves = page_of(run_dir, floor_nats=1.5).curves
    records = read_metrics(run_dir / "metrics.jsonl")
    assert len(records) == 20
    columns = ("step", "tokens", "wall_s", "train_loss", "valid_loss", "learning_rate", "gradient_norm", "tokens_per_s")
    expected = {"label": "", "columns": {name: [one.get(name) for one in records] for name in columns}, "lost": [4]}
    assert curves == {"runs": [expected], "floor": 1.5, "uniform": math.log(11)}


def test_chart_columns_are_in_the_data_and_named(run_dir):
    page = page_of(run_dir)
    charts = [attributes for tag, attributes in page.elements if attributes.get("class") == "chart"]
    assert len(charts) == 4
    for attributes in charts:
        names = str(attributes["data-series"]).split(" ")
        assert set(names) <= page.curves["runs"][0]["columns"].keys()
        assert len(str(attributes["data-names"]).split("|")) == len(names)
    axes = [attributes["value"] for tag, attributes in page.elements if attributes.get("name") == "axis"]
    assert axes == ["step", "tokens", "wall_s"]
    assert set(axes) <= page.curves["runs"][0]["columns"].keys()


def test_html_in_texts_is_escaped(run_dir):
    page = page_of(run_dir)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert not [attributes for _, attributes in page.elements if "onerror" in attributes]
    assert page.texts["title"] == page.texts["h1"] == ['a<b>&"c']
    assert f"end_of_text{HOSTILE}" in page.rows()
    assert f"torch{HOSTILE}" in page.rows()
    assert HOSTILE.replace(" ", "·") in page.texts["li"]
    assert f"{HOSTILE} 20" in page.texts["blockquote"]


def test_html_in_the_data_of_the_curves_is_escaped():
    assert not set("<>&").intersection(script_json([HOSTILE]))
    assert json.loads(script_json([HOSTILE])) == [HOSTILE]


def test_page_is_self_contained(run_dir):
    html = report_page(run_dir)
    page = Page(html)
    assert not {"link", "iframe", "img", "base", "object"} & {tag for tag, _ in page.elements}
    assert not {"src", "href", "srcset", "action"} & {name for _, attributes in page.elements for name in attributes}
    assert "url(" not in html
    assert "@import" not in html
    assert html.count("http") == html.count("http-equiv") + html.count("http://www.w3.org/2000/svg")
    policy = [attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]


def test_key_figures(run_dir):
    page = page_of(run_dir)
    figures = dict(zip(page.texts["dt"], page.texts["dd"], strict=False))
    loss = 9 / 20
    assert figures["Validation loss"] == "0.450nats per token; the lowest so far"
    assert figures["Perplexity"] == f"{math.exp(loss):.3g}of validation tokens"
    assert figures["Bits per byte"] == f"{loss / math.log(2) * 4 / 12:.3f}of validation text"
    assert figures["Tokens per second"] == "1,011median"
    (summary,) = (text for text in page.texts["p"] if text.startswith("A Transformer"))
    assert summary == ("A Transformer with 4,496 parameters, trained for 20 of 50 steps: 12,800 tokens in 13 min 30 s.")


def test_best_evaluation_is_shown_if_it_is_not_the_last(run_dir):
    write_log(run_dir, [record(1, valid_loss=2.0), record(2, valid_loss=1.25), record(3, valid_loss=1.5)])
    page = page_of(run_dir)
    assert "1.500nats per token; 1.250 at step 2" in page.texts["dd"]
    assert [row for row in page.rows() if row.startswith("2")] == ["21,2801 min 21 s4.00001.25003.49"]


def test_samples_are_evenly_spaced_and_all_are_available(run_dir):
    page = page_of(run_dir)
    steps = [int(text.rpartition(" ")[2]) for text in page.texts["blockquote"]]
    assert steps == [1, 5, 9, 12, 16, 20, *range(1, 21)]
    assert "All 20 samples" in page.texts["summary"]


def test_samples_of_older_runs_are_read_from_samples_txt(run_dir):
    write_log(run_dir, [record(10), record(20)])
    (run_dir / "samples.txt").write_text("--- step 10 ---\nOnce\n\nmore\n\n--- step 20 ---\nThe end.\n\n")
    page = page_of(run_dir)
    assert page.texts["blockquote"] == ["Once\n\nmore", "The end."]
    assert "Step 20loss 0.400" in page.texts["div"]
    (run_dir / "samples.txt").write_text("One story.\n\nAnother.\n")
    assert page_of(run_dir).texts["blockquote"] == ["One story.\n\nAnother."]


def test_tokenizer_section(run_dir):
    page = page_of(run_dir)
    rows = page.rows()
    assert "Vocabulary5 tokens" in rows
    assert "Special tokens'<|end|>'" in rows
    assert "Training text4 tokens, 12.500 bytes per token" in rows
    assert "Validation text4 tokens, 3.000 bytes per token" in rows
    longest = [text for text in page.texts["li"] if "step" not in text.lower()]
    assert longest == [HOSTILE.replace(" ", "·"), "·the↵", "a", "\\xff"]
    # Two tokens of one byte, one of five, and one of more than twelve.
    bars = [attributes["style"] for tag, attributes in page.elements if tag == "span"]
    assert bars == [f"width: {share}.0%" for share in (100, 0, 0, 0, 50, 0, 0, 0, 0, 0, 0, 50)]


@pytest.mark.parametrize("name", ["vocab.json", "special_tokens.json"])
def test_damaged_tokenizer_is_an_error_that_names_the_file(run_dir, name):
    (run_dir / "tokenizer" / name).write_text("{")
    with pytest.raises(DamagedFileError, match=rf"{name} has changed since"):
        report_page(run_dir)


def test_default_settings_are_marked(run_dir):
    page = page_of(run_dir)
    marked = dict(
        zip(page.rows(), (attributes.get("class") for tag, attributes in page.elements if tag == "tr"), strict=True)
    )
    assert marked["max_learning_rate0.003"] is None
    assert marked["min_learning_rate0.0001"] == "default"


def test_environment_of_a_resumed_run_shows_the_changes(run_dir):
    page = page_of(run_dir)
    environment = page.rows()[-4:]
    assert environment == [f"torch{HOSTILE}", "tokens.count7", "commandtrain.py --resume", "tokens.count8"]
    assert "Resumed after step 12" in page.texts["h3"]
    (run_dir / "environment.json").write_text('{"torch": "2.15"}')
    assert page_of(run_dir).rows()[-1] == "torch2.15"


@pytest.mark.parametrize("content", ["[1]", '{"starts": 1}', '{"starts": [1]}', '{"starts": [[]]}', "1"])
def test_an_environment_of_a_wrong_shape_is_an_error_that_names_the_file(run_dir, content):
    (run_dir / "environment.json").write_text(content)
    with pytest.raises(DamagedFileError, match=r"environment\.json is damaged: it does not describe the starts"):
        report_page(run_dir)


DAMAGED_RECORDS = [
    *([1], None, {}, {"step": None}, {"step": "5"}, {"step": 5}, {"kind": "sample", "step": 5, "text": 3}),
    *({"kind": "sample", "text": "x"}, {"kind": "nonfinite"}, {"kind": 5, "step": 5}, record(5, tokens="x")),
    *(record(5, wall_s=[1]), record(5, train_loss="x"), record(5, valid_loss={}), record(5, tokens_per_s="x")),
    *(record(5, train_loss=math.nan), record(5, wall_s=math.inf), record(5, tokens=10**400), record(5, wall_s=10**400)),
    {key.replace("s", "r"): value for key, value in record(5).items()},
    {key.replace("t", "u"): value for key, value in record(5).items()},
]


@pytest.mark.filterwarnings("ignore:.*lines that are incomplete or damaged are left out")
@pytest.mark.parametrize("damaged", DAMAGED_RECORDS, ids=repr)
def test_a_record_of_a_wrong_shape_is_left_out(run_dir, damaged):
    sample = {"kind": "sample", "step": 5, "text": "a text"}
    whole = [record(1), record(2, valid_loss=1.5), sample, record(6)]
    write_log(run_dir, whole)
    expected = report_page(run_dir)
    write_log(run_dir, [*whole[:3], damaged, whole[3]])
    assert report_page(run_dir) == expected


def test_run_without_metrics_yet(tmp_path):
    model = ModelConfig(vocab_size=11, context_length=8, d_model=16, num_layers=1, num_heads=2)
    save_config(RunConfig(model=model, train=TrainConfig(steps=5)), tmp_path / "config.toml")
    write_log(tmp_path, [])
    page = page_of(tmp_path)
    assert "no metrics have been logged yet" in " ".join(page.texts["p"])
    assert page.texts["h2"] == ["Curves", "Configuration"]
    write_log(tmp_path, [record(1)])
    assert "valid_loss" not in page_of(tmp_path).curves["runs"][0]["columns"]
    assert page_of(tmp_path).curves["runs"][0]["columns"]["train_loss"] == [8]


def test_memory_has_a_chart_and_the_entropy_of_the_log_a_line(run_dir):
    source = {"kind": "source", "step": 1, "entropy_nats": 0.6, "loss_nats": 0.65}
    write_log(run_dir, [record(1, cpu_memory_bytes=2_000_000_000), source])
    page = page_of(run_dir)
    charts = [attributes["data-series"] for tag, attributes in page.elements if attributes.get("class") == "chart"]
    assert charts[-1] == "gpu_memory_bytes cpu_memory_bytes"
    assert page.curves["runs"][0]["columns"]["cpu_memory_bytes"] == [2_000_000_000]
    assert page.curves["floor"] == 0.6
    assert (
        "the entropy of the source, 0.600 nats per token of whole documents; the model has 0.650 at the end"
        in " ".join(page.texts["p"])
    )
    assert page_of(run_dir, floor_nats=0.5).curves["floor"] == 0.5
    write_log(run_dir, [record(1), source, record(2)])  # resumed: the loss is no longer that of the end
    resumed = page_of(run_dir)
    assert resumed.curves["floor"] == 0.6
    assert "at the end" not in " ".join(resumed.texts["p"])


def with_another_rate(run_dir: Path, records: list[dict[str, object]]) -> Path:
    """A copy of the run beside it, with another learning rate and these records in its log."""
    other = run_dir.parent / "other"
    shutil.copytree(run_dir, other)
    text = (other / "config.toml").read_text()
    (other / "config.toml").write_text(text.replace("max_learning_rate = 0.003", "max_learning_rate = 0.05"))
    write_log(other, records)
    return other


def test_several_runs_have_their_curves_together_and_a_table(run_dir):
    other = with_another_rate(run_dir, [record(1, valid_loss=2.5), record(2, valid_loss=2.75)])
    page = Page(report_page([run_dir, other, run_dir]))
    assert [run["label"] for run in page.curves["runs"]] == ["max_learning_rate=0.003", "max_learning_rate=0.05"]
    assert [len(run["columns"]["step"]) for run in page.curves["runs"]] == [20, 2]
    assert page.texts["h1"] == ['a<b>&"c and 1 more']
    assert page.texts["h2"] == ["Curves", "Results", "Last samples"]
    assert page.rows() == [
        "RunValidationLowestBits/byteStepsTokensTimeParameters",
        "max_learning_rate=0.0030.45000.4500 at 200.2162012,80013 min 30 s4,496",
        "max_learning_rate=0.052.75002.5000 at 11.32221,2801 min 21 s4,496",
    ]
    assert page.texts["blockquote"] == [f"{HOSTILE} 20"]


def test_script_writes_the_page_to_the_run_or_to_output(run_dir, tmp_path, monkeypatch, capsys):
    run_script(monkeypatch, "report", run_dir)
    assert f"wrote {run_dir / 'report.html'} " in capsys.readouterr().out
    assert Page((run_dir / "report.html").read_text("utf-8")).curves["floor"] is None
    run_script(monkeypatch, "report", run_dir, "--output", tmp_path / "page.html", "--entropy", "0.25")
    assert Page((tmp_path / "page.html").read_text("utf-8")).curves["floor"] == 0.25
    for script in ("report", "plot"):
        with pytest.raises(
            SystemExit, match=r"^error: the entropy must be above 0 nats per token, got -1; leave it out"
        ):
            run_script(monkeypatch, script, run_dir, "--entropy=-1", "--output", tmp_path / f"{script}.svg")
    with pytest.raises(SystemExit, match=r"^error: .*nowhere is not a run: it has no config\.toml"):
        run_script(monkeypatch, "report", tmp_path / "nowhere")
    shutil.copytree(run_dir, tmp_path / "other")
    run_script(monkeypatch, "report", run_dir, tmp_path / "other")
    both = tmp_path / f"report_of_{run_dir.name}_other.html"
    assert len(Page(both.read_text("utf-8")).curves["runs"]) == 2


def test_a_followed_run_has_a_page_that_loads_itself_until_the_run_ends(run_dir, monkeypatch, capsys):
    pages, path = [], run_dir / "report.html"
    text = (run_dir / "config.toml").read_text()
    last = read_metrics(run_dir / "metrics.jsonl")[-1]["step"]
    longer = re.sub(r"^steps = .*", f"steps = {last + 1}", text, flags=re.M)
    (run_dir / "config.toml").write_text(longer)

    def train_on(seconds: float) -> None:
        pages.append(path.read_text("utf-8"))
        (run_dir / "config.toml").write_text(longer.replace(f"steps = {last + 1}", f"steps = {last}"))

    monkeypatch.setattr("time.sleep", train_on)
    run_script(monkeypatch, "report", run_dir, "--follow")
    assert len(pages) == 1
    assert '<meta http-equiv="refresh" content="10">' in pages[0]
    assert 'http-equiv="refresh"' not in path.read_text("utf-8")
    assert f"wrote {path} " in capsys.readouterr().out


def test_a_followed_page_loads_itself_and_keeps_what_is_shown(driver, run_dir, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(report_page([run_dir], refresh_s=1), encoding="utf-8")
    driver.get(f"{page.as_uri()}#axis=tokens&smoothing=0.6&from=2000&to=9000")
    driver.execute_script("window.isOld = true")
    state = "const $ = (css) => document.querySelector(css); return [window.isOld ?? false, "
    state += "$('input[name=axis]:checked').value, $('.smoothing input').value, $('.reset').hidden]"

    def is_new(driver) -> bool:
        ready = "return window.isOld === undefined && document.readyState === 'complete'"
        return driver.execute_script(ready)

    WebDriverWait(driver, 30, 0.05).until(is_new)
    assert driver.execute_script(state) == [False, "tokens", "0.6", False]
    assert [entry["message"] for entry in driver.get_log("browser")] == []


def test_plotting_script_labels_runs_and_skips_duplicates(run_dir, tmp_path, monkeypatch):
    other = with_another_rate(run_dir, [record(1, valid_loss=2.5)])
    run_script(monkeypatch, "plot", run_dir, other, run_dir, "--output", tmp_path / "loss.svg")
    labels = [text for text in svg_texts(tmp_path / "loss.svg") if "max_learning_rate" in text]
    assert labels == ["max_learning_rate=0.003: validation loss 0.450", "max_learning_rate=0.05: validation loss 2.500"]


def test_folder_that_is_not_a_run(tmp_path):
    with pytest.raises(NotARunError, match=r"config\.toml"):
        report_page(tmp_path)
