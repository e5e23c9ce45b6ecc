"""What data.py promises: exact arrays, errors of one line, a downloader that always ends, files and folders kept whole.

The checksums of decoded arrays were computed by a second program that shares no code with data.py:
struct and plain loops over the bytes. Tests on real files skip where ../shared/data is absent.
"""

import contextlib
import gzip
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data sets in {REAL}")


def sha256(*arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def md5(content):
    return "md5:" + hashlib.md5(content).hexdigest()


# Real files, bit by bit

BYTES = {  # SHA-256 of x, y, x_test, y_test, one after the other
    "digits": "b67409842c637e7625d2f1f42b3b4809aba27efa038389910291cfa2f83a6b2d",
    "mnist": "06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16",
    "cifar10": "80aa5152c37692485b0242b2c368217363f7db062ab6307d9b5780d235ad3a65",
    "shakespeare": "72f8d5593c6435f246da809642303d57604332ed3a9f89c32fe50e3a43e1efb9",
}
SIZES = {"digits": (1437, 8, 8, 1, 10), "mnist": (60_000, 28, 28, 1, 10), "cifar10": (10_000, 32, 32, 3, 10),
         "shakespeare": (15_685, 64, 65)}  # fmt: skip


@pytest.mark.parametrize("name", ["digits", *(pytest.param(name, marks=real) for name in BYTES if name != "digits")])
def test_real_files_are_read_bit_exactly(name, capsys):
    dataset = data.DATASETS[name](REAL)
    assert sha256(*dataset[:4]) == BYTES[name]
    assert (*dataset.x.shape, dataset.classes) == SIZES[name]
    missing = "10000 of 50000 train and 1000 of 10000 test" if name == "cifar10" else ""  # of the files that are here
    assert missing in capsys.readouterr().err


def test_the_shipped_digits_are_sampled_exactly_so():
    digits, few = data.load("digits"), data.load("digits", samples=1024)
    assert sha256(few.x) == "08aad0feda3c61edb8cc4f9c8732973b17a1d1ae9689fc9af069b63cf0a46571"
    assert sha256(few.y) == "f7868027a1bb77525669c1e433382961ea387aadf421b4c550e85ec8dcf5faac"
    assert (digits.x.dtype, digits.y.dtype) == (np.float32, np.int32) and digits.x_test.shape == (360, 8, 8, 1)
    assert digits.x.min() == 0 and digits.x.max() == 1


def test_training_and_test_digits_are_the_whole_table_with_no_row_twice():
    rows = gzip.open(Path(data.__file__).parent / "datasets/digits.csv.gz", "rt").read().split()
    x, y, x_test, y_test, _ = data.load("digits")
    images, labels = np.concatenate([x, x_test]).reshape(-1, 64) * 16, np.concatenate([y, y_test])
    seen = Counter(",".join(map(str, [*i.astype(int), n])) for i, n in zip(images, labels))
    assert seen == Counter(rows)


@real
def test_real_photographs_are_cropped_and_scaled_bit_exactly_and_grey_ones_have_three_equal_channels():
    for part, expected in (
        ("train/n03000684", "4a34241ba4a635de60ba33ccd3a49e65564e5c0a0648652d6700db1032c66e69"),
        ("val/n03888257", "3a6103e281e3426f9c3bcd44f0426dccd600d0ec346f35aa91ff93054268a5a7"),
    ):
        paths = sorted((REAL / "imagenette2" / part).glob("*.JPEG"))[:3]
        assert sha256(np.stack([data.read_image(path, 32) for path in paths])) == expected
    grey = data.read_image(REAL / "imagenette2/train/n03000684/n03000684_11104.JPEG", 32)
    assert grey.shape == (32, 32, 3) and grey.std() > 10 and (grey == grey[..., :1]).all()


# Tiny files of every format, written here


def idx(array):
    dims = [0, 0, 8, array.ndim] + [byte for n in array.shape for byte in n.to_bytes(4, "big")]
    return bytes(dims) + array.astype(np.uint8).tobytes()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_mnist(folder, n=5):
    for part in ("train", "t10k"):
        images = np.arange(n * 784).reshape(n, 28, 28) % 251
        write(folder / f"mnist/{part}-images-idx3-ubyte.gz", gzip.compress(idx(images)))
        write(folder / f"mnist/{part}-labels-idx1-ubyte.gz", gzip.compress(idx(np.arange(n) % 3)))


def record(*labels, colour=(10, 20, 30)):
    planes = np.repeat(np.array(colour, np.uint8), 1024)
    planes[[0, 31, 1024]] = 1, 2, 3  # red at (0, 0) and (0, 31), green at (0, 0)
    return bytes(labels) + planes.tobytes()


def write_cifar10(folder):
    write(folder / "cifar-10-batches-bin/data_batch_1.bin", record(7) + record(2))
    write(folder / "cifar-10-batches-bin/data_batch_3.bin", record(9, colour=(40, 50, 60)))
    write(folder / "cifar-10-batches-bin/test_batch.bin", record(0))


def write_cifar100(folder):
    write(folder / "cifar-100-binary/train.bin", record(19, 99) + record(0, 42))
    write(folder / "cifar-100-binary/test.bin", record(3, 1))


def picture(pixels):
    """A lossless image file: Pillow goes by content, whatever the name."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, "png")
    return file.getvalue()


def write_imagenette(folder, name="imagenette2-160"):
    for label, wnid in enumerate(data.WNIDS):
        train, val = (folder / name / part / wnid for part in ("train", "val"))
        write(train / "b.JPEG", picture(np.full((4, 4, 3), 20 * label)))
        write(train / "a.JPEG", picture(np.full((4, 4, 3), 20 * label + 1)))
        write(val / "a.JPEG", picture(np.full((4, 4), 20 * label + 2)))


WRITE = {"mnist": write_mnist, "cifar10": write_cifar10, "cifar100": write_cifar100, "imagenette": write_imagenette}


def test_mnist_pixels_are_fractions_of_255_with_classes_taking_turns(tmp_path):
    write_mnist(tmp_path)
    x, y, x_test, y_test, classes = data.load("mnist", tmp_path)
    assert (x.dtype, y.dtype, x_test.dtype, y_test.dtype) == (np.float32, np.int32) * 2
    assert y.tolist() == [0, 1, 2, 0, 1] and y_test.tolist() == [0, 1, 2, 0, 1] and classes == 10
    pixels = (np.arange(5 * 784) % 251).reshape(5, 28, 28, 1)
    np.testing.assert_array_equal(x_test, (pixels / 255).astype(np.float32))


def test_what_a_browser_unpacked_is_read_under_either_name_and_files_of_macos_are_passed_over(tmp_path):
    write_mnist(tmp_path)
    packed = data.load("mnist", tmp_path)
    for k, file in enumerate(sorted((tmp_path / "mnist").iterdir())):
        content = gzip.decompress(file.read_bytes())
        file.unlink()
        (file if k % 2 else file.with_suffix("")).write_bytes(content)
    np.testing.assert_equal(data.load("mnist", tmp_path), packed)
    write_imagenette(tmp_path)
    whole = data.load("imagenette", tmp_path, image_size=2)
    write(tmp_path / f"imagenette2-160/train/{data.WNIDS[2]}/._a.JPEG", b"of macOS")
    np.testing.assert_equal(data.load("imagenette", tmp_path, image_size=2), whole)


def test_cifar_planes_become_channels_and_batches_that_are_there_follow_in_order(tmp_path):
    write_cifar10(tmp_path)
    x, y, x_test, y_test, classes = data.cifar10(tmp_path)
    assert y.tolist() == [7, 2, 9] and y_test.tolist() == [0] and classes == 10
    assert x.shape == (3, 32, 32, 3) and x[2, 5, 5].tolist() == [40, 50, 60]
    assert x[0, 0, 0].tolist() == [1, 3, 30] and x[0, 0, 31].tolist() == [2, 20, 30]


def test_cifar100_takes_the_fine_label(tmp_path):
    write_cifar100(tmp_path)
    x, y, x_test, y_test, classes = data.cifar100(tmp_path)
    assert y.tolist() == [99, 42] and y_test.tolist() == [1] and classes == 100
    assert x[1, 9, 9].tolist() == [10, 20, 30]


@pytest.mark.parametrize("name", ["imagenette2", "imagenette2-160", "imagenette2-320"])
def test_imagenette_labels_count_the_sorted_class_folders(tmp_path, name):
    write_imagenette(tmp_path, name)
    x, y, x_test, y_test, classes = data.imagenette(tmp_path, 2)
    assert list(data.WNIDS) == sorted(data.WNIDS) and classes == 10
    assert y.tolist() == sorted(2 * list(range(10))) and y_test.tolist() == list(range(10))
    assert x[:, 0, 0, 0].tolist() == [20 * label + i for label in range(10) for i in (1, 0)]
    assert x_test[3].tolist() == [[[62] * 3] * 2] * 2


def test_imagenette_is_filed_by_class_but_its_test_images_take_turns(tmp_path):
    write_imagenette(tmp_path)
    for wnid in data.WNIDS[:2]:
        write(tmp_path / "imagenette2-160/val" / wnid / "b.JPEG", picture(np.full((4, 4), 255)))
    _, _, x_test, y_test, _ = data.imagenette(tmp_path, 2)
    assert y_test.tolist() == [*range(10), 0, 1]
    assert x_test[:, 0, 0, 0].tolist() == [20 * label + 2 for label in range(10)] + [255, 255]


def test_an_image_is_cropped_to_its_centre_square_and_averaged(tmp_path):
    pixels = np.zeros((4, 10, 3))
    pixels[:, 3:5] = 100  # of columns 3 to 6, the centre, the left half
    write(tmp_path / "wide.JPEG", picture(pixels))
    write(tmp_path / "tall.JPEG", picture(pixels.swapaxes(0, 1)))
    wide = data.read_image(tmp_path / "wide.JPEG", 4)
    assert wide[..., 0].tolist() == [[100, 100, 0, 0]] * 4
    assert (data.read_image(tmp_path / "tall.JPEG", 4) == wide.swapaxes(0, 1)).all()
    # At size 1 column c weighs 1 − |c − 4.5|/4: columns 3 and 4 hold (5 + 7)/32 of the total.
    assert data.read_image(tmp_path / "wide.JPEG", 1).tolist() == [[[38, 38, 38]]]


# The cache of decoded images


def test_images_are_decoded_once_while_neither_they_nor_the_size_change(tmp_path, monkeypatch):
    write_imagenette(tmp_path)
    first, read_image = data.imagenette(tmp_path, 2), data.read_image
    cache = tmp_path / "imagenette2-160-2.npz"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imagenette2-160", cache.name]
    monkeypatch.setattr(data, "read_image", None)
    np.testing.assert_array_equal(data.imagenette(tmp_path, 2).x, first.x)
    with pytest.raises(TypeError):  # another size has to be decoded
        data.imagenette(tmp_path, 3)
    monkeypatch.setattr(data, "read_image", read_image)
    cache.replace(tmp_path / "imagenette2-160-3.npz")  # even where a cache has its name
    assert data.imagenette(tmp_path, 3).x.shape == (20, 3, 3, 3)
    data.imagenette(tmp_path, 2)
    changed = tmp_path / "imagenette2-160/train" / data.WNIDS[4] / "a.JPEG"
    changed.write_bytes(picture(np.full((4, 4, 3), 255)))
    assert data.imagenette(tmp_path, 2).x[8].min() == 255


@pytest.mark.parametrize("content", [b"", b"broken", "half", "pickle", "short"])
def test_a_broken_cache_is_made_anew(tmp_path, content):
    write_imagenette(tmp_path)
    first, cache = data.imagenette(tmp_path, 2), tmp_path / "imagenette2-160-2.npz"
    good = cache.read_bytes()
    if content == "pickle":
        np.savez(cache, key=np.array([None]), x=first.x)
    elif content == "short":
        with np.load(cache) as kept:
            key = kept["key"]
        np.savez(cache, key=key, x=first.x[:1])
    else:
        cache.write_bytes(good[: len(good) // 2] if content == "half" else content)
    np.testing.assert_array_equal(data.imagenette(tmp_path, 2).x, first.x)
    with np.load(cache) as kept:
        np.testing.assert_array_equal(kept["x"][:20], first.x)


def test_a_read_only_folder_is_read_and_left_as_it_is(tmp_path):
    write_imagenette(tmp_path)
    tmp_path.chmod(0o555)
    assert data.imagenette(tmp_path, 2).x.shape == (20, 2, 2, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["imagenette2-160"]
    tmp_path.chmod(0o755)


# Bad files


def fails_in_one_line(call, *mentions):
    with pytest.raises((ValueError, OSError)) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for text in mentions:
        assert str(text) in message, message


IMAGES, LABELS = "mnist/train-images-idx3-ubyte.gz", "mnist/t10k-labels-idx1-ubyte.gz"
ZEROS = np.zeros((5, 28, 28))
BATCH, COARSE = "cifar-10-batches-bin/data_batch_3.bin", "cifar-100-binary/train.bin"
PHOTO = f"imagenette2-160/train/{data.WNIDS[2]}/a.JPEG"
NOISE = np.random.RandomState(0).randint(0, 256, (32, 32, 3))


@pytest.mark.parametrize(
    "name, file, content, mention",
    [
        ("mnist", IMAGES, b"", "must be idx"),
        ("mnist", IMAGES, b"not gzip", "must be idx"),
        ("mnist", IMAGES, idx(ZEROS)[:-1], "by its header it must be 3936"),
        ("mnist", IMAGES, gzip.compress(idx(ZEROS))[:-9], "broken or cut short"),
        ("mnist", IMAGES, gzip.compress(idx(ZEROS))[:-8] + bytes(8), "broken or cut short"),
        ("mnist", IMAGES, gzip.compress(b"")[:10] + b"\xff" * 20, "broken or cut short"),
        ("mnist", IMAGES, gzip.compress(idx(ZEROS).replace(b"\x08", b"\x0d", 1)), "must be idx"),
        ("mnist", IMAGES, gzip.compress(idx(ZEROS)[:-1]), "by its header it must be 3936"),
        ("mnist", IMAGES, gzip.compress(idx(ZEROS) + b"0"), "by its header it must be 3936"),
        ("mnist", IMAGES, gzip.compress(idx(ZEROS)[:9]), "must be idx"),
        ("mnist", IMAGES, gzip.compress(idx(np.zeros(5))), "00000803"),
        ("mnist", IMAGES, gzip.compress(idx(np.zeros((5, 27, 28)))), "[5, 27, 28]"),
        ("mnist", IMAGES, gzip.compress(idx(np.zeros((0, 28, 28)))), "[0, 28, 28]"),
        ("mnist", LABELS, gzip.compress(idx(np.array([0, 1, 2, 3, 10]))), "must be 5 labels 0 "),
        ("mnist", LABELS, gzip.compress(idx(np.arange(4))), "4 labels 0 to 3, must be 5"),
        ("cifar10", BATCH, b"", "records of 3073 bytes"),
        ("cifar10", BATCH, record(1) + record(2)[:-1], "has 6145 bytes"),
        ("cifar10", BATCH, record(1) + record(10), "record 1 has label [10]"),
        ("cifar100", COARSE, b"", "records of 3074 bytes"),
        ("cifar100", COARSE, record(0, 0)[:99], "has 99 bytes"),
        ("cifar100", COARSE, record(0, 100), "has label [  0 100], must be below (20, 100)"),
        ("cifar100", COARSE, record(20, 0), "has label [20  0], must be below (20, 100)"),
        ("digits", "digits.csv.gz", b"", "must be 1797 rows"),
        ("digits", "digits.csv.gz", gzip.compress(b"1,2\n"), "must be 1797 rows"),
        ("digits", "digits.csv.gz", gzip.compress(b"no,number\n"), "must be 1797 rows"),
        ("digits", "digits.csv.gz", gzip.compress(b"9" * 30), "must be 1797 rows"),
        ("imagenette", PHOTO, b"", "not a whole image"),
        ("imagenette", PHOTO, b"text", "not a whole image"),
        ("imagenette", PHOTO, picture(NOISE)[:-1500], "not a whole image"),
        ("shakespeare", "tinyshakespeare/input.txt", b"", "wrong checksum"),
        ("shakespeare", "tinyshakespeare/input.txt", b"First Citizen:", "wrong checksum"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, name, file, content, mention):
    WRITE.get(name, lambda folder: None)(tmp_path)
    write(tmp_path / file, content)
    fails_in_one_line(lambda: data.load(name, tmp_path), tmp_path / file, mention)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "digits.csv.gz")
    fails_in_one_line(lambda: data.load("digits", tmp_path), tmp_path / "digits.csv.gz", "is not a file")


@pytest.mark.parametrize("column, value", [(3, 17), (63, -1), (64, 10)])
def test_a_digit_out_of_range_is_named_by_its_row(tmp_path, column, value):
    rows = np.zeros((1797, 65), int)
    rows[6, column] = value
    table = "".join(",".join(map(str, row)) + "\n" for row in rows)
    write(tmp_path / "digits.csv.gz", gzip.compress(table.encode()))
    fails_in_one_line(lambda: data.load("digits", tmp_path), tmp_path / "digits.csv.gz", "row 7 ")


@pytest.mark.parametrize(
    "name, gone, mention",
    [
        ("cifar10", "cifar-10-batches-bin/data_batch_*", "must hold training images"),
        ("cifar10", "cifar-10-batches-bin/test_batch.bin", "test_batch.bin"),
        ("imagenette", f"imagenette2-160/train/{data.WNIDS[3]}", data.WNIDS[3]),
        ("imagenette", f"imagenette2-160/train/{data.WNIDS[3]}/*", "must hold .JPEG files"),
        ("imagenette", "imagenette2-160/val", "imagenette2-160/val"),
    ],
)
def test_a_file_missing_from_a_data_set_is_one_line_that_names_it(tmp_path, name, gone, mention):
    WRITE[name](tmp_path)
    for path in tmp_path.glob(gone):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    fails_in_one_line(lambda: data.load(name, tmp_path), tmp_path, mention)


def test_an_unknown_class_folder_is_named(tmp_path):
    write_imagenette(tmp_path)
    (tmp_path / "imagenette2-160/train/n12345678").mkdir()
    fails_in_one_line(lambda: data.load("imagenette", tmp_path), "unknown: n12345678")


@pytest.mark.parametrize(
    "settings, mention",
    [
        (dict(name="digit"), "must be one of digits, mnist"),
        (dict(name="digits", samples=1438), "must be 1 to 1437 or 0 for all"),
        (dict(name="digits", samples=-1), "-1 samples"),
        (dict(name="digits", test_samples=361), "361 test samples, must be 1 to 360 or 0 for all"),
        (dict(name="digits", test_samples=-1), "-1 test samples"),
        (dict(name="imagenette", image_size=0), "must be 1 or more"),
        (dict(name="digits", folder="no/such/folder"), "no/such/folder: there is no such folder"),
        (dict(name="pydocs", standardize=True), "pydocs: text cannot be standardized"),
    ],
)
def test_a_wrong_argument_is_one_line_that_says_what_is_allowed(settings, mention):
    fails_in_one_line(lambda: data.load(**settings), mention)


# Samples, standardization, text


def test_any_number_of_samples_is_balanced_and_starts_the_larger_ones():
    whole = data.load("digits")
    for samples in (1, 10, 64, 1024):
        np.random.seed(samples)  # on which nothing depends
        few = data.load("digits", samples=samples)
        counts = np.bincount(few.y, minlength=10)
        assert len(few.x) == samples and counts.max() - counts.min() <= 1
        np.testing.assert_array_equal(few.x, whole.x[:samples])
        np.testing.assert_array_equal(few.x_test, whole.x_test)


def test_the_first_test_samples_are_those_of_the_whole_test_part_whatever_is_trained_on():
    whole, few = data.load("digits"), data.load("digits", samples=3, test_samples=50)
    assert len(few.x) == 3 and len(few.x_test) == 50
    np.testing.assert_array_equal(few.x_test, whole.x_test[:50])
    np.testing.assert_array_equal(few.y_test, whole.y_test[:50])


def test_a_class_that_runs_out_leaves_its_place_to_the_others():
    y = np.array([2, 0, 0, 1, 0, 0, 2])
    assert y[data.balanced_order(y)].tolist() == [0, 1, 2, 0, 2, 0, 0]
    assert data.balanced_order(y).tolist() == [1, 3, 0, 2, 6, 4, 5]


def test_standardized_training_channels_have_mean_0_and_deviation_1_and_test_follows(tmp_path):
    batch = np.random.RandomState(0).randint(0, 256, (40, 3073)).astype(np.uint8)
    batch[:, 0] %= 10
    batch[:, 2049:] = 77  # blue is constant
    write_cifar10(tmp_path)
    write(tmp_path / "cifar-10-batches-bin/data_batch_1.bin", batch.tobytes())
    write(tmp_path / "cifar-10-batches-bin/data_batch_3.bin", batch[:1].tobytes())
    plain = data.load("cifar10", tmp_path, samples=20)
    scaled = data.load("cifar10", tmp_path, samples=20, standardize=True)
    assert scaled.x.dtype == scaled.x_test.dtype == np.float32
    np.testing.assert_allclose(scaled.x.mean((0, 1, 2), np.float64), [0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(scaled.x.std((0, 1, 2), np.float64), [1, 1, 0], atol=1e-6)
    mean, std = plain.x.mean((0, 1, 2), np.float64), plain.x.std((0, 1, 2), np.float64)
    std[2] = 1
    np.testing.assert_allclose(scaled.x_test, (plain.x_test - mean) / std, atol=1e-6)


def test_text_is_cut_into_blocks_of_64_with_the_next_character_as_target():
    x, y, x_test, y_test, classes = data.load("pydocs", samples=3)
    from pydoc_data.topics import topics

    text = "".join(topics[key] for key in sorted(topics))
    alphabet = sorted(set(text))
    decode = lambda codes: "".join(alphabet[code] for code in codes.ravel())
    assert classes == len(alphabet) and x.shape == y.shape == (3, 64)
    assert decode(x) == text[:192] and decode(y) == text[1:193]
    rest = text[len(text) * 9 // 10 :]
    assert decode(x_test) == rest[: x_test.size] and decode(y_test) == rest[1 : x_test.size + 1]
    assert len(rest) - 65 < x_test.size < len(rest)


def test_training_text_ends_before_the_test_text_begins():
    text = data.read_text("a" * 900 + "b" * 100)
    assert set(text.x.ravel()) == set(text.y.ravel()) == {0}
    assert set(text.x_test.ravel()) == set(text.y_test.ravel()) == {1}


# Folders with one owner, files that are whole


def test_a_folder_has_one_owner_at_a_time(tmp_path):
    folder = tmp_path / "made" / "here"
    for _ in range(2):  # usable again afterwards
        with data.owned(folder), pytest.raises(ValueError) as refused, data.owned(folder):
            pass
        assert str(refused.value) == f"{folder}: another process is at work there"


def test_a_folder_of_another_process_is_refused_until_that_is_dead_however_it_ended(tmp_path):
    code = "import data, pathlib, sys\nwith data.owned(pathlib.Path(sys.argv[1])): print('mine', flush=True), input()"
    owner = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=Path(data.__file__).parent,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    with owner:
        assert owner.stdout.readline() == b"mine\n"
        with pytest.raises(ValueError, match="another process"), data.owned(tmp_path):
            pass
        owner.kill()
    with data.owned(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_whole_or_stays_what_it_was(tmp_path):
    file = tmp_path / "file"

    def break_off(stream):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    for before in [], [file]:
        fails_in_one_line(lambda: data.write(file, break_off), file, "No space left on device", "is kept")
        assert list(tmp_path.iterdir()) == before and (not before or file.read_bytes() == b"old")
        data.write(file, lambda stream: stream.write(b"old"))
    data.write(file, lambda stream: stream.write(b"new"))
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == b"new"
    absent = tmp_path / "absent" / "file"
    fails_in_one_line(lambda: data.write(absent, break_off), absent, "No such")


def test_an_error_inside_an_owned_folder_stays_what_it_is(tmp_path):
    with pytest.raises(BlockingIOError, match="of the body"), data.owned(tmp_path):
        raise BlockingIOError(11, "of the body")
    with data.owned(tmp_path):  # and the lock is gone
        pass


def test_a_write_that_fails_in_another_way_leaves_no_temporary_file_and_says_what_it_was(tmp_path):
    with pytest.raises(ZeroDivisionError):
        data.write(tmp_path / "file", lambda stream: 1 / 0)

    def short(stream):  # as numpy reports it, without a number
        raise OSError("10 requested and 3 written")

    fails_in_one_line(lambda: data.write(tmp_path / "file", short), tmp_path / "file", "10 requested and 3 written")
    assert list(tmp_path.iterdir()) == []


# The downloader, against a server of our own


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        if server.status == "garbage":
            return self.wfile.write(b"this is\r\nno HTTP\r\n")
        if server.status:
            return self.send_error(server.status)
        self.send_response(200)
        if not server.endless:
            self.send_header("Content-Length", len(server.body))
        self.end_headers()
        server.asked += 1
        self.wfile.write(server.body[:100])
        if server.stalls:
            server.released.wait(20)
        self.wfile.write(server.body[100 : server.cuts.pop(0) if server.cuts else None])
        with contextlib.suppress(OSError):  # which ends these when the reader has gone
            while server.endless == "fast":
                self.wfile.write(server.body)
            while server.endless == "slow" and not server.released.wait(0.1):
                self.wfile.write(b"0")

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    """serve(body): a server of that body; cuts: how many bytes go out before each break."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    servers = []

    def start(body, cuts=(), status=0, stalls=False, endless=""):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.body, server.cuts, server.status = body, list(cuts), status
        server.stalls, server.endless, server.released = stalls, endless, threading.Event()
        server.asked = 0
        server.url = f"http://127.0.0.1:{server.server_address[1]}/"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.released.set()
        server.shutdown()
        server.server_close()


BODY = bytes(range(256)) * 40


def fetch(folder, *urls, checksum=md5(BODY), name="sub/file.bin", timeout=0.3):
    return data.fetch(folder, name, {name: (checksum, *urls)}, timeout)


def left_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_missing_file_is_downloaded_whole_and_then_left_alone(tmp_path, serve, capsys):
    server = serve(BODY)
    for _ in range(2):
        assert fetch(tmp_path, server.url).read_bytes() == BODY
    assert server.asked == 1 and left_in(tmp_path) == ["file.bin"]
    assert f"downloading {server.url}file.bin" in capsys.readouterr().err


def test_a_second_call_tries_again(tmp_path, serve):
    server = serve(BODY, cuts=[3000])
    fails_in_one_line(lambda: fetch(tmp_path, server.url), "ended after 3000 of 10240 bytes")
    assert left_in(tmp_path) == []
    assert fetch(tmp_path, server.url).read_bytes() == BODY and left_in(tmp_path) == ["file.bin"]


def test_two_processes_that_fetch_one_file_leave_it_whole(tmp_path, serve):
    archive = tar(*CIFAR100)
    slow, fast = serve(archive, stalls=True), serve(archive)
    given = dict(checksum=md5(archive), name="cifar-100-binary", timeout=9)
    get = lambda server: fetch(tmp_path, f"{server.url}x.tgz", **given)
    with ThreadPoolExecutor(1) as other:
        first = other.submit(get, slow)
        while not slow.asked:
            time.sleep(0.01)
        second = get(fast)
        slow.released.set()
        assert first.result() == second and left_in(tmp_path) == ["test.bin", "train.bin"]
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-100-binary"]


def test_a_wrong_checksum_deletes_the_download_and_says_so(tmp_path, serve):
    server = serve(BODY[:-1] + b"?")
    mentions = "wrong checksum", server.url + "file.bin", tmp_path / "sub/file.bin"
    fails_in_one_line(lambda: fetch(tmp_path, server.url), *mentions)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    "behaviour, mention",
    [
        (dict(status=404), "HTTP Error 404"),
        (dict(status=500), "HTTP Error 500"),
        (dict(status="garbage"), "this is"),
        (dict(cuts=[100]), "ended after 100 of 10240 bytes"),
        (dict(stalls=True), "timed out"),
        (dict(endless="slow"), "gave up after"),
        (dict(endless="fast"), "gave up after"),
    ],
    ids=["missing", "failing", "garbage", "cut short", "stalled", "dripping", "endless"],
)
def test_a_bad_server_ends_in_one_line_with_what_to_do_by_hand(tmp_path, serve, monkeypatch, behaviour, mention):
    monkeypatch.setattr(data, "LARGEST", 1e6)
    url, path = serve(BODY, **behaviour).url, tmp_path / "sub/file.bin"
    todo = f"fetch {url}file.bin and save it as {path}"
    fails_in_one_line(lambda: fetch(tmp_path, url), f"{path}: missing", mention, todo)
    assert not path.exists()


