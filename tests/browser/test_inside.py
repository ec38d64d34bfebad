"""The page's inspector: what it shows of each example load is what the trace and the counters say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import minisgl
from tests.browser.conftest import Page, check_accessible, poll
from tests.e2e.conftest import Server

Visit = Callable[..., Page]
STAGES = ["received", "validated", "tokenized", "queued", "admitted", "finished", "detokenized", "sent"]
PACKAGE = Path(minisgl.__file__).parent


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The built-in model with few pages, slow motion, and no guesses, so that requests wait for long enough."""
    log = tmp_path_factory.mktemp("logs") / "small.log"
    flags = ["--port", "0", "--device", "cpu", "--dtype", "float32", "--num-pages", "64", "--slow-motion"]
    flags += ["--speculate", "off"]
    with Server.running(["-m", "minisgl", *flags], log) as server:
        yield server


def look(visit: Visit, server: Server, **options: Any) -> Page:
    page = visit(f"{server.url}/#inside", **options)
    page.locator(".inside[data-status=on]").wait_for()
    page.locator(".controls[data-ready]").wait_for()
    return page


def run_load(page: Page, name: str) -> list[str]:
    """Press a load's button, and wait until all has ended. Returns its HTTP requests' ids, in order."""
    page.locator(f"[data-load={name}]").click()
    page.locator(".controls[data-state=running]").wait_for()
    page.locator(".controls[data-state=done]").wait_for(timeout=60_000)
    return str(page.locator(".controls").get_attribute("data-ids")).split()


def get(server: Server, path: str) -> Any:
    return httpx.get(f"{server.url}{path}", timeout=60).raise_for_status().json()


def outputs(server: Server, ids: list[str]) -> list[dict[str, Any]]:
    return [output for one in ids for output in get(server, f"/trace/{one}")["outputs"]]


