"""Image retrieval data sets: published layouts, malformed files, image lists, tensorflow-datasets, shards."""

import dataclasses
import functools
import inspect
import json
import pathlib

import dataset_layouts as layouts
import numpy as np
import pytest
import tensorflow as tf
from conftest import REPOSITORY

from s2sd_tf import data
from s2sd_tf.data.retrieval_split import report_unpublished_counts

LAYOUTS = [(name, layout) for name, known in layouts.LAYOUTS.items() for layout in known]


def pairs(images):
    """`(path, class name)` of the images."""
    return [(path, images.class_names[label]) for path, label in zip(images.images.tolist(), images.labels)]


def as_text(found):
    return [(str(path), name) for path, name in found]


def read_slice(image):
    with open(image["path"], "rb") as file:
        file.seek(image["offset"])
        return file.read(image["length"])


class TestLayouts:
    @pytest.mark.parametrize(("name", "layout"), LAYOUTS)
    def test_finds_the_published_split(self, tmp_path, name, layout):
        expected = layouts.write(name, tmp_path, layout=layout)
        for check in ("none", "files", "decode"):
            split = data.datasets.load(name, str(tmp_path), check=check)
            assert list(split.parts()) == list(expected)
            for part, images in split.parts().items():
                assert sorted(pairs(images)) == sorted(as_text(expected[part]))
                assert images.kind == "paths"
                assert images.labels.dtype == np.int32
        first = [name for _, name in expected["train"]]
        assert split.train.class_names == tuple(dict.fromkeys(first))
        assert not set(split.train.class_names) & set(split.test.class_names)
        batch = next(iter(data.evaluation_batches(split.train, data.Preprocessing(6, 5))))
        assert np.isfinite(batch).all()

    @pytest.mark.parametrize(("name", "layout"), LAYOUTS)
    def test_images_keep_their_order(self, tmp_path, name, layout):
        expected = layouts.write(name, tmp_path, layout=layout)
        for part, images in data.datasets.load(name, str(tmp_path)).parts().items():
            assert pairs(images) == as_text(expected[part])

    def test_root_may_be_the_data_folder_itself(self, tmp_path):
        layouts.write_cub200(tmp_path)
        layouts.write_sop(tmp_path)
        layouts.write_cars196(tmp_path, layout="published")
        assert len(data.load_cub200(str(tmp_path / "CUB_200_2011")).train) == 12
        assert len(data.load_sop(tmp_path / "Stanford_Online_Products").train) == 12
        assert len(data.load_cars196(str(tmp_path / "cars196")).train) == 12

    def test_folders_of_cub200_are_ordered_by_number(self, tmp_path):
        for number in (1, 2, 10, 11):
            layouts.write_image(tmp_path / "images" / f"{number}.Bird" / "0.jpg")
        split = data.load_cub200(str(tmp_path))
        assert split.train.class_names == ("1.Bird", "2.Bird")
        assert split.test.class_names == ("10.Bird", "11.Bird")

    def test_two_hundred_classes_are_split_in_half(self, tmp_path):
        layouts.write_cub200(tmp_path, classes=200, images_per_class=1, size=(8, 6))
        split = data.load_cub200(str(tmp_path))
        assert split.counts() == {"train": (100, 100), "test": (100, 100)}
        assert split.test.class_names[0].startswith("101.")

    def test_super_classes(self, tmp_path):
        layouts.write_sop(tmp_path)
        layouts.write_inshop(tmp_path)
        sop, inshop = data.load_sop(str(tmp_path)), data.load_inshop(str(tmp_path))
        assert sop.train.super_classes == ("bicycle", "coffee_maker", "sofa", "bicycle")
        assert inshop.test.super_classes == ("WOMEN/Dresses", "MEN/Denim") * 2
        assert inshop.gallery.class_names == inshop.test.class_names == tuple(f"id_{c:08d}" for c in range(5, 9))

    def test_a_class_of_one_image_and_numbers_out_of_order(self, tmp_path):
        layouts.write_sop(tmp_path)
        path = tmp_path / "Stanford_Online_Products" / "Ebay_test.txt"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], *lines[:6:-1]]))
        split = data.load_sop(str(tmp_path))
        assert split.test.class_names == ("7", "8")
        path.write_text("\n".join(lines[:5]))
        assert data.load_sop(str(tmp_path)).test.class_counts().tolist() == [3, 1]

    @pytest.mark.parametrize("name", layouts.LAYOUTS)
    def test_missing_files(self, tmp_path, name):
        with pytest.raises(FileNotFoundError, match="root: expected"):
            data.datasets.load(name, str(tmp_path))
        for arguments in ({"check": "all"}, {"on_corrupt": "ignore"}, {"source": "zip"}):
            with pytest.raises(ValueError, match=f"{next(iter(arguments))}: expected"):
                data.datasets.load(name, str(tmp_path), **arguments)


