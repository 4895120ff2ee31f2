"""The report: right numbers, right pictures, one file, and nothing in a data set can become markup."""

from __future__ import annotations

import base64
import io
import json
import re
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats
from PIL import Image

import diffprune
from diffprune.engines import run_stage
from diffprune.errors import InputError
from diffprune.reporting import figures, tables
from diffprune.reporting.inputs import Log, Score, read_logs, read_scores
from diffprune.reporting.palette import NEUTRAL, Palette
from diffprune.shards import index_shards
from diffprune.tables import base_table, write_table

HOSTILE = "<img src=x onerror=alert(1)>&\"'"
COUNT, CLASSES = 60, 4


def pixels_of(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 256, (9, 9), dtype=np.uint8)


def write_tars(folder: Path, prefix: str, keys: list[str], *, start: int = 0, per_shard: int = 25) -> Path:
    """Shards of 9×9 gray PNGs; image i is ``pixels_of(start + i)``, its label i % 4."""
    folder.mkdir(parents=True)
    for first in range(0, len(keys), per_shard):
        with tarfile.open(folder / f"{prefix}-{first // per_shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i, key in list(enumerate(keys))[first : first + per_shard]:
                image = io.BytesIO()
                Image.fromarray(pixels_of(start + i)).save(image, "PNG")
                for extension, data in (("png", image.getvalue()), ("cls", str(i % CLASSES).encode())):
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def write_scores(out: Path, shards: Path, columns: dict[str, Any], *, keep: str = "highest", failed: int = -1) -> Path:
    """Score tables; ``columns`` are values by row number. The row ``failed`` is failed and has no scores."""
    indexes = {index.path.stem: index for index in index_shards(shards)}
    firsts = dict(zip(indexes, np.cumsum([0, *(len(i.samples) for i in indexes.values())]), strict=False))

    def work(stem: str, bar: Any) -> pa.Table:
        samples = indexes[stem].samples
        rows = [int(firsts[stem]) + i for i in range(len(samples))]
        errors = ["truncated" if row == failed else None for row in rows]
        nothing = [None] * len(rows)
        table = base_table(f"{stem}.tar", samples, [row % CLASSES for row in rows], nothing, errors)
        for name, values in columns.items():
            kind = pa.int32() if name == "cluster" else pa.float64()
            cells = pa.array([None if row == failed else values[row] for row in rows], kind)
            field = pa.field(name, kind, metadata={"keep": keep, "meaning": f"the meaning of {name}"})
            table = table.append_column(field, cells)
        bar.advance(len(rows))
        return table

    run_stage("score", out, {"methods": list(columns), "seed": 3}, list(indexes), work, total=COUNT)
    return out


def write_kept(path: Path, keys: list[str], **metadata: Any) -> Path:
    write_table(path, pa.table({"key": pa.array(keys, pa.string())}), metadata)
    return path


def write_evaluation(path: Path, name: str, kept: Path | None, *, count: int = 100, **metrics: float | None) -> Path:
    evaluation = {
        "name": name,
        "metrics": {"frechet_distance": 1.0, **metrics},
        "memorization": {"closest_pairs": []},
        "classes": None,
        "context": {
            "samples": {"path": "samples", "count": count, "metadata": {}},
            "reference": {"path": "real", "split": "train", "count": COUNT, "vendi_score": 12.5},
            "sampling": {"method": "heun", "steps": 60, "guidance": 4.0, "seed": 5},
            "embedder": {"model": "vqvae", "model_sha256": "f" * 64, "dimensions": 4},
            "kept": None if kept is None else str(kept),
            "training_images": COUNT if kept is None else 15,
            "k": 3,
            "flags": ["only a test"],
        },
    }
    path.write_text(json.dumps(evaluation))
    return path


def write_log(path: Path, losses: list[float]) -> Path:
    lines = [json.dumps({"step": 10 * (i + 1), "loss": loss}) for i, loss in enumerate(losses)]
    path.write_text("\n".join(lines) + "\n" + '{"step": 990, "lo')  # the last line was being written
    return path


class Page(HTMLParser):
    """What a browser would make of the page: elements with attributes, and text by section."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {"": []}
        self.section, self.style, self.dot = "", False, ""
        self.colors: dict[str, set[str]] = {}  # name -> the colours of the dots before it
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.style = tag == "style"
        if dict(attrs).get("class") == "dot":
            self.dot = dict(attrs)["style"] or ""
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
            self.text[self.section] = []

    def handle_data(self, data: str) -> None:
        if not self.style and data.strip():
            self.text[self.section].append(data.strip())
            if self.dot:
                self.colors.setdefault(data.strip(), set()).add(self.dot)
                self.dot = ""

    def images(self) -> dict[str, np.ndarray]:
        """Pixels of each img, by its title or alt."""
        shown = {}
        for tag, attributes in self.elements:
            if tag == "img":
                data = base64.b64decode((attributes["src"] or "").partition("base64,")[2])
                shown[attributes.get("title") or attributes["alt"]] = np.asarray(Image.open(io.BytesIO(data)))
        return shown


KEYS = [f"c{i % CLASSES}/{HOSTILE}{i:03d}" if i % 10 == 0 else f"c{i % CLASSES}/{i:03d}" for i in range(COUNT)]
GRAND = [float((i * 37) % COUNT) for i in range(COUNT)]  # a permutation: row 0 is the lowest
MADE = [f"made-{i:03d}" for i in range(24)]


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("report")
    shards = write_tars(root / "shards", "real", KEYS)
    (root / "shards" / "classes.json").write_text(json.dumps(["zero", "<b>one</b>", "two", "three"]))
    scores = write_scores(root / "scores", shards, {"grand": GRAND, "loss": [x * x for x in GRAND]}, failed=5)
    order = sorted(range(COUNT), key=lambda i: -GRAND[i])
    kept = write_kept(root / "kept.parquet", [KEYS[i] for i in order[:15]], order="highest", by="grand", count=15)
    balanced = write_kept(root / "even.parquet", KEYS[:20], order="balanced", within="nearest", count=20)
    pairs = [{"sample": MADE[3], "training": KEYS[50], "distance": 0.25}]
    mine = write_evaluation(root / "mine.json", "GraNd 25%", kept, frechet_distance=2.0, precision=0.9, vendi_score=9.0)
    mine.write_text(mine.read_text().replace('"closest_pairs": []', f'"closest_pairs": {json.dumps(pairs)}'))
    return {
        "title": f"A title with {HOSTILE}",
        "shards": shards,
        "scores": [scores],
        "clusters": write_scores(
            root / "clusters",
            shards,
            {"cluster": [i % 7 for i in range(COUNT)], "distance": [float(i % 11) for i in range(COUNT)]},
            keep="lowest",
        ),
        "selections": {"GraNd 25%": kept, f"even {HOSTILE} $x$": balanced},
        "samples": {"GraNd 25%": write_tars(root / "made", "made", MADE, start=1000)},
        "metrics": [
            write_evaluation(
                root / "full.json", "full data", None, frechet_distance=1.5, precision=0.8, vendi_score=9.5
            ),
            mine,
        ],
        "logs": {"GraNd 25%": write_log(root / "log.jsonl", [2.0, 1.0, 0.5, 0.25])},
    }


@pytest.fixture(scope="module")
def page(material, tmp_path_factory) -> Page:
    out = tmp_path_factory.mktemp("out") / "report.html"
    result = diffprune.report(out, **material)
    html = out.read_text(encoding="utf-8")
    assert result["bytes"] == len(html.encode()) and result["sections"][-1] == "Provenance"
    return Page(html)


# --- one file, nothing hostile ---------------------------------------------------------------------------------


def test_page_needs_no_other_resource(page):
    assert not {tag for tag, _ in page.elements} & {"script", "iframe", "object", "embed", "video", "source"}
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name) or ""
            assert not value or value.startswith(("data:", "#")), (tag, name, value)
        assert "url(h" not in (attributes.get("style") or "")


def test_nothing_in_keys_names_or_classes_becomes_markup(page):
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert tag != "img" or (attributes["src"] or "").startswith("data:image/")
    assert f"A title with {HOSTILE}" in page.text[""]
    assert any(text == KEYS[50] for text in page.text["scores"])  # a hostile key, whole, as text
    assert any(f"even {HOSTILE} $x$" == text for text in page.text["kept"])
    assert "<b>one</b>" in page.text["kept"]


def test_hostile_names_in_figures_are_text(tmp_path):
    log = Log(f"</svg>{HOSTILE}", np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    svg = str(figures.loss_curves([log], ["var(--series-0)"], 400, f"alt {log.name} $\\frac"))
    elements = Page(svg).elements
    assert {tag for tag, _ in elements} <= {
        "svg",
        "g",
        "path",
        "defs",
        "clippath",
        "rect",
        "use",
        "text",
        "style",
        "line",
    }
    assert elements[0][1]["aria-label"] == f"alt {log.name} $\\frac"


def test_figures_take_their_colours_and_font_from_the_page():
    svg = str(figures.histogram(np.arange(50.0), np.arange(50) > 40, "var(--series-3)", "alt"))
    assert "var(--series-3)" in svg and "var(--muted)" in svg
    assert "#face" not in svg and "DejaVu" not in svg and "<metadata" not in svg and "<?xml" not in svg


def test_same_inputs_same_bytes(material, tmp_path):
    diffprune.report(tmp_path / "a.html", **material)
    diffprune.report(tmp_path / "b.html", **material)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


# --- sections ---------------------------------------------------------------------------------------------------

SECTIONS = ["results", "samples", "memorization", "training", "kept", "scores", "agreement", "clusters", "provenance"]


def test_page_has_every_section_and_the_nav_links_to_each(page):
    assert [name for name in page.text if name] == SECTIONS
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links == [f"#{name}" for name in SECTIONS]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["metrics"], ["results"]),
        (["logs"], ["training"]),
        (["selections"], ["kept"]),
        (["samples"], ["samples"]),
        (["scores"], ["scores", "agreement"]),
        (["clusters"], ["scores", "clusters"]),
        (["metrics", "samples"], ["results", "samples"]),  # no shards: no pictures of training images
    ],
)
def test_sections_without_input_are_left_out(material, given, expected, tmp_path):
    diffprune.report(tmp_path / "report.html", **{name: material[name] for name in given})
    assert [name for name in Page((tmp_path / "report.html").read_text()).text if name] == [*expected, "provenance"]


def test_dry_run_names_the_sections_and_writes_nothing(material, tmp_path):
    plan = diffprune.report(tmp_path / "report.html", **material, dry_run=True)
    assert plan["sections"][0] == "Results" and not list(tmp_path.iterdir())


# --- numbers ----------------------------------------------------------------------------------------------------


def evaluations(*frechet: float | None, **context: Any) -> list[dict[str, Any]]:
    base = {"embedder": {"model": "m"}, "reference": {"count": 9}, "samples": {"count": 5}, "k": 3}
    return [
        {"name": f"run {i}", "metrics": {"frechet_distance": value, "precision": 0.5}, "context": {**base, "kept": "k"}}
        for i, value in enumerate(frechet)
    ]


def best(table: dict[str, Any], column: int) -> list[bool]:
    return [row["cells"][column]["mark"] == "best" for row in table["rows"]]


def test_best_value_of_a_column_is_marked_by_its_direction_ties_included():
    given = evaluations(3.0, 1.0, 1.0)
    for one, precision in zip(given, (0.2, 0.9, 0.5), strict=True):
        one["metrics"]["precision"] = precision
        one["metrics"]["vendi_score"] = 10 * precision
    table = tables.metric_table(given)
    assert [c.key for c in table["columns"]] == ["frechet_distance", "precision", "vendi_score"]
    assert best(table, 0) == [False, True, True] and best(table, 1) == [False, True, False]
    assert best(table, 2) == [False, False, False]  # more varied than real images is not better
    assert [row["cells"][0]["text"] for row in table["rows"]] == ["3.000", "1.000", "1.000"]


def test_columns_that_say_nearly_the_same_have_a_table_of_their_own():
    columns = [metric for metric in tables.METRICS if metric.key in ("frechet_distance", "density", "precision")]
    assert tables.column_parts(columns) == [[0, 1], [2]] and tables.column_parts(columns[2:]) == [[0]]


def test_the_real_images_own_unequal_classes_are_beside_the_models():
    given = evaluations(3.0, 1.0)
    for one, skew in zip(given, (0.25, 0.5), strict=True):
        one["metrics"] = {"class_kl_uniform": skew}
        one["classes"] = {"reference_shares": {"0": 0.5, "1": 0.25, "2": 0.25, "3": 0.0}}
        one["context"]["reference"] = {"count": 9, "vendi_score": 1.0}
    table = tables.metric_table(given)
    # ½ log 2 + ½ log 1: the entropy of four equal classes, over that of these
    assert table["real"] == ["0.3466"] and best(table, 0) == [True, False]


@pytest.mark.parametrize(
    "change",
    [
        ("samples", {"count": 6}),
        ("k", 5),
        ("embedder", {"model": "other"}),
        ("sampling", {"steps": 30}),
        ("reference", {"count": 9, "vendi_score": 4.5, "path": "a"}),  # as many real images, and others
    ],
)
def test_rows_that_cannot_be_compared_have_no_best_value(change):
    given = evaluations(3.0, 1.0)
    for one, path in zip(given, ("a", "elsewhere/a"), strict=True):
        one["context"]["reference"] = {"count": 9, "vendi_score": 4.25, "path": path}
    assert tables.metric_table(given)["comparable"]
    given[1]["context"][change[0]] = change[1]
    table = tables.metric_table(given)
    assert not table["comparable"] and best(table, 0) == [False, False] and table["real"] is None
    assert tables.headline(given) is None


def test_headline_names_the_best_pruned_set_beside_the_full_one():
    given = evaluations(0.5, 2.0, 1.25)
    given[0]["context"]["kept"] = None
    told = tables.headline(given)
    assert (told["name"], told["distance"]) == ("run 2", "1.250")
    assert (told["full_name"], told["full_distance"], told["others"]) == ("run 0", "0.500", 1)
    assert told["of"] == 9  # images that were selected from
    for one in given:
        one["context"]["training"] = "features/train"
    assert tables.headline(given)["of"] is None  # the reference is another split
    given[1]["metrics"]["frechet_distance"] = None
    assert tables.headline(given) is None


def test_page_says_the_results(page):
    results = page.text["results"]
    assert "(best)" in results and "only a test" in " ".join(results)
    assert "12.50" in results  # the Vendi score of the real images
    assert "60 real ones (train)" in " ".join(results) and "(heun, 60 steps, guidance 4.0, seed 5)" in " ".join(results)
    assert any("GraNd 25%" in text for text in page.text[""])  # the headline


def test_rank_correlations_equal_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=80), rng.integers(0, 6, 80).astype(float)  # b has ties
    c = a**3
    a[7], b[11] = np.nan, np.nan
    scores = [Score(n, v, "", "") for n, v in (("a", a), ("b", b), ("c", c), ("constant", np.ones(80)))]
    found = tables.correlations(scores)
    both = ~np.isnan(a) & ~np.isnan(b)
    assert found[0][1] == pytest.approx(scipy.stats.spearmanr(a[both], b[both]).statistic, abs=1e-12)
    assert found[0][2] == pytest.approx(1) and found[1][0] == pytest.approx(found[0][1])
    assert found[0][3] is None


def test_retention_is_the_share_of_each_class(material):
    scores = read_scores({"s": material["scores"][0]})
    kept = [KEYS[i] for i in (0, 4, 8, 1, 59)]
    labels, shares = tables.retention(scores, [tables.Selection("s", frozenset(kept), {})])
    assert labels.tolist() == [0, 1, 2, 3]
    assert shares.tolist() == [[3 / 15, 1 / 15, 0, 1 / 15]]


def test_more_classes_than_a_table_shows_are_drawn(material, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_CLASSES", 3)
    given = {name: material[name] for name in ("scores", "selections")}
    diffprune.report(tmp_path / "report.html", **given)
    labels = [a.get("aria-label") or "" for t, a in Page((tmp_path / "report.html").read_text()).elements if t == "svg"]
    assert any(label.startswith("Share of each class kept: GraNd 25%") for label in labels)


def test_extremes_are_in_order_ties_go_by_key_and_failed_samples_are_out(material):
    scores = read_scores({"c": material["clusters"], "s": material["scores"][0]})
    by_name = {score.name: score for score in scores.scores}
    lowest, highest = tables.extremes(scores, by_name["grand"], 12)
    assert [GRAND[i] for i in lowest[:3]] == [0, 1, 2] and [GRAND[i] for i in highest[:3]] == [59, 58, 57]
    assert GRAND[5] == 5 and 5 not in lowest  # the failed row
    lowest, _ = tables.extremes(scores, by_name["distance"], 7)
    zeros = sorted(KEYS[i] for i in range(COUNT) if i % 11 == 0)
    assert [scores.keys[i] for i in lowest[: len(zeros)]] == zeros


def test_columns_of_one_name_are_told_apart_by_their_folder(material, tmp_path):
    again = write_scores(tmp_path / "again", material["shards"], {"grand": GRAND[::-1]})
    scores = read_scores({"first": material["scores"][0], "second": again})
    assert [score.name for score in scores.scores] == ["first grand", "loss", "second grand"]


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([1234.5678, 2.0, None], False, ["1,235", "2", "–"]),
        ([0.12345, -0.5], False, ["0.1235", "−0.5000"]),
        ([1.5e-5, -2e-6], False, ["1.50e−5", "−2.00e−6"]),
        ([0.5, 1.0], True, ["50.0\N{NO-BREAK SPACE}%", "100.0\N{NO-BREAK SPACE}%"]),
        ([0.0, None], False, ["0", "–"]),
        ([], False, []),
    ],
)
def test_numbers_of_a_column_have_the_same_decimals(values, percent, expected):
    assert tables.format_column(values, percent=percent) == expected


def test_heat_is_relative_to_the_average_on_a_log_scale():
    assert tables.heat_cell(0.1, 0.1)["strength"] == "0.00"
    twice, half = tables.heat_cell(0.2, 0.1), tables.heat_cell(0.05, 0.1)
    assert (twice["side"], twice["strength"], half["side"], half["strength"]) == ("more", "0.50", "less", "0.50")
    assert tables.heat_cell(0.0, 0.1)["strength"] == "1.00" and tables.heat_cell(1.0, 0.1)["strength"] == "1.00"


# --- pictures ---------------------------------------------------------------------------------------------------


def test_the_kept_end_is_that_of_the_selection(page, material, tmp_path):
    assert "· kept by GraNd 25%" in page.text["scores"]
    keys = [KEYS[i] for i in sorted(range(COUNT), key=GRAND.__getitem__)[:15]]
    low = write_kept(tmp_path / "low.parquet", keys, order="lowest", by="grand", count=15)
    diffprune.report(
        tmp_path / "low.html", scores=material["scores"], selections={"low": low}, shards=material["shards"]
    )
    html = (tmp_path / "low.html").read_text()
    assert html.count("<b>Lowest</b> · kept by low<") == 1 and "<b>Highest</b> · kept by" not in html
    assert html.count("<b>Highest</b> · what the method keeps<") == 1  # loss: no selection is by it


def test_pictures_of_scored_images_are_the_shards_own(page):
    shown = page.images()
    highest = max(range(COUNT), key=lambda i: GRAND[i])
    label = ["zero", "<b>one</b>", "two", "three"][highest % CLASSES]
    title = f"{KEYS[highest]} · class {label} · 59.00"
    assert np.array_equal(shown[title], pixels_of(highest))


def test_nearest_training_images_are_shown_beside_the_samples(page):
    shown = page.images()
    assert np.array_equal(shown[MADE[3]], pixels_of(1003)) and np.array_equal(shown[KEYS[50]], pixels_of(50))
    assert "0.2500" in page.text["memorization"]


def test_sample_grid_has_one_column_per_class(page):
    sheet = page.images()["Images generated by the model trained on: GraNd 25%"]
    assert sheet.shape == (6 * 10 - 1, CLASSES * 10 - 1, 4)
    cells = [[sheet[10 * y : 10 * y + 9, 10 * x : 10 * x + 9, 0] for x in range(CLASSES)] for y in range(6)]
    for x in range(CLASSES):
        expected = {pixels_of(1000 + i).tobytes() for i in range(24) if i % CLASSES == x}
        assert {cells[y][x].tobytes() for y in range(6)} == expected


def test_a_grid_png_is_shown_as_it_is(tmp_path):
    Image.fromarray(pixels_of(1)).save(tmp_path / "grid.png")
    diffprune.report(tmp_path / "report.html", samples={"one": tmp_path / "grid.png"})
    encoded = base64.b64encode((tmp_path / "grid.png").read_bytes()).decode()
    assert f"data:image/png;base64,{encoded}" in (tmp_path / "report.html").read_text()


def test_large_photographs_become_thumbnails(tmp_path):
    from diffprune.reporting.images import data_uri, thumbnails

    photo = np.random.default_rng(0).integers(0, 256, (150, 240, 3), dtype=np.uint8)
    with tarfile.open(tmp_path / "p-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, data in (("photo", _png(photo)), ("broken", _png(photo)[:200])):
            info = tarfile.TarInfo(f"{key}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = thumbnails(tmp_path, ["photo", "broken"])
    assert found["broken"] is None and found["photo"].shape == (112, 112, 3)
    assert data_uri(found["photo"]).startswith("data:image/jpeg;base64,")


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


# --- colours and curves -----------------------------------------------------------------------------------------


def test_a_method_has_one_colour_everywhere(page):
    """A run, its selection, its samples, its log and the score it was selected by."""
    assert all(len(colors) == 1 for colors in page.colors.values())
    assert page.colors["GraNd 25%"] == page.colors["grand"]
    assert page.colors["full data"] == {f"--c: {NEUTRAL}"}
    others = [page.colors[name] for name in ("grand", "loss", "distance", f"even {HOSTILE} $x$", "full data")]
    assert len(set.union(*others)) == 5


def test_colours_go_by_first_use_and_start_again_after_the_last():
    palette = Palette([f"m{i}" for i in range(9)], {"m1": "m0"})
    assert palette("m0") == palette("m1") == palette("m8") == "var(--series-0)"
    assert palette("m2") == "var(--series-1)"


def test_loss_curves_average_over_stretches_of_the_run():
    steps = np.arange(1, 1001, dtype=float)
    x, y = figures._averaged(Log("run", steps[::-1], 2 * steps[::-1]))
    assert len(x) == figures.CURVE_POINTS and x[0] == pytest.approx(steps[:10].mean())
    assert np.allclose(y, 2 * x)


def test_a_run_of_one_line_is_drawn():
    one = Log("one", np.array([40.0]), np.array([1.25]))
    drawn = str(figures.loss_curves([one], ["var(--series-2)"], 360, "one"))
    assert "stroke: var(--series-2); stroke-width: 6" in drawn


def test_histogram_range_is_not_stretched_by_outliers():
    values = np.concatenate([np.linspace(0, 1, 1000), [500.0]])
    low, high = figures._robust_range(values)
    assert low == 0 and 1 < high < 1.1
    assert figures._robust_range(np.array([2.0, 2.0])) == (1.5, 2.5)
    assert figures._robust_range(np.linspace(-3, 3, 99)) == (-3, 3)


# --- bad input --------------------------------------------------------------------------------------------------


def refuse(tmp_path: Path, match: str, **inputs: Any) -> None:
    with pytest.raises(InputError, match=match):
        diffprune.report(tmp_path / "report.html", **inputs)
    assert not (tmp_path / "report.html").exists()


def test_report_refuses_tables_that_do_not_belong_together(material, tmp_path):
    other = write_tars(tmp_path / "other", "other", [f"k{i}" for i in range(COUNT)])
    foreign = write_scores(tmp_path / "foreign", other, {"loss": GRAND})
    refuse(tmp_path, "another data set", scores=[material["scores"][0], foreign])
    refuse(
        tmp_path,
        "'zebra' is in none",
        scores=material["scores"],
        selections={"z": write_kept(tmp_path / "k", ["zebra"])},
    )
    refuse(tmp_path, "is in none of these shards", scores=material["scores"], shards=other)


def test_report_names_the_key_of_a_nan_score(material, tmp_path):
    values = [float("nan") if i == 33 else 1.0 for i in range(COUNT)]
    scores = write_scores(tmp_path / "nan", material["shards"], {"loss": values})
    refuse(tmp_path, f"{KEYS[33]}.*loss is nan", scores=[scores])


def test_report_refuses_unreadable_inputs(tmp_path):
    refuse(tmp_path, "nothing to show")
    refuse(tmp_path, "no such", metrics=[tmp_path / "no.json"])
    (tmp_path / "odd.json").write_text('{"name": "x", "metrics": {}}')
    refuse(tmp_path, "lacks metrics.frechet_distance", metrics=[tmp_path / "odd.json"])
    (tmp_path / "bad.jsonl").write_text('{"step": 1, "loss": 2}\nnot json\n')
    refuse(tmp_path, "line 2: not JSON", logs={"x": tmp_path / "bad.jsonl"})
    (tmp_path / "empty.jsonl").write_text('{"step": 1}\n')
    refuse(tmp_path, "no line with step and loss", logs={"x": tmp_path / "empty.jsonl"})
    refuse(tmp_path, "not a readable log", logs={"x": tmp_path / "missing.jsonl"})
    (tmp_path / "fake.png").write_text("<svg onload=alert(1)>")
    refuse(tmp_path, "expected a PNG", samples={"x": tmp_path / "fake.png"})
    refuse(tmp_path, "not a readable image", samples={"x": tmp_path / "gone.png"})


def test_a_log_cut_in_its_last_line_is_read_up_to_there(tmp_path):
    [log] = read_logs({"x": write_log(tmp_path / "log.jsonl", [3.0, 2.0])})
    assert log.steps.tolist() == [10, 20] and log.losses.tolist() == [3, 2]
    assert re.search(r'"lo$', (tmp_path / "log.jsonl").read_text())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", 7),
        ("metrics.frechet_distance", "x"),
        ("metrics.kernel_distance", {"a": 1}),
        ("memorization.closest_pairs", "x"),
        ("context.embedder", "x"),
        ("context.reference.count", "many"),
        ("context.sampling", {"steps": "../x"}),
        ("context.training_images", "x"),
        ("context.kept", 7),
        ("classes", {"shares": {"0": [1]}, "reference_shares": {"0": 1.0}, "k": 3}),
        ("classes", {"shares": {"0": 1.0}, "reference_shares": {"1": 1.0}, "k": 3}),
        ("classes", []),
    ],
)
def test_metrics_of_other_types_are_told_by_name(tmp_path, name, value):
    path = write_evaluation(tmp_path / "metrics.json", "x", None)
    changed = json.loads(path.read_text())
    *above, last = name.split(".")
    place = changed
    for one in above:
        place = place[one]
    place[last] = value
    path.write_text(json.dumps(changed))
    refuse(tmp_path, rf"metrics\.json: {name}", metrics=[path])


@pytest.mark.parametrize("line", ['{"step": "x", "loss": 1}', '{"step": 1, "loss": null}', "[" * 100_000])
def test_a_log_of_other_types_is_told_by_line(tmp_path, line):
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n')
    refuse(tmp_path, r"log\.jsonl: line 2: ", logs={"a": tmp_path / "log.jsonl"})
