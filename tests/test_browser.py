"""The built book in a real browser with the network closed: every page, narrow and wide, light and dark.

Each page is opened once; what is seen there is noted, and the tests read the notes.
"""

import functools
import html
import html.parser
import http.server
import re
import shutil
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest
import test_colab
from conftest import ROOT, require

SITE = ROOT / "_build" / "html"
PAGES = sorted(
    str(path.relative_to(SITE))
    for path in SITE.rglob("*.html")
    if path.name != "index.html" and not path.relative_to(SITE).parts[0].startswith("_")
)
WIDTHS, THEMES = (1280, 390), ("light", "dark")
each_page = pytest.mark.parametrize("name", PAGES)

SETTLE = """async () => {
  if (window.MathJax?.startup) await MathJax.startup.promise;
  await document.fonts.ready;
  for (const img of document.images) { img.loading = "eager"; await img.decode().catch(() => null); }
}"""

# Formulas, and text in which TeX is left, over the whole page; listings may hold what they like.
MATHEMATICS = r"""() => {
  const raw = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode;
    if (node.parentElement.closest("pre, code, script, style, mjx-container, noscript")) continue;
    if (/\$|\\[()\[\]]|\\[A-Za-z]+/.test(node.data)) raw.push(node.data.trim().slice(0, 80));
  }
  const sources = [...document.querySelectorAll(".math")];
  return {
    raw,
    formulas: sources.length,
    bare: sources.filter(e => !e.querySelector("mjx-container")).map(e => e.textContent.slice(0, 80)),
    errors: [...document.querySelectorAll("mjx-merror, [data-mjx-error]")].map(
      e => e.getAttribute("data-mjx-error") || e.textContent),
  };
}"""

PICTURES = r"""() => [...document.querySelectorAll("main img:not([src*='_static/minus.png'])")].map(
  img => ({alt: img.alt, loads: img.naturalWidth > 0, source: img.src.slice(0, 80)}))"""

# What sticks out of the window: visible pieces of the article beyond its edges, where no scroll bar leads.
OVERFLOW = r"""() => {
  const pieces = "p, li, h1, h2, h3, h4, dt, dd, pre, table, img, mjx-container, .jupyter-widgets";
  const article = document.querySelector("article");
  const scrolls = e => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
  const out = [], width = window.innerWidth, root = document.scrollingElement;
  if (root.scrollWidth > width) out.push(`the page: ${root.scrollWidth} > ${width}`);
  for (const e of article ? article.querySelectorAll(pieces) : []) {
    const box = e.getBoundingClientRect();
    if (!box.width || !box.height || (box.right <= width + 1 && box.left >= -1)) continue;
    let around = e;
    while (around !== article && !scrolls(around)) around = around.parentElement;
    const where = `${Math.round(box.left)}..${Math.round(box.right)} > ${width}`;
    if (around === article) out.push(`${e.tagName} ${where}: ${e.textContent.trim().slice(0, 60)}`);
  }
  return out;
}"""

BRIGHTNESS = r"""() => {
  let e = document.querySelector("article") || document.body, colour;
  const clear = () => /, 0\)$|transparent/.test(colour = getComputedStyle(e).backgroundColor);
  while (clear() && e.parentElement) e = e.parentElement;
  return colour.match(/[\d.]+/g).slice(0, 3).reduce((sum, x) => sum + Number(x), 0) / 3;
}"""

# The frame that a slider shows: the visible pictures of the widget around the handle.
FRAME = r"""handle => {
  let root = handle;
  for (let e = handle; e; e = e.parentElement) if (e.classList.contains("jupyter-widgets")) root = e;
  return [...root.querySelectorAll("img")].filter(i => i.checkVisibility()).map(i => [i.alt, i.src]);
}"""