class TestFiles:
    def spoil(self, expected):
        """Makes the first four test images unreadable, each in a different way; returns their paths."""
        bad = [path for path, _ in expected["test"][:4]]
        bad[0].unlink()
        bad[1].write_bytes(bad[1].read_bytes()[:-40])
        bad[2].write_bytes(b"")
        bad[3].write_bytes(b"<html>404</html>")
        return bad

    @pytest.mark.parametrize("check", ["files", "decode"])
    @pytest.mark.parametrize(("name", "layout"), LAYOUTS)
    def test_bad_files_are_named_and_refused_or_skipped(self, tmp_path, name, layout, check):
        load = functools.partial(data.datasets.load, name)
        expected = layouts.write(name, tmp_path, classes=12, images_per_class=4, layout=layout)
        bad = self.spoil(expected)
        named = bad[1:] if (name, layout) in layouts.WITHOUT_ANNOTATIONS else bad
        with pytest.raises(ValueError, match=f"{len(named)} files under") as refused:
            load(str(tmp_path), check=check)
        assert all(str(path) in str(refused.value) for path in named)
        split = load(str(tmp_path), on_corrupt="skip", check=check)
        for part, images in split.parts().items():
            left = [pair for pair in expected[part] if pair[0] not in bad]
            assert sorted(pairs(images)) == sorted(as_text(left))
            if part == "train":
                assert images.num_classes == 6
        # Classes left without images are dropped; the split of the others does not change.
        assert split.test.num_classes == len({name for part in ("test", "gallery") if part in expected
                                              for path, name in expected[part] if path not in bad})  # fmt: skip

    def test_without_a_check_no_file_is_opened(self, tmp_path):
        self.spoil(layouts.write_sop(tmp_path, images_per_class=4))
        assert len(data.load_sop(str(tmp_path), check="none").test) == 16

    def test_data_after_the_end_of_a_jpeg_is_ignored(self, tmp_path):
        (path, _), *_ = layouts.write_cub200(tmp_path)["train"]
        path.write_bytes(path.read_bytes() + bytes(2000))
        assert len(data.load_cub200(str(tmp_path)).train) == 12

    def test_other_formats(self, tmp_path):
        for c in range(2):
            for extension in ("png", "bmp", "gif"):
                layouts.write_image(tmp_path / "images" / f"{c}" / f"0.{extension}")
        assert len(data.load_cub200(str(tmp_path)).train) == 3
        path = tmp_path / "images" / "0" / "0.png"
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match=r"0\.png: truncated"):
            data.load_cub200(str(tmp_path))

    def test_no_test_class_is_left(self, tmp_path):
        for path, _ in layouts.write_cub200(tmp_path)["test"]:
            path.unlink()
        with pytest.raises(ValueError, match="part 'test'"):
            data.load_cub200(str(tmp_path), on_corrupt="skip")


