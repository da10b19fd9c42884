"""Makes the README's two pictures from one live run: the page while a job trains and chat runs, and finetuning under a burst.

    make pictures    needs Chromium; about two minutes

    docs/images/page.png    the page, in a browser that asks a question meanwhile
    docs/images/burst.png   tokens per second of both workloads, from the server's counters

The run: `coserve serve` with the demo's objectives; the demo's job alone; then chat that arrives at random, with a burst of it
for a while. Nothing is drawn that was not measured.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from pathlib import Path

from playwright.async_api import Page, async_playwright

from coserve.demo.client import connect
from coserve.demo.job import SEED, create_job
from coserve.demo.server import START_S, beside, open_server, serve_command
from coserve.demo.story import TPOT_MS, TTFT_MS
from coserve.demo.traffic import Traffic
from coserve.demo.watch import Watch
from coserve.plots import throughput_chart

IMAGES = Path(__file__).parent / "images"
ALONE_S, CALM_S, BURST_S, AFTER_S = 12.0, 18.0, 10.0, 25.0
CALM_RATE, BURST_RATE = 0.4, 5.0
"""Requests per second."""
SPAN_S = 3.0
"""Rates are means of so many seconds."""
_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUESTION = "Who tends the lighthouse at Vellmoor?"


async def traffic_for(seconds: float, traffic: Traffic) -> None:
    """Chat at the traffic's rate for so long; requests that were sent go on afterwards."""
    running = asyncio.create_task(traffic.run())
    await asyncio.sleep(seconds)
    running.cancel()


async def play(url: str, page: Page) -> None:
    """One run against a server that listens; writes both pictures."""
    connection = connect(url)
    base = (await connection.client.models.list()).data[0].id
    watch = Watch(connection, lambda: None)
    await page.goto(f"{url}/")

    async def story() -> tuple[float, float]:
        watch.job = await create_job(connection, base)
        await watch.until(lambda: bool(watch.samples) and watch.samples[-1].finetune_tokens > 0)
        await asyncio.sleep(ALONE_S)
        await traffic_for(CALM_S, Traffic(connection, base, CALM_RATE, SEED))
        await page.fill("#chat-text", QUESTION)
        await page.click("#chat-send")
        began = time.perf_counter()
        await traffic_for(BURST_S, Traffic(connection, base, BURST_RATE, SEED + 1))
        ended = time.perf_counter()
        await traffic_for(AFTER_S, Traffic(connection, base, CALM_RATE, SEED + 2))
        await page.screenshot(path=IMAGES / "page.png")
        return began, ended

    burst = await beside(story(), watch.run())
    start = watch.samples[0].time_s
    throughput_chart(
        [sample.time_s - start for sample in watch.samples],
        {"finetuning": [sample.finetune_tokens for sample in watch.samples],
         "inference": [sample.inference_tokens for sample in watch.samples]},
        IMAGES / "burst.png", span_s=SPAN_S, shaded=(burst[0] - start, burst[1] - start),
        shaded_label=f"a burst: {BURST_RATE:g} requests/s", title="Finetuning yields to a burst of chat, and returns",
    )


async def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        arguments = ["--data-dir", f"{directory}/data", "--slo-tpot-ms", f"{TPOT_MS:g}", "--slo-ttft-ms", f"{TTFT_MS:g}"]
        async with (
            open_server(serve_command(arguments), Path(directory) / "server.log", print) as server,
            async_playwright() as playwright,
        ):
            browser = await playwright.chromium.launch(executable_path=_CHROMIUM, chromium_sandbox=False)
            page = await browser.new_page(viewport={"width": 1440, "height": 1000}, color_scheme="light")

            async def run() -> None:
                await server.wait_ready(START_S)
                await play(server.url, page)

            await beside(run(), server.read())
            await browser.close()


if __name__ == "__main__":
    asyncio.run(main())
