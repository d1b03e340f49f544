"""`evaluation.audit` on planted faults and against plain loops, s2sd-audit, and training without what it excludes."""

import csv
import logging

import conftest
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import silhouette_score

from s2sd_tf import data, evaluation
from s2sd_tf.files import read_json
from s2sd_tf.reporting import EmbeddedImages, save_audit
from s2sd_tf.training import default_config, resolve
from s2sd_tf.training.datasets import load_split


def clusters(items, classes, seed=0, noise=0.5, dim=24):
    """Random rows around a random center for each class: `(rows, labels, generator)`."""
    generator = np.random.default_rng(seed)
    labels = np.arange(items) % classes
    rows = generator.normal(size=(classes, dim))[labels] + noise * generator.normal(size=(items, dim))
    return rows.astype(np.float32), labels, generator


def test_planted_faults_are_found():
    rows, labels, generator = clusters(1000, 40)
    true = labels.copy()
    wrong, copied, leaked, odd = np.split(generator.permutation(1000)[:40], [12, 27, 36])
    labels[wrong] = (labels[wrong] + generator.integers(1, 40, 12)) % 40
    rows[odd] = 1.1 * generator.normal(size=(4, 24))
    # Half of the copies are exact, the others differ a little.
    copies, leaks = (
        rows[some] + 0.01 * generator.normal(size=(len(some), 24)) * (np.arange(len(some)) % 2)[:, None]
        for some in (copied, leaked)
    )
    everything = np.concatenate([rows, copies]).astype(np.float32)
    labels = np.concatenate([labels, labels[copied]])
    labels[labels == 7] = 6
    test = np.concatenate([clusters(300, 30, seed=1)[0], leaks]).astype(np.float32)
    found = evaluation.audit(everything, labels, test)
    pairs = set(zip(found.duplicates.first.tolist(), found.duplicates.second.tolist()))
    assert pairs == set(zip(copied.tolist(), range(1000, 1015)))
    assert set(np.flatnonzero(found.duplicates.equal).tolist()) == {*range(8)}
    assert set(found.leaks.first.tolist()) == set(leaked.tolist())
    assert (found.leaks.second >= 300).all()
    assert found.leaks.equal.sum() == 5
    assert set(found.label_errors()[:12].tolist()) == set(wrong.tolist())
    assert len(found.label_errors()) <= 14
    assert (found.suggested_labels[wrong] == np.where(true[wrong] == 7, 6, true[wrong])).all()
    assert set(odd.tolist()) <= set(found.outliers().tolist())
    assert len(found.outliers()) < 30
    assert [split.label for split in found.split_classes] == [6]
    of_seven = np.flatnonzero(true == 7)
    assert any(np.isin(of_seven, group).mean() > 0.9 for group in found.split_classes[0].groups)
    excluded = found.to_exclude()
    assert len(excluded["duplicates"]) == 15
    assert set(excluded["leaks"].tolist()) == set(leaked.tolist())


def similarities_of(rows):
    """Cosine similarities of all pairs, -inf with itself."""
    wide = rows.astype(np.float64)
    norms = np.sqrt(np.sum(wide * wide, axis=1, keepdims=True))
    found = (wide @ wide.T) / np.where(norms > 0, norms, 1) / np.where(norms > 0, norms, 1).T
    found = found.astype(np.float32)
    np.fill_diagonal(found, -np.inf)
    return found


def naive_scores(similarities, labels, k):
    """Label scores, suggested labels and mean similarities, and the shares of confused classes, in plain loops."""
    n = len(labels)
    scores, suggested, means, votes = [], [], [], {}
    every = {}
    for item in range(n):
        order = [j for j in np.argsort(-similarities[item], kind="stable") if j != item][:k]
        size = {label: int(np.sum(labels == label)) for label in labels.tolist()}
        own = int(labels[item])
        for other in dict.fromkeys(int(labels[j]) for j in order):
            near = order[: max(3, min(size[own] - 1, size[other]))]
            weights = {j: max(float(similarities[item, j]), 0.0) for j in near}
            share = sum(w for j, w in weights.items() if labels[j] == other) / (sum(weights.values()) or 1.0)
            every[item, other] = share
        near = order[: max(3, size[own] - 1)]
        means.append(float(np.mean([similarities[item, j] for j in near])) if near else 0.0)
        for j in near:
            votes.setdefault(own, []).append(int(labels[j]))
    for item in range(n):
        best, which = 0.0, int(labels[item])
        alike = [j for j in range(n) if labels[j] == labels[item]]
        for other in [other for one, other in every if one == item and other != labels[item] and len(alike) > 1]:
            usual = np.median([every.get((j, other), 0.0) for j in alike])
            score = round(every[item, other] - every.get((item, int(labels[item])), 0.0) - usual, 6)
            if score > best:
                best, which = score, other
        scores.append(best)
        suggested.append(which)
    shares = {}
    for one, found in votes.items():
        for other in set(found) - {one}:
            pair = (min(one, other), max(one, other))
            shares[pair] = shares.get(pair, 0.0) + found.count(other) / len(found) / 2
    return np.array(scores), np.array(suggested), np.array(means), shares


