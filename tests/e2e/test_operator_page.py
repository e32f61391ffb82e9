"""The operator's page in a real browser, on the real server."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator

import pytest
import requests
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.helpers.browser import Line, Page, browser
from tests.helpers.elastic import RANKS, ElasticServer
from tests.helpers.load import Load
from tests.helpers.shared import EXPERTS, KEY, Shared

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]
steady = pytest.mark.shared("steady")


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as page:
        yield page


@pytest.fixture
def server(shared: Shared) -> ElasticServer:
    return shared.steady()


@pytest.fixture
def line() -> Iterator[Line]:
    with contextlib.closing(Line()) as line:
        yield line


def enter(page: Page, server: ElasticServer, url: str | None = None, *, width: int = 1280) -> None:
    """Open the page as somebody who has never been there, and log in."""
    page.emulate(width, 800, prefers_color_scheme="light", prefers_reduced_motion="no-preference")
    page.open(url or server.url)
    page.js("sessionStorage.clear(); localStorage.clear()")
    page.driver.refresh()
    page.log_in(KEY)
    page.wait_live()
    page.wait(lambda: page.placement() != {}, "ranks are drawn")


def placed(server: ElasticServer) -> dict[int, list[int]]:
    placement = server.status()["placement"]
    return {rank: [column for column in range(EXPERTS) if placement[column] == rank] for rank in range(RANKS)}


@steady
def test_a_wrong_key_is_told_and_the_right_one_stays_in_the_tab(page: Page, server: ElasticServer) -> None:
    assert requests.get(server.url + "/elastic_ep/events", timeout=30).status_code == 401
    page.open(server.url)
    page.js("sessionStorage.clear()")
    page.driver.refresh()
    page.wait(lambda: page.state == "locked", "the page asks for the key")
    assert page.focused == "key" and page.text("key-error") == "" and not page.id("board").is_displayed()
    page.log_in("wrong")
    page.wait(lambda: page.text("key-error") == "The server refused this key.", "it says so")
    assert page.id("key").get_attribute("aria-invalid") == "true"
    page.log_in(KEY)
    page.wait_live()
    assert KEY not in page.driver.current_url and KEY not in page.driver.page_source
    page.driver.refresh()
    page.wait_live()
    page.id("forget").click()
    page.wait(lambda: page.state == "locked", "the key is forgotten")


@steady
def test_the_page_shows_what_the_status_says(page: Page, server: ElasticServer) -> None:
    enter(page, server)
    status = server.status()
    assert page.placement() == placed(server)
    assert page.driver.title.startswith("EP 2/4")
    for rank in status["ranks"][:2]:
        row = page.driver.find_elements(By.CSS_SELECTOR, "#rank-rows tr")[rank["rank"]].text
        assert "active" in row and f"pid {rank['pid']}" in row and "used" in row
    devices = page.driver.find_elements(By.CSS_SELECTOR, "#devices li")
    assert len(devices) == RANKS and "columns" in devices[0].text and "KV" in devices[0].text
    assert "Not available on this server" in page.text("policy") or page.id("policy-modes").is_displayed()
    assert page.complaints() == []


@steady
def test_a_change_that_somebody_else_makes_is_seen_under_load(page: Page, server: ElasticServer) -> None:
    enter(page, server)
    page.js(
        "window.flights = 0; const animate = Element.prototype.animate;"
        "Element.prototype.animate = function (...all) { window.flights += 1; return animate.apply(this, all); };"
        "window.ghosts = 0; new MutationObserver(() => { window.ghosts = Math.max(window.ghosts,"
        "document.querySelectorAll('.cell.ghost').length); }).observe(document.body, {subtree: true, childList: true});"
    )
    begin = int(time.time())
    with Load(server.url) as load:
        streams = [load.start([5, 6, 7, 8 + number], 400) for number in range(4)]
        for stream in streams:
            stream.wait_for_tokens(5, 60)
        operation = server.must_scale(4)
        page.wait(lambda: page.placement() == placed(server), "the new placement is drawn")
        page.wait(lambda: "done" in page.text("operation-rows"), "the change is in the list")
        for stream in streams:
            stream.wait(240)
        ends = int(time.time())
        page.wait(lambda: page.js("return state.figures.at(-1).at") > ends, "the last second is told")
    figures = [second for second in page.js("return state.figures") if second["at"] >= begin]
    assert sum(second["tokens"] for second in figures) == 1600
    assert sum(second["arrived"] for second in figures) == sum(second["ended"] for second in figures) == 4
    ttfts = [second["ttft_p50_ms"] for second in figures if second["ttft_p50_ms"] is not None]
    measured = [1000 * (stream.first_at - stream.sent_at) for stream in streams]
    assert ttfts and 0 < min(ttfts) <= max(measured)
    longest = max(max(stream.gaps()) for stream in streams) * 1000
    seen = max(second["longest_gap_ms"] or 0 for second in figures)
    assert longest / 4 - 50 <= seen <= longest * 2 + 250, "clients and the page see about the same longest gap"
    assert page.js("return window.ghosts") > 0, "what will move was marked"
    assert page.js("return window.flights") >= operation["columns_planned"], "columns flew to their new ranks"
    assert "2→4" in page.js("return document.querySelector('#plots svg').textContent"), "the change is marked"
    assert "done" in page.js("return document.getElementById('news').textContent"), "a screen reader hears of it"
    assert page.complaints() == []


@steady
def test_scaling_and_retiring_by_button(page: Page, server: ElasticServer) -> None:
    enter(page, server)
    page.id("more").click()
    page.id("scale-button").click()
    page.wait(lambda: server.status()["membership"] == [0, 1, 2], "the server has grown")
    page.wait(lambda: "Accepted" in page.text("scale-answer"), "the page says that it was accepted")
    page.wait(lambda: page.placement() == placed(server), "the new placement is drawn")
    page.wait(lambda: server.status()["running"] is None, "the change has ended")

    page.driver.find_element(By.CSS_SELECTOR, "input[aria-label='Select rank 1 to retire it']").click()
    page.id("retire").click()
    assert page.text("confirm-what") == "Retire rank 1?"
    page.id("confirm-no").click()
    assert server.status()["membership"] == [0, 1, 2] and server.status()["running"] is None
    page.id("retire").click()
    page.id("confirm-yes").click()
    page.wait(lambda: server.status()["membership"] == [0, 2], "rank 1 has retired")
    page.wait(lambda: page.placement() == placed(server), "the new placement is drawn")

    page.wait(lambda: server.status()["running"] is None, "the change has ended")
    page.js("document.getElementById('scale-form').noValidate = true")
    page.id("size").send_keys(Keys.CONTROL, "a")
    page.id("size").send_keys("9", Keys.ENTER)
    page.wait(lambda: "from 1 to 4" in page.text("scale-answer"), "the server's sentence")
    assert "bad" in str(page.id("scale-answer").get_attribute("class"))


@steady
def test_everything_works_with_the_keyboard_alone(page: Page, server: ElasticServer) -> None:
    enter(page, server)
    page.js("document.activeElement.blur()")
    page.tab_to("inspect")
    page.press(Keys.ARROW_LEFT)
    assert not page.text("readout").startswith("Latest") and "tokens/s" in page.text("readout")
    page.tab_to("size")
    page.press(Keys.ARROW_UP)
    assert page.id("size").get_attribute("value") == "3"
    page.press(Keys.ENTER)
    page.wait(lambda: server.status()["membership"] == [0, 1, 2], "the server has grown")
    page.wait(lambda: server.status()["running"] is None, "the change has ended")
    page.wait(lambda: page.placement() == placed(server), "the new placement is drawn")
    page.tab_to("fewer")
    page.press(Keys.SPACE)
    page.tab_to("scale-button")
    page.press(Keys.ENTER)
    page.wait(lambda: page.focused == "confirm-no", "the question has the focus, on what does nothing")
    page.press(Keys.ESCAPE)
    page.wait(lambda: page.focused == "scale-button", "the focus is back")
    page.press(Keys.ENTER)
    page.wait(lambda: page.focused == "confirm-no", "the question")
    page.tab_to("confirm-yes")
    page.press(Keys.ENTER)
    page.wait(lambda: server.status()["membership"] == [0, 1], "the server has shrunk")
    ring = page.js("return getComputedStyle(document.activeElement).outlineStyle")
    assert ring != "none", "where the focus is can be seen"


@steady
def test_roles_names_and_contrast(page: Page, server: ElasticServer) -> None:
    """axe-core in both colour schemes and widths; nothing is wider than the window."""
    page.open(server.url)
    page.js("sessionStorage.clear()")
    page.driver.refresh()
    page.wait(lambda: page.state == "locked", "the page asks for the key")
    assert page.axe() == []
    enter(page, server)
    for width, scheme in itertools.product((1280, 390), ("light", "dark")):
        page.emulate(width, 800, prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
        page.wait(lambda: page.js("return document.querySelectorAll('#operation-rows tr').length") > 0, "a change")
        assert page.axe() == [], f"{width} pixels, {scheme}"
        assert page.js("return document.documentElement.scrollWidth") <= width


@steady
def test_a_theme_that_was_chosen_stays_and_motion_can_be_reduced(page: Page, server: ElasticServer) -> None:
    enter(page, server)
    background = "return getComputedStyle(document.documentElement).backgroundColor"
    light = page.js(background)
    page.id("theme").click()
    page.id("theme").click()
    assert page.text("theme-name") == "dark" and page.js(background) != light
    page.driver.refresh()
    page.wait_live()
    assert page.text("theme-name") == "dark" and page.js(background) != light
    page.emulate(1280, 800, prefers_reduced_motion="reduce")
    page.js("window.flights = 0; Element.prototype.animate = () => { window.flights += 1; }")
    server.must_scale(3)
    page.wait(lambda: page.placement() == placed(server), "the new placement is drawn")
    assert page.js("return window.flights") == 0


POLICY = """
window.asked = [];
const fetched = window.fetch, settings = {slo: "ttft=1s", autoscale: "shadow", hold_s: 600};
window.fetch = async (path, options) => {
  if (!String(path).startsWith("policy")) return fetched(path, options);
  if (options.method === "POST") {
    const body = JSON.parse(options.body);
    window.asked.push([body, options.headers.Authorization]);
    if (body.hold_s === "long") return Response.json({error: "hold_s must be a number"}, {status: 400});
    Object.assign(settings, body);
  }
  const decisions = [[30, "nothing", 2], [29, "nothing", 2], [28, "grow", 3]].map(([at, action, desired]) => (
    {at, action, ranks: 2, desired, because: `reason ${at}`, acted: false, inputs: {waiting: 4}}));
  return Response.json({settings, mode: settings.autoscale, state: "It looks.", desired_ranks: 3, attainment: null,
    goodput_tokens_per_s: 41.2, ttft: {p50: 0.12, p90: null, p99: 1.5}, queue_length: 4, decisions});
};
"""
"""In place of the server's route: whatever the policy decides, the page shows the same."""


