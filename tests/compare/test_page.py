"""The page's text, drawings and embedded videos, without a browser."""

from __future__ import annotations

import base64
import itertools
import math
import random
import re
import statistics
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dit_accel.compare import charts
from dit_accel.compare.embed import Videos, recompressed
from dit_accel.compare.numbers import decimals, number, plural, seconds
from dit_accel.compare.page import write_page
from dit_accel.compare.results import Clip, Metric, ProfileInfo, Results, Spread
from dit_accel.video import read_video

VOID = {"meta", "link", "input", "br", "img", "hr"}


class Page(HTMLParser):
    """A page as a list of elements: tag, attributes, own and inner text, in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, {name: value or "" for name, value in attrs}, [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, []))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1][0] == tag, f"</{tag}> closes <{self.open[-1][0]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for _, _, text in self.open:
            text.append(data)

    def all(self, tag: str, **attributes: str) -> list[tuple[dict[str, str], str]]:
        """Attributes and inner text of the elements with this tag and these attributes."""
        wanted = {name.replace("_", "-").rstrip("-"): value for name, value in attributes.items()}
        return [
            (found, " ".join("".join(text).split()))
            for name, found, text in self.elements
            if name == tag and all(found.get(key) == value for key, value in wanted.items())
        ]


@pytest.fixture(scope="session")
def page(page_path: Path) -> Page:
    return Page(page_path)


def rows(page: Page, table: str) -> dict[str, list[str]]:
    """The cells of a table by the name in its rows' headers."""
    found: dict[str, list[str]] = {}
    inside, name = False, ""
    for tag, attributes, text in page.elements:
        if tag == "table":
            inside = table in attributes.get("class", "").split()
        words = " ".join("".join(text).split())
        if inside and tag == "th" and attributes.get("scope") == "row":
            name = words
            found[name] = []
        if inside and tag == "td":
            found[name].append(words)
    return found


# ---- Numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "digits"),
    [
        ([30.26, 8.1], 1),
        ([math.inf, 27.0], 1),
        ([0.951, 1.0], 3),
        ([0.031], 4),
        ([4.6], 2),
        ([412.0], 0),
        ([0.0], 2),
        ([None], 3),
        ([], 3),
    ],
)
def test_a_column_shows_three_figures(values, digits):
    assert decimals(values) == digits


def test_numbers_as_people_read_them():
    assert number(-1.25, 1) == "−1.2"
    assert number(-0.0001, 2) == "0.00"
    assert number(None, 2) == "–"
    assert number(math.inf, 1) == "∞"
    assert number(-math.inf, 1) == "−∞"
    assert [plural(1, "clip"), plural(1200, "clip")] == ["1 clip", "1,200 clips"]
    assert [seconds(v) for v in (None, 0, 0.0123, 0.45, 3.6, 59.96, 248.2, 3599.6, 7260)] == [
        "–",
        "0 s",
        "0.012 s",
        "0.450 s",
        "3.60 s",
        "60.0 s",
        "4 min 08 s",
        "1 h 00 min",
        "2 h 01 min",
    ]


# ---- Drawings -----------------------------------------------------------------------------


def sample(name: str, time: float, quality: float, spread: float = 0.0) -> charts.Sample:
    times = Spread(time, time - spread, time + spread)
    return charts.Sample(name, "profile", times, Spread(quality, quality - spread, quality))


