"""The report as a reader meets it: opened from disk in headless Chromium."""

import pytest

from nnunet_diffrefine.reports.report import Request, write_report
from tests.reports import study
from tests.reports.browser import CHROMIUM, Browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)"),
]
COLUMN = "[...document.querySelectorAll('table.sortable tbody tr')].map(row => row.cells[{}].dataset.value)"
NAMES = "[...document.querySelectorAll('table.sortable tbody tr')].map(row => row.cells[0].textContent)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    given = study.build(folder / "study")
    tables = {name: folder / "study" / f"metrics_{system}" / "metrics.csv" for name, system in NAMED}
    page = write_report(Request(tables, folder / "out", given))
    browser = Browser(folder / "profile")
    browser.emulate()
    browser.open(page)
    yield browser
    browser.close()


NAMED = (("nnU-Net", "before"), ("refined", "after"))


def click(browser, column):
    browser.run(f"document.querySelectorAll('table.sortable thead button')[{column}].click()")


def test_it_sorts_by_value_both_ways_and_by_name(browser):
    click(browser, 5)
    ascending = [float(v) for v in browser.run(COLUMN.format(5))]
    assert ascending == sorted(ascending)
    assert len(set(ascending)) > 1
    click(browser, 5)
    assert [float(v) for v in browser.run(COLUMN.format(5))] == sorted(ascending, reverse=True)
    assert browser.run("document.querySelectorAll('[aria-sort=descending]').length") == 1
    click(browser, 0)
    names = browser.run(NAMES)
    # punctuation before letters, as people sort
    assert names == [name for name in (study.CASES[3], *study.CASES[:3]) for _ in range(2)]


def test_every_figure_is_drawn_and_every_image_decoded(browser):
    sizes = browser.run(
        "[...document.querySelectorAll('figure svg')].map(s => [s.getBoundingClientRect().width, s.getBBox().width])"
    )
    # scatter and size for two classes and two metrics, two on reliability, eight panels for each of three cases
    assert len(sizes) == 8 + 2 + 3 * 8
    assert min(min(size) for size in sizes) > 50
    images = browser.run("document.querySelectorAll('figure svg image').length")
    assert images >= 3 * 8
    decoded = "Promise.all([...document.querySelectorAll('figure svg image')].map(i => i.decode().then(() => 1)))"
    answer = browser("Runtime.evaluate", expression=decoded, awaitPromise=True, returnByValue=True)
    assert answer["result"]["value"] == [1] * images


def test_points_and_names_lead_to_rows_and_pictures(browser):
    browser.run("document.querySelector('.charts a[href^=\"#row-\"]').dispatchEvent(new MouseEvent('click'))")
    assert browser.run("document.querySelector('tr:target') !== null")
    browser.run("document.querySelector('table.sortable a').click()")
    assert browser.run("document.querySelector('article:target') !== null")


@pytest.mark.parametrize("width", [380, 1280])
def test_the_page_fits_the_window(browser, width):
    browser.emulate(width)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")


def test_light_and_dark_differ_and_both_are_legible(browser):
    contrasts = []
    for scheme in ("light", "dark"):
        browser.emulate(scheme=scheme)
        style = "getComputedStyle(document.{}).{}"
        colours = [browser.run(style.format("body", name)) for name in ("color", "backgroundColor")]
        colours += [
            browser.run(style.format(f"querySelector('.{verdict}')", "color")) for verdict in ("better", "worse")
        ]
        ink, paper, better, worse = map(luminance, colours)
        contrasts.append(paper)
        assert contrast(ink, paper) > 7
        assert min(contrast(better, paper), contrast(worse, paper)) > 4.5  # WCAG AA
    assert contrasts[0] > 0.9
    assert contrasts[1] < 0.1


def luminance(colour):
    """Relative luminance (WCAG 2) of ``rgb(r, g, b)``."""
    channels = [int(c) / 255 for c in colour[4:-1].split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def test_it_prints(browser):
    browser("Emulation.setEmulatedMedia", media="")
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF")
    assert 1 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 10


def test_nothing_was_logged_and_no_request_left_the_page(browser):
    """Last: over all that the tests above did."""
    browser.run("console.error('heard')")  # the listener listens
    heard = browser.named("Runtime.consoleAPICalled")
    assert [call["args"][0]["value"] for call in heard] == ["heard"]
    assert browser.named("Runtime.exceptionThrown") == []
    assert browser.named("Log.entryAdded") == []
    urls = [request["request"]["url"] for request in browser.named("Network.requestWillBeSent")]
    assert sum(url.startswith("file:") for url in urls) == 1
    assert all(url.startswith(("file:", "data:image/png")) for url in urls)


def test_the_policy_blocks_what_should_have_been_escaped(browser):
    """A second fence: a script that got in would not run, an image would not be fetched."""
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=x.png onerror=\"window.got = 1\">')")
    browser.run("{const s = document.createElement('script'); s.text = 'window.got = 2'; document.body.append(s)}")
    assert browser.run("window.got === undefined")