@steady
def test_the_policy_is_shown_and_set(page: Page, server: ElasticServer) -> None:
    enter(page, server)
    page.js(POLICY + "state.policy = null; state.decisions = []; nextPolicy = 0;")
    page.wait(lambda: "It looks." in page.text("policy-state"), "the policy is shown")
    assert "SLO ttft=1s" in page.text("policy-state") and "120 ms · – · 1.50 s" in page.text("policy-figures")
    first, second = page.driver.find_elements(By.CSS_SELECTOR, "#decisions li")
    assert "nothing: reason 30 (2 times since" in first.text
    assert "grow 2 → 3 (not carried out): reason 28" in second.text and "waiting 4" in second.text
    modes = page.driver.find_elements(By.CSS_SELECTOR, "#policy-modes button")
    assert [mode.get_attribute("aria-pressed") for mode in modes] == ["false", "true", "false"]
    assert page.axe() == []
    modes[2].click()
    page.id("confirm-yes").click()
    page.wait(lambda: modes[2].get_attribute("aria-pressed") == "true", "it is on")
    page.driver.find_element(By.CSS_SELECTOR, "#policy summary").click()
    page.id("setting").send_keys("hold_s")
    page.id("setting-value").clear()
    page.id("setting-value").send_keys("long", Keys.ENTER)
    page.wait(lambda: "hold_s must be a number" in page.text("policy-answer"), "the server's sentence")
    bearer = f"Bearer {KEY}"
    assert page.js("return window.asked") == [[{"autoscale": "on"}, bearer], [{"hold_s": "long"}, bearer]]