@pytest.mark.parametrize(
    ("items", "classes", "k", "change"),
    [
        (60, 6, 20, None),
        (41, 17, 5, None),
        (30, 4, 100, "ties"),
        (12, 12, 20, None),
        (9, 1, 4, None),
        (10, 3, 4, "equal"),
        (10, 3, 4, "zeros"),
        (2, 1, 20, None),
        (1, 1, 20, None),
    ],
)
def test_scores_are_those_of_plain_loops(items, classes, k, change):
    rows, labels, generator = clusters(items, classes, noise=1.0, dim=4)
    if change == "ties":
        rows = generator.integers(-1, 2, (items, 4)).astype(np.float32)
    elif change:
        rows[:] = 0.0 if change == "zeros" else rows[0]
    labels = labels * 7 - 3
    similarities = similarities_of(rows)
    found = evaluation.audit(rows, labels, k=k, duplicate_similarity=0.9)
    scores, suggested, means, shares = naive_scores(similarities, labels, k)
    np.testing.assert_allclose(found.label_scores, scores, atol=1e-6)
    assert found.suggested_labels.tolist() == suggested.tolist()
    of_class = [labels == label for label in labels]
    away = np.array([np.median(means[same] if same.sum() >= 5 else means) for same in of_class]) - means
    scale = 1.4826 * np.median(np.abs(away)) or 1.2533 * np.mean(np.abs(away))
    np.testing.assert_allclose(found.outlier_scores, away / (scale or 1), rtol=1e-4, atol=1e-4)
    given = zip(found.confusions.first.tolist(), found.confusions.second.tolist(), found.confusions.shares)
    assert {(one, other): share for one, other, share in given} == pytest.approx(shares)
    assert (np.diff(found.confusions.shares) <= 0).all()
    if k >= items:
        pairs = {(i, j) for i in range(items) for j in range(i + 1, items) if similarities[i, j] >= np.float32(0.9)}
        assert set(zip(found.duplicates.first.tolist(), found.duplicates.second.tolist())) == pairs
    equal = [np.array_equal(rows[i], rows[j]) for i, j in zip(found.duplicates.first, found.duplicates.second)]
    assert found.duplicates.equal.tolist() == equal
    dropped = set(found.to_exclude()["duplicates"].tolist())
    joined = list(zip(found.duplicates.first.tolist(), found.duplicates.second.tolist()))
    assert all(one in dropped or other in dropped for one, other in joined)
    kept = {item for pair in joined for item in pair} - dropped
    assert all(any({item, other} in map(set, joined) for other in kept) for item in dropped)


def test_classes_that_are_alike_and_errors_in_one_direction():
    rows, labels, generator = clusters(800, 20)
    # Classes 0 and 1 are one.
    both = np.flatnonzero(labels < 2)
    labels[both] = generator.permutation(labels[both])
    # A tenth of class 4 is named class 5.
    wrong = np.flatnonzero(labels == 4)[:4]
    labels[wrong] = 5
    found = evaluation.audit(rows, labels)
    assert set(found.label_errors().tolist()) == set(wrong.tolist())
    assert set(found.suggested_labels[wrong].tolist()) == {4}


def test_more_copies_than_neighbors_leave_one():
    rows, labels, _ = clusters(60, 3)
    rows[20:50] = rows[0]
    found = evaluation.audit(rows, labels, k=4, duplicate_similarity=1.0)
    assert set(range(60)) - set(found.to_exclude()["duplicates"].tolist()) >= set(range(1, 20)) | set(range(50, 60))
    assert len(found.to_exclude()["duplicates"]) == 30


def test_of_duplicates_the_one_with_the_better_label_is_kept():
    rows, labels, _ = clusters(60, 3)
    rows[59], labels[59] = rows[0], (labels[0] + 1) % 3
    rows[1], labels[1] = rows[58], (labels[58] + 1) % 3
    assert evaluation.audit(rows, labels, duplicate_similarity=1.0).to_exclude()["duplicates"].tolist() == [1, 59]


