"""The HTML page and the projector's files."""

import base64
import hashlib
import html.parser
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from s2sd_tf import evaluation
from s2sd_tf.reporting import EmbeddedImages, save_audit, save_curves, save_matches, save_projector, save_report
from s2sd_tf.reporting.meanings import meanings
from s2sd_tf.reporting.pictures import data_uri

EVIL = "</script><script>alert('x')</script> & \"quotes\" <b>"
# Elements without an end tag.
VOID = {"meta", "link", "img", "br", "input"}


class Page(html.parser.HTMLParser):
    """Collects a page's elements, texts, scripts and the data of its map; checks that elements are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts, self.text = [], [], [], ""
        self.scripts, jsons = [], []
        self.inside = {"script": self.scripts, "json": jsons}
        self.feed(text)
        self.close()
        assert self.open == []
        self.data = json.loads(jsons[0]) if jsons else None

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.kind = "json" if self.elements[-1][1].get("type") == "application/json" else "script"
            self.inside[self.kind].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            self.inside[self.kind][-1] += data
        elif inside != "style":
            self.text += data
            if data.strip():
                self.texts.append((inside, data))

    def kinds(self):
        return [tag for tag, _ in self.elements]

    def section(self, heading):
        """The texts after a heading, up to the next."""
        start = self.texts.index(("h2", heading)) + 1
        following = [at for at in range(start, len(self.texts)) if self.texts[at][0] == "h2"]
        return [text for _, text in self.texts[start : following[0] if following else None]]

    def check_policy(self):
        """Nothing is fetched, and no script runs but those whose digest the page names."""
        (policy,) = [attributes["content"] for _, attributes in self.elements if "http-equiv" in attributes]
        digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in self.scripts]
        allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
        assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
        for tag, attributes in self.elements:
            assert tag not in ("iframe", "object", "embed", "base", "b", "link") or attributes.get("rel") == "icon"
            assert not [name for name in attributes if name.startswith("on")]
            for name in ("src", "href"):
                assert attributes.get(name, "data:").startswith(("data:", "#"))


@pytest.fixture
def queries():
    """Rows and labels of seven classes, the last with one image."""
    labels = np.append(np.repeat(np.arange(6), 8), 6)
    generator = np.random.default_rng(0)
    return generator.normal(size=(7, 5))[labels] + 0.4 * generator.normal(size=(49, 5)), labels


def report(path, rows, labels, names=None, ids=None, image=None, **settings):
    positions = np.arange(len(labels))
    found = evaluation.find_neighbors(rows, rows, 4, positions, positions)
    queries = EmbeddedImages(rows, labels, names, ids, image)
    save_report(str(path), evaluation.evaluate_retrieval(rows, labels), found, queries, **settings)
    return path.read_text(encoding="utf-8")


def test_the_page_is_complete_and_self_contained(queries, tmp_path):
    rows, labels = queries
    pictures = np.random.default_rng(0).random((49, 6, 5, 3))
    names = {label: f"{EVIL} {label}" for label in range(7)}
    text = report(
        tmp_path / "report.html", rows, labels, names=names, ids=[EVIL] * 49, image=lambda i: pictures[i],
        title=EVIL, about=EVIL, table={"exact": {"recall@1": 0.25, EVIL: 0.5, "ratio": float("nan")}},
        facts={"model": EVIL}, config={"data": {"root": EVIL, "sizes": [1, 2]}},
    )  # fmt: skip
    page = Page(text)
    page.check_policy()
    kinds = page.kinds()
    assert kinds.count("svg") == 2
    assert kinds.count("h2") == 8
    # Bokeh, its API, its log level and our own.
    assert len(page.scripts) == 4
    assert "url(" not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert "http" not in re.sub(r"data:[^\"]*|http-equiv|<script>.*?</script>", "", text, flags=re.DOTALL)
    assert page.data["ids"] == [EVIL] * 49
    assert page.data["names"] == list(names.values())
    # Everything that is referred to exists once.
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert {attributes["href"][1:] for tag, attributes in page.elements if tag == "use"} <= set(ids)
    assert len(set(ids)) == len(ids)
    assert "25.0" in page.text
    assert "1 of them without a positive" in page.text
    assert page.texts[page.texts.index(("dt", "model")) :][:2] == [("dt", "model"), ("dd", EVIL)]
    assert page.texts[page.texts.index(("dt", "data.sizes")) :][:2] == [("dt", "data.sizes"), ("dd", "[1, 2]")]
    # Three kinds of queries, five of each, with four neighbours each; and the pictures of the map.
    assert kinds.count("img") == 3 * 5 * 5 + 1
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_without_images_names_or_ids_and_with_a_gallery(queries, tmp_path):
    rows, labels = queries
    assert "position " in report(tmp_path / "a.html", rows, labels)
    result = evaluation.evaluate_retrieval(rows[:9], labels[:9], rows, labels)
    found = evaluation.find_neighbors(rows[:9], rows, 3)
    gallery = EmbeddedImages(rows, labels, ids=[f"item {i}" for i in range(49)])
    save_report(str(tmp_path / "b.html"), result, found, EmbeddedImages(rows[:9], labels[:9]), gallery)
    text = (tmp_path / "b.html").read_text(encoding="utf-8")
    data = Page(text).data
    assert len(data["x"]) == len(data["y"]) == len(data["near"]) == 9
    near = [[data["ids"][item] for item in row] for row in data["near"]]
    assert near == [[f"item {position}" for position in row] for row in found.indices.tolist()]
    np.testing.assert_allclose(data["similarities"], found.similarities, atol=1e-3)
    assert [data["names"][code] for code in data["classes"][:9]] == [str(label) for label in labels[:9]]
    assert set(data["cells"]) == {-1}
    assert 'title="item 3"' in text
    assert 'title="position 3"' in text


def test_a_collapsed_embedding(tmp_path):
    text = report(tmp_path / "report.html", np.ones((40, 5)), np.arange(40) // 4)
    page = Page(text)
    assert [page.data["names"][code] for code in page.data["classes"]] == [str(i // 4) for i in range(40)]
    assert "nan" not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)


@pytest.mark.parametrize(("size", "dim"), [(2, 1), (3, 2), (12, 3)])
def test_tiny_sets(size, dim, tmp_path):
    rows = np.random.default_rng(0).normal(size=(size, dim))
    assert len(Page(report(tmp_path / "report.html", rows, np.zeros(size, int))).data["x"]) == size


def test_verification(queries, tmp_path):
    rows, labels = queries
    for kind, values in (("spread", rows), ("collapsed", np.ones_like(rows)), ("large", 1e8 * rows)):
        found = evaluation.verification_metrics(values, labels, metric="euclidean" if kind == "large" else "cosine")
        table = {"exact": {**found.values}}
        page = Page(report(tmp_path / "report.html", rows, labels, verification=found, table=table))
        assert page.kinds().count("svg") == 3
        positives, negatives = found.true_accepts[-1], found.false_accepts[-1]
        assert f"All {positives:,} pairs of one class and {negatives:,} of others" in page.text
        low, high = found.confidence_intervals()["eer"]
        assert f"{100 * low:.1f} to {100 * high:.1f}" in page.text
    found = evaluation.verification_metrics(np.eye(3), [0, 0, 1])
    report(tmp_path / "tiny.html", np.eye(3), np.array([0, 0, 1]), verification=found)


def test_the_map_has_the_neighbours_and_pictures_of_its_points(queries, tmp_path):
    rows, labels = queries
    shades = np.linspace(0, 1, 49)
    text = report(tmp_path / "report.html", rows, labels, image=lambda i: np.full((7, 9), shades[i]) if i else None)
    page = Page(text)
    data = page.data
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similarities = unit @ unit.T
    np.fill_diagonal(similarities, -np.inf)
    assert data["near"] == np.argsort(-similarities, axis=1)[:, :4].tolist()
    np.testing.assert_allclose(data["similarities"], -np.sort(-similarities, axis=1)[:, :4], atol=1e-3)
    quality = evaluation.evaluate_retrieval(rows, labels).values["map@r"]
    assert data["quality"][48] is None
    np.testing.assert_allclose(data["quality"][:48], 100 * quality[:48], atol=0.06)
    (source,) = [attributes["src"] for _, attributes in page.elements if attributes.get("id") == "map-sheet"]
    sheet = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
    side, across = data["side"], sheet.width // data["side"]
    assert data["cells"][0] == -1
    for item, cell in enumerate(data["cells"][1:], 1):
        center = cell % across * side + side // 2, cell // across * side + side // 2
        assert sheet.getpixel(center) == pytest.approx(255 * shades[item], abs=4)


def test_the_map_samples_large_sets_and_says_so(tmp_path):
    generator = np.random.default_rng(0)
    labels = np.arange(4000) % 400
    rows = generator.normal(size=(4000, 2))
    noise = generator.integers(0, 256, (48, 48, 3), np.uint8)
    text = report(
        tmp_path / "report.html", rows, labels, {label: f"{label} {'long name ' * 40}" for label in range(400)},
        [f"{i}/{'long name ' * 40}" for i in range(4000)], lambda i: np.roll(noise, i, axis=(0, 1)),
    )  # fmt: skip
    page = Page(text)
    assert "A sample: 3,000 of 4,000 embeddings, of 300 of 400 classes, chosen at random" in page.text
    names = [page.data["names"][code] for code in page.data["classes"][:3000]]
    assert {names.count(name) for name in set(names)} == {10}
    assert len(text) < 20e6
    assert sum(cell >= 0 for cell in page.data["cells"]) == len(page.data["cells"]) <= 4000
    # All classes are in the table, those of the map as links.
    links = [attributes for tag, attributes in page.elements if tag == "button" and "data-class" in attributes]
    assert (page.kinds().count("tr") > 400, len(links)) == (True, 300)


def test_of_large_classes_the_map_has_a_part(tmp_path):
    labels = np.append(np.zeros(200, int), np.arange(2900) // 10 + 1)
    rows = np.random.default_rng(0).normal(size=(3100, 2))
    page = Page(report(tmp_path / "report.html", rows, labels))
    counts = np.bincount(page.data["classes"][: len(page.data["x"])])
    assert sorted(counts.tolist()) == [10] * 290 + [20]
    assert "A sample: 2,920 of 3,100 embeddings, of 291 classes" in page.text


def test_queries_are_of_different_classes(tmp_path):
    # One class has the best queries, and another the worst.
    labels = np.repeat(np.arange(8), 6)
    centers = np.eye(8)[labels]
    noise = np.random.default_rng(0).normal(size=(48, 8)) * np.linspace(0, 1, 8)[labels][:, None]
    rows = centers + noise
    page = Page(report(tmp_path / "report.html", rows, labels))
    for heading in ("Best queries", "Typical queries", "Worst queries"):
        shown = [text for text in page.section(heading) if text.startswith("query: ")]
        assert len(shown) == len(set(shown)) == 5
    quality = evaluation.evaluate_retrieval(rows, labels).values["map@r"]
    scores = [text for text in page.section("Worst queries") if text.startswith("MAP@R")]
    assert scores[0] == f"MAP@R {100 * quality.min():.1f}"
    # Of fewer classes, some have several.
    page = Page(report(tmp_path / "report.html", rows[:12], labels[:12]))
    shown = [text for text in page.section("Best queries") if text.startswith("query: ")]
    assert len(shown) == 5
    assert len(set(shown)) == 2


def test_every_class_is_in_a_table_that_sorts(queries, tmp_path):
    rows, labels = queries
    long = "a name of more than fifty characters, that ends in its number: "
    names = {label: f"{long}{label}" for label in range(7)}
    page = Page(report(tmp_path / "report.html", rows, labels, names))
    classes, counts, means = evaluation.evaluate_retrieval(rows, labels).per_class()
    heads = [attributes for tag, attributes in page.elements if tag == "th" and "aria-sort" in attributes]
    assert [head["aria-sort"] for head in heads] == ["none", "none", "ascending", "none", "none", "none"]
    assert [head["data-kind"] for head in heads] == ["text", *["number"] * 5]
    titles = [attributes["title"] for tag, attributes in page.elements if tag == "th" and "title" in attributes]
    order = np.lexsort((classes, means["recall@1"]))
    assert titles == [names[i] for i in classes[order]]
    cells = page.section("Classes")
    assert cells[1:7] == ["class", "queries", "recall@1", "r_precision", "map@r", "mrr"]
    first = order[0]
    values = [f"{100 * means[name][first]:.1f}" for name in ("recall@1", "r_precision", "map@r", "mrr")]
    short, *numbers = cells[7:13]
    assert numbers == [str(counts[first]), *values]
    assert len(short) == 48
    assert short[:20] == long[:20]
    assert short.endswith(f"number: {classes[first]}")
    codes = [int(attributes["data-class"]) for _, attributes in page.elements if "data-class" in attributes]
    assert [page.data["names"][code] for code in codes] == titles


def test_metrics_are_explained_where_they_are_shown(queries, tmp_path):
    rows, labels = queries
    table = {"exact": {"recall@1": 0.5, "recall@2": 0.6, "ratio": 0.5, "rho": 0.3, "f1": 0.2}}
    explained = [
        text for tag, text in Page(report(tmp_path / "a.html", rows, labels, table=table)).texts if tag == "li"
    ]
    assert [text.split(":")[0] for text in explained] == ["recall@k", "ratio", "rho", "f1"]
    result = evaluation.evaluate_retrieval(rows, labels)
    pairs, space = evaluation.verification_metrics(rows, labels), evaluation.embedding_geometry(rows, labels)
    shown = {**result.means(), **space, **evaluation.clustering_metrics(rows, labels), **pairs.values}
    shown = [name for name, value in shown.items() if isinstance(value, float)]
    assert len(meanings(shown)) == len({name.split("@")[0] for name in shown})


def browser():
    """The path of a Chromium, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.mark.skipif(browser() is None, reason="no Chromium found (apt-get install chromium)")
