"""The page's chat, as a person uses it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.browser.conftest import Page, check_accessible, poll, say, wait_done
from tests.e2e.conftest import Server, fake

Visit = Callable[..., Page]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}


def complete(server: Server, text: str) -> dict[str, str]:
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
    return {"text": answer["choices"][0]["message"]["content"], "tokens": answer["usage"]["completion_tokens"]}


def set_field(page: Page, name: str, value: str) -> None:
    """In the settings, which may have to be opened first."""
    if not page.locator("#settings").is_visible():
        page.get_by_role("button", name="Settings").click()
    page.locator(f"#set-{name}").fill(value)


def test_a_turn_shows_what_the_api_answers(visit: Visit, demo: Server) -> None:
    page = visit(demo.url)
    page.get_by_role("heading", name="What shall we talk about?").wait_for()
    page.get_by_text("make serve MODEL=").wait_for()  # how to have a larger one
    set_field(page, "temperature", "0")
    question = "What is a radix tree?"
    expected = complete(demo, question)
    answer = wait_done(say(page, question))
    assert answer.locator(".text").last.inner_text() == expected["text"]
    stats = answer.locator(".stats").inner_text()
    assert f"{expected['tokens']} tokens" in stats
    assert re.search(r"[\d.]+ tokens/s\s+first token after [\d.]+ m?s", stats)
    assert "complete" in stats
    after = wait_done(say(page, "Thank you.")).locator(".stats").inner_text()
    cached, total = map(int, re.search(r"(\d+) of (\d+) prompt tokens cached", after).groups())  # type: ignore[union-attr]
    assert 0 < cached < total


@pytest.fixture
def slower(tmp_path: Path) -> Iterator[Server]:
    """The built-in model without guesses, by which an answer of 700 tokens takes a quarter of a second."""
    flags = ["--port", "0", "--device", "cpu", "--dtype", "float32", "--speculate", "off"]
    with Server.running(["-m", "minisgl", *flags], tmp_path / "slower.log") as server:
        yield server


def test_esc_stops_an_answer_and_the_server_its_work(visit: Visit, slower: Server) -> None:
    page = visit(slower.url)
    set_field(page, "temperature", "0")
    page.get_by_role("button", name="Close").click()
    answer = say(page, "Count from 1 to 1000.")
    answer.get_by_text("1, 2, 3").wait_for()
    assert page.get_by_role("button", name="Stop").is_visible()
    page.keyboard.press("Escape")
    wait_done(answer, "stopped")
    assert "stopped by you" in answer.locator(".stats").inner_text()
    load = f"{slower.url}/server_info"
    poll(lambda: httpx.get(load).json()["load"]["num_requests_in_flight"] == 0, "the request goes on")
    assert page.get_by_role("button", name="Send").is_visible()


def test_conversations_outlive_the_page(visit: Visit, demo: Server) -> None:
    page = visit(demo.url)
    text = wait_done(say(page, "My name is Ada.")).locator(".text").last.inner_text()
    page.get_by_role("button", name="New chat").click()
    wait_done(say(page, "Hello!"))
    page.reload()
    names = page.get_by_role("navigation", name="Conversations")
    names.get_by_role("button", name="My name is Ada.", exact=True).click()
    page.get_by_role("log").get_by_text(text, exact=True).wait_for()
    wait_done(say(page, "What is my name?")).get_by_text("Ada").wait_for()  # the model is told all that was said

    names.get_by_text("⋯").first.click()
    with page.expect_download() as download:
        names.get_by_role("button", name="Save as JSON").first.click()
    saved = json.loads(Path(download.value.path()).read_text())
    assert saved["messages"][0]["content"] in ("Hello!", "My name is Ada.")
    names.locator("li").filter(has_text="My name is Ada.").get_by_text("⋯").click()
    with page.expect_download() as download:
        names.get_by_role("button", name="Save as Markdown").last.click()
    assert Path(download.value.path()).read_text().startswith("# My name is Ada.\n\n**user**\n\nMy name is Ada.\n")
    names.locator("li").filter(has_text="My name is Ada.").get_by_text("⋯").click()
    names.get_by_role("button", name="Rename").last.click()
    page.get_by_role("textbox", name="Rename").fill("About Ada")
    page.keyboard.press("Enter")
    page.evaluate("window.confirm = () => true")  # it asks whether we are sure
    names.locator("li").filter(has_text="Hello!").get_by_text("⋯").click()
    names.get_by_role("button", name="Delete").first.click()
    poll(lambda: names.locator("li").count() == 1, "the conversation stays")
    page.reload()
    names.get_by_role("button", name="About Ada", exact=True).wait_for()
    assert names.locator("li").count() == 1


def test_edit_and_answer_again(visit: Visit, demo: Server) -> None:
    page = visit(demo.url)
    set_field(page, "temperature", "0")
    wait_done(say(page, "What is 2 plus 3?"))
    wait_done(say(page, "Thank you."))
    first = page.locator(".message.user").first
    first.hover()
    first.get_by_role("button", name="Edit").click()
    page.get_by_role("textbox", name="Edit").fill("What is 3 plus 4?")
    page.get_by_role("button", name="Send again").click()
    answer = wait_done(page.locator(".message.answer").last)
    assert page.locator(".message").count() == 2
    assert answer.locator(".text").last.inner_text() == complete(demo, "What is 3 plus 4?")["text"]
    answer.get_by_role("button", name="Answer again").click()
    answer = wait_done(page.locator(".message.answer").last)
    assert page.locator(".message").count() == 2
    assert answer.locator(".text").last.inner_text() == complete(demo, "What is 3 plus 4?")["text"]


def test_the_token_view_has_each_token_and_what_might_have_been(visit: Visit, demo: Server) -> None:
    page = visit(demo.url)
    answer = wait_done(say(page, "Tell me a short story about a lighthouse."))
    told = int(re.search(r"(\d+) tokens\b", answer.locator(".stats").inner_text().replace("tokens/s", ""))[1])  # type: ignore[index]
    answer.get_by_role("button", name="Tokens and their probabilities").click()
    tokens = answer.locator(".tokens .token")
    assert tokens.count() == told
    text = "".join(tokens.all_text_contents()).replace("⏎\n", "\n")
    assert text.startswith(answer.locator(".text").last.inner_text())
    tokens.nth(5).click()
    rows = answer.locator(".token-detail tbody tr")
    assert rows.count() in (5, 6)  # the sampled one may be none of the five
    shares = [float(one.removesuffix(" %")) for one in rows.locator("td:last-child").all_inner_texts()]
    assert 0 < max(shares) <= 100 and sum(shares) <= 100.5
    page.keyboard.press("ArrowRight")
    assert tokens.nth(6).get_attribute("aria-pressed") == "true"
    check_accessible(page)


def test_calls_are_shown_and_take_results(visit: Visit, demo: Server) -> None:
    page = visit(demo.url)
    set_field(page, "temperature", "0")
    set_field(page, "tools", json.dumps([WEATHER]))
    answer = wait_done(say(page, "What is the weather in Paris?"))
    answer.get_by_text("Calls get_weather").wait_for()
    assert json.loads(answer.locator(".call pre").inner_text()) == {"city": "Paris"}
    answer.get_by_role("textbox", name="What get_weather returned").fill('{"temperature": 21, "sky": "clear"}')
    answer.get_by_role("button", name="Send the results").click()
    poll(lambda: page.locator(".message.answer").count() == 2, "there is no second answer")
    assert "calls functions" not in wait_done(page.locator(".message.answer").last).locator(".stats").inner_text()


def test_language_and_theme_follow_the_browser_and_the_switch(visit: Visit, demo: Server) -> None:
    page = visit(demo.url, locale="zh-CN", color_scheme="dark")
    page.get_by_role("heading", name="想聊点什么？").wait_for()
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    check_accessible(page)
    page.get_by_role("button", name="浅色模式").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
    page.get_by_role("combobox", name="语言").select_option("en")
    page.get_by_role("heading", name="What shall we talk about?").wait_for()
    page.reload()  # both choices stay
    page.get_by_role("heading", name="What shall we talk about?").wait_for()
    assert page.locator("html").get_attribute("data-theme") == "light"
    check_accessible(page)


def test_a_phone_shows_all_of_it(visit: Visit, demo: Server) -> None:
    page = visit(demo.url, viewport={"width": 360, "height": 700}, has_touch=True, reduced_motion="reduce")
    wait_done(say(page, "Hello!"))
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.get_by_role("button", name="Conversations").click()
    assert page.get_by_role("button", name="New chat").is_visible()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings").click()
    page.locator("#set-temperature").wait_for()
    check_accessible(page)


def test_the_api_is_described_without_the_network(visit: Visit, demo: Server) -> None:
    page = visit(f"{demo.url}/docs")
    page.get_by_text("/v1/chat/completions", exact=True).first.wait_for()
    page.locator("#operations-server-version_version_get, [id*=version_version_get]").first.click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    page.locator(".live-responses-table").get_by_text('"version"').first.wait_for()


@pytest.fixture(scope="module")
def scripted(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server with a key, whose every answer is what a file says."""
    answer = tmp_path_factory.mktemp("answers") / "answer.txt"
    answer.write_text("Good.")
    options = {"api_key": "sk-first,sk-second", "answer": str(answer), "max_seq_len": 4096, "reasoning": "qwen3"}
    with Server.running(fake(model_path, **options), answer.with_name("server.log")) as server:
        yield server, answer