@pytest.mark.parametrize("better", ["higher", "lower"])
@pytest.mark.parametrize("seed", range(20))
def test_pareto_front_is_what_nothing_beats(better, seed):
    rng = random.Random(seed)
    sign = 1 if better == "higher" else -1
    values = [*range(5), *([math.inf] if better == "higher" else [])]
    samples = [
        sample(str(i), rng.choice(range(1, 5)), rng.choice(values))
        for i in range(rng.randint(1, 9))
    ]

    def beats(a: charts.Sample, b: charts.Sample) -> bool:
        faster = b.time.median - a.time.median
        finer = sign * (a.quality.median > b.quality.median) - sign * (
            a.quality.median < b.quality.median
        )
        return faster >= 0 and finer >= 0 and (faster > 0 or finer > 0)

    free = {b.name for b in samples if not any(beats(a, b) for a in samples)}
    front = charts.pareto(samples, better)
    assert front <= free
    place = {s.name: (s.time.median, s.quality.median) for s in samples}
    assert {place[name] for name in front} == {place[name] for name in free}  # one of equals


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_scatter_puts_faster_left_and_better_up(better):
    samples = [sample("a", 1.0, 20.0, 0.1), sample("b", 2.0, 30.0, 0.1), sample("c", 4.0, 25.0)]
    chart = charts.scatter(samples, better)
    a, b, c = chart.points
    assert a.x < b.x < c.x
    assert (b.y < c.y < a.y) == (better == "higher")
    assert c.x - chart.frame.left == pytest.approx(4 * (a.x - chart.frame.left))  # from zero
    assert a.x_bar[0] < a.x < a.x_bar[1]
    for tick in chart.x_ticks:
        assert tick.at == pytest.approx(
            chart.frame.left + tick.value * (a.x - chart.frame.left), abs=0.01
        )
    assert chart.infinite_y is None
    assert [p.on_front for p in chart.points] == (
        [True, True, False] if better == "higher" else [True, False, False]
    )


def test_scatter_of_infinite_quality_alone():
    chart = charts.scatter(
        [sample("dense", 2.0, math.inf), sample("same", 1.0, math.inf)], "higher"
    )
    assert {p.y for p in chart.points} == {chart.infinite_y}
    assert all(math.isfinite(v) for p in chart.points for v in (*p.x_bar, *p.y_bar, p.x, p.y))
    assert [p.on_front for p in chart.points] == [False, True]


@pytest.mark.parametrize("seed", range(8))
def test_labels_cover_neither_points_nor_each_other(seed):
    rng = random.Random(seed)
    samples = [sample(f"profile-{i}", rng.uniform(1, 5), rng.uniform(20, 40)) for i in range(7)]
    chart = charts.scatter(samples, "higher")
    boxes = []
    for point in chart.points:
        width = charts.GLYPH * len(point.sample.name)
        left = point.label_x - {"start": 0, "middle": width / 2, "end": width}[point.anchor]
        boxes.append((left, point.label_y - 11, left + width, point.label_y + 3))
        assert left >= chart.frame.left - 1
        assert left + width <= chart.frame.right + 1
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_ticks_are_round_and_inside():
    assert charts.ticks(0, 4.9) == [0, 1, 2, 3, 4]
    assert charts.ticks(26.9, 53.2) == [30, 35, 40, 45, 50]
    for low, high in ((0.0, 0.013), (0.91, 0.999), (-3.0, 700.0)):
        found = charts.ticks(low, high)
        assert 3 <= len(found) <= 8
        assert low <= found[0]
        assert found[-1] <= high * (1 + 1e-9)


def ragged_map(seed: int, height: int, width: int) -> list[list[float | None]]:
    rng = random.Random(seed)
    return [[rng.choice([None, 0.0, 0.25, 0.25, 1.0]) for _ in range(width)] for _ in range(height)]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 7), (40, 50), (130, 3)])
def test_a_map_draws_every_cell_once(height, width):
    values = ragged_map(height, height, width)
    values[-1][0] = 0.5
    drawn = charts.heat_map(values, 1.0)
    assert drawn is not None
    cells: dict[tuple[int, int], float | None] = {}
    for run in drawn.runs:
        row = round(run.y / drawn.cell_height)
        first = round((run.x - drawn.left) / drawn.cell_width)
        for column in range(first, first + round(run.width / drawn.cell_width)):
            assert (row, column) not in cells
            cells[row, column] = run.level
    assert cells == {(r, c): v for r, line in enumerate(values) for c, v in enumerate(line)}
    assert len(drawn.runs) <= height * width
    found = [v for line in values for v in line if v is not None]
    assert drawn.mean == pytest.approx(sum(found) / len(found))
    assert values[drawn.lowest[1]][drawn.lowest[2]] == drawn.lowest[0] == min(found)
    assert values[drawn.highest[1]][drawn.highest[2]] == drawn.highest[0] == max(found)
    steps = [tick.value for tick in drawn.column_labels]
    assert steps == ([1, 2, 3] if width == 3 else steps)
    for labels, room in ((drawn.row_labels, 11), (drawn.column_labels, 20)):
        assert all(b.at - a.at >= room for a, b in itertools.pairwise(labels))