class Visits(dict):
    """{page: what was seen there}, filled as pages are asked for."""

    def __init__(self, browser, origin):
        self.browser, self.origin, self.left_origin = browser, origin, []
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
        self.context.set_default_timeout(60_000)
        self.context.route("**/*", self.guard)

    def guard(self, route):
        if route.request.url.startswith(self.origin):
            return route.continue_()
        self.left_origin.append(route.request.url)
        return route.abort()

    def open(self, name):
        page, problems = self.context.new_page(), []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("response", lambda r: problems.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        page.goto(self.origin + name)
        widgets = page.locator('script[type="application/vnd.jupyter.widget-view+json"]').count()
        if widgets:
            page.wait_for_function(f"document.querySelectorAll('.jupyter-widgets [role=slider]').length >= {widgets}")
        page.add_style_tag(content="* { transition: none !important; animation: none !important }")
        page.evaluate(SETTLE)
        return page, problems, widgets

    def __missing__(self, name):
        page, problems, widgets = self.open(name)
        seen = self[name] = {"problems": problems, "widgets": widgets, "overflow": {}, "brightness": {}}
        seen["mathematics"], seen["pictures"] = page.evaluate(MATHEMATICS), page.evaluate(PICTURES)
        seen["sliders"] = [self.slide(page, handle) for handle in page.locator("[role=slider]").all()]
        seen["closed"], seen["stuck"], seen["buried"] = self.unfold(page)
        for width in WIDTHS:  # with all folded things open
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(250)  # the page's own script tidies up after a resize
            for theme in THEMES:
                page.emulate_media(color_scheme=theme)
                page.evaluate("theme => { document.documentElement.dataset.theme = theme }", theme)
                seen["overflow"][f"{width} px, {theme}"] = page.evaluate(OVERFLOW)
                seen["brightness"][theme] = page.evaluate(BRIGHTNESS)
        page.close()
        return seen

    def slide(self, page, handle):
        """Move a slider by one step with the keyboard; returns what was shown before and after."""
        last = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
        before, pixels = handle.evaluate(FRAME), self.picture_of(handle)
        handle.focus()
        page.keyboard.press("ArrowLeft" if last else "ArrowRight")
        page.wait_for_timeout(150)
        return {
            "before": before,
            "after": handle.evaluate(FRAME),
            "redrawn": pixels != self.picture_of(handle),
        }

    @staticmethod
    def picture_of(handle):
        root = handle.locator("xpath=ancestor::*[contains(@class, 'jupyter-widgets')][last()]")
        return root.locator("img:visible").first.screenshot() if root.locator("img:visible").count() else None

    @staticmethod
    def unfold(page):
        """Open what is folded: how many there were; which stayed closed; which formulas no link opens."""
        buried, shut = [], "document.querySelectorAll('article details').forEach(e => { e.open = false })"
        inside = "[...document.querySelectorAll('article details .math[id]')].map(e => e.id)"
        for name in page.evaluate(inside)[:4]:
            page.evaluate(shut)
            page.evaluate("name => { location.hash = name }", name)
            page.wait_for_timeout(50)
            if not page.evaluate("name => document.getElementById(name).checkVisibility()", name):
                buried.append(name)
        page.evaluate(shut)
        folds = page.locator("article details > summary, article .toggle .toggle-button").all()
        stuck = []
        for fold in folds:
            fold.scroll_into_view_if_needed()
            fold.click(position={"x": 8, "y": 8})
            if not fold.evaluate(
                "e => e.closest('details')?.open ?? !e.closest('.toggle').classList.contains('toggle-hidden')"
            ):
                stuck.append(fold.inner_text()[:60])
        return len(folds), stuck, buried


def chromium(playwright):
    """The system's Chromium, or the one that `playwright install chromium` fetched; None where there is neither."""
    fetched = playwright.chromium.executable_path
    return shutil.which("chromium") or (fetched if Path(fetched).is_file() else None)


@pytest.fixture(scope="module")
def visits():
    require(PAGES, "the built book (make book)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        require(chromium(playwright), "the browser chromium")
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    arguments = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(playwright), args=arguments)
        yield Visits(browser, f"http://127.0.0.1:{server.server_port}/")
        browser.close()
    server.shutdown()
    server.server_close()


def described(picture):
    """Whether a picture has a text in words, not the name of a file, which Sphinx takes where it has none."""
    return len(picture["alt"]) >= 10 and not re.search(r"\.(png|svg|jpe?g)$", picture["alt"])


@each_page
def test_page_is_quiet(visits, name):
    assert not visits[name]["problems"], "errors on the console"


@each_page
def test_mathematics_is_rendered(visits, name):
    mathematics = visits[name]["mathematics"]
    assert not mathematics["errors"], "formulas that MathJax could not read"
    assert not mathematics["bare"], "formulas that were not rendered"
    assert not mathematics["raw"], "TeX left in the text"


@each_page
def test_nothing_overflows(visits, name):
    assert {at: out for at, out in visits[name]["overflow"].items() if out} == {}


@each_page
def test_light_and_dark(visits, name):
    brightness = visits[name]["brightness"]
    assert brightness["light"] > 200 and brightness["dark"] < 60, brightness


@each_page
def test_pictures_load_and_are_described(visits, name):
    for picture in visits[name]["pictures"]:
        assert picture["loads"], picture
        assert described(picture), picture


@each_page
def test_sliders_work_by_keyboard_without_a_kernel(visits, name):
    for slider in visits[name]["sliders"]:
        assert slider["before"] and slider["after"], "a slider that shows no picture"
        assert slider["before"] != slider["after"] and slider["redrawn"], "the picture does not change"
        alternatives = [[alt for alt, _ in slider[when]] for when in ("before", "after")]
        assert alternatives[0] != alternatives[1], "the alt text does not change"
    assert len(visits[name]["sliders"]) >= visits[name]["widgets"]


@each_page
def test_folded_parts_open(visits, name):
    assert not visits[name]["stuck"], "stays closed when clicked"
    assert not visits[name]["buried"], "formulas in a folded proof that a link to them does not open"


FAULTY = r"""<body style="margin: 0"><main><article>
<p>Raw $x$</p><p>Raw \(y\)</p><p>Raw \alpha</p><pre>$not$ \raw</pre>
<span class="math">x</span> <mjx-merror data-mjx-error="Undefined control sequence"></mjx-merror>
<img src="none.png" alt="none.png"> <div style="overflow-x: hidden"><p style="width: 3000px">Too wide.</p></div>
<div style="overflow-x: auto"><p style="width: 3000px">Can be scrolled.</p></div>
<img src="https://example.org/picture.png" alt="A picture from elsewhere">
</article></main><script>throw new Error("broken")</script>"""


def test_faults_are_seen(visits):
    """A page with one fault of each kind, looked at in the same way."""
    here = type(visits)(visits.browser, visits.origin)
    here.context.route(f"{here.origin}faulty.html", lambda r: r.fulfill(body=FAULTY, content_type="text/html"))
    seen = here["faulty.html"]
    assert len(seen["mathematics"]["raw"]) == 3
    assert seen["mathematics"]["bare"] == ["x"] and len(seen["mathematics"]["errors"]) == 1
    assert [described(picture) and picture["loads"] for picture in seen["pictures"]] == [False, False]
    assert [len(out) for out in seen["overflow"].values()] == [1] * 4
    assert here.left_origin == ["https://example.org/picture.png"]
    assert any("broken" in problem for problem in seen["problems"])
    assert any("404" in problem for problem in seen["problems"])


def test_something_was_tested(visits):
    """The tests above look at formulas, pictures, sliders and proofs: there are some."""
    seen = [visits[name] for name in PAGES]
    assert sum(page["mathematics"]["formulas"] for page in seen) > 100
    for what in ("pictures", "sliders"):
        assert any(page[what] for page in seen), f"no {what} on any page"
    assert sum(page["closed"] for page in seen) > 5


def test_no_request_leaves_the_origin(visits):
    for name in PAGES:
        visits[name]
    print(f"off-origin requests: {len(visits.left_origin)} of {len(PAGES)} pages")
    assert not visits.left_origin


class Links(html.parser.HTMLParser):
    """The links of a file, and the places in it that a link can name."""

    def __init__(self, path):
        super().__init__()
        self.links, self.places = [], {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.places.update(attributes[key] for key in ("id", "name") if attributes.get(key))
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])


