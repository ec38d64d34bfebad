"""The page of a cluster, in a real browser: what it says of replicas is what they say themselves."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpx
import pytest

from tests.browser.conftest import Page, check_accessible, poll
from tests.cluster.conftest import Cluster, running

pytestmark = pytest.mark.timeout(600)
ROW = "tr[data-replica]"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("cluster") / "log", "--replicas", "2", "--max-replicas", "2") as one:
        yield one


def look(visit: Callable[..., Page], cluster: Cluster, **options: Any) -> Page:
    page = visit(f"{cluster.url}/#inside", **options)
    page.locator(".inside[data-status=on]").wait_for()
    page.locator(ROW).nth(1).wait_for()
    return page


def ask(cluster: Cluster, session: str, count: int, headers: dict[str, str] | None = None) -> None:
    """Requests of one session, which go to one replica."""
    body = {"prompt": f"{session} " * 40, "max_tokens": 2}
    for _ in range(count):
        given = {"x-session-id": session, **(headers or {})}
        httpx.post(f"{cluster.url}/v1/completions", json=body, headers=given, timeout=60).raise_for_status()


def counted(cluster: Cluster, name: str) -> Counter[str]:
    """By replica, what their metrics say of this one."""
    sums = Counter[str]()
    text = httpx.get(f"{cluster.url}/metrics", timeout=60).text
    for replica, value in re.findall(rf"^minisgl:{name}\{{.*replica=\"(\w+)\"\}} (\S+)", text, re.M):
        sums[replica] += int(float(value))
    return sums


def shown(page: Page, name: str) -> dict[str, int]:
    """By replica, what the page says."""
    rows = page.locator(ROW).evaluate_all("all => all.map((one) => ({...one.dataset}))")
    return {row["replica"]: int(float(row[name])) for row in rows}


def ended(page: Page) -> set[str]:
    rows: Iterable[Any] = page.locator("tr.ended").evaluate_all("all => all.map((one) => one.dataset.id)")
    return {*rows}


def own(told: dict[str, Any]) -> set[str]:
    """The requests of which a replica itself tells; of the last ones a moment after they were answered."""
    past = httpx.get(f"{told['url']}/trace?format=json&steps=1&requests=24", timeout=60).json()
    return {request["id"] for request in past["requests"] if request["outputs"]}


def test_it_tells_where_requests_went_and_what_was_cached(visit: Callable[..., Page], cluster: Cluster) -> None:
    page = look(visit, cluster)
    before = shown(page, "ended")
    assert before.keys() == cluster.replicas().keys()
    ask(cluster, "alike", 6)
    for name, metric in (("ended", "request_success_total"), ("cached", "prefix_cache_hits_total")):
        poll(lambda name=name, metric=metric: shown(page, name) == counted(cluster, metric), f"other numbers: {name}")
    gained = {name: count - before[name] for name, count in shown(page, "ended").items()}
    assert sorted(gained.values()) == [0, 6]
    assert shown(page, "cached")[max(gained, key=gained.__getitem__)] > 0
    assert page.locator(f"{ROW}[data-state=serving]").count() == 2


def test_one_replica_is_looked_into(visit: Callable[..., Page], cluster: Cluster) -> None:
    """The panels show requests of the replica that is chosen, and of no other."""
    for name in cluster.replicas():  # both have had some
        ask(cluster, name, 1, {"x-replica": name})
    page = look(visit, cluster)
    for told in cluster.get("/cluster")["replicas"]:
        page.get_by_role("button", name=f"Look into replica {told['name']}").click()
        page.locator(f"{ROW}.chosen[data-replica='{told['name']}']").wait_for()
        poll(lambda told=told: ended(page) == own(told) != set(), "requests of another replica are shown")


def test_one_that_is_gone_or_drains_says_so(visit: Callable[..., Page], cluster: Cluster) -> None:
    page = look(visit, cluster)
    name, *_ = cluster.replicas()
    told = cluster.get("/cluster")
    left = [one for one in told["replicas"] if one["name"] != name]
    page.route("**/cluster", lambda route: route.fulfill(json={**told, "replicas": left}))
    page.locator(f"{ROW}[data-replica='{name}'][data-state=gone]").wait_for()
    assert page.get_by_role("button", name=f"Look into replica {name}").is_disabled()
    page.locator(f"{ROW}.chosen[data-state=serving]").wait_for()
    page.unroute("**/cluster")
    page.route("**/cluster", lambda route: route.fulfill(json={**told, "draining": True}))
    page.locator(f"{ROW}[data-state=draining]").nth(1).wait_for()


def test_it_can_be_read_by_everybody(visit: Callable[..., Page], cluster: Cluster) -> None:
    page = look(visit, cluster)
    check_accessible(page)
    page.get_by_role("combobox", name="Language").select_option("zh")
    page.get_by_role("heading", name="副本").wait_for()
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    check_accessible(page)


def test_what_comes_late_of_another_replica_is_not_shown(visit: Callable[..., Page], cluster: Cluster) -> None:
    """The page asks who has ended, and somebody looks into another replica before the answer is there."""
    held: list[Any] = []
    page = look(visit, cluster)
    page.route(re.compile(r"/trace\?format=json&steps=1&"), lambda route: held.append(route))
    first = page.locator(f"{ROW}.chosen").evaluate("one => one.dataset.replica")
    ask(cluster, "late", 1, {"x-replica": first})
    for _ in range(200):
        if held:
            break
        page.wait_for_timeout(300)
    assert held, "the page does not ask who has ended"
    other = next(told for told in cluster.get("/cluster")["replicas"] if told["name"] != first)
    page.get_by_role("button", name=f"Look into replica {other['name']}").click()
    page.locator(f"{ROW}.chosen[data-replica='{other['name']}']").wait_for()
    poll(lambda: ended(page) == own(other), "requests of another replica are shown")
    with page.expect_response(re.compile(r"/trace\?format=json&steps=1&")):
        held[0].continue_()
    page.wait_for_timeout(500)
    assert ended(page) == own(other)