def test_no_map_of_nothing():
    assert charts.heat_map([[None, None]], 1.0) is None
    assert charts.mean_map([]) == []
    assert charts.mean_map([[], [[]]]) == []


def test_mean_of_maps_skips_gaps_and_other_shapes():
    a, b = ragged_map(1, 3, 5), ragged_map(2, 3, 5)
    mean = charts.mean_map([[], a, b, [[0.1]]])
    for row, column in itertools.product(range(3), range(5)):
        found = [m[row][column] for m in (a, b) if m[row][column] is not None]
        expected = sum(found) / len(found) if found else None
        assert mean[row][column] == pytest.approx(expected)


# ---- The page -----------------------------------------------------------------------------


def test_the_page_holds_everything_itself(page, page_path, compared):
    policy = page.all("meta", http_equiv="Content-Security-Policy")[0][0]["content"]
    assert policy.startswith("default-src 'none';")
    assert not page.open, "every element is closed"
    for tag, attributes, _ in page.elements:
        for name in ("src", "href", "srcset", "poster", "action", "data"):
            target = attributes.get(name, "#")
            assert target.startswith(("#", "data:,")), f"<{tag} {name}={target}>"
    assert "@import" not in page_path.read_text(encoding="utf-8")
    assert not re.search(r"url\((?!#)", page_path.read_text(encoding="utf-8"))
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes, _ in page.all("a"):
        assert attributes["href"][1:] in ids


def test_videos_are_inside_byte_for_byte(page, compared):
    results, folder = compared
    texts = {a["id"]: text for a, text in page.all("script", type="text/plain")}
    shown = {
        (figure["aria-label"], figure["data-source"])
        for figure, _ in page.all("video")
        if not figure["aria-label"].startswith("difference")
    }
    clips = [clip for clip in results.clips if clip.video]
    assert len(shown) == len(clips) == 14
    for clip in clips:
        source = next(s for label, s in shown if label == f"{clip.profile}: {clip.prompt}")
        assert base64.b64decode(texts[source]) == (folder / str(clip.video)).read_bytes()


def naive(results: Results, profile: str, metric: str) -> list[float]:
    return [
        math.inf if clip.metrics_note.get(metric) == "identical" else clip.metrics[metric]
        for clip in results.clips
        if clip.profile == profile and clip.status == "done"
    ]


@pytest.mark.parametrize("profile", ["quality", "balanced", "fast", "diffusers-pab"])
def test_summary_shows_median_and_both_ends(page, compared, profile):
    results, _ = compared
    table = rows(page, "summary")
    assert list(table)[0] == "dense"
    note = "2 of 3 clips" if profile == "fast" else ""
    cells = table[profile + note]
    dense = {c.prompt_id: c.denoise_s for c in results.clips if c.profile == "dense"}
    ratios = [
        a / b
        for clip in results.clips
        if clip.profile == profile
        for a, b in zip(dense[clip.prompt_id], clip.denoise_s, strict=False)
    ]
    median, low, high = statistics.median(ratios), min(ratios), max(ratios)
    assert cells[0] == f"{median:.2f}× {low:.2f}– to {high:.2f}"
    psnr = naive(results, profile, "psnr")
    ends = "– to ".join(f"{v:.1f}".replace("inf", "∞") for v in (min(psnr), max(psnr)))
    assert cells[2] == f"{statistics.median(psnr):.1f} {ends}"
    assert cells[-1] == "–"  # memory is not measured on a CPU


def test_the_worst_clip_is_linked(page, compared):
    results, _ = compared
    links = [a for a, _ in page.all("a") if "the worst" in a.get("aria-label", "")]
    assert len(links) == 4 * 4 + 3  # speed-up and three metrics that differ, attention of ours
    for profile, metric, worst in (("fast", "psnr", min), ("balanced", "flicker", max)):
        values = naive(results, profile, metric)
        clips = [c for c in results.clips if c.profile == profile and c.status == "done"]
        clip = clips[values.index(worst(values))]
        digits = {"psnr": 1, "flicker": 2}[metric]
        text = f"{worst(values):.{digits}f}, the worst: show the clip: {clip.prompt}"
        link = next(a for a in links if a["aria-label"].startswith(text))
        assert link["href"] == f"#clip-{clip.prompt_id}-0"
        assert link["data-show"] == profile