def test_split_classes():
    rows, labels, _ = clusters(120, 12)
    labels[labels > 8] = 3
    (split,) = [split for split in evaluation.audit(rows, labels).split_classes if split.label == 3] or [None]
    members = np.concatenate(split.groups)
    assert sorted(members.tolist()) == np.flatnonzero(labels == 3).tolist()
    assert len(split.groups[0]) >= len(split.groups[1])
    side = np.repeat([0, 1], [len(group) for group in split.groups])
    assert split.silhouette == pytest.approx(silhouette_score(rows[members], side, metric="cosine"), abs=1e-5)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    centers = [unit[group].mean(axis=0) for group in split.groups]
    others = [unit[labels == label].mean(axis=0) for label in set(labels.tolist()) - {3}]
    cosine = lambda a, b: 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    assert split.distance == pytest.approx(cosine(*centers), abs=1e-5)
    assert split.other_distance == pytest.approx(min(cosine(a, b) for a in centers for b in others), abs=1e-5)
    # Two views that are closer to each other than to other classes are one class.
    near = np.tile(np.repeat([[1.0, 0.15, 0], [1.0, -0.15, 0]], 5, axis=0), (2, 1))
    near[10:] = near[10:, [2, 1, 0]]
    near += 0.01 * np.random.default_rng(0).normal(size=near.shape)
    assert evaluation.audit(near, np.repeat([0, 1], 10)).split_classes == []
    assert evaluation.audit(near, np.zeros(20, int)).split_classes == []


