"""The reports' pages in a real browser: they open, their tables sort, a sample opens, and nothing is in the console."""

import asyncio
import io
from pathlib import Path

import pytest
from evaluation_folders import BASE, HOSTILE, TRAINED, write_evaluation
from headless_browser import Tab, browser_tab, find_browser
from rich.console import Console
from run_folders import row, sample_lines, write_run

from fastreason.report.compare import report_compare
from fastreason.report.run import report_run

BROWSER = find_browser()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        BROWSER is None,
        reason="no browser: install Debian's chromium (apt-get install chromium), or name one in CHROMIUM",
    ),
]
PROBLEMS = "table:has(button[data-problem])"
STEPS = "#t1-0"  # of a run's page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evals")
    folders = [write_evaluation(root, "base", BASE), write_evaluation(root, "trained", TRAINED)]
    return report_compare(folders, root / "report")


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_run_page(tmp_path_factory.mktemp("runs") / "try")


def written_run_page(folder: Path) -> Path:
    norms = {1: 0.002, 2: 1.5e-05, 3: 11.0}
    run = write_run(folder, [row(step, **{"train/grad_norm": norm}) for step, norm in norms.items()], steps=3)
    (run / "samples.jsonl").write_text(sample_lines(1, 2, 2, text=HOSTILE), encoding="utf-8")
    return report_run(run, console=Console(file=io.StringIO())).with_suffix(".html")


def in_browser(page: Path, tmp_path: Path, use) -> Tab:
    async def run() -> Tab:
        assert BROWSER is not None
        async with browser_tab(BROWSER, tmp_path / "profile") as tab:
            await tab.open(page)
            await use(tab)
            return tab

    return asyncio.run(asyncio.wait_for(run(), 180))


async def column(tab: Tab, table: str, number: int) -> list[str]:
    return await tab.run(
        f"[...document.querySelector({table!r}).tBodies[0].rows].map((row) => row.cells[{number}].textContent)"
    )


def test_the_page_opens_sorts_and_shows_samples(page: Path, tmp_path: Path) -> None:
    async def use(tab: Tab) -> None:
        assert await tab.run("document.querySelectorAll('figure img').length") >= 6
        assert await tab.run("[...document.images].every((image) => image.complete && image.naturalWidth > 50)")
        assert await column(tab, PROBLEMS, 0) == ["p2", "p1", "p4", "p10", "p3"], "best change first"
        # Numbers inside names count as numbers, and a second click turns the order round.
        await tab.click(f"{PROBLEMS} th:nth-child(1) button")
        assert await column(tab, PROBLEMS, 0) == ["p1", "p2", "p3", "p4", "p10"]
        await tab.click(f"{PROBLEMS} th:nth-child(1) button")
        assert await column(tab, PROBLEMS, 0) == ["p10", "p4", "p3", "p2", "p1"]
        await tab.click(f"{PROBLEMS} th:nth-child(4) button")
        assert await column(tab, PROBLEMS, 3) == ["-25.0", "0.0", "0.0", "+50.0", "+75.0"]
        assert await tab.run(f"document.querySelector('{PROBLEMS} th:nth-child(4)').ariaSort") == "ascending"
        await tab.click("button[data-problem='1']")
        assert await tab.run("document.getElementById('sample').open")
        text = await tab.run("document.getElementById('sample').textContent")
        assert HOSTILE in text and "trained: 4 of 4 right" in text and "Gold answer: 7" in text
        # Four samples of four of each model are shown; only the first is unfolded.
        assert await tab.run("document.querySelectorAll('#sample details').length") == 8
        assert await tab.run("document.querySelectorAll('#sample details[open]').length") == 1
        await tab.click("#sample header button")
        assert not await tab.run("document.getElementById('sample').open")
        await tab.run("(() => { const f = document.querySelector('input[type=search]'); f.value = 'P3';"
                      " f.dispatchEvent(new Event('input')); })()")  # fmt: skip
        assert (
            await tab.run(f"[...document.querySelector('{PROBLEMS}').tBodies[0].rows].filter((r) => !r.hidden).length")
            == 1
        )

    tab = in_browser(page, tmp_path, use)
    assert tab.complaints == []
    assert [address for address in tab.fetched if not address.startswith("data:")] == [page.resolve().as_uri()]


def test_what_a_model_writes_is_never_run(page: Path, tmp_path: Path) -> None:
    async def use(tab: Tab) -> None:
        await tab.click("button[data-problem='0']")
        assert await tab.run("window.hacked === undefined && document.querySelectorAll('#sample img').length === 0")

    assert in_browser(page, tmp_path, use).complaints == []


def test_the_page_of_a_run_opens_sorts_and_shows_responses(run_page: Path, tmp_path: Path) -> None:
    async def use(tab: Tab) -> None:
        assert await tab.run("document.images.length") == 1
        assert await tab.run("[...document.images].every((image) => image.complete && image.naturalWidth > 50)")
        assert await column(tab, STEPS, 0) == ["1", "2", "3"]
        assert await tab.run(f"document.querySelector('{STEPS} th:nth-child(3)').textContent") == "gradient norm"
        await tab.click(f"{STEPS} th:nth-child(3) button")
        assert await column(tab, STEPS, 2) == ["1.5e-05", "0.002", "11"], "a power of ten counts"
        await tab.click(f"{STEPS} th:nth-child(3) button")
        assert await column(tab, STEPS, 0) == ["3", "1", "2"]
        assert await column(tab, PROBLEMS, 0) == ["2: a", "1: a"], "the newest first"
        await tab.click(f"{PROBLEMS} th:nth-child(1) button")
        assert await column(tab, PROBLEMS, 0) == ["1: a", "2: a"]
        await tab.click("button[data-problem='0']")
        text = await tab.run("document.getElementById('sample').textContent")
        assert HOSTILE in text and "try: 2 of 2 right" in text
        assert await tab.run("window.hacked === undefined && document.querySelectorAll('#sample img').length === 0")

    tab = in_browser(run_page, tmp_path, use)
    assert tab.complaints == []
    assert [address for address in tab.fetched if not address.startswith("data:")] == [run_page.resolve().as_uri()]


def test_the_test_sees_a_page_that_complains(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<script>console.log('hello'); throw new Error('x')</script><img src='missing.png'>")

    async def use(tab: Tab) -> None:
        await asyncio.sleep(0.2)

    tab = in_browser(bad, tmp_path, use)
    assert len(tab.complaints) >= 2 and any(address.endswith("missing.png") for address in tab.fetched)