class TestAnnotations:
    @pytest.mark.parametrize(
        ("name", "file", "line", "text", "words"),
        [
            ("cub200", "CUB_200_2011/images.txt", 2, "2", "expected 2 columns. Received: '2'"),
            ("cub200", "CUB_200_2011/images.txt", 3, "3 ../../secret.jpg", "expected a path under"),
            ("cub200", "CUB_200_2011/images.txt", 3, "3 /etc/secret.jpg", "expected a path under"),
            ("cub200", "CUB_200_2011/images.txt", 3, "99 a.jpg", "expected an image of image_class_labels.txt"),
            ("cub200", "CUB_200_2011/image_class_labels.txt", 4, "4 99", "expected a class of classes.txt"),
            ("cub200", "CUB_200_2011/images.txt", 3, "3 a\0.jpg", "expected a path under"),
            ("cub200", "CUB_200_2011/classes.txt", 1, "one Auk", "expected an int as class_id"),
            ("cub200", "CUB_200_2011/classes.txt", 1, b"\xff\xfe Auk", "expected UTF-8"),
            ("sop", "Stanford_Online_Products/Ebay_train.txt", 3, "2 1 1", "expected 4 columns"),
            ("sop", "Stanford_Online_Products/Ebay_test.txt", 3, "2 one 1 a.jpg", "expected an int as class_id"),
            ("sop", "Stanford_Online_Products/Ebay_test.txt", 2, "1 1 1 C:\\a.jpg", "expected a path under"),
            ("sop", "Stanford_Online_Products/Ebay_test.txt", 2, "1 1 1 a/..\\..\\b.jpg", "expected a path under"),
            ("inshop", "Eval/list_eval_partition.txt", 1, "seven", "expected an int as the number of images"),
            ("inshop", "Eval/list_eval_partition.txt", 1, "7", "expected the number of images listed in the file, 24"),
            ("inshop", "Eval/list_eval_partition.txt", 5, "img/M/D/i/a.jpg i probe", "expected one of .*'probe'"),
            ("inshop", "Eval/list_eval_partition.txt", 5, "img/a.jpg i train", "expected img/<gender>"),
            ("inshop", "Eval/list_eval_partition.txt", 5, "img/../../../a.jpg i train", "expected a path under"),
        ],
    )
    def test_a_malformed_line_is_reported_by_file_and_line(self, tmp_path, name, file, line, text, words):
        layouts.write(name, tmp_path)
        path = tmp_path / file
        lines = path.read_bytes().splitlines()
        lines[line - 1] = text if isinstance(text, bytes) else text.encode()
        path.write_bytes(b"\n".join(lines))
        with pytest.raises(ValueError, match=words) as refused:
            data.datasets.load(name, str(tmp_path))
        assert f"{path}, line {line}: " in str(refused.value)

    @pytest.mark.parametrize(
        ("name", "file"),
        [
            ("cub200", "CUB_200_2011/classes.txt"),
            ("cub200", "CUB_200_2011/image_class_labels.txt"),
            ("sop", "Stanford_Online_Products/Ebay_test.txt"),
        ],
    )
    def test_a_missing_file_is_reported(self, tmp_path, name, file):
        layouts.write(name, tmp_path)
        (tmp_path / file).unlink()
        with pytest.raises(FileNotFoundError, match=f"{file}: expected an annotation file"):
            data.datasets.load(name, str(tmp_path))

    def test_two_classes_with_the_same_name(self, tmp_path):
        layouts.write_cub200(tmp_path)
        path = tmp_path / "CUB_200_2011" / "classes.txt"
        path.write_text(path.read_text().replace("002.Bird_1", "001.Auk_0"))
        with pytest.raises(ValueError, match=r"different names. Received: \['001.Auk_0'\]"):
            data.load_cub200(str(tmp_path))

    def test_an_image_listed_twice(self, tmp_path):
        layouts.write_cub200(tmp_path)
        path = tmp_path / "CUB_200_2011" / "images.txt"
        lines = path.read_text().splitlines()
        lines[1] = "2 " + lines[0].split(None, 1)[1]
        path.write_text("\n".join(lines))
        with pytest.raises(ValueError, match=r"images.txt, line 2: expected every image once.*line 1"):
            data.load_cub200(str(tmp_path))

    def test_queries_without_a_match_are_logged(self, tmp_path, caplog):
        layouts.write_inshop(tmp_path)
        path = tmp_path / "Eval" / "list_eval_partition.txt"
        lines = path.read_text().splitlines()
        kept = [line for line in lines if not line.endswith("id_00000008 gallery")]
        path.write_text("\n".join([str(len(kept) - 2), *kept[1:]]))
        with caplog.at_level("WARNING", logger="absl"):
            split = data.load_inshop(str(tmp_path))
        assert "1 items that are missing from it, ['id_00000008']" in caplog.text
        assert split.counts() == {"train": (12, 4), "test": (4, 4), "gallery": (6, 3)}
        assert split.test.class_names == split.gallery.class_names

    def test_a_class_in_both_train_and_test(self, tmp_path):
        layouts.write_sop(tmp_path)
        path = tmp_path / "Stanford_Online_Products" / "Ebay_test.txt"
        path.write_text(path.read_text() + "9 1 1 bicycle_final/other.jpg\n")
        with pytest.raises(ValueError, match=r"either train or test. Received: 1 .*\['1'\]"):
            data.load_sop(str(tmp_path), check="none")

    def test_cars_without_labels_of_the_test_images(self, tmp_path):
        layouts.write_cars196(tmp_path, layout="devkit")
        labels = tmp_path / "devkit" / "cars_test_annos_withlabels.mat"
        labels.rename(tmp_path / "cars_test_annos_withlabels.mat")
        assert len(data.load_cars196(str(tmp_path)).test) == 12
        (tmp_path / "cars_test_annos_withlabels.mat").unlink()
        with pytest.raises(FileNotFoundError, match=r"cars_test_annos_withlabels\.mat"):
            data.load_cars196(str(tmp_path))

    @pytest.mark.parametrize(
        ("records", "words"),
        [
            ([("car_ims/1.jpg", 3)], "annotation 1: expected a class from 1 to 2. Received: 3"),
            ([("../1.jpg", 1)], "annotation 1: expected a path under"),
            ([("car_ims/1.jpg", 1), ("car_ims/2.jpg", "one")], "annotation 2: expected the fields"),
        ],
    )
    def test_malformed_matlab_annotations(self, tmp_path, records, words):
        path = tmp_path / "cars_annos.mat"
        layouts.write_annotations(path, "relative_im_path", records, class_names=["a", "b"])
        with pytest.raises(ValueError, match=words) as refused:
            data.load_cars196(str(tmp_path))
        assert str(path) in str(refused.value)

    @pytest.mark.parametrize("content", [b"", b"no MATLAB file", b"\x80\x04\x95" + bytes(200)])
    def test_files_that_are_not_matlab_files(self, tmp_path, content):
        (tmp_path / "cars_annos.mat").write_bytes(content)
        with pytest.raises(ValueError, match=r"cars_annos.mat: expected a MATLAB file"):
            data.load_cars196(str(tmp_path))
        layouts.write_annotations(tmp_path / "cars_annos.mat", "relative_im_path", [("car_ims/1.jpg", 1)])
        with pytest.raises(ValueError, match=r"none named \['class_names'\]"):
            data.load_cars196(str(tmp_path))