def test_errors():
    rows, labels, _ = clusters(12, 3)
    for arguments, settings, message in [
        ((rows[:0], labels[:0]), {}, "embeddings: expected at least one row"),
        ((rows, labels[:5]), {}, "labels: expected one for each of 12 rows"),
        ((rows, labels, rows[:, :3]), {}, "gallery: expected dimension 24"),
        ((rows, labels), {"k": 0}, "k: expected an int >= 1"),
        ((rows, labels), {"duplicate_similarity": 2}, "duplicate_similarity: expected a number in"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluation.audit(*arguments, **settings)
    found = evaluation.audit(rows, labels, rows)
    with pytest.raises(ValueError, match="score: expected a finite number"):
        found.label_errors("high")


@pytest.fixture
def photos(tmp_path):
    """Folder of 6 classes of 4 images, of which two files are equal, and its embeddings with other faults."""
    rows, labels, generator = clusters(24, 6)
    order = np.argsort(labels, kind="stable")
    rows, labels = rows[order], labels[order]
    ids = [f"c{label}/{i % 4}.png" for i, label in enumerate(labels)]
    for position, name in enumerate(ids):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (9, 8, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        if position == 1:
            (tmp_path / "photos" / ids[1]).write_bytes((tmp_path / "photos" / ids[0]).read_bytes())
    rows[1] = rows[0] + 1e-6
    rows[6] = rows[12:16].mean(axis=0)
    np.savez(tmp_path / "photos.npz", embeddings=rows, labels=[f"c{label}" for label in labels], ids=ids)
    test = np.concatenate([rows[20:21], generator.normal(size=(5, 24))])
    np.savez(tmp_path / "test.npz", embeddings=test, labels=["other"] * 6, ids=[f"test/{i}.png" for i in range(6)])
    return tmp_path


def test_the_program_and_training_without_what_it_excludes(photos, call, caplog):
    output = photos / "audit"
    given = (f"--embeddings={photos / 'photos.npz'}", f"--images={photos / 'photos'}", f"--output={output}")
    printed = call("audit", *given, f"--gallery_embeddings={photos / 'test.npz'}").stdout
    assert "exact duplicates" in printed
    tables = {path.stem: list(csv.DictReader(path.read_text().splitlines())) for path in output.glob("*.csv")}
    assert set(tables) == {"duplicates", "leaks", "label_errors", "outliers", "confused_classes", "split_classes"}
    (pair,) = tables["duplicates"]
    assert (pair["image"], pair["other"], pair["exact"], pair["other_label"]) == ("c0/0.png", "c0/1.png", "1", "c0")
    assert [(row["image"], row["other"]) for row in tables["leaks"]] == [("c5/0.png", "test/0.png")]
    assert [(row["image"], row["suggested_label"]) for row in tables["label_errors"]] == [("c1/2.png", "c3")]
    excluded = (output / "exclude.txt").read_text().splitlines()
    assert excluded == ["c0/1.png", "c1/2.png", "c5/0.png"]
    summary = read_json(output / "audit.json")
    assert summary["excluded"] == {"duplicates": 1, "leaks": 1, "label_errors": 1, "images": 3}
    assert "data:image" in (output / "audit.html").read_text()
    wrong = (given[0], f"--output={photos / 'photos'}")
    assert "--output: expected a new folder" in call("audit", *wrong, status=2).stderr

    config = default_config()
    config.data.name, config.data.root = "folder", str(photos / "photos")
    (photos / "exclude.txt").write_text("".join(f"{name}\n" for name in excluded))
    config.data.exclude = str(photos / "exclude.txt")
    with caplog.at_level(logging.WARNING):
        split = load_split(resolve(config))
    assert "left out 2 of 12 images of 'train'" in caplog.text
    left = [name for part in (split.train, split.test) for name in part.images.tolist()]
    assert sorted(set(excluded) - {"/".join(name.split("/")[-2:]) for name in left}) == excluded
    assert len(left) == 21


def test_exclude_images(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png", "x/a/1.png", "y/1.png", "y/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name)
    split = data.load_folder(tmp_path, test_fraction=0.5)
    assert split.train.class_names == ("a", "b")
    path = tmp_path / "list.txt"

    def left(text):
        path.write_bytes(text.encode())
        found = data.exclude_images(split, path, tmp_path)
        return {name: [p[len(str(tmp_path)) + 1 :] for p in part.images] for name, part in found.parts().items()}

    assert left("")["train"] == ["a/1.png", "a/2.png", "b/1.png"]
    # `a/1.png` is the end of two paths: the one directly under the root is meant.
    assert left(f"a/1.png\r\n\n{tmp_path}/y/2.png\n") == {
        "train": ["a/2.png", "b/1.png"],
        "test": ["x/a/1.png", "y/1.png"],
    }
    left("b/1.png")
    assert data.exclude_images(split, path, tmp_path).train.class_names == ("a",)
    for text, message in [
        ("a/1.png\nz/1.png\nz/2.png", "2 of 3 match no images: 'z/1.png', 'z/2.png'"),
        ("/a/1.png", "1 of 1 match no images: '/a/1.png'"),
        ("1.png", "1 of 1 match several images: '1.png'"),
        ("a/1.png\na/2.png\nb/1.png", "expected to leave images in the part 'train'"),
    ]:
        with pytest.raises(ValueError, match=message):
            left(text)
    with pytest.raises(FileNotFoundError, match="exclude: expected a text file"):
        data.exclude_images(split, tmp_path / "none.txt")
    path.write_text("0\n")
    with pytest.raises(ValueError, match="exclude: expected a data set of image files"):
        data.exclude_images(data.datasets.load("digits"), path)


@pytest.mark.parametrize("left", [False, True])
def test_teachers_of_all_images_or_of_those_that_are_left(left, tmp_path):
    for name in "abcdef":
        for number in range(3):
            (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "photos" / name / f"{number}.png")
    (tmp_path / "list.txt").write_text("a/1.png\nb/0.png\nb/1.png\nb/2.png")
    of_images, of_classes = np.arange(9.0)[:, None], np.arange(3.0)[:, None]
    kept, kept_classes = [0, 2, 6, 7, 8], [0, 2]
    if left:
        of_images, of_classes = of_images[kept], of_classes[kept_classes]
    np.save(tmp_path / "images.npy", of_images)
    np.save(tmp_path / "classes.npy", of_classes)
    config = conftest.small_config(**{
        "data.name": "folder", "data.root": str(tmp_path / "photos"), "data.exclude": str(tmp_path / "list.txt"),
        "data.teachers": tuple(str(tmp_path / f"{name}.npy") for name in ("images", "classes")),
    })  # fmt: skip
    images, classes = load_split(resolve(config)).train.teachers
    np.testing.assert_array_equal(images[:, 0], kept)
    np.testing.assert_array_equal(classes[:, 0], np.repeat(kept_classes, [2, 3]))


def test_an_audit_replaces_an_earlier_one(tmp_path):
    rows, labels, _ = clusters(12, 3)
    images = EmbeddedImages(rows, labels, ids=[f"{i}.png" for i in range(12)])
    save_audit(tmp_path / "audit", evaluation.audit(rows, labels, rows), images, images)
    assert (tmp_path / "audit" / "exclude.txt").read_text().split() == images.ids
    # Without ids there is nothing to list.
    assert (
        save_audit(tmp_path / "audit", evaluation.audit(rows, labels), EmbeddedImages(rows, labels))["gallery"] is None
    )
    assert not {"leaks.csv", "exclude.txt"} & {path.name for path in (tmp_path / "audit").iterdir()}


def test_save_audit_refuses_what_does_not_fit(tmp_path):
    rows, labels, _ = clusters(12, 3)
    found = evaluation.audit(rows, labels, rows)
    images = EmbeddedImages(rows, labels)
    for arguments, settings, message in [
        ((images._replace(rows=rows[:5], labels=labels[:5]), images), {}, "found: expected the audit of 5 images"),
        ((images,), {}, "gallery: expected that of the audit"),
        ((images, images), {"label_score": 2}, "label_score: expected a number in"),
        ((images, images), {"outlier_score": -1}, "outlier_score: expected a number >= 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            save_audit(tmp_path / "audit", found, *arguments, **settings)
    assert not (tmp_path / "audit").exists()