def test_no_network_ends_in_one_line_and_makes_no_folder(tmp_path, serve, monkeypatch):
    server = serve(BODY)
    server.shutdown()
    server.server_close()  # nobody listens on its port any more
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.SOURCES, "cifar-100-binary", (md5(BODY), server.url + "c.tar.gz"))
    todo = f"fetch {server.url}c.tar.gz and unpack it in datasets"
    fails_in_one_line(lambda: data.load("cifar100"), "datasets/cifar-100-binary", "refused", todo)
    assert list(tmp_path.iterdir()) == []


def test_the_second_source_is_used_when_the_first_fails(tmp_path, serve):
    bad, gone, good = serve(b"other"), serve(BODY, status=404), serve(BODY)
    assert fetch(tmp_path, bad.url, gone.url, good.url).read_bytes() == BODY
    assert (bad.asked, gone.asked, good.asked) == (1, 0, 1)


def test_a_gz_file_is_checked_by_its_content_and_stays_packed(tmp_path, serve):
    packed = gzip.compress(BODY, mtime=7)
    path = fetch(tmp_path, serve(packed).url, name="mnist/a-ubyte.gz")
    assert path.read_bytes() == packed
    path.unlink()
    cut = serve(packed[:-5])
    fails_in_one_line(lambda: fetch(tmp_path, cut.url, name="mnist/a-ubyte.gz"), "cut short")
    assert left_in(tmp_path) == []