def test_what_is_missing_is_said(page):
    (notice,) = [text for a, text in page.all("div", class_="notice")]
    assert notice.startswith("1 clip of 15 failed and is in no figure.")
    assert "OutOfMemoryError: tried to allocate 2.00 GiB <b>on the device</b>" in notice
    left_out = [text for _, text in page.all("li")]
    assert "cache-dit did not run: not installed (pip install cache-dit)" in left_out
    reason = "the weights of AlexNet could not be downloaded"
    assert f"LPIPS was not measured: {reason}" in left_out
    assert not page.all("th", class_="figure", title="LPIPS")
    assert "cache-dit" not in rows(page, "summary")


def test_environment_and_command(page, compared):
    environment = compared[0].environment
    assert page.all("pre", class_="command")[0][1] == environment.command
    told = " ".join(text for _, text in page.all("dd"))
    for value in (environment.commit, environment.cpu, environment.torch, environment.dense_kernel):
        assert value in told


def test_plots_tell_every_point(page, compared):
    results, _ = compared
    labels = [a["aria-label"] for a, _ in page.all("g") if "aria-label" in a]
    assert len(labels) == 4 * 5  # four metrics were measured, five profiles ran
    fast = [c for c in results.clips if c.profile == "fast" and c.status == "done"]
    times = [time for clip in fast for time in clip.denoise_s]
    start = f"fast: {statistics.median(times):.2f} s ({min(times):.2f} s to {max(times):.2f} s)"
    assert any(label.startswith(f"{start}, PSNR ") for label in labels)
    texts = [text for a, text in page.all("desc")]
    assert any(
        text.endswith("On the Pareto front: fast, balanced, quality, dense.") for text in texts
    )


def changed(results: Results, **changes: object) -> Results:
    return replace(results, **changes)  # type: ignore[arg-type]


def test_prompts_are_text_and_gaps_have_reasons(compared, tmp_path):
    results, _ = compared
    bad = '</script><script>alert("x")</script> & a <video>'
    clips = [
        replace(
            c,
            prompt=bad,
            video="gone.mp4",
            difference=None,
            metrics={**c.metrics, "adherence": None},
            metrics_note={"adherence": "two objects cannot be judged"},
            layer_names=[],
        )
        for c in results.clips[:2]
    ]
    page = Page(write_page(changed(results, clips=clips, model=bad), tmp_path))
    assert any(text == bad for _, text in page.all("h3"))
    assert page.all("title")[0][1] == f"dit_accel comparison: {bad}"
    assert not any("alert" in text for _, text in page.all("script"))
    assert [t for _, t in page.all("p", class_="missing")] == ["no video", "no video"]
    texts = [text for _, text in page.all("li")]
    assert "Adherence has no value for 2 clips: two objects cannot be judged" in texts
    assert any("layer 4, step 6" in text for _, text in page.all("desc"))


def ran(results: Results, profile: str, calls: dict[str, int], **changes: object) -> list[Clip]:
    """The clips, as if a profile's calls had come out like this, at full density."""
    own = {"launched_density": 1.0, "calls": calls, **changes}
    return [replace(c, **own) if c.profile == profile else c for c in results.clips]


def test_a_profile_that_ran_dense_is_not_rated(compared, tmp_path):
    results, folder = compared
    calls = {"dense: below break-even": 96, "dense: profile": 1904}
    clips = ran(results, "balanced", calls)
    Path(tmp_path, "clips").symlink_to(folder / "clips")
    page = Page(write_page(changed(results, clips=clips), tmp_path))
    (why,) = rows(page, "summary")["balanced"][:-2]
    assert why == (
        "ran dense because: profile (5,712), below break-even (288); --no-breakeven runs it sparse"
    )
    cells = page.all("td", class_="unrated")
    assert [a["colspan"] for a, _ in cells] == [
        str(len(rows(page, "summary")["fast2 of 3 clips"]) - 2)
    ]
    labels = [a["aria-label"] for a, _ in page.all("g") if "aria-label" in a]
    assert len(labels) == 4 * 4 and not any("balanced" in label for label in labels)
    assert not any("balanced" in text for _, text in page.all("desc") if "Pareto" in text)
    leads = [text for _, text in page.all("p", class_="lead")]
    assert any(text.endswith("Not rated, because it ran dense: balanced.") for text in leads)
    captions = [text for _, text in page.all("figcaption")]
    assert captions.count("balanced ran dense") == 3
    chosen = [a["value"] for a, _ in page.all("input", name="profile")]
    assert chosen == ["quality", "fast", "diffusers-pab", "balanced", "*"]
    assert not [text for _, text in page.all("li") if text.startswith("balanced")]