def test_the_page_in_a_browser(queries, tmp_path):
    rows, labels = queries
    evil = "</script><img src=x onerror=\"document.title='run'\">"
    names = {label: f"{evil}{label}" for label in range(7)}
    report(tmp_path / "report.html", rows, labels, names, [evil] * 49, lambda i: np.full((4, 4), i / 49))
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--enable-logging=stderr")
    command = [browser(), *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", tmp_path / "report.html"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "bokeh" not in line]
    assert console == []
    page = Page(done.stdout)
    assert "49 of 49 images, 7 of 7 classes" in page.text
    assert sum("aria-pressed" in attributes for _, attributes in page.elements) == 7
    assert not [attributes for _, attributes in page.elements if attributes.get("src") == "x"]
    assert ("title", "run") not in page.texts


def test_writing_a_page_is_deterministic(queries, tmp_path):
    assert report(tmp_path / "a.html", *queries) == report(tmp_path / "b.html", *queries)


def test_thumbnails():
    for pixels in (np.zeros((300, 20), np.uint8), np.ones((5, 9, 1)), np.ones((4, 4, 3), np.float32)):
        assert data_uri(pixels).startswith("data:image/")


@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures that are written."""
    saved, savefig = [], Figure.savefig

    def save(figure, *arguments, **settings):
        savefig(figure, *arguments, **settings)
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", save)
    return saved


@pytest.mark.parametrize("epochs", [[1], [1, 2], [0, 1, 2, 3], list(range(5, 155, 5))])
def test_curves_have_whole_epochs(epochs, figures, tmp_path):
    save_curves(tmp_path / "curves.png", {"loss": {"a": (epochs, epochs)}})
    (axes,) = figures[0].axes
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks
    assert all(float(tick).is_integer() for tick in ticks)


def test_pictures_shorten_names_but_no_scores(figures, tmp_path):
    name = "a very long name of a class, number 17"
    save_matches(tmp_path / "found.png", [[(np.zeros((4, 4)), "query", None), (np.zeros((4, 4)), name, 0.87654)]])
    captions = [axes.get_title() for axes in figures[0].axes]
    assert captions[0] == "query"
    score, short = captions[1].split("\n")
    assert score == "0.877"
    assert (short[:4], short[-4:], len(short)) == (name[:4], name[-4:], 20)


def test_projector(queries, tmp_path):
    from google.protobuf import text_format
    from tensorboard.plugins.projector import ProjectorConfig

    rows, labels = queries
    ids = [f"image\t{i}\n" for i in range(49)]
    save_projector(str(tmp_path / "log"), rows, labels, ids, lambda i: np.full((7, 9), i / 49))
    config = text_format.Parse((tmp_path / "log" / "projector_config.pbtxt").read_text(), ProjectorConfig())
    tensor = config.embeddings[0]
    assert list(tensor.tensor_shape) == [49, 5]
    np.testing.assert_allclose(np.loadtxt(tmp_path / "log" / tensor.tensor_path, delimiter="\t"), rows, rtol=1e-5)
    lines = (tmp_path / "log" / tensor.metadata_path).read_text().splitlines()
    assert lines[:2] == ["label\tid", "0\timage 0"]
    assert len(lines) == 50
    sprite = Image.open(tmp_path / "log" / tensor.sprite.image_path)
    assert sprite.size == (7 * 64, 7 * 64)
    save_projector(str(tmp_path / "plain"), rows, labels, image=lambda i: None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="folder: expected a new folder"):
        save_projector(str(tmp_path / "run"), rows)
    assert len((tmp_path / "plain" / "metadata.tsv").read_text().splitlines()) == 49


def test_the_page_of_an_audit_is_self_contained(queries, tmp_path):
    rows, labels = queries
    rows[1], labels[9] = rows[0], 3
    rows[16:20] = -rows[20]
    pictures = np.random.default_rng(0).random((49, 6, 5, 3))
    images = EmbeddedImages(
        rows, labels, {label: f"{EVIL} {label}" for label in range(7)}, [f"{EVIL}\udcff"] * 49, lambda i: pictures[i]
    )
    found = evaluation.audit(rows, labels, rows[:5])
    for name, gallery in (("with", EmbeddedImages(rows[:5], labels[:5])), ("without", None)):
        its = found if gallery else evaluation.audit(rows, labels)
        save_audit(tmp_path / name, its, images, gallery, label_score=0.5, outlier_score=1, about=EVIL)
        page = Page((tmp_path / name / "audit.html").read_text(encoding="utf-8"))
        page.check_policy()
        assert page.scripts == []
        assert page.kinds().count("h2") == 6 + bool(gallery)
        sources = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
        assert len(sources) > 20
        assert all(source.startswith("data:image/") for source in sources)
        assert f"{EVIL} 3" in [attributes.get("title") for _, attributes in page.elements]
    # Names of files that are not UTF-8 are written as they are.
    assert b"\xff" in (tmp_path / "with" / "duplicates.csv").read_bytes()
    rows, labels = np.eye(4)[[0, 0, 1, 1]] * 1.0, np.array([0, 0, 1, 1])
    save_audit(tmp_path / "empty", evaluation.audit(rows, labels, duplicate_similarity=1), EmbeddedImages(rows, labels))
    assert "Nothing found." in Page((tmp_path / "empty" / "audit.html").read_text(encoding="utf-8")).text
