"""s2sd-evaluate, -embed, -index, -search and -beam, run from the command line."""

import json
import os

import numpy as np
import pytest
import tensorflow as tf
from conftest import METHODS, needs_scann
from PIL import Image

import s2sd_tf
from s2sd_tf import data, evaluation, export
from s2sd_tf.checks import check_file_to_write
from s2sd_tf.cli import evaluated
from s2sd_tf.files import check_replaceable, read_json, write_json
from s2sd_tf.keras_compat import keras


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with images (4 classes of 5 images), an encoder, and the same model as `.keras`."""
    root = tmp_path_factory.mktemp("made")
    generator = np.random.default_rng(0)
    for label in range(4):
        (root / "images" / f"c{label}").mkdir(parents=True)
        pattern = generator.integers(0, 200, (9, 9, 3))
        for i in range(5):
            pixels = (pattern + generator.integers(0, 56, (9, 9, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(root / "images" / f"c{label}" / f"{i}.png")
    (root / "images" / "c0" / "notes.txt").write_text("every program leaves out what is no image")
    keras.utils.set_random_seed(0)
    backbone = s2sd_tf.models.backbones.conv_blocks((8, 8, 1), filters=(6, 8), pools=1)
    model = s2sd_tf.S2SDModel(backbone, 4, target_dims=(8,))
    model.compile(optimizer="adam")
    preprocessing = data.Preprocessing(8, 8, 1)
    export.export_encoder(model, preprocessing, str(root / "encoder"))
    model.save(root / "model.keras")
    write_json(str(root / "preprocessing.json"), preprocessing.get_config())
    return root


@needs_scann
def test_from_images_to_a_search(call, made, tmp_path):
    images, encoder = made / "images", made / "encoder"
    output = call(
        "embed", f"--encoder={encoder}", f"--images={images}", f"--output={tmp_path / 'emb'}", "--shard_size=6"
    ).stdout
    assert "20 images, 4 dimensions, 4 shards" in output
    output = call(
        "index", f"--embeddings={tmp_path / 'emb'}", f"--output={tmp_path / 'index'}",
        f"--encoder={encoder}", f"--saved_model={tmp_path / 'retrieval'}", "--k=3", "--min_score=1",
    ).stdout  # fmt: skip
    assert "20 items, 4 dimensions, scann" in output
    assert (tmp_path / "retrieval" / "saved_model.pb").exists()
    queries = [images / "c1" / "3.png", images / "c2" / "0.png"]
    search = (f"--encoder={encoder}", *(f"--image={path}" for path in queries), "--k=2")
    for folder in ("index", "emb"):
        if folder == "emb":
            error = call("search", f"--index={tmp_path / folder}", *search, status=2).stderr
            assert "index: expected a folder with an index" in error
            continue
        arguments = (*search, "--min_score=-2", f"--picture={tmp_path / 'found.png'}", f"--images={images}")
        answers = json.loads(call("search", f"--index={tmp_path / folder}", *arguments).stdout)
    assert [answer["query"] for answer in answers] == [str(path) for path in queries]
    first = answers[0]["matches"]
    assert len(first) == 2
    assert (first[0]["id"], first[0]["label"]) == ("c1/3.png", "c1")
    assert first[0]["similarity"] == pytest.approx(1.0, abs=1e-5)
    assert np.array(Image.open(tmp_path / "found.png")).std() > 1
    # No similarity reaches the threshold that the index stores.
    own = evaluation.read_embeddings(tmp_path / "emb").rows[:1]
    rows = (own + np.float32([0.1, -0.1, 0.2, 0.3])).astype(np.float32)
    assert evaluation.load_index(tmp_path / "index").search(rows, 2).indices.tolist() == [[-1, -1]]
    search_graph = export.load_retrieval(tmp_path / "retrieval").signatures["embeddings"]
    found = search_graph(embeddings=tf.constant(rows))
    assert found["ids"].numpy().tolist() == [[b"", b"", b""]]
    assert np.isneginf(found["scores"]).all()
    # An image reaches its own, however short the row.
    assert search_graph(embeddings=tf.constant(1e-13 * own))["ids"].numpy()[0, 0] == b"c0/0.png"
    error = call("index", f"--embeddings={tmp_path / 'emb'}", f"--output={tmp_path / 'other'}", "--metric=euclidean",
                 "--min_score=0.5", status=2).stderr  # fmt: skip
    assert "min_score: expected at most 0, the largest euclidean similarity (a negative distance)" in error
    (tmp_path / "broken.png").write_text("no image")
    query = f"--image={tmp_path / 'broken.png'}"
    error = call("search", f"--index={tmp_path / 'index'}", f"--encoder={encoder}", query,
                 status=2).stderr  # fmt: skip
    assert "broken.png" in error


def test_beam(call, made, tmp_path):
    arguments = (f"--encoder={made / 'encoder'}", f"--images={made / 'images'}", f"--output={tmp_path / 'out'}")
    assert (
        "20 images, 4 dimensions"
        in call(
            "beam",
            *arguments,
            "--shards=3",
            "--method=funnel",
            "--funnel_dim=2",
            "--codes=int8",
            "--beam=--runner=DirectRunner",
        ).stdout
    )
    found = call("search", f"--index={tmp_path / 'out'}", f"--encoder={made / 'encoder'}",
                 f"--image={made / 'images' / 'c0' / '1.png'}", "--k=1").stdout  # fmt: skip
    assert json.loads(found)[0]["matches"][0]["id"] == "c0/1.png"
    assert "expected exactly one" in call("beam", *arguments, "--tfrecords=x", status=2).stderr


def test_evaluating_models_and_embeddings_gives_the_same(call, made, tmp_path):
    images = f"--images={made / 'images'}"
    results = {}
    for name in ("encoder", "model.keras"):
        output = tmp_path / f"{name}.json"
        more = (f"--report={tmp_path / f'{name}.html'}", f"--projector={tmp_path / f'{name}_projector'}")
        call("evaluate", f"--model={made / name}", images, f"--output={output}", "--ks=1,3", "--map_ks=2,1000", *more)
        results[name] = read_json(output)
        # Files are named below the folder of the data: a report may be passed on.
        projector = [path.read_text() for path in (tmp_path / f"{name}_projector").glob("*.tsv")]
        for text in ((tmp_path / f"{name}.html").read_text(), output.read_text(), *projector):
            assert str(made) not in text
            assert str(tmp_path) not in text
        assert 'title="c1/0.png"' in (tmp_path / f"{name}.html").read_text()
    items = s2sd_tf.serving.list_images(made / "images")
    s2sd_tf.serving.embed_images(
        items, s2sd_tf.serving.Encoder(made / "encoder"), str(tmp_path / "emb"), progress=False
    )
    rows, ids, labels = evaluation.read_embeddings(tmp_path / "emb")
    np.save(tmp_path / "rows.npy", rows[:])
    np.savez(tmp_path / "rows.npz", embeddings=rows[:], labels=labels, ids=ids)
    (tmp_path / "labels.txt").write_text("\n".join(labels) + "\n")
    for name, more in (("emb", ()), ("rows.npz", ()), ("rows.npy", (f"--labels={tmp_path / 'labels.txt'}",))):
        output = tmp_path / f"{name}.json"
        if name == "rows.npy":
            more += (f"--report={tmp_path / 'report.html'}", f"--projector={tmp_path / 'projector'}")
        call("evaluate", f"--embeddings={tmp_path / name}", *more, f"--output={output}", "--ks=1,3", "--map_ks=2,1000")
        results[name] = read_json(output)
    assert '<img src="data:image' not in (tmp_path / "report.html").read_text()
    assert (tmp_path / "projector" / "vectors.tsv").exists()
    expected = evaluation.retrieval_metrics(rows[:], np.repeat(np.arange(4), 5), ks=(1, 3), map_ks=(2, 1000))
    for result in results.values():
        for method in METHODS:
            assert result[method] == pytest.approx(expected, abs=1e-5)
        assert set(result["space"]["cosine"]) == {"intra", "inter", "ratio", "rho", "nmi", "ami", "f1"}
        low, high = result["intervals"]["recall@1"]
        assert low <= expected["recall@1"] <= high
        assert sorted(result["per_class"]) == ["c0", "c1", "c2", "c3"]
        assert result["space"]["cosine"]["rho"] == pytest.approx(results["encoder"]["space"]["cosine"]["rho"], rel=1e-3)


@pytest.mark.parametrize(
    ("program", "given", "words"),
    [
        ("search", ("--index=i", "--encoder=e", "--image=q.png", "--images=."), "--picture: expected the file"),
        ("beam", ("--encoder=e", "--output=o", "--images=.", "--method=none", "--recall=0.9"),
         "--recall: expected an index. Received: --method=none"),
        ("shards", ("--name=folder", "--root=.", "--output=o", "--source=shards", "--check=none"),
         "--check: expected image files. Received: --source=shards"),
        ("evaluate", ("--workdir=w", "--postprocess=whiten", "--training_embeddings=typo.npz"), "'typo.npz'"),
    ],
)  # fmt: skip
def test_flags_without_effect_are_refused(call, program, given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in call(program, *given, status=2).stderr


def test_separate_queries_and_gallery_with_both_metrics(call, tmp_path):
    generator = np.random.default_rng(0)
    rows, labels = generator.normal(size=(40, 3)), generator.integers(0, 4, 40)
    names = [f"group{label // 2}/n{label}" for label in labels]
    np.savez(tmp_path / "queries.npz", embeddings=rows[:10], labels=names[:10])
    np.savez(tmp_path / "gallery.npz", embeddings=rows[10:], labels=names[10:])
    given = (f"--embeddings={tmp_path / 'queries.npz'}", f"--gallery_embeddings={tmp_path / 'gallery.npz'}")
    output = call("evaluate", *given, f"--output={tmp_path / 'out.json'}", f"--report={tmp_path / 'r.html'}",
                  "--noclustering", "--methods=exact", "--published_space").stdout  # fmt: skip
    assert "euclidean" in output
    results = read_json(tmp_path / "out.json")
    levels = np.stack([labels // 2, labels], axis=1)
    expected = evaluation.hierarchical_metrics(rows[:10], levels[:10], rows[10:], levels[10:])
    assert results["levels"] == pytest.approx(expected)
    assert f"Levels, cosine: ndcg {100 * expected['ndcg']:.1f}, h_ap" in output
    assert "super-class " in output
    for name, metric in (("exact", "cosine"), ("exact, euclidean", "euclidean")):
        expected = evaluation.retrieval_metrics(
            rows[:10], labels[:10], rows[10:], labels[10:], map_ks=(1000,), metric=metric
        )
        assert results[name] == pytest.approx(expected)
        sets = (rows[:10], labels[:10], rows[10:], labels[10:])
        pairs = evaluation.verification_metrics(*sets, metric=metric)
        written = results["verification"][metric]
        for key, value in pairs.values.items():
            assert written[key] == (pytest.approx(value) if np.isfinite(value) else None)
        assert (written["positives"], written["negatives"]) == (pairs.true_accepts[-1], pairs.false_accepts[-1])
        assert written["intervals"] == {key: list(pair) for key, pair in pairs.confidence_intervals().items()}
        assert results["open_set"] == {}
        space = evaluation.embedding_geometry(rows[:10], labels[:10], metric, published=True)
        assert results["space"][metric] == pytest.approx({**space, "rho@10": None})


def test_an_image_in_queries_and_gallery_does_not_find_itself(call, made, tmp_path):
    images, model = f"--images={made / 'images'}", f"--model={made / 'encoder'}"
    alone = call("evaluate", model, images, "--methods=exact").stdout
    assert call("evaluate", model, images, f"--gallery_images={made / 'images'}", "--methods=exact").stdout == alone
    rows = np.random.default_rng(0).normal(size=(8, 3))
    np.savez(tmp_path / "a.npz", embeddings=rows, labels=np.arange(8) // 4, ids=[f"i{i}" for i in range(8)])
    given = (f"--embeddings={tmp_path / 'a.npz'}", "--methods=exact", "--metrics=cosine", "--noclustering")
    others = f"--gallery_embeddings={tmp_path / 'a.npz'}"
    assert call("evaluate", *given, others, "--same_ids").stdout == call("evaluate", *given).stdout
    assert call("evaluate", *given, others).stdout.splitlines()[2].split()[1] == "100.0"


def test_absolute_ids_are_shown_below_the_folder_of_the_images(made):
    rows = np.random.default_rng(0).normal(size=(8, 3))
    root = made / "images"
    ids = [str(root / f"c{i % 4}" / f"{i % 5}.png") for i in range(8)]
    np.savez(made / "absolute.npz", embeddings=rows, labels=np.arange(8) % 4, ids=ids)
    given = str(made / "absolute.npz")
    shown = [name[len(str(root)) + 1 :] for name in ids]
    for folder in (str(root), None):
        queries, gallery, same = evaluated.embeddings((given, None, folder), None)
        assert (queries.ids, gallery, same) == (shown, None, {})
    # Whether they are the same image depends on the whole path.
    np.savez(made / "other.npz", embeddings=rows, labels=np.arange(8) % 4, ids=["/elsewhere" + name for name in ids])
    for name, count in (("absolute", 8), ("other", 16)):
        _, gallery, same = evaluated.embeddings(
            (given, None, None), (str(made / f"{name}.npz"), None, None), same_ids=True
        )
        assert gallery.ids == shown
        assert len(np.unique([*same["query_ids"], *same["gallery_ids"]])) == count
    np.savez(made / "rows.npz", embeddings=rows, labels=np.arange(8) % 4)
    with pytest.raises(ValueError, match=r"--same_ids: expected embeddings with ids.*rows\.npz', which has none"):
        evaluated.embeddings((given, None, None), (str(made / "rows.npz"), None, None), same_ids=True)
    assert queries.image is None
    queries, _, _ = evaluated.embeddings((given, None, str(root)), None)
    assert queries.image(3).shape == (9, 9, 3)


def test_label_files_and_rows_without_a_label(tmp_path, caplog):
    generator = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c"], 4)
    rows = generator.normal(size=(3, 5)).repeat(4, axis=0) + generator.normal(size=(12, 5))
    np.savez(tmp_path / "clean.npz", embeddings=rows, labels=labels)
    np.save(tmp_path / "rows.npy", rows)
    (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbf" + b"".join(f"{label} \r\n".encode() for label in labels))
    loose = np.insert(rows, [0, 7], generator.normal(size=(2, 5)), axis=0)
    np.savez(tmp_path / "loose.npz", embeddings=loose, labels=np.insert(labels, [0, 7], "").astype(bytes),
             ids=np.insert(np.arange(12).astype("U9"), [0, 7], ["one.png", "two.png"]))  # fmt: skip
    clean, *_ = evaluated.embeddings((str(tmp_path / "clean.npz"), None, None), None)
    for path, file in (("rows.npy", str(tmp_path / "labels.txt")), ("loose.npz", None)):
        with caplog.at_level("WARNING"):
            found, *_ = evaluated.embeddings((str(tmp_path / path), file, None), None)
        np.testing.assert_array_equal(found.rows, clean.rows)
        np.testing.assert_array_equal(found.labels, clean.labels)
        assert found.names == clean.names == {0: "a", 1: "b", 2: "c"}
    assert found.ids == [str(i) for i in range(12)]
    assert "left out 2 of 14 rows, which have no label" in caplog.text
    assert "one.png, two.png" in caplog.text
    # Whole numbers are the same label in every type.
    np.savez(tmp_path / "ints.npz", embeddings=rows, labels=np.arange(12) // 4)
    np.savez(tmp_path / "floats.npz", embeddings=rows, labels=np.arange(12) // 4 * 1.0)
    one, other, same = evaluated.embeddings(*((str(tmp_path / f"{n}.npz"), None, None) for n in ("ints", "floats")))
    assert same == {}
    np.testing.assert_array_equal(one.labels, other.labels)
    np.savez(tmp_path / "none.npz", embeddings=rows, labels=[""] * 12)
    with pytest.raises(ValueError, match="labels: expected rows with a label"):
        evaluated.embeddings((str(tmp_path / "none.npz"), None, None), None)


def test_outputs_that_cannot_be_written_are_refused_first(made, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").mkdir(mode=0o500)
    items, encoder = s2sd_tf.serving.list_images(made / "images"), s2sd_tf.serving.Encoder(made / "encoder")
    closed = [] if os.access(tmp_path / "closed", os.W_OK) else [tmp_path / "closed" / "a"]
    for path in (tmp_path / "file" / "a", tmp_path / "file" / "a" / "b", *closed):
        with pytest.raises(ValueError, match="path: expected a path to write"):
            check_file_to_write("path", path)
        with pytest.raises(ValueError, match="path: expected a path to write"):
            check_replaceable("path", path, "index.json")
        with pytest.raises(ValueError, match="folder: expected a path to write"):
            s2sd_tf.serving.embed_images(items, encoder, path, progress=False)
    with pytest.raises(ValueError, match="folder: expected a folder to write"):
        s2sd_tf.serving.embed_images(items, encoder, tmp_path / "file", progress=False)
    check_file_to_write("path", tmp_path / "new" / "folder" / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closed", "file"]


ERRORS = [
    ((), "exactly one of --workdir, --model and --embeddings"),
    (("--embeddings=a", "--model=b"), "exactly one of"),
    (("--embeddings=none.npy",), "embeddings: expected a file or a folder"),
    (("--model=none",), "--images: expected"),
    (("--model=none.keras", "--images=images"), "--model: expected a .keras file"),
    (("--embeddings=rows.npy",), "--labels: expected labels"),
    (("--embeddings=rows.npy", "--labels=labels.npy"), "--labels: expected 4 labels"),
    (("--embeddings=rows.npy", "--ks=0"), "--ks: expected integers >= 1"),
    (("--embeddings=rows.npy", "--methods="), "--methods: expected at least one"),
    (("--embeddings=rows.npy", "--gallery_labels=labels.npy"), "--gallery_labels: expected --gallery_embeddings"),
    (("--embeddings=rows.npy", "--gallery_images=images"), "--gallery_images: expected --model or --gallery_embed"),
    (("--workdir=none", "--images=images"), "--images: expected --model or --embeddings too"),
    (("--model=none", "--images=images", "--labels=labels.npy"), "--labels: expected --embeddings too"),
    (("--embeddings=rows.npy", "--same_ids"), "--same_ids: expected --gallery_embeddings too"),
    (("--embeddings=rows.npy", "--labels=some.txt"), "1 have none, first line 3"),
    (("--embeddings=rows.npy", "--labels=flat.txt", "--levels"), "--levels: expected classes that have super-classes"),
    (("--embeddings=rows.npy", "--metrics=cosine,guess"), "--metrics: expected one of"),
    (("--embeddings=rows.npy", "--projector=."), "--projector: expected a new folder"),
]


def test_errors_are_one_line(call, made, tmp_path, monkeypatch):
    np.save(tmp_path / "rows.npy", np.ones((4, 3)))
    np.save(tmp_path / "labels.npy", np.arange(3))
    (tmp_path / "some.txt").write_text("a\na\n\nb\n")
    (tmp_path / "flat.txt").write_text("a\na\nb\nb\n")
    (tmp_path / "images").symlink_to(made / "images")
    monkeypatch.chdir(tmp_path)
    for arguments, words in ERRORS:
        assert words in call("evaluate", *arguments, status=2).stderr