links_of = functools.cache(Links)


@pytest.mark.parametrize("name", [*PAGES, "index.html"] if PAGES else [])
def test_internal_links_lead_somewhere(name):
    broken = []
    for link in links_of(SITE / name).links:
        if re.match(r"[a-z]+:", link):
            continue
        address, place = urldefrag(urljoin(f"/{name}", link))
        target = SITE / unquote(address).lstrip("/")
        if not target.is_file() or (target.suffix == ".html" and unquote(place) not in links_of(target).places):
            broken.append(link)
    assert not broken


def test_the_front_door_opens():
    require(PAGES, "the built book (make book)")
    start = re.search(r'url=([^"]+)"', (SITE / "index.html").read_text(encoding="utf-8"))
    assert start and (SITE / start[1]).is_file() or Path(SITE / "index.html").stat().st_size > 5000


@pytest.mark.parametrize("name", test_colab.NAMES)
def test_colab_has_the_numbers_of_the_page(name):
    page = SITE / "book" / f"{name}.html"
    require(page.exists(), "the built book (make book)")
    shown = re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))
    shown = " ".join(html.unescape(shown).replace("’", "'").split())  # Sphinx curls the apostrophe
    text = test_colab.prose(test_colab.stored(name))
    kinds = "Theorem|Lemma|Proposition|Corollary|Definition|Exercise|Remark"
    numbered = re.findall(rf"\*\*((?:{kinds}) [\d.]*\d(?: \([^$*`]+\))?)", text)  # with the title, if it is in words
    figures = re.findall(r"^\*\*Figure ([\d.]*\d)\.\*\* (\w+ \w+)", text, re.M)
    for said in numbered:
        assert re.search(rf"{re.escape(said)}(?![\d.]*\d)", shown), f"{said} is not on the page"
    for number, words in figures:
        assert re.search(rf"Figure {re.escape(number)} ?{re.escape(words)}", shown), f"Figure {number}: {words}"
    tags = re.findall(r"\\tag\{([\d.]+)\}", text)
    assert len(tags) == len(set(tags))
    for tag in tags:
        assert f"({tag})" in shown, f"({tag}) is not on the page"