def test_dense_self_attention_beside_reused_cross_attention_is_rated(compared, tmp_path):
    results, _ = compared
    clips = ran(results, "fast", {"dense: below break-even": 96}, cross_calls={"reused": 30})
    page = Page(write_page(changed(results, clips=clips), tmp_path))
    (note,) = [text for _, text in page.all("li") if text.startswith("fast: ")]
    assert note.startswith("fast: its self-attention ran dense because: below break-even (192)")
    assert "×" in rows(page, "summary")["fast2 of 3 clips"][0]
    clips = ran(results, "fast", {"sparse": 96})
    page = Page(write_page(changed(results, clips=clips), tmp_path))
    assert [t for _, t in page.all("li") if t.startswith("fast: ")] == [
        "fast: its blocks cover everything at this size"
    ]


@pytest.mark.parametrize("clips", ["none", "all failed", "dense failed"])
def test_a_page_of_almost_nothing(compared, tmp_path, clips):
    results, _ = compared
    failed = [
        Clip(c.prompt, c.prompt_id, c.seed, c.profile, status="failed", error="RuntimeError: no")
        for c in results.clips
    ]
    kept = {
        "none": [],
        "all failed": failed,
        "dense failed": [
            f if c.profile == "dense" else c for c, f in zip(results.clips, failed, strict=True)
        ],
    }[clips]
    empty = changed(results, clips=kept, frames=0, height=0, width=0)
    page = Page(write_page(results if clips == "dense failed" else empty, tmp_path))
    assert page.all("h1")
    if clips == "dense failed":
        page = Page(write_page(changed(results, clips=kept), tmp_path))
        assert rows(page, "summary")["quality"][0] == "–"
        assert rows(page, "summary")["dense0 of 3 clips"][2] == "–"


def test_memory_of_a_gpu(compared, tmp_path):
    results, _ = compared
    clips = [replace(c, peak_memory_bytes=(3 << 30) + (c.prompt_id << 28)) for c in results.clips]
    page = Page(write_page(changed(results, clips=clips), tmp_path))
    assert any(text == "Memory, GiB" for _, text in page.all("th"))
    assert rows(page, "summary")["quality"][-1] == "3.25 3.00– to 3.50"


def test_a_map_of_a_large_model_stays_small(compared, tmp_path):
    results, _ = compared
    density = [[1.0 if step < 10 else 0.31 for step in range(50)] for _ in range(40)]
    clip = next(c for c in results.clips if c.profile == "fast")
    clip = replace(clip, density_map=density, error_map=[], layer_names=[], video=None)
    clip = replace(clip, difference=None)
    path = write_page(changed(results, clips=[clip]), tmp_path)
    assert path.stat().st_size < 100_000
    assert "was not measured in this run" in path.read_text(encoding="utf-8")


def test_videos_that_are_too_much_together_are_recompressed(compared):
    results, folder = compared
    whole = Videos.of(results.clips, folder)
    assert whole.limit is None
    source = max(whole.files.values(), key=lambda path: path.stat().st_size)
    smaller = Videos.of(results.clips, folder, most=len(whole.files) * 2500)
    assert smaller.limit == 2500
    texts = dict(smaller.encoded)
    index = list(smaller.files.values()).index(source)
    assert len(texts) == len(whole.files)
    data = base64.b64decode(texts[f"video-{index}"])
    assert len(data) < 0.75 * source.stat().st_size
    copy = folder / "copy.mp4"
    copy.write_bytes(recompressed(source, 2500))
    assert len(read_video(copy)) == len(read_video(source)) == results.frames


def test_a_page_that_cannot_be_written_leaves_the_old_one(compared, tmp_path):
    results, _ = compared
    path = write_page(changed(results, clips=[]), tmp_path)
    before = path.read_bytes()
    broken = changed(results, clips=[], metrics={"psnr": Metric("dB", "sideways")})  # type: ignore[arg-type]
    broken = changed(broken, profiles=[ProfileInfo("dense", "dense", "")])
    with pytest.raises(KeyError):
        write_page(broken, tmp_path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["index.html"]
