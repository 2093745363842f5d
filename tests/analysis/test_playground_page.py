"""The playground's page in a browser: typing, streaming, mouse, keyboard, and texts that contain HTML."""

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from basic.analysis.playground.answers import MAX_SHOWN_TOKENS, Playground
from basic.analysis.playground.server import create_app
from basic.common.errors import InvalidInputError
from tests.helpers.playground_tools import CONTEXT, make_playground, train_two_checkpoints

HOSTILE = (
    "<img src=x onerror=\"document.title='broken'\"> </script><script>document.title='broken'</script> "
    "\u202eabc\u202c \u0301\u0302x \u200f&lt;b&gt; {{7*7}} \ud83e\udd39\ud83c\udffd\u200d\u2640\ufe0f \0 \ufeff"
)


@contextmanager
def serving(playground: Playground) -> Generator[str]:
    config = uvicorn.Config(create_app(playground), port=0, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def playground(tmp_path_factory) -> Playground:
    return make_playground(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def address(playground) -> Iterator[str]:
    with serving(playground) as address:
        yield address


class Page:
    def __init__(self, driver: webdriver.Chrome, address: str, view: str = "tokens") -> None:
        self.driver = driver
        driver.get("about:blank")
        driver.get(f"{address}#{view}")
        self.wait(lambda: self.all(".pane-head dd" if view == "tokens" else "#models .stats dd"))

    def wait(self, condition) -> None:
        WebDriverWait(self.driver, 30, 0.05).until(lambda _: condition())

    def all(self, css: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def one(self, css: str):
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def js(self, code: str, *arguments):
        return self.driver.execute_script(code, *arguments)

    def texts(self, css: str) -> list[str]:
        return self.js("return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", css)

    def write(self, text: str) -> None:
        """Set the text of the box, also with characters that no key produces."""
        self.js(
            "const t = document.querySelector('#text'); t.value = arguments[0]; t.dispatchEvent(new Event('input'))",
            text,
        )

    def console_messages(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "DEBUG"]


@pytest.fixture
def page(driver, address) -> Page:
    return Page(driver, address)


LEFT, RIGHT = "#panes .card:nth-child(1) ", "#panes .card:nth-child(2) "


def test_typed_text_is_tokenized_by_both_tokenizers(page):
    page.one("#clear").click()
    page.one("#text").send_keys("the the\n<")
    page.wait(lambda: page.texts(LEFT + ".t") == ["the", "·the", "↵", "<"])
    page.wait(lambda: page.texts(RIGHT + ".t") == ["t", "h", "e", "·", "t", "h", "e", "↵", "<"])
    assert page.texts(LEFT + "dd") == ["4", "9", "2.25", "4", "260"]
    page.wait(lambda: page.one("#comparison").text == "bytes needs 125% more tokens than tiny.")
    page.one("#view input[value=ids]").find_element(By.XPATH, "..").click()
    assert page.texts(LEFT + ".t") == ["257", "258", "10", "60"]
    page.one("#view input[value=bytes]").find_element(By.XPATH, "..").click()
    assert page.texts(LEFT + ".t") == ["74 68 65", "20 74 68 65", "0A", "3C"]
    assert page.console_messages() == []


def test_arrow_keys_move_between_tokens_and_highlight_them_on_the_other_side(page):
    page.write("the the the")
    page.wait(lambda: len(page.all(LEFT + ".t")) == 3)
    page.wait(lambda: len(page.all(RIGHT + ".t")) == 11)
    page.one(LEFT + ".t").send_keys(Keys.ARROW_RIGHT)
    assert page.driver.switch_to.active_element.text == "·the"
    assert "token 2 · id 258 · 4 bytes 20 74 68 65 · 2 times" in page.one(LEFT + ".pane-foot").text
    assert page.texts(RIGHT + ".t.echo") == ["·", "t", "h", "e"]
    page.driver.switch_to.active_element.send_keys(Keys.END)
    assert "token 3" in page.one(LEFT + ".pane-foot").text
    assert page.js("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


@pytest.mark.parametrize("view", ["tokens", "model"])
def test_html_in_the_text_is_shown_as_text(driver, address, view):
    page = Page(driver, address, view)
    page.write(HOSTILE)
    listing = "#models .scored" if view == "model" else LEFT + ".tokens"
    page.wait(lambda: "<" in "".join(page.texts(listing + " .t")[:1]))
    page.wait(lambda: not page.all(".busy"))
    shown = "".join(page.texts(listing + " .t"))
    assert shown.startswith("<img·src=x·o")
    if view == "tokens":
        assert shown.endswith("·U+0000·EFBBBF")
        assert "</script><script>" in shown
    page.js("document.querySelector(arguments[0]).click()", listing + " .t")
    assert page.driver.title == "basic · playground"
    assert page.all("main img, main script, main b.x") == []
    assert page.js("return document.querySelectorAll('script').length") == 1
    # Direction marks and combining characters affect only their own token.
    assert {
        page.js("return getComputedStyle(arguments[0]).unicodeBidi", token) for token in page.all(listing + " .t")[:9]
    } == {"isolate"}
    assert page.console_messages() == []


def test_five_megabytes_can_be_pasted(page):
    page.one(RIGHT + "select option[value='']").click()  # one tokenizer is enough
    page.one("#clear").click()
    page.js(
        """const data = new DataTransfer();
        data.setData("text/plain", " the".repeat(1250000));
        const paste = new ClipboardEvent("paste", { clipboardData: data, cancelable: true });
        document.querySelector("#text").dispatchEvent(paste);"""
    )
    assert len(page.one("#text").get_property("value")) == 40_000
    assert "and 4,960,000 more characters" in page.one("#tail").text
    page.wait(lambda: page.texts(LEFT + "dd")[:2] == ["1,250,000", "5,000,000"])
    assert len(page.all(LEFT + ".t")) == MAX_SHOWN_TOKENS
    assert "Only the first 3,000 of 1,250,000 tokens are shown" in page.one(LEFT + ".note").text
    page.one("#tail button").click()
    page.wait(lambda: page.texts(LEFT + "dd")[1] == "40,000")
    page.one("#tab-model").click()
    page.wait(lambda: f"the first {CONTEXT} of 10,000" in page.one("#models .note").text)


def test_clicked_token_shows_the_ten_most_probable_tokens(driver, address, playground):
    page = Page(driver, address, "model")
    page.write("the the")
    page.wait(lambda: page.texts("#models .scored .t") == ["the", "·the", "next?"])
    answer = playground.evaluate("the the")
    assert page.texts("#models .stats dd")[1] == f"{answer['mean_nats']:.3f}"
    page.all("#models .scored .t")[1].click()
    rows = page.texts("#inspector li")
    unlikely = answer["ranks"][1] > 10
    assert len(rows) == 10 + unlikely
    assert f"loss {answer['nats'][1]:.3f} nats" in page.one("#inspector").text
    assert [row.startswith("·the") for row in page.texts("#inspector li.actual")] == [True]
    page.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT, Keys.ENTER)
    assert page.one("#inspector .big").text == "Prediction"
    assert len(page.all("#inspector li")) == 10
    assert page.console_messages() == []


def test_continuation_streams_and_stops(driver, tmp_path):
    numbers = []

    class Slow(Playground):
        def generate(self, *arguments, **settings):
            yield {"tokens": 1, "seen": 1}
            for number in range(500):
                time.sleep(0.02)
                numbers.append(number)
                yield {"text": f" <i>{number}"}

    with serving(make_playground(tmp_path, playground_class=Slow)) as address:
        page = Page(driver, address, "model")
        page.write("the")
        page.wait(lambda: page.texts("#models .scored .t")[:1] == ["the"])
        page.one("#go").click()
        page.wait(lambda: " <i>1" in page.one("#models .stream").text)
        early = page.one("#models .stream").text
        page.wait(lambda: " <i>9" in page.one("#models .stream").text)
        assert page.one("#models .stream").text.startswith(early)
        assert not page.all("#models .stream i")
        page.one("#stop").click()
        page.wait(lambda: "Stopped: " in page.one("#progress").text)
        page.wait(lambda: page.all("#models .scored .t.new"))
        count = len(numbers)
        assert count < 400
        time.sleep(0.2)
        assert len(numbers) <= count + 2  # the server has stopped too
        page.one("#models .after button").click()
        assert page.one("#text").get_property("value").startswith("the <i>0 <i>1")
        page.one("#go").click()
        page.wait(lambda: page.one("#models .stream").is_displayed() and " <i>3" in page.texts("#models .stream")[0])
        page.write("xyz")
        page.wait(lambda: page.texts("#models .scored .t") == [*"xyz", "next?"])
        assert not page.one("#models .stream").is_displayed()
        assert not page.one("#models .after").is_displayed()


def test_two_models_side_by_side_with_their_samples_and_maps(driver, tmp_path):
    two_checkpoints = train_two_checkpoints(tmp_path)
    with serving(Playground(two_checkpoints, device="cpu")) as address:
        page = Page(driver, address, "model")
        page.write("abc")
        second = "#models .card:nth-child(2) "
        page.js(
            """const [model, step] = document.querySelectorAll(arguments[0] + "select");
            for (const [menu, value] of [[model, "talks"], [step, "2"]]) {
              menu.value = value;
              menu.dispatchEvent(new Event("change"));
            }""",
            second,
        )
        page.wait(lambda: page.texts(second + ".t") == ["a", "b", "c", "next?"] and not page.all(".busy"))
        answer = Playground(two_checkpoints, device="cpu").evaluate("abc", "talks", 2)
        page.wait(lambda: page.texts(second + ".stats dd")[1] == f"{answer['mean_nats']:.3f}")
        page.js(
            """for (const [id, value] of [["samples", 3], ["length", 4], ["seed", 1]]) $(id).value = value;
            document.querySelector("#go").click();"""
        )
        page.wait(lambda: "Done: " in page.one("#progress").text)
        run = Playground(two_checkpoints, device="cpu").model("talks", 2).run
        settings = {"temperature": 0.8, "top_p": 0.95}
        expected = [run.complete("abc", 4, seed=seed, **settings) for seed in (1, 2, 3)]
        assert page.texts(second + ".sample") == expected
        page.one("#tab-attention").click()
        page.wait(lambda: len(page.all("#maps canvas")) == 4 and page.texts("#attended .t")[-1] == "c")
        page.all(".map")[3].click()
        assert page.one("#attention-facts").text.startswith("Layer 2, head 2: c (framed) attends most to ")
        page.one("#tab-chat").click()
        page.one("#message").send_keys("Hi", Keys.ENTER)
        page.wait(lambda: len(page.all("#messages li")) == 2 and not page.all("#messages .live"))
        assert page.texts("#messages .user") == ["Hi"]
        assert page.console_messages() == []


def test_a_missing_vocabulary_says_how_to_get_it(driver, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with serving(make_playground(tmp_path)) as address:
        page = Page(driver, address)
        page.one(RIGHT + "select option[value='o200k (GPT-4o)']").click()
        page.wait(lambda: "tiktoken.get_encoding('o200k_base')" in page.one(RIGHT + ".note").text)
        assert not page.one(RIGHT + ".tokens").is_displayed()


def test_errors_are_shown_in_the_page(driver, tmp_path):
    class Failing(Playground):
        def evaluate(self, text, model=None, checkpoint=None, *, keep_end=False):
            if text == "another":
                raise InvalidInputError("<b>not</b> possible")
            return super().evaluate(text, model, checkpoint, keep_end=keep_end)

    with serving(make_playground(tmp_path, playground_class=Failing)) as address:
        page = Page(driver, address, "model")
        page.write("another")
        page.wait(lambda: page.one("#models .error").text == "<b>not</b> possible")


@pytest.mark.parametrize("view", ["tokens", "model"])
def test_page_fits_the_width_of_a_phone(driver, address, view):
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        page = Page(driver, address, view)
        page.write("x" * 300 + " the")
        page.wait(lambda: not page.all(".busy"))
        assert page.js("return document.documentElement.scrollWidth") <= 390
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