@pytest.fixture
def keyed(visit: Visit, scripted: tuple[Server, Path]) -> Page:
    """The page of that server, with the key in it."""
    page = visit(scripted[0].url)
    page.get_by_role("textbox", name="API key").fill("sk-first")
    page.get_by_role("button", name="Use it").click()
    page.get_by_text("fake-model").first.wait_for()
    return page


def test_a_key_is_asked_for_and_kept_in_the_tab(visit: Visit, scripted: tuple[Server, Path]) -> None:
    page = visit(scripted[0].url)
    page.get_by_role("heading", name="An API key, please").wait_for()
    check_accessible(page)
    page.get_by_role("textbox", name="API key").fill("sk-wrong")
    page.keyboard.press("Enter")
    page.get_by_text("does not take that key").wait_for()
    page.get_by_role("textbox", name="API key").fill("sk-second")
    page.keyboard.press("Enter")
    wait_done(say(page, "Hello!")).get_by_text("Good.").wait_for()
    page.reload()
    wait_done(say(page, "Hello again!"))
    assert "sk-second" not in page.evaluate("JSON.stringify(localStorage)")


def test_reasoning_is_folded(keyed: Page, scripted: tuple[Server, Path]) -> None:
    scripted[1].write_text("<think>\nFirst this, then that.\n</think>\n\nThe answer is **42**.")
    answer = wait_done(say(keyed, "Why?"))
    assert answer.locator("strong").inner_text() == "42"
    assert not answer.get_by_text("First this, then that.").is_visible()
    answer.get_by_text("Thoughts").click()
    assert answer.get_by_text("First this, then that.").is_visible()