def test_progress_is_one_updating_line_on_a_terminal_and_quiet_elsewhere(tmp_path, serve, monkeypatch, capsys):
    fetch(tmp_path, serve(BODY).url, name="a")
    assert "\r" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fetch(tmp_path, serve(BODY * 90).url, checksum=md5(BODY * 90), name="b")
    assert "\r  0.9 of 0.9 MB" in capsys.readouterr().err


def tar(*members):
    """A .tar.gz of (name, content) files; a link is (name, type, target)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, *rest in members:
            member = tarfile.TarInfo(name)
            if len(rest) == 2:
                member.type, member.linkname = rest
                archive.addfile(member)
            else:
                member.size = len(rest[0])
                archive.addfile(member, io.BytesIO(rest[0]))
    return file.getvalue()


TRAIN, TEST = record(19, 99) + record(0, 42), record(3, 1)
CIFAR100 = [("cifar-100-binary/train.bin", TRAIN), ("cifar-100-binary/test.bin", TEST)]


def test_load_downloads_and_unpacks_an_archive_into_the_default_folder(tmp_path, serve, monkeypatch):
    archive = tar(*CIFAR100)
    url = serve(archive).url + "cifar-100-binary.tar.gz"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.SOURCES, "cifar-100-binary", (md5(archive), url))
    assert data.load("cifar100").y.tolist() == [42, 99]
    assert left_in(tmp_path) == ["test.bin", "train.bin"]
    assert [p.name for p in (tmp_path / "datasets").iterdir()] == ["cifar-100-binary"]


@pytest.mark.parametrize(
    "member, mention",
    [
        (("../evil", b"!"), "outside"),
        (("cifar-100-binary/../../../evil", b"!"), "outside"),
        (("evil", tarfile.SYMTYPE, "../../evil"), "outside"),
        (("evil", tarfile.LNKTYPE, "../../evil"), "outside"),
        (("evil", tarfile.FIFOTYPE, ""), "special file"),
    ],
    ids=["parent", "nested parent", "symbolic link", "hard link", "device"],
)
def test_an_archive_that_reaches_out_of_its_folder_leaves_nothing(tmp_path, serve, member, mention):
    folder, archive = tmp_path / "datasets", tar(*CIFAR100, member)
    url = serve(archive).url + "x.tgz"
    call = lambda: fetch(folder, url, checksum=md5(archive), name="cifar-100-binary")
    fails_in_one_line(call, folder / "cifar-100-binary", mention)
    assert list(tmp_path.iterdir()) == [folder] and list(folder.iterdir()) == []


def test_an_absolute_name_in_an_archive_does_not_reach_its_place(tmp_path, serve):
    evil, folder = tmp_path / "evil", tmp_path / "datasets"
    archive = tar(*CIFAR100, (str(evil), b"!"))
    url = serve(archive).url + "x.tgz"
    fetch(folder, url, checksum=md5(archive), name="cifar-100-binary")
    assert list(tmp_path.iterdir()) == [folder]
    assert left_in(folder) == ["test.bin", "train.bin"]


def test_an_archive_that_is_none_is_one_line(tmp_path, serve):
    url = serve(BODY).url + "x.tgz"
    fails_in_one_line(lambda: fetch(tmp_path, url, name="some-folder"), "some-folder: missing", "not a gzip file")
    assert left_in(tmp_path) == []


# The file as a whole


def test_every_source_has_a_checksum_and_an_https_address():
    for checksum, *urls in data.SOURCES.values():
        assert re.fullmatch("md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", checksum)
        assert urls and all(url.startswith("https://") for url in urls)
