import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from PIL import Image
from report_pages import Page, made

from timm_nrpm.attacks.flags import MASKED
from timm_nrpm.figures.page import write_page
from timm_nrpm.figures.robustness import draw_attacks

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "microsoft-edge", "firefox")


def beyond(browse, path, width):
    """What is cut off, or wider than a window of this width, outside the boxes that scroll by themselves.

    Chromium's window is at least 500 pixels wide, so the page is shown in a frame; only this copy of the page holds a
    script, which measures the page and writes what it finds into the frame's own text.
    """
    script = """<script>const found = [], edge = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth > edge) found.push("page " + document.documentElement.scrollWidth);
    for (const each of document.body.querySelectorAll("*")) {
      const box = each.getBoundingClientRect(), inside = each.parentElement.closest(".wide, .paper");
      // A caption stays in the window while the table below it scrolls.
      const beyond = box.right > edge + 1 || box.left < -1;
      if (box.width && beyond && (!inside || each.matches("caption"))) found.push(each.tagName + " " + box.right);
      if (each.matches(".wide, .paper") && getComputedStyle(each).overflowX !== "auto") found.push("no scrolling");
    }
    parent.postMessage([edge, found], "*");</script>"""
    source = re.sub("<meta http-equiv=[^>]*>", "", path.read_text(encoding="utf-8"))
    copy = path.with_name(f"copy-{width}.html")
    copy.write_text(source.replace("</body>", f"{script}</body>"), encoding="utf-8")
    frame = path.with_name(f"frame-{width}.html")
    frame.write_text(
        "<body><p></p><script>onmessage = e => document.body.firstChild.textContent = JSON.stringify(e.data);</script>"
        f'<iframe src="{copy.name}" style="width:{width}px; height:900px; border:0"></iframe>',
        encoding="utf-8",
    )
    dom = browse("--dump-dom", "--virtual-time-budget=3000", "--window-size=1400,1000", name=f"dom{width}", page=frame)
    edge, found = json.loads(re.search("<p>(.*?)</p>", dom).group(1))
    assert abs(edge - width) <= 16  # a scroll bar may take some
    return found


@pytest.fixture
def browse(tmp_path):
    """Open a page in a browser without a window, and return what it prints."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}")

    def browse(*arguments, name, page):
        if "firefox" in program:
            if "--dump-dom" in arguments:
                pytest.skip("Firefox does not print the page as it stands")
            command = [program, "--headless", "--profile", str(tmp_path)]
        else:
            command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
            command += [f"--user-data-dir={tmp_path / name}"]
        command += [*arguments, page.as_uri()]
        return subprocess.run(command, capture_output=True, timeout=120, check=True).stdout.decode()

    return browse


@pytest.mark.parametrize("width", [390, *(pytest.param(width, marks=pytest.mark.slow) for width in (768, 1280))])
def test_nothing_is_cut_off_however_long_its_name(real, browse, width, tmp_path):
    """Of several reports with pictures, of another without a control, and of one with members and flags."""
    long = f"folder_{'without_an_end_' * 12}/{'0123456789abcdef' * 8}"
    odd = [
        real[1],
        replace(real[0], warnings=(long,), sha256=long, suite=long, versions={long: long}),
        replace(real[1], control=None),
    ]
    renamed = tuple(replace(each, name=f"{each.name}_member_{long}") for each in real[1].attacks)
    odd.append(replace(real[1], attacks=renamed, flags=(MASKED, long), plain="member"))
    picture = draw_attacks(made(), tmp_path / "attacks.png")
    path = write_page(odd, tmp_path / "odd.html", title=long, pictures={long: picture})
    assert beyond(browse, path, width) == []


def test_in_a_real_browser(real, browse, tmp_path):
    path = write_page(real, tmp_path / "page.html", title="A model")

    def seen(name, width, *arguments):
        browse(*arguments, f"--window-size={width},1400", f"--screenshot={tmp_path / name}.png", name=name, page=path)
        with Image.open(tmp_path / f"{name}.png") as picture:
            return picture.convert("RGB")

    light = seen("light", 900)
    assert light.width == 900
    colours = {colour for _, colour in light.getcolors(1 << 21)}
    assert len(colours) > 100
    assert max(light.getcolors(1 << 21))[1] == (255, 255, 255)
    dom = browse("--dump-dom", name="dom", page=path)
    dark = seen("dark", 600, "--blink-settings=preferredColorScheme=0")
    assert dark.width == 600
    assert max(dark.getcolors(1 << 21))[1] == (0x14, 0x17, 0x1B)
    (tmp_path / "dom.html").write_text(dom, encoding="utf-8")
    page, written = Page(tmp_path / "dom.html"), Page(path)
    assert len(page.all("tr")) == len(written.all("tr")) > 30
    for report in real:
        caption = f"3 attacks on 40 images, {report.threat}"
        assert page.table(caption) == written.table(caption)
    assert page.reports() == real