MARKDOWN = r"""# Title
Some *words*, `code`, and $e^{i\pi} + 1 = 0$; it costs $5 and $6.

$$\sum_{n=1}^\infty \frac{1}{n^2} = \frac{\pi^2}{6}$$

```python
def add(a, b):  # a comment
    return a + 1
```

| a | b |
|---|---|
| 1 | 2 |
"""


def test_markdown_code_and_formulas(keyed: Page, scripted: tuple[Server, Path]) -> None:
    scripted[1].write_text(MARKDOWN)
    answer = wait_done(say(keyed, "Show me."))
    answer.locator("table td").first.wait_for()
    assert answer.locator("math").count() == 2
    assert answer.locator("math[display=block] mfrac").count() == 2
    assert "costs $5 and $6" in answer.inner_text()
    assert answer.locator(".hl-keyword").all_inner_texts() == ["def", "return"]
    assert answer.locator(".hl-comment").inner_text() == "# a comment"
    keyed.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer.locator(".copy-code").click()
    copied = keyed.evaluate("navigator.clipboard.readText()")
    assert copied == "def add(a, b):  # a comment\n    return a + 1"
    check_accessible(keyed)


HOSTILE = """<script>window.harmed = 1; alert(1)</script>
<img src=x onerror="window.harmed = 1"> <svg onload="window.harmed = 1"></svg>
[a](javascript:window.harmed=1) [b](JaVaScRiPt&#58;window.harmed=1) [c](data:text/html,<script>window.harmed=1</script>)
![tracked](https://example.com/pixel.png) <iframe src="https://example.com"></iframe>
<style>body { display: none }</style> <base href="https://example.com/"> <form action="https://example.com"><button>x
<a href="https://example.com/" id="prompt" style="position:fixed;inset:0" onclick="window.harmed=1">d</a>
$\\href{javascript:window.harmed=1}{x}$ $\\text{<img src=x onerror=window.harmed=1>}$
<math><mtext><mglyph><style><img src=x>
[e](https://example.com/ "onmouseover=window.harmed=1") `<script>window.harmed=1</script>`
"""