@steady
def test_a_line_that_was_cut_is_told_and_mended(page: Page, server: ElasticServer, line: Line) -> None:
    line.lead_to(server.port)
    enter(page, server, line.url)
    line.cut()
    page.wait(lambda: page.state == "lost", "the page says that the server does not answer")
    assert "does not answer" in page.text("lost") or "closed the connection" in page.text("lost")
    assert "as of" in page.text("lost") and page.id("board").is_displayed(), "what was seen last stays, with its time"
    line.lead_to(server.port)
    page.wait_live()
    assert not page.id("lost").is_displayed()


@pytest.mark.shared("site", "last")
def test_the_page_survives_a_restart_of_the_server(page: Page, shared: Shared, line: Line) -> None:
    """Another server behind the same address, after one that was stopped while somebody looked at the page."""
    site = shared.site()
    first = site.running()
    line.lead_to(first.port)
    page.open(line.url)
    page.js("sessionStorage.clear()")
    page.driver.refresh()
    page.wait_live()
    page.wait(lambda: page.placement() != {}, "ranks are drawn")
    instance = page.js("return state.instance")
    site.stop()
    assert first.exit_status == 0, "an open page does not keep the server from ending"
    page.wait(lambda: page.state == "lost", "the page says that the server does not answer")
    line.lead_to(site.next().port)
    page.wait_live()
    assert page.js("return state.instance") != instance
    assert "restarted" in page.js("return document.getElementById('news').textContent")
    page.wait(lambda: "restart" in page.js("return document.querySelector('#plots svg').textContent"), "the mark")