class TestCounts:
    def test_counts_other_than_the_published_are_logged(self, tmp_path, caplog):
        layouts.write_cub200(tmp_path)
        with caplog.at_level("INFO", logger="absl"):
            split = data.load_cub200(str(tmp_path))
            assert [record.levelname for record in caplog.records] == ["INFO"]
            assert "cub200: expected the published split, train 5,864 images of 100 classes; test" in caplog.text
            report_unpublished_counts("x", {"train": (12, 4), "test": (13, 4)}, split)
            assert caplog.records[-1].levelname == "WARNING"
            report_unpublished_counts("x", split.counts(), split)
            assert len(caplog.records) == 2
        assert "expected the published split, train 12 images of 4 classes; test 13 images" in caplog.text
        assert "Received: train 12 images of 4 classes; test 12 images" in caplog.text

    def test_lists_of_another_data_set_have_no_published_counts(self, tmp_path, caplog):
        layouts.write_lists(tmp_path)
        lists = [str(tmp_path / "train.txt"), str(tmp_path / "test.txt")]
        with caplog.at_level("INFO", logger="absl"):
            data.load_lists(str(tmp_path), *lists)
            assert "inaturalist: expected the published split" in caplog.text
            caplog.clear()
            for path in (tmp_path / "train.txt", tmp_path / "test.txt"):
                path.write_text(path.read_text().replace("train_val2018", "mine"))
            (tmp_path / "train_val2018").rename(tmp_path / "mine")
            data.load_lists(str(tmp_path), *lists)
        assert not caplog.records

    def test_counts_add_up(self):
        counts = {name: data.datasets.counts(name) for name in layouts.LAYOUTS}
        totals = {name: tuple(map(sum, zip(*parts.values()))) for name, parts in counts.items()}
        assert totals["cub200"] == (11_788, 200)
        assert totals["cars196"] == (16_185, 196)
        assert totals["sop"] == (120_053, 22_634)
        assert totals["inshop"][0] == 52_712


class TestImageLists:
    def test_two_lists(self, tmp_path):
        expected = layouts.write_lists(tmp_path)
        split = data.load_lists(str(tmp_path), str(tmp_path / "train.txt"), str(tmp_path / "test.txt"))
        for part, images in split.parts().items():
            assert pairs(images) == as_text(expected[part])
        assert split.train.class_names == ("Aves/10", "Aves/12", "Plantae/11", "Plantae/13")
        assert split.train.super_classes == ("Aves", "Aves", "Plantae", "Plantae")
        with pytest.raises(ValueError, match="either train or test"):
            data.load_lists(str(tmp_path), str(tmp_path / "train.txt"), str(tmp_path / "train.txt"))

    def test_labels_in_a_second_column(self, tmp_path):
        for name in ("a b.jpg", "c.PNG", "d.jpg"):
            layouts.write_image(tmp_path / "x" / name)
        (tmp_path / "list.txt").write_text("x/a b.jpg 10\nx/c.PNG\t9\n\nx/d.jpg 10\n")
        images = data.load_image_list(str(tmp_path), str(tmp_path / "list.txt"))
        assert images.class_names == ("9", "10")
        assert images.labels.tolist() == [1, 0, 1]
        assert images.super_classes == ()

    def test_bad_files_and_classes_without_images(self, tmp_path):
        expected = layouts.write_lists(tmp_path)
        for path, _ in expected["train"][:3]:
            path.write_bytes(b"")
        arguments = str(tmp_path), str(tmp_path / "train.txt")
        with pytest.raises(ValueError, match="3 files under"):
            data.load_image_list(*arguments)
        images = data.load_image_list(*arguments, on_corrupt="skip")
        assert pairs(images) == as_text(expected["train"][3:])
        assert images.class_names == ("Aves/12", "Plantae/11", "Plantae/13")

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("a/b.jpg\na/c.txt\n", "line 2: expected <folder of a class>/<file>"),
            ("a/b.jpg\n\nb.jpg\n", "line 3: expected <folder of a class>/<file>"),
            ("a/b.jpg 1\na/c.jpg\n", "line 2: expected <path> <class>"),
            ("a/b.jpg\n../c/d.jpg\n", "line 2: expected a path under"),
            ("", "image_list: expected one path per line"),
        ],
    )
    def test_malformed_lists(self, tmp_path, text, words):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(ValueError, match=words):
            data.load_image_list(str(tmp_path), str(tmp_path / "list.txt"))
        with pytest.raises(FileNotFoundError, match="image_list"):
            data.load_image_list(str(tmp_path), str(tmp_path / "none.txt"))