def counter(server: Server, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    return float(re.search(rf"^minisgl:{name}\{{.*?\}} (\S+)", text, flags=re.MULTILINE)[1])  # type: ignore[index]


def panel(page: Page, name: str) -> dict[str, str]:
    """What a panel says of itself in `data-…`."""
    shown = page.locator(f"[data-panel={name}] > :last-child")
    return dict(shown.evaluate("node => ({...node.dataset})"))


def test_one_chat_and_its_eight_stages(visit: Visit, demo: Server) -> None:
    page = look(visit, demo)
    (one,) = run_load(page, "one")
    row = page.locator(f"tr.ended[data-id='{one}']")
    row.get_by_role("button").click()
    detail = page.locator(".request")
    detail.locator(".stage.done").nth(7).wait_for()
    assert not re.search(r"\b1 (tokens|pages|nodes|requests|steps)\b", page.locator(".inside").inner_text())
    (told,) = outputs(demo, [one])
    stages = [event for event in told["events"] if event["name"] in STAGES]
    assert [stage["name"] for stage in stages] == STAGES
    assert detail.locator(".stages [data-stage]").evaluate_all("all => all.map((one) => one.dataset.stage)") == STAGES
    assert detail.locator(".stage.done").count() == 8
    shown = detail.locator(".when").all_inner_texts()
    assert [seconds_of(text) for text in shown] == pytest.approx(
        [stage["seconds"] for stage in stages], rel=0.01, abs=0.0006
    )
    assert f"{told['num_prompt']} prompt tokens" in detail.inner_text()
    assert f"Prefill chunks: {told['num_chunks']}" in detail.inner_text()
    assert row.locator("td").nth(3).inner_text() == str(told["num_output"])
    for name in ("prefill", "decode", "admitted", "retracted"):
        assert detail.locator(f".timeline .{name}").count() == len(
            [one for one in told["events"] if one["name"] == name]
        )
    assert told["num_chunks"] == 1

    detail.locator("[data-stage=queued]").click()  # the code of this version, by line
    place = detail.locator(".source .code-head .mono").first.inner_text()
    file, first, last = re.fullmatch(r"minisgl/(.+):(\d+)–(\d+)", place).groups()  # type: ignore[union-attr]
    lines = (PACKAGE / file).read_text(encoding="utf-8").splitlines()[int(first) - 1 : int(last)]
    assert detail.locator(".source code").first.inner_text().rstrip() == "\n".join(lines)
    detail.locator("[data-stage=prefill]").click()
    assert detail.locator(".source .code").count() > 0
    with page.expect_download() as download:
        page.get_by_role("button", name="Save for ui.perfetto.dev").click()
    assert json.loads(Path(download.value.path()).read_text())["traceEvents"]


def seconds_of(shown: str) -> float:
    value, unit = re.fullmatch(r"\+([\d.,]+) (m?s)", shown).groups()  # type: ignore[union-attr]
    return float(value) / (1000 if unit == "ms" else 1)


def test_a_shared_prefix_is_computed_once(visit: Visit, demo: Server) -> None:
    page = look(visit, demo)
    hits = counter(demo, "prefix_cache_hits_total")
    told = outputs(demo, run_load(page, "shared"))
    assert len(told) == 16
    assert all(output["num_cached"] > 0 for output in told[1:])
    for output in told[1:]:
        row = page.locator(f"tr.ended[data-uid='{output['uid']}']")
        row.get_by_text(f"{output['num_cached']} cached").wait_for()
    assert counter(demo, "prefix_cache_hits_total") - hits == sum(output["num_cached"] for output in told)
    poll(lambda: int(panel(page, "tree").get("nodes", 0)) > 15, "the tree has no branches")
    assert page.locator(".tree .branch .branch").count() > 1  # what is their own, right of what they share
    assert int(panel(page, "tree")["hits"]) > 0
    poll(lambda: panel(page, "pool").get("used") == "0", "pages stay in use")
    pages = {name: int(panel(page, "pool")[name]) for name in ("used", "cached", "free")}
    assert pages["cached"] > 0 and sum(pages.values()) == get(demo, "/server_info")["num_pages"]


def test_a_long_prompt_shares_steps_with_running_streams(visit: Visit, demo: Server) -> None:
    page = look(visit, demo)
    before = {step["step"] for step in get(demo, "/trace?format=json&steps=2048&requests=1")["steps"]}
    mixed = int(panel(page, "strip")["mixed"])
    ids = run_load(page, "long")
    (told,) = outputs(demo, ids[-1:])
    assert told["num_chunks"] >= 2
    steps = get(demo, "/trace?format=json&steps=2048&requests=1")["steps"]
    known = [
        step
        for step in steps
        if step["step"] not in before and step["num_decode"] and any(row[3] == 1 for row in step["rows"])
    ]
    chunks = {event["step"] for event in told["events"] if event["name"] == "prefill"}
    assert chunks & {step["step"] for step in known}
    poll(lambda: panel(page, "strip")["last"] == str(steps[-1]["step"]), "the strip stands still")
    assert int(panel(page, "strip")["mixed"]) - mixed == len(known)
    page.locator(f"tr[data-uid='{told['uid']}']").get_by_role("button").click()
    poll(lambda: page.locator(".timeline .prefill").count() == told["num_chunks"], "not each chunk is shown")


def test_runs_of_guessed_tokens_are_seen(visit: Visit, demo: Server) -> None:
    """A request that brings the answer as its `prediction`."""
    asked: dict[str, Any] = {"model": "minisgl-demo", "messages": [{"role": "user", "content": "What can you do?"}]}
    asked |= {"max_tokens": 40, "temperature": 0}
    text = httpx.post(f"{demo.url}/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
    page = look(visit, demo)
    guess = {"prediction": {"type": "content", "content": text}}
    answer = httpx.post(f"{demo.url}/v1/chat/completions", json=asked | guess).raise_for_status()
    one = answer.headers["x-request-id"]
    (told,) = outputs(demo, [one])
    usage = answer.json()["usage"]["completion_tokens_details"]
    assert told["num_accepted"] == usage["accepted_prediction_tokens"] > 5
    row = page.locator(f"tr.ended[data-id='{one}']")
    row.get_by_text(f"{told['num_accepted']} guessed").wait_for()
    row.get_by_role("button").click()
    runs = [event for event in told["events"] if event["name"] == "accepted"]
    poll(lambda: page.locator(".timeline .accepted").count() == len(runs), "not each run is shown")
    titles = page.locator(".timeline .accepted").evaluate_all("all => all.map((one) => one.title)")
    assert [int(re.findall(r"a run: (\d+) ", title)[0]) for title in titles] == [run["num_new"] for run in runs]
    said = f"Of {told['num_drafted']} guessed tokens, {told['num_accepted']} are in the output"
    page.locator(".request").get_by_text(said).wait_for()
    page.locator("[data-stage=accepted]").click()
    page.locator(".source .code").first.wait_for()
    page.locator(".key .verify").wait_for()
    check_accessible(page)


def test_one_is_retracted_where_pages_are_few(visit: Visit, small: Server) -> None:
    page = look(visit, small)
    before = counter(small, "num_preemptions_total")
    page.locator("[data-load=retracted]").click()
    page.locator("tr.waiting").first.wait_for()
    why = page.locator("tr.waiting td:nth-child(2)").first.inner_text()
    assert why.startswith("waits ")
    page.locator(".controls[data-state=done]").wait_for(timeout=60_000)
    told = outputs(small, str(page.locator(".controls").get_attribute("data-ids")).split())
    assert sum(output["num_retractions"] for output in told) == counter(small, "num_preemptions_total") - before > 0
    assert all(output["reason"] == "length" for output in told)  # and each came to its end
    assert "pages" in panel(page, "requests")["waits"].split()
    for output in told:
        times = output["num_retractions"]
        shown = page.locator(f"tr.ended[data-uid='{output['uid']}']").inner_text()
        assert (f"retracted {times} ×" in shown) == (times > 0)
    assert int(panel(page, "tree").get("evicted", 0)) > 0


def test_the_server_can_be_paused_and_slowed(visit: Visit, small: Server) -> None:
    page = look(visit, small)
    page.locator("[data-load=long]").click()
    page.locator("tr.running").first.wait_for()
    page.get_by_role("button", name="Pause").click()
    stood = poll_still(page)
    assert page.locator("tr.running").count() > 0
    page.get_by_role("slider", name="Slow motion").fill("2")
    page.get_by_text("100 ms after each step").wait_for()
    page.get_by_role("button", name="Go on").click()
    poll(lambda: int(panel(page, "strip")["last"]) > stood, "it does not go on")
    page.get_by_role("slider", name="Slow motion").fill("0")
    page.locator(".controls[data-state=done]").wait_for(timeout=60_000)


def poll_still(page: Page) -> int:
    """Wait until no step begins for a second. Returns the last one's number."""
    last = -1

    def stands() -> bool:
        nonlocal last
        before, last = last, int(panel(page, "strip")["last"] or -1)
        page.wait_for_timeout(1000)
        return before == last

    poll(stands, "steps go on")
    return last


def test_numbers_and_queues_are_those_of_the_planner(visit: Visit, small: Server) -> None:
    page = look(visit, small)
    answers: list[Any] = []
    page.on("response", lambda answer: answers.append(answer) if "/trace/live" in answer.url else None)
    page.locator("[data-load=retracted]").click()
    page.locator("tr.waiting").first.wait_for()
    page.get_by_role("button", name="Pause").click()
    poll_still(page)
    load = get(small, "/server_info")["load"]  # what the planner has
    num_running, num_waiting = load["num_running_requests"], load["num_waiting_requests"]
    assert num_running > 0 and num_waiting > 0
    poll(
        lambda: (number(page, "running"), number(page, "waiting")) == (num_running, num_waiting),
        "other numbers are shown",
    )
    queues = page.locator("[data-process]").evaluate_all(
        "all => all.map((one) => [one.dataset.process, one.dataset.queue])"
    )
    queued = {name: int(queue) for name, queue in queues}
    assert (queued["scheduler"], queued["api"]) == (num_waiting, num_running + num_waiting)
    assert queued["engine"] == answers[-1].json()["num_inflight"] and queued["tokenizer"] == queued["detokenizer"] == 0
    page.get_by_role("button", name="Go on").click()

    def is_told() -> bool:
        if page.locator(".controls[data-state=done]").count():  # on a busy machine, before it was seen
            page.locator("[data-load=retracted]").click()
        return is_shown(page, [answer.json() for answer in answers[-8:]])

    poll(is_told, "other rates are shown")
    points = page.locator("[data-spark=running] .line").last.get_attribute("points")
    assert points is not None and 1 < len(points.split()) <= len(answers) + 1
    page.locator(".controls[data-state=done]").wait_for(timeout=60_000)


def number(page: Page, name: str, part: str = "strong") -> float:
    shown = re.search(r"[\d.,]+", page.locator(f"[data-spark={name}] {part}").inner_text().removeprefix("p95"))
    return float(shown[0].replace(",", "")) if shown else -1


def is_shown(page: Page, states: list[Any]) -> bool:
    """Whether the page shows the rates that these answers tell of, and there are some."""
    first, last = states[0]["counts"], states[-1]["counts"]
    speed = (last["num_output"] - first["num_output"]) / (states[-1]["time"] - states[0]["time"])
    bounds, counts = last["itl"]["bounds"], np.subtract(last["itl"]["counts"], first["itl"]["counts"])
    ranks = np.cumsum([0, *counts])
    if ranks[-1] < 2 or counts[-1]:
        return False
    begin = int(np.searchsorted(ranks, ranks[-1] / 2)) - 1  # the bucket that the median lies in: lines between its ends
    middle = 1000 * np.interp(ranks[-1] / 2, ranks[begin : begin + 2], [0, *bounds][begin : begin + 2])
    return abs(number(page, "speed") - speed) <= 1 and number(page, "itl") == pytest.approx(middle, rel=0.1)


def test_a_time_to_first_token_is_no_bound_of_a_bucket(visit: Visit, demo: Server) -> None:
    def total() -> float:
        return counter(demo, "time_to_first_token_seconds_sum")

    before = total()
    page = look(visit, demo)
    page.wait_for_timeout(300)  # a first answer, which the request is not in
    run_load(page, "one")
    poll(lambda: number(page, "ttft") > 0, "no time is shown")
    assert number(page, "ttft") == pytest.approx(1000 * (total() - before), rel=0.02, abs=0.6)


def test_who_has_ended_does_not_leave_the_table(visit: Visit, demo: Server) -> None:
    page = look(visit, demo)
    page.evaluate("""() => {
        window.seen = new Set();
        window.gone = [];
        new MutationObserver(() => {
            const rows = [...document.querySelectorAll("tr[data-uid]")].map((row) => row.dataset.uid);
            for (const uid of window.seen) if (!rows.includes(uid)) window.gone.push(uid);
            rows.forEach((uid) => window.seen.add(uid));
        }).observe(document.querySelector("[data-panel=requests] tbody"), { childList: true });
    }""")
    (one,) = run_load(page, "one")
    row = page.locator(f"tr.ended[data-id='{one}']")
    assert row.locator("td").nth(1).inner_text().startswith(("complete", "cut off at the token limit"))
    assert row.get_attribute("data-uid") in page.evaluate("[...window.seen]")
    assert row.get_attribute("data-uid") not in page.evaluate("window.gone")


def test_the_theme_leaves_the_view_marked(visit: Visit, demo: Server) -> None:
    page = look(visit, demo)
    page.get_by_role("button", name="Dark mode").click()
    page.get_by_role("button", name="Light mode").wait_for()
    assert page.locator("[data-view=inside]").get_attribute("aria-current") == "page"
    assert page.locator("[aria-current=page]").count() == 1


def test_what_cannot_be_shown_here_says_how(visit: Visit, demo: Server) -> None:
    page = look(visit, demo)
    assert page.locator("[data-load=retracted]").is_disabled()
    assert page.locator("[data-panel=replicas]").is_hidden()  # it is no cluster
    page.get_by_text("--num-pages 64").wait_for()
    page.get_by_text("--slow-motion").wait_for()


def test_nothing_is_sent_while_nobody_looks(visit: Visit, demo: Server) -> None:
    page = look(visit, demo)
    page.get_by_role("link", name="Chat").click()
    page.locator(".chat").wait_for()
    page.wait_for_timeout(300)  # a question may have been under way
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    httpx.post(f"{demo.url}/v1/completions", json={"prompt": "a", "max_tokens": 4}, timeout=60)
    page.wait_for_timeout(1000)
    assert not [url for url in asked if not url.endswith("/icon.svg")]
    page.get_by_role("link", name="Inside").click()
    page.locator(".inside[data-status=on]").wait_for()


def test_the_description_of_the_api_can_be_read_by_everybody(visit: Visit, demo: Server) -> None:
    page = visit(f"{demo.url}/docs")
    page.locator(".opblock").first.wait_for()
    check_accessible(page)


def test_it_can_be_read_by_everybody(visit: Visit, demo: Server) -> None:
    page = look(visit, demo)
    run_load(page, "one")
    check_accessible(page)
    page.get_by_role("button", name="Dark mode").click()
    page.get_by_role("combobox", name="Language").select_option("zh")
    page.get_by_role("heading", name="推理服务如何运作").wait_for()
    check_accessible(page)
    page.set_viewport_size({"width": 360, "height": 740})
    page.locator("tr.ended").first.get_by_role("button").click()
    page.locator(".request .stage.done").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    check_accessible(page)


def test_a_chat_leads_to_its_request(visit: Visit, demo: Server) -> None:
    page = visit(demo.url)
    page.get_by_role("textbox", name="Write a message").fill("Hello!")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Look inside").click()
    page.locator(".request .stage.done").nth(7).wait_for()
    assert page.url.rpartition("/")[2] in page.locator(".request h2").inner_text()