def check_harmless(page: Page) -> None:
    shown = page.locator(".log .text")
    assert page.evaluate("window.harmed") is None
    for what in ("script", "img", "iframe", "style", "base", "form", "svg", "input", "[style]", "[id]", "[onclick]"):
        assert shown.locator(what).count() == 0, what
    for href in shown.locator("a").evaluate_all("links => links.map((link) => link.href)"):
        assert href.startswith("https://example.com/"), href
    assert shown.locator("a:not([rel~=noopener])").count() == 0
    assert page.get_by_role("textbox", name="Write a message").is_visible()


def test_hostile_output_does_nothing(keyed: Page, scripted: tuple[Server, Path]) -> None:
    scripted[1].write_text(HOSTILE)
    answer = wait_done(say(keyed, "Harm me."))
    answer.get_by_text("window.harmed=1", exact=False).first.wait_for()
    for link in answer.locator(".text a").all():
        link.hover()
    check_harmless(keyed)


HUGE = {
    "a line without an end": "x" * 300_000,
    "quotations in quotations": ">" * 20_000 + " deep",
    "lists in lists": "\n".join(" " * 2 * depth + "- deep" for depth in range(400)),
    "brackets": "[" * 30_000,
    "links": "[a](" * 20_000,
    "stars": "*a _b " * 20_000,
    "backticks": " ".join("`" * length for length in range(1, 400)),
    "tables": "|" * 30_000 + "\n" + "|-" * 15_000,
    "formulas": "$$" + "{" * 3_000 + "$$ $" + r"\frac{" * 800 + "$",
    "brackets of HTML": "<a" * 30_000 + "<!--" * 10_000,
}


def fulfil(events: str, route: Any) -> None:
    route.fulfill(content_type="text/event-stream", body=events)


WATCH = """() => {
    window.early = 0;
    new MutationObserver(() => {
        const answer = document.querySelector(".message.answer");
        const isOver = answer?.querySelector(".stats").textContent
            || (answer && !document.querySelector(".send[aria-label=Stop]"));
        if (isOver && !answer.innerText.includes("THE END")) window.early++;
    }).observe(document.body, { childList: true, subtree: true, attributes: true });
}"""


def test_an_answer_is_over_when_all_of_it_is_drawn_and_its_speed_is_possible(keyed: Page) -> None:
    def late(events: str, route: Any) -> None:
        time.sleep(0.2)
        fulfil(events, route)

    words = [f"**word** {index}\n\n" for index in range(2000)]
    chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": {"content": word}}]} for word in words]
    chunks.append({"choices": [{"index": 0, "delta": {"content": "THE END"}, "finish_reason": "stop"}]})
    chunks.append({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 12}})
    events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    keyed.route("**/v1/chat/completions", partial(late, events))
    keyed.evaluate(WATCH)
    stats = wait_done(say(keyed, "All at once.")).locator(".stats").inner_text()
    assert keyed.get_by_role("button", name="Send", exact=True).is_visible()
    assert keyed.evaluate("window.early") == 0
    speed = float(re.search(r"([\d.,]+) tokens/s", stats)[1].replace(",", ""))  # type: ignore[index]
    # All came in one read, 0.2 seconds after they were asked for; or in two, where a busy browser has read in between.
    # A rate is told of a tenth of a second and more.
    assert 0 < speed <= 12 / 0.1


def test_endless_output_does_not_freeze_the_page(keyed: Page) -> None:
    for what, text in HUGE.items():
        chunk = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}]}
        events = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
        keyed.route("**/v1/chat/completions", partial(fulfil, events))
        keyed.get_by_role("button", name="New chat").click()
        answer = wait_done(say(keyed, what))
        poll(
            lambda shown=answer: len(shown.locator(".text").last.text_content() or "") > 100,
            f"{what}: nothing is shown",
        )
        check_harmless(keyed)