class TestImageSet:
    @pytest.fixture
    def images(self):
        labels = np.repeat(np.arange(5), [4, 1, 2, 7, 10]).astype(np.int32)
        pixels = np.arange(24, dtype=np.uint8).reshape(24, 1, 1, 1)
        return data.ImageSet(pixels, labels, tuple("vwxyz"), ("q", "p", "q", "p", "r"))

    def test_super_classes(self, images):
        chosen = images.select_classes([3, 0])
        assert chosen.super_classes == ("p", "q")
        with pytest.raises(ValueError, match=r"one for each of 5 classes\. Received: 2"):
            data.ImageSet(images.images, images.labels, images.class_names, ("p", "q"))

    def test_nested_folders_have_super_classes(self, tmp_path):
        for name in ("b/x", "a/y", "b/z/w"):
            layouts.write_image(tmp_path / name / "0.png")
        assert data.load_image_folder(str(tmp_path)).super_classes == ("a", "b", "b")
        layouts.write_image(tmp_path / "c" / "0.png")
        assert data.load_image_folder(str(tmp_path)).super_classes == ()

    def test_checks_of_a_folder_are_chosen_by_name(self, tmp_path):
        layouts.write_image(tmp_path / "a" / "0.jpg")
        path = tmp_path / "a" / "1.jpg"
        path.write_bytes(b"\xff\xd8\xff and the end marker \xff\xd9")
        assert len(data.load_image_folder(str(tmp_path), check="files")) == 2
        assert len(data.load_image_folder(str(tmp_path), check="none")) == 2
        with pytest.raises(ValueError, match="1 files under"):
            data.load_image_folder(str(tmp_path), check="decode")

    @pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.8, 0.99])
    def test_samples_are_split_within_classes(self, images, fraction):
        train, rest = data.split_samples(images, fraction, seed=3)
        assert sorted([*train.images.ravel(), *rest.images.ravel()]) == list(range(24))
        for part in (train, rest):
            assert part.class_names == images.class_names
            assert part.super_classes == images.super_classes
            assert part.labels.tolist() == images.labels[part.images.ravel()].tolist()
        for count, first, second in zip(images.class_counts(), train.class_counts(), rest.class_counts()):
            assert first + second == count
            assert first >= 1
            assert (second >= 1) == (count >= 2)
            assert abs(second - fraction * count) <= 1

    def test_samples_are_split_by_seed(self, images):
        def chosen(seed):
            return data.split_samples(images, 0.5, seed)[0].images.ravel().tolist()

        assert chosen(1) == chosen(1)
        assert len({tuple(chosen(seed)) for seed in range(8)}) > 4
        for arguments in ((images, 0.0), (images, 1.0), (images, 0.5, -1), (images.select_classes([1]), 0.5)):
            with pytest.raises(ValueError, match="expected"):
                data.split_samples(*arguments)

    def test_slices(self):
        slices = data.image_slices(["a", "bcd"], [5, 2**40], [1, 2])
        images = data.ImageSet(slices, np.array([0, 1], np.int32), ("x", "y"))
        assert images.kind == "slices"
        assert slices.dtype.names == ("path", "offset", "length")
        assert images.select_classes([1]).images.tolist() == [("bcd", 2**40, 2)]


@pytest.fixture(scope="class")
def split(tmp_path_factory):
    """A split with a gallery and super-classes."""
    root = tmp_path_factory.mktemp("inshop")
    layouts.write_inshop(root, images_per_class=5)
    return data.load_inshop(str(root))


@pytest.fixture
def shards(split, tmp_path):
    data.write_shards(split, str(tmp_path / "shards"), shard_mib=0.001)
    return tmp_path / "shards"


