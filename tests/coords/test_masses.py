"""The scale of masses: in the map, the chart, two runs and the stills."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from coords.still import MASS_COLOURS, mass_scale
from map_scene import (
    WORDS,
    is_colour,
    on_screen,
    pixels,
    rewrite,
    words_checkpoint,
)


def share_of_scale(mass, high):
    return np.clip(0.5 + np.log(mass) / np.log(high) / 2, 0, 1)


def test_masses_on_one_scale_around_1(open_map, in_tmp):
    """Colours and sizes by the ratio to 1; the same in the map, the chart, both runs and stills."""
    words_checkpoint()
    words_checkpoint("y.pt", hidden_dim=24)
    page, runs = open_map(
        "--text",
        WORDS,
        "--compare",
        "y.pt",
        address="#view=map&token=20&colour=mass&layer=2&fit=layer",
    )
    masses = np.concatenate([run["mass"] for run in runs])
    high = max(1 / 0.9, masses.max(), 1 / masses.min())
    legends = page.locator(".scene .legend").all_inner_texts()
    assert legends[0].split("mass")[0] == legends[1].split("mass")[0]
    low_and_high = [float(x) for x in re.findall(r"[\d.]+", legends[0])[:2]]
    assert np.allclose(low_and_high, [1 / high, high], rtol=0.006)
    still = [SimpleNamespace(measured=SimpleNamespace(mass=np.array(run["mass"]))) for run in runs]
    assert np.allclose(mass_scale(still), [1 / high, high], rtol=1e-4)
    picture = pixels(page)
    shown = MASS_COLOURS(share_of_scale(runs[0]["mass"][20], high))[:3]
    assert is_colour(picture, on_screen(page, runs[0], 2)[20], 255 * np.array(shown))

    # the chart: every point at its mass and frequency, as the ticks beside it have them
    page.click("#tab-masses")
    read = """(name) => [...document.querySelectorAll('.masses')[0].querySelectorAll(name)].map(
      n => [...['cx', 'cy', 'r', 'x', 'y', 'y1'].map(a => Number(n.getAttribute(a))), n.textContent,
        getComputedStyle(n).fill])"""
    given = runs[0]["vocabulary"]
    points = page.evaluate(read, ".point")
    ticks = page.evaluate(read, ".tick")
    up = [(float(t), y - 4) for *_, x, y, _, t, _ in ticks if x < 55]
    along = {t: x for *_, x, y, _, t, _ in ticks if x > 55}
    (one, y_one), (two, y_two) = up[0], up[-1]
    at = y_one + np.log(np.array(given["masses"]) / one) / np.log(two / one) * (y_two - y_one)
    assert np.allclose([p[1] for p in points], at, atol=0.1) and one < two
    far = np.log2(2 * np.maximum(given["counts"], 0.5)) * (along["1"] - along["never"])
    assert np.allclose([p[0] for p in points], along["never"] + far, atol=0.1)
    assert max(given["counts"]) > 2
    # what is beyond the masses of the text looks like the last of them
    share = share_of_scale(np.array(given["masses"]), high).clip(0, 1)
    assert np.allclose([p[2] for p in points], 3.5 * 4**share / 2, rtol=1e-3)
    expected = [f"rgb({','.join(str(round(255 * c)) for c in MASS_COLOURS(s)[:3])})" for s in share]
    drawn = np.array([re.findall(r"\d+", p[-1]) for p in points], float)
    wanted = np.array([re.findall(r"\d+", c) for c in expected], float)
    assert np.abs(drawn - wanted).max() <= 2
    mark = page.evaluate(read, ".mark-line")[0][5]
    assert mark == pytest.approx(y_one + np.log(1 / one) / np.log(two / one) * (y_two - y_one))

    # masses within a few thousandths of 1 look like 1
    def alike(run):
        run["mass"] = [1.003 if n % 2 else 0.998 for n in range(len(run["mass"]))]
        run["vocabulary"]["masses"] = [1.003] * len(run["vocabulary"]["masses"])

    rewrite(in_tmp, alike)
    page, (run, _) = open_map(address="#view=map&token=21&colour=mass&layer=2&fit=layer")
    assert page.locator(".legend").first.inner_text().split("mass")[0].split() == ["0.900", "1.11"]
    assert is_colour(pixels(page), on_screen(page, run, 2)[21], (149, 149, 149))
