"""The HTML page and the projector's files."""

import html.parser
import re
import xml.etree.ElementTree

import numpy as np
import pytest
from PIL import Image

from s2sd_tf import evaluation
from s2sd_tf.reporting import EmbeddedImages, save_audit, save_projector, save_report
from s2sd_tf.reporting.charts import embedding_map
from s2sd_tf.reporting.pictures import data_uri

EVIL = "</script><script>alert('x')</script> & \"quotes\" <b>"
# Elements without an end tag.
VOID = {"meta", "link", "img", "br"}


class Page(html.parser.HTMLParser):
    """Collects a page's elements, text and titles of points; checks that elements are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.points, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-2:] in (["use", "title"], ["path", "title"]):
            self.points.append(data)
        elif not self.open or self.open[-1] != "style":
            self.text += data


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
    )  # fmt: skip
    page = Page(text)
    kinds = [tag for tag, _ in page.elements]
    assert kinds.count("svg") == 3
    assert kinds.count("h2") == 8
    assert not set(kinds) & {"script", "iframe", "object", "embed", "base", "b"}
    policies = [attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith(("data:", "#"))
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in re.sub(r"data:[^\"]*|http-equiv", "", text)
    assert page.points == [f"{EVIL} {label} · {EVIL}" for label in labels]
    # Everything that is referred to exists once.
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert {attributes["href"][1:] for tag, attributes in page.elements if tag == "use"} <= set(names)
    assert len(set(names)) == len(names)
    assert "25.0" in page.text
    assert "1 of them without a positive" in page.text
    # Three kinds of queries, five of each, with four neighbours each.
    assert sum(tag == "img" for tag, _ in page.elements) == 3 * 5 * 5
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_without_images_names_or_ids_and_with_a_gallery(queries, tmp_path):
    rows, labels = queries
    assert "position " in report(tmp_path / "a.html", rows, labels)
    result = evaluation.evaluate_retrieval(rows[:9], labels[:9], rows, labels)
    found = evaluation.find_neighbors(rows[:9], rows, 3)
    gallery = EmbeddedImages(rows, labels, ids=[f"item {i}" for i in range(49)])
    save_report(str(tmp_path / "b.html"), result, found, EmbeddedImages(rows[:9], labels[:9]), gallery)
    text = (tmp_path / "b.html").read_text(encoding="utf-8")
    assert len(Page(text).points) == 9
    assert 'title="item 3"' in text
    assert 'title="position 3"' in text


def test_a_collapsed_embedding(tmp_path):
    text = report(tmp_path / "report.html", np.ones((40, 5)), np.arange(40) // 4)
    assert Page(text).points == [str(i // 4) for i in range(40)]
    assert "nan" not in text


@pytest.mark.parametrize(("size", "dim"), [(2, 1), (3, 2), (12, 3)])
def test_tiny_sets(size, dim, tmp_path):
    rows = np.random.default_rng(0).normal(size=(size, dim))
    assert len(Page(report(tmp_path / "report.html", rows, np.zeros(size, int))).points) == size


def test_verification(queries, tmp_path):
    rows, labels = queries
    for kind, values in (("spread", rows), ("collapsed", np.ones_like(rows)), ("large", 1e8 * rows)):
        found = evaluation.verification_metrics(values, labels, metric="euclidean" if kind == "large" else "cosine")
        table = {"exact": {**found.values}}
        page = Page(report(tmp_path / "report.html", rows, labels, verification=found, table=table))
        assert [tag for tag, _ in page.elements].count("svg") == 4
        positives, negatives = found.true_accepts[-1], found.false_accepts[-1]
        assert f"All {positives:,} pairs of one class and {negatives:,} of others" in page.text
        low, high = found.confidence_intervals()["eer"]
        assert f"{100 * low:.1f} to {100 * high:.1f}" in page.text
    found = evaluation.verification_metrics(np.eye(3), [0, 0, 1])
    report(tmp_path / "tiny.html", np.eye(3), np.array([0, 0, 1]), verification=found)


def test_writing_a_page_is_deterministic(queries, tmp_path):
    assert report(tmp_path / "a.html", *queries) == report(tmp_path / "b.html", *queries)


def test_points_of_a_map_match_their_titles():
    angles = np.radians([0, 150, 50, 100])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    svg, _ = embedding_map(rows, np.array([0, 1, 0, 1]), str, np.random.default_rng(0))
    found = {}
    for element in xml.etree.ElementTree.fromstring(svg).iter():
        if element.find("title") is not None:
            found[element.find("title").text] = element.attrib
    assert sorted(found) == ["0", "1", "2", "3"]
    colors = [found[str(i)]["style"].split(";")[0] for i in range(4)]
    assert colors[0] == colors[2] != colors[1] == colors[3]
    across = np.argsort([float(found[name]["x"]) for name in "0123"]).tolist()
    assert across in ([0, 2, 3, 1], [1, 3, 2, 0])


def test_thumbnails():
    for pixels in (np.zeros((300, 20), np.uint8), np.ones((5, 9, 1)), np.ones((4, 4, 3), np.float32)):
        assert data_uri(pixels).startswith("data:image/")


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
        kinds = [tag for tag, _ in page.elements]
        assert kinds.count("h2") == 6 + bool(gallery)
        assert not set(kinds) & {"script", "iframe", "object", "embed", "base", "b"}
        sources = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
        assert len(sources) > 20
        assert all(source.startswith("data:image/") for source in sources)
        assert f"{EVIL} 3" in page.text
    # Names of files that are not UTF-8 are written as they are.
    assert b"\xff" in (tmp_path / "with" / "duplicates.csv").read_bytes()
    rows, labels = np.eye(4)[[0, 0, 1, 1]] * 1.0, np.array([0, 0, 1, 1])
    save_audit(tmp_path / "empty", evaluation.audit(rows, labels, duplicate_similarity=1), EmbeddedImages(rows, labels))
    assert "Nothing found." in Page((tmp_path / "empty" / "audit.html").read_text(encoding="utf-8")).text