class TestShards:
    def test_every_slice_equals_the_original_file(self, split, shards):
        found = data.read_shards(str(shards))
        assert found.counts() == split.counts()
        for part, images in found.parts().items():
            original = split.parts()[part]
            assert images.kind == "slices"
            assert images.class_names == original.class_names
            assert images.super_classes == original.super_classes
            assert images.labels.dtype == np.int32
            np.testing.assert_array_equal(images.labels, original.labels)
            for image, path in zip(images.images, original.images):
                with open(path, "rb") as file:
                    assert read_slice(image) == file.read()

    def test_batches_equal_those_from_the_files(self, split, shards):
        preprocessing = data.Preprocessing(6, 5)
        for part, images in data.read_shards(str(shards)).parts().items():
            found = next(iter(data.evaluation_batches(images, preprocessing)))
            expected = next(iter(data.evaluation_batches(split.parts()[part], preprocessing)))
            np.testing.assert_array_equal(found, expected)

    def test_tensorflow_reads_the_records(self, split, shards):
        kinds = {
            "image/encoded": tf.io.FixedLenFeature([], tf.string),
            "image/class/label": tf.io.FixedLenFeature([], tf.int64),
            "image/class/text": tf.io.FixedLenFeature([], tf.string),
            "image/super_class/text": tf.io.FixedLenFeature([], tf.string),
            "image/filename": tf.io.FixedLenFeature([], tf.string),
        }
        for part, images in split.parts().items():
            files = sorted(shards.glob(f"{part}-*.tfrecord"))
            assert len(files) > 1
            assert [path.name for path in files] == [
                f"{part}-{number:05d}-of-{len(files):05d}.tfrecord" for number in range(len(files))
            ]
            records = tf.data.TFRecordDataset([str(path) for path in files])
            examples = [tf.io.parse_single_example(record, kinds) for record in records]
            assert len(examples) == len(images)
            for example, path, label in zip(examples, images.images, images.labels):
                example = {name: value.numpy() for name, value in example.items()}
                with open(path, "rb") as file:
                    assert example["image/encoded"] == file.read()
                assert example["image/class/label"] == label
                assert example["image/class/text"].decode() == images.class_names[label]
                assert example["image/super_class/text"].decode() == images.super_classes[label]
                assert example["image/filename"].decode() == path.split("/")[-1]

    def test_shards_do_not_contain_the_original_paths(self, split, shards):
        content = b"".join(path.read_bytes() for path in shards.iterdir())
        assert str(split.train.images[0]).rsplit("/", 2)[0].encode() not in content

    def test_all_kinds_of_images(self, tmp_path, shards):
        train, test, _ = data.load_digits()
        pixels = data.RetrievalSplit(train, test)
        assert data.write_shards(pixels, str(tmp_path / "pixels")) == {"train": 1, "test": 1}
        read = data.read_shards(str(tmp_path / "pixels"))
        assert read.gallery is None
        for position in (0, 77, len(test) - 1):
            decoded = tf.io.decode_png(read_slice(read.test.images[position]))
            np.testing.assert_array_equal(decoded, test.images[position])
        sliced = data.read_shards(str(shards))
        data.write_shards(sliced, str(tmp_path / "again"))
        again = data.read_shards(str(tmp_path / "again"))
        contents = [read_slice(image) for image in again.gallery.images]
        assert contents == [read_slice(image) for image in sliced.gallery.images]
        array = np.empty(len(contents), object)
        array[:] = contents
        encoded = data.ImageSet(array, sliced.gallery.labels, sliced.gallery.class_names)
        data.write_shards(data.RetrievalSplit(encoded, encoded), str(tmp_path / "bytes"))
        images = data.read_shards(str(tmp_path / "bytes")).train
        assert [read_slice(image) for image in images.images] == contents
        assert images.super_classes == ()

    def test_a_changed_shard_is_refused_by_name(self, shards):
        path = sorted(shards.glob("train-*.tfrecord"))[1]
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=f"{path.name} to have {len(whole)} bytes. Received: {len(whole) - 1}"):
            data.read_shards(str(shards))
        path.unlink()
        with pytest.raises(FileNotFoundError, match=f"expected the shard {path.name}"):
            data.read_shards(str(shards))

    def test_a_changed_description_or_index_is_refused(self, shards):
        path = shards / "s2sd_shards.json"
        whole = json.loads(path.read_text())
        shard = whole["parts"]["train"]["shards"][0]
        for changed in (
            {**whole, "version": 2},
            {"version": 1},
            [],
            {**whole, "parts": {"train": whole["parts"]["train"]}},
            {**whole, "parts": {**whole["parts"], "gallery": whole["parts"]["train"]}},
            {**whole, "parts": {**whole["parts"], "test": {**whole["parts"]["test"], "images": 99}}},
            {**whole, "parts": {**whole["parts"], "train": {**whole["parts"]["train"], "class_names": ["a"]}}},
            {**whole, "parts": {**whole["parts"], "train": {**whole["parts"]["train"], "shards": [shard]}}},
            {**whole, "parts": {**whole["parts"], "test": {**whole["parts"]["test"],
                                                           "shards": [{**shard, "name": "../x"}]}}},
        ):  # fmt: skip
            path.write_text(json.dumps(changed))
            with pytest.raises(ValueError, match="expected"):
                data.read_shards(str(shards))
        path.write_text(json.dumps(whole))
        index = dict(np.load(shards / "index.npz"))
        for name, value in (("train_offset", 10**9), ("train_shard", -1), ("train_length", 0)):
            np.savez(shards / "index.npz", **{**index, name: np.full_like(index[name], value)})
            with pytest.raises(ValueError, match=r"index.npz: expected places"):
                data.read_shards(str(shards))
        np.savez(shards / "index.npz", **{**index, "train_label": np.array([{}], object)})
        with pytest.raises(ValueError, match=r"index.npz: expected the index"):
            data.read_shards(str(shards))
        (shards / "index.npz").unlink()
        with pytest.raises(FileNotFoundError, match=r"expected index.npz"):
            data.read_shards(str(shards))

    def test_written_whole_or_not_at_all(self, split, shards, tmp_path):
        before = sorted((path.name, path.stat().st_size) for path in shards.iterdir())
        gone = data.ImageSet(np.array([str(tmp_path / "gone.jpg")]), np.array([0], np.int32), ("a",))
        with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
            data.write_shards(split._replace(test=gone), str(shards))
        assert sorted((path.name, path.stat().st_size) for path in shards.iterdir()) == before
        assert [path.name for path in tmp_path.iterdir()] == ["shards"]
        data.write_shards(split, str(shards), shard_mib=1)
        assert data.read_shards(str(shards)).counts() == split.counts()
        assert len(list(shards.iterdir())) == 5

    def test_errors(self, split, tmp_path):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "thesis.txt").write_text("")
        with pytest.raises(ValueError, match="folder: expected a new folder"):
            data.write_shards(split, str(tmp_path / "other"))
        with pytest.raises(ValueError, match="shard_mib"):
            data.write_shards(split, str(tmp_path / "new"), shard_mib=0)
        taught = dataclasses.replace(split.train, teachers=(np.zeros((len(split.train), 2), np.float32),))
        with pytest.raises(ValueError, match="split: expected images without teachers"):
            data.write_shards(split._replace(train=taught), str(tmp_path / "new"))
        empty = np.empty(1, object)
        empty[0] = b""
        images = data.ImageSet(empty, np.array([0], np.int32), ("a",))
        with pytest.raises(ValueError, match="an empty one, 0 of train"):
            data.write_shards(data.RetrievalSplit(images, images), str(tmp_path / "new"))
        with pytest.raises(FileNotFoundError, match=r"s2sd_shards\.json"):
            data.read_shards(str(tmp_path / "other"))


class TestTensorFlowDatasets:
    """Uses the features of the real builders, with our own images."""

    def prepare(self, folder, name, examples):
        """Writes records as the builder would; returns the encoded images. `examples` is a dict from part to a list of
        features, without images and boxes.
        """
        import tensorflow_datasets as tfds

        builder = tfds.builder(name, data_dir=folder)
        features = builder.info.features
        written = pathlib.Path(builder.data_dir)
        written.mkdir(parents=True)
        encoded, infos = [], []
        for part in examples:
            template = tfds.core.ShardedFileTemplate(
                data_dir=written, dataset_name=name, split=part, filetype_suffix="tfrecord"
            )
            with tf.io.TFRecordWriter(str(template.sharded_filepath(shard_index=0, num_shards=1))) as writer:
                for at, example in enumerate(examples[part]):
                    path = folder / "source" / f"{part}{at}.jpg"
                    layouts.write_image(path, seed=len(encoded), mode="CMYK" if at == 0 else "RGB")
                    encoded.append(path.read_bytes())
                    boxes = {"bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0)} if "bbox" in features else {}
                    whole = features.encode_example({"image": str(path), **boxes, **example})
                    writer.write(features.serialize_example(whole))
            count = len(examples[part])
            infos.append(tfds.core.SplitInfo(name=part, shard_lengths=[count], num_bytes=0, filename_template=template))
        tfds.folder_dataset.write_metadata(data_dir=written, features=features, split_infos=infos)
        return encoded

    def check(self, split, encoded):
        for images in split.parts().values():
            assert images.kind == "bytes"
        found = [*split.train.images, *split.test.images]
        assert sorted(found) == sorted(encoded)

    def test_cars196(self, tmp_path):
        names = [
            "AM General Hummer SUV 2000",
            "Acura RL Sedan 2012",
            "Acura Integra Type R 2001",
            "Volvo 240 Sedan 1993",
        ]
        examples = {
            part: [{"label": name, "id": f"{part}{at}"} for at, name in enumerate(names)] for part in ("train", "test")
        }
        encoded = self.prepare(tmp_path, "cars196", examples)
        split = data.load_tfds("cars196", tmp_path)
        self.check(split, encoded)
        assert split.train.class_names == tuple(names[:2])
        assert split.test.class_names == tuple(names[2:])
        assert split.counts() == {"train": (4, 2), "test": (4, 2)}
        # Within each part, the builder wrote images in the order of their names.
        for images in split.parts().values():
            for image, label in zip(images.images, images.labels):
                assert encoded.index(image) % 4 == names.index(images.class_names[label])
        assert data.load_cars196(tmp_path, source="tfds").counts() == split.counts()

    def test_birds_have_the_names_of_their_folders(self, tmp_path):
        def example(label):
            return {
                "image/filename": f"CUB_200_2011/images/{label + 1:03d}.Auk_{label}/Auk.jpg",
                "label": label,
                "label_name": f"auk_{label}",
                "segmentation_mask": np.zeros((40, 30, 1), np.uint8),
            }

        parts = {"train": [example(label) for label in (3, 0)], "test": [example(label) for label in (2, 1, 0)]}
        encoded = self.prepare(tmp_path, "caltech_birds2011", parts)
        split = data.load_tfds("caltech_birds2011", tmp_path)
        self.check(split, encoded)
        assert split.train.class_names == ("001.Auk_0", "002.Auk_1")
        assert split.test.class_names == ("003.Auk_2", "004.Auk_3")
        assert split.train.class_counts().tolist() == [2, 1]

    def test_products_keep_the_parts_of_the_builder(self, tmp_path):
        def example(number, super_number):
            return {"class_id": number, "super_class_id": super_number, "super_class_id/num": super_number}

        parts = {"train": [example(0, 0), example(0, 0), example(7, 3)], "test": [example(11318, 2)]}
        encoded = self.prepare(tmp_path, "stanford_online_products", parts)
        split = data.load_tfds("stanford_online_products", tmp_path)
        self.check(split, encoded)
        assert split.train.class_names == ("1", "8")
        assert split.train.super_classes == ("bicycle", "coffee_maker")
        assert split.test.class_names == ("11319",)
        assert split.test.super_classes == ("chair",)

    def test_nothing_is_downloaded(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"tfds.builder\('cars196', .*download_and_prepare"):
            data.load_tfds("cars196", tmp_path)
        with pytest.raises(ValueError, match="name: expected one of"):
            data.load_tfds("mnist", tmp_path)


class TestRegistry:
    def test_every_data_set_read_from_files_has_its_layouts_here(self):
        sourced = {name for name in data.datasets.names() if "source" in data.datasets.settings(name)}
        assert set(layouts.LAYOUTS) == sourced - {"folder"}

    def test_the_documentation_has_a_row_for_each(self):
        documentation = (REPOSITORY / "docs" / "training.md").read_text()
        for name in data.datasets.names():
            row = next((line for line in documentation.splitlines() if line.startswith(f"| `{name}` |")), None)
            assert row, f"docs/training.md has no row of the data set {name}"
            for images, classes in (data.datasets.counts(name) or {}).values():
                assert f"{images:,}" in row
                assert f"{classes:,}" in row

    def test_settings_are_the_arguments_of_the_functions(self):
        functions = {"cub200": data.load_cub200, "folder": data.load_folder, "lists": data.load_lists}
        for name, function in functions.items():
            parameters = inspect.signature(function).parameters
            assert list(data.datasets.settings(name)) == [key for key in parameters if key != "root"]
        assert data.datasets.settings("lists")["train_list"] == ""
        assert data.datasets.settings("digits") == {}

    def test_a_custom_data_set(self, monkeypatch):
        monkeypatch.setattr(data.datasets, "_data_sets", dict(data.datasets._data_sets))

        @data.datasets.register("mine", {"train": (9, 3)}, preprocessing=lambda size: data.Preprocessing(size, size))
        def load_mine(classes=3):
            return classes

        assert "mine" in data.datasets.names()
        assert data.datasets.settings("mine") == {"classes": 3}
        assert data.datasets.counts("mine") == {"train": (9, 3)}
        assert data.datasets.preprocessing("mine", 7).output_shape == (7, 7, 3)
        assert data.datasets.load("mine", "root that it does not take", classes=4) == 4
        with pytest.raises(ValueError, match="'mine' is taken by load_mine"):
            data.datasets.register("mine")(load_mine)

    def test_preprocessing(self):
        assert data.datasets.preprocessing("digits", 99).output_shape == (8, 8, 1)
        assert data.datasets.preprocessing("omniglot", 28).output_shape == (28, 28, 1)
        assert data.datasets.preprocessing("sop", 28) is None

    @pytest.mark.parametrize("name", layouts.LAYOUTS)
    def test_files_and_shards(self, tmp_path, name):
        layouts.write(name, tmp_path / "files")
        split = data.datasets.load(name, str(tmp_path / "files"))
        assert split.train.kind == "paths"
        data.write_shards(split, str(tmp_path / "shards"))
        for source in ("auto", "shards"):
            read = data.datasets.load(name, str(tmp_path / "shards"), source=source)
            assert read.train.kind == "slices"
            assert read.counts() == split.counts()
        with pytest.raises(FileNotFoundError, match="root"):
            data.datasets.load(name, str(tmp_path / "shards"), source="files")

    def test_errors(self, tmp_path):
        for name, settings, words in [
            ("mnist", {}, "name: expected one of"),
            ("sop", {"source": "zip"}, "source: expected one of"),
            ("sop", {"source": "tfds", "on_corrupt": "ignore"}, "on_corrupt"),
            ("sop", {"test_root": "x"}, r"data set 'sop': expected settings from .* Received: \['test_root'\]"),
            ("inshop", {"source": "tfds"}, "source: expected 'auto', 'files' or 'shards' for 'inshop'"),
            ("folder", {"source": "tfds"}, "source: expected 'auto', 'files' or 'shards' for 'folder'"),
        ]:
            with pytest.raises(ValueError, match=words):
                data.datasets.load(name, str(tmp_path), **settings)

    def test_shards_of_folders_are_already_split(self, tmp_path):
        for name in "abcd":
            layouts.write_image(tmp_path / "images" / name / "0.png")
        split = data.load_folder(str(tmp_path / "images"), test_classes="a, b")
        assert split.test.class_names == ("a", "b")
        data.write_shards(split, str(tmp_path / "shards"), name="folder")
        assert data.load_folder(str(tmp_path / "shards")).test.class_names == ("a", "b")
        with pytest.raises(ValueError, match=r"test_classes, .* expected none for shards, .* Received: '', 'c', 0.5"):
            data.load_folder(str(tmp_path / "shards"), test_classes="c")
        with pytest.raises(ValueError, match=r"test_fraction: expected none for shards, .* Received: '', '', 0.2"):
            data.load_folder(str(tmp_path / "shards"), test_fraction=0.2)

    def test_the_program(self, tmp_path, run_python):
        layouts.write_cub200(tmp_path / "birds")
        program = ("-m", "s2sd_tf.cli.shards")
        done = run_python(*program, "--name=cub200", f"--root={tmp_path / 'birds'}", f"--output={tmp_path / 'out'}")
        assert [line.split() for line in done.stdout.splitlines()[:3]] == [
            ["part", "images", "classes", "shards"],
            ["train", "12", "4", "1"],
            ["test", "12", "4", "1"],
        ]
        assert data.load_cub200(str(tmp_path / "out")).counts() == {"train": (12, 4), "test": (12, 4)}
        images = tmp_path / "birds" / "CUB_200_2011" / "images"
        (images / "001.Auk_0" / "empty.jpg").write_bytes(b"")
        run_python(*program, "--name=folder", f"--root={images}", f"--output={tmp_path / 'more'}", "--on_corrupt=skip")
        assert data.read_shards(str(tmp_path / "more")).counts() == {"train": (12, 4), "test": (12, 4)}
        refused = run_python(*program, "--name=digits", "--root=.", f"--output={tmp_path / 'no'}", check=False)
        assert "--name: expected one of ['cars196', 'cub200', " in refused.stderr
