"""Data specs: equal to independent readings of the same files, exact in every batch size, and clear when wrong."""

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pcq.data import Data, from_arrays, open_data
from pcq.data import sets as small_sets
from pcq.data.folder import find_images
from pcq.data.inputs import refusing, tensor
from pcq.errors import CheckFailed, PcqError
from pcq.torchvision_compat import import_torchvision


def everything(data: Data) -> tuple[torch.Tensor, torch.Tensor | None]:
    return next(data.batches(data.n))


def picture(path: Path, width: int = 40, height: int = 30, seed: int = 0, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def numbered(n: int, labelled: bool = True) -> Data:
    x = torch.arange(n, dtype=torch.float32)[:, None]
    return from_arrays("numbered", "test", x, torch.arange(n) if labelled else None)


@given(n=st.integers(1, 50), batch=st.integers(1, 60), limit=st.none() | st.integers(1, 60))
@settings(deadline=None, max_examples=60)
def test_batches_cover_each_sample_once_whatever_their_size(n: int, batch: int, limit: int | None) -> None:
    found = list(numbered(n).batches(batch, limit))
    x, y = (torch.cat([pair[i] for pair in found]) for i in (0, 1))  # type: ignore[misc]
    assert torch.equal(x[:, 0].long(), y)
    assert all(len(part) == batch for part, _ in found[:-1])
    assert len(y) == min(n, limit or n)
    gaps = y.diff()
    assert y[0] == 0
    assert not len(gaps) or (int(gaps.min()) >= 1 and int(gaps.max()) - int(gaps.min()) <= 1), "evenly spaced"


def test_a_training_loop_gives_its_own_order_and_augmentation() -> None:
    order = torch.tensor([3, 1, 1])
    ((x, y),) = numbered(4).batches(8, order=order, augment=lambda x: -x)
    assert torch.equal(x[:, 0], torch.tensor([-3.0, -1.0, -1.0]))
    assert y is not None
    assert torch.equal(y, order)


@pytest.mark.parametrize(("batch", "limit"), [(0, None), (-1, None), (1, 0), (1, -5)])
def test_batches_refuse_what_cannot_be(batch: int, limit: int | None) -> None:
    with pytest.raises(PcqError, match="Allowed"):
        list(numbered(3).batches(batch, limit))


def test_digits_are_what_the_demo_network_was_trained_on() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy((bunch.images * (255 / 16)).round()).float()[:, None]
    order = np.random.RandomState(0).permutation(len(images))
    x, y = (images[order] / 255 - 0.3053) / 0.3760, torch.from_numpy(bunch.target[order])
    held = torch.randperm(1397, generator=torch.Generator().manual_seed(0))
    for split, chosen in (("train", held[:-200]), ("val", held[-200:]), ("test", torch.arange(1397, 1797))):
        got_x, got_y = everything(open_data("digits", split))
        assert got_x.dtype == torch.float32
        assert torch.allclose(got_x, x[chosen], rtol=0, atol=2e-7), split
        assert got_y is not None
        assert torch.equal(got_y, y[chosen]), split
    assert open_data("digits").describe() == "digits, test: 400 samples of 1x8x8, 10 classes"


def idx_files(folder: Path, zipped: bool) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    random, arrays = np.random.default_rng(0), {}
    for stem, n in (("train", 5003), ("t10k", 20)):
        for kind, shape, magic in (("images-idx3", (n, 28, 28), 2051), ("labels-idx1", (n,), 2049)):
            array = random.integers(0, 10 if len(shape) == 1 else 256, shape).astype(np.uint8)
            raw = np.array([magic, *shape], ">i4").tobytes() + array.tobytes()
            name = f"{stem}-{kind}-ubyte" + (".gz" if zipped else "")
            (folder / name).write_bytes(gzip.compress(raw, 1) if zipped else raw)
            arrays[f"{stem}-{kind}"] = array
    return arrays


@pytest.mark.parametrize(("inside", "zipped"), [("", True), ("FashionMNIST/raw", False)])
def test_fashion_mnist_reads_idx_files(tmp_path: Path, inside: str, zipped: bool) -> None:
    arrays = idx_files(tmp_path / "d" / inside, zipped)
    order = torch.randperm(5003, generator=torch.Generator().manual_seed(0)).numpy()
    for split, stem, chosen in (
        ("test", "t10k", np.arange(20)),
        ("train", "train", order[:3]),
        ("val", "train", order[3:]),
    ):
        data = open_data(f"fashion-mnist:{tmp_path / 'd'}", split)
        x, y = everything(data)
        images = torch.from_numpy(arrays[f"{stem}-images-idx3"][chosen])[:, None]
        assert data.shape == (1, 28, 28)
        assert torch.equal(x, (images.float() / 255 - torch.tensor(0.2860)) / torch.tensor(0.3530))
        assert y is not None
        assert torch.equal(y, torch.from_numpy(arrays[f"{stem}-labels-idx1"][chosen]).long())


def test_fashion_mnist_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(PcqError, match=r"not there.*apt install dataset-fashion-mnist.*download=True"):
        open_data(f"fashion-mnist:{tmp_path}")
    idx_files(tmp_path / "d", True)
    file = tmp_path / "d" / "t10k-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    for broken in (whole[:-100], b"no gzip at all", gzip.compress(gzip.decompress(whole)[:-1])):
        file.write_bytes(broken)
        with pytest.raises(CheckFailed, match="t10k-images-idx3-ubyte"):
            open_data(f"fashion-mnist:{tmp_path / 'd'}")


def cifar_folders(root: Path) -> None:
    for split, count in (("train", 2), ("test", 1)):
        for label, name in enumerate(small_sets.CLASSES["cifar10"]):
            for i in range(count):
                picture(root / split / name / f"{i:04}.png", 32, 32, seed=label * 10 + i)


def test_cifar10_folders_and_batches_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(small_sets.HELD_OUT, "cifar10", 7)
    cifar_folders(tmp_path / "images")
    folder = tmp_path / "batches" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        found = find_images(tmp_path / "images" / split)
        rows = np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1).reshape(-1) for path in found.files])
        names = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
        for name, part, labels in zip(
            names, np.split(rows, len(names)), np.split(np.array(found.labels), len(names)), strict=True
        ):
            (folder / name).write_bytes(pickle.dumps({"data": part, "labels": labels.tolist()}, protocol=4))
    for split, n in (("train", 13), ("val", 7), ("test", 10)):
        one, other = (open_data(f"cifar10:{tmp_path / kind}", split) for kind in ("images", "batches"))
        assert one.n == other.n == n
        for a, b in zip(everything(one), everything(other), strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)
    held = torch.randperm(20, generator=torch.Generator().manual_seed(0))[-7:]
    assert torch.equal(open_data(f"cifar10:{tmp_path / 'images'}", "val").labels, held // 2)  # type: ignore[arg-type]


def test_cifar10_batches_execute_nothing(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "test_batch").write_bytes(pickle.dumps({"data": Hostile(), "labels": [0]}))
    with pytest.raises(CheckFailed, match="not a batch of CIFAR-10"):
        open_data(f"cifar10:{tmp_path}")
    assert not (tmp_path / "executed").exists()


def test_cifar10_refuses_other_folders(tmp_path: Path) -> None:
    with pytest.raises(PcqError, match="not there"):
        open_data(f"cifar10:{tmp_path}")
    cifar_folders(tmp_path)
    with pytest.raises(PcqError, match="20 training images are too few"):
        open_data(f"cifar10:{tmp_path}", "train")
    picture(tmp_path / "test" / "airplane" / "0000.png", 33, 32)
    with pytest.raises(PcqError, match=r"airplane.0000.png: the image is not 32x32"):
        open_data(f"cifar10:{tmp_path}")
    picture(tmp_path / "test" / "ant" / "0.png", 32, 32)
    with pytest.raises(PcqError, match="Allowed: CIFAR-10's ten"):
        open_data(f"cifar10:{tmp_path}")


@given(
    width=st.integers(20, 90),
    height=st.integers(20, 90),
    size=st.integers(8, 20),
    more=st.integers(0, 20),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    mode=st.sampled_from(["RGB", "L", "P"]),
)
@settings(deadline=None, max_examples=40)
def test_preprocessing_is_torchvisions(
    tmp_path_factory: pytest.TempPathFactory,
    width: int,
    height: int,
    size: int,
    more: int,
    interpolation: str,
    mode: str,
) -> None:
    import_torchvision()
    from torchvision import transforms

    root = tmp_path_factory.mktemp("images")
    picture(root / "a.png", width, height, seed=width, mode=mode)
    x, y = everything(open_data(f"folder:{root}?size={size}&resize={size + more}&interpolation={interpolation}"))
    expected = transforms.Compose(
        [
            transforms.Resize(size + more, transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )(Image.open(root / "a.png").convert("RGB"))
    assert y is None
    assert torch.equal(x[0], expected)


def test_folder_order_and_labels_are_imagefolders(tmp_path: Path) -> None:
    import_torchvision()
    from torchvision.datasets import ImageFolder

    names = ["b/2.png", "b/10.JPG", "a/deep/er/x.png", "a/z.jpeg", "10/x.png", "9/x.webp", "9/notes.txt"]
    for i, name in enumerate(names):
        if name.endswith("txt"):
            (tmp_path / name).write_text("no image")
        else:
            picture(tmp_path / name, seed=i)
    theirs = ImageFolder(str(tmp_path))
    ours = find_images(tmp_path)
    assert [(str(path), label) for path, label in zip(ours.files, ours.labels, strict=True)] == theirs.samples
    assert list(ours.classes) == theirs.classes


def test_folder_notes_numbers_in_alphabetical_order(tmp_path: Path) -> None:
    for name in ("1", "2", "10"):
        picture(tmp_path / name / "x.png")
    data = open_data(f"folder:{tmp_path}?size=8")
    assert data.classes == ("1", "10", "2")
    assert "alphabetical order (10 before 2)" in data.describe()
    (tmp_path / "order.txt").write_text("1\n2\n3\n10\n")
    listed = open_data(f"folder:{tmp_path}?size=8&classes={tmp_path / 'order.txt'}")
    assert listed.labels is not None
    assert (listed.labels.tolist(), listed.classes) == ([0, 1, 3], ("1", "2", "3", "10"))
    assert "alphabetical" not in listed.describe()


def test_folder_reads_the_list_of_classes_as_it_is(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "x.png")
    spec = f"folder:{tmp_path}?size=8&classes={tmp_path / 'list.txt'}"
    (tmp_path / "list.txt").write_text("a\nb\n", "utf-8-sig")
    assert open_data(spec).classes == ("a", "b")
    (tmp_path / "list.txt").write_text("a\nb\na\nc\n")
    with pytest.raises(PcqError, match=r"list\.txt: it names a more than once\. Allowed: each class once"):
        open_data(spec)
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(PcqError, match="it names no class"):
        open_data(spec)


def test_folder_picks_its_split(tmp_path: Path) -> None:
    for split in ("train", "val"):
        picture(tmp_path / split / "cat" / f"{split}.png")
        picture(tmp_path / split / "dog" / f"{split}.png")
    assert "val" in open_data(f"folder:{tmp_path}?size=8", "test").name
    assert "train" in open_data(f"folder:{tmp_path}?size=8", "train").name
    picture(tmp_path / "flat" / "0.png")
    for shadow in (tmp_path / "flat" / "._0.png", tmp_path / "val" / "cat" / "._0.png"):  # as macOS leaves them
        shadow.write_bytes(b"\0\5\x16\7")
    assert open_data(f"folder:{tmp_path}?size=8", "test").n == 2
    flat = open_data(f"folder:{tmp_path / 'flat'}?size=8&mean=0.5&std=0.5", "train")
    assert (flat.n, flat.labels, flat.shape) == (1, None, (1, 8, 8))
    assert "no labels" in flat.describe()
    assert "The folder has no train/: this is all of it" in flat.describe()
    picture(tmp_path / "only" / "train" / "a" / "0.png")
    with pytest.raises(PcqError, match="it has train/ but no test/"):
        open_data(f"folder:{tmp_path / 'only'}")


def test_folder_names_the_broken_image(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "b.jpg", seed=1)
    file = tmp_path / "b.jpg"
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"not an image"):
        file.write_bytes(broken)
        with pytest.raises(PcqError, match=r"b\.jpg: the image cannot be decoded"):
            everything(open_data(f"folder:{tmp_path}?size=8"))


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_folder_scales_16_bits_to_8(tmp_path: Path, ending: str) -> None:
    bytes_ = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    wide = bytes_.astype(np.uint16) * 257
    if ending == "pgm":
        (tmp_path / "a.pgm").write_bytes(b"P5 8 8 65535\n" + wide.astype(">u2").tobytes())
    else:
        Image.fromarray(wide).save(tmp_path / f"a.{ending}")
    x, _ = everything(open_data(f"folder:{tmp_path}?size=8&resize=0&mean=0&std=1"))
    assert torch.equal(x[0, 0], torch.from_numpy(bytes_).float() / 255)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_folder_refuses_numbers_without_a_white(tmp_path: Path, kind: type) -> None:
    Image.fromarray(np.full((8, 8), 300, kind)).save(tmp_path / "a.tif")
    with pytest.raises(PcqError, match=r"a\.tif: the image's values are .*Allowed: images of 8 or 16 bits"):
        everything(open_data(f"folder:{tmp_path}?size=8"))


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("siz=8", "no option 'siz'.*Did you mean 'size'"),
        ("size=0", "size: the option is out of range"),
        ("size=8.5", "size"),
        ("size=abc", "size: the option is out of range. Allowed: a whole number from 1 to 4096"),
        ("size=True", "size: the option is out of range"),
        ("size=", "size: the option is out of range"),
        ("size=99999999", "1 to 4096"),
        ("size=30&resize=20", "resize.*0, or 30 to 8192"),
        ("size=30&resize=abc", "resize.*0, or 30 to 8192"),
        ("size=30&resize=99999999", "resize.*0, or 30 to 8192"),
        ("size=8&mean=abc", r"mean: 'abc' is not a number\. Allowed: a number, or one for each channel"),
        ("size=8&mean=", "mean: '' is not a number"),
        ("size=8&mean=0.5,abc,0.2", "mean: '0.5,abc,0.2' is not a number"),
        ("size=8&mean=true", "mean: True is not a number"),
        ("size=8&mean=True", "mean: True is not a number"),
        ("size=8&mean=()", r"mean: \(\) is not a number"),
        ("size=8&std=none", "std: 'none' is not a positive number"),
        ("size=8&classes=5", "5: the list of classes cannot be read"),
        ("size=8&classes=0", "0: the list of classes cannot be read"),
        ("size=8&interpolation=[1]", "bilinear or bicubic"),
        ("size=8&std=1,0,1", "std.*positive"),
        ("size=8&mean=1,2", "mean and std"),
        ("size=8&interpolation=best", "bilinear or bicubic"),
        ("size=8&classes=/nowhere", "list of classes cannot be read"),
        ("size=64&resize=0", "smaller than 64"),
        ("size", "not an option"),
        ("size=8&size=9", "given twice"),
    ],
)
def test_folder_options_that_are_wrong(tmp_path: Path, query: str, told: str) -> None:
    picture(tmp_path / "a" / "0.png")
    with pytest.raises(PcqError, match=told):
        everything(open_data(f"folder:{tmp_path}?{query}"))


def test_folder_that_is_not_one(tmp_path: Path) -> None:
    with pytest.raises(PcqError, match="no such folder"):
        open_data(f"folder:{tmp_path / 'no'}")
    with pytest.raises(PcqError, match="there is no image in it"):
        open_data(f"folder:{tmp_path}")
    picture(tmp_path / "cat" / "0.png")
    (tmp_path / "dog").mkdir()
    (tmp_path / ".cache").mkdir()
    with pytest.raises(PcqError, match=r"no image is in dog\."):
        open_data(f"folder:{tmp_path}")


NPZ_NAMES = [
    ("x", "y"),
    ("images", "labels"),
    ("x_test", "y_test"),
    ("images", "y"),
    ("x", "labels"),
    ("data_test", "y_test"),
]


@pytest.mark.parametrize("names", NPZ_NAMES)
def test_npz_round_trip(tmp_path: Path, names: tuple[str, str]) -> None:
    x, y = np.random.default_rng(0).normal(size=(5, 3, 4, 4)), np.array([0, 1, 2, 3, 1])
    np.savez(tmp_path / "d.npz", **{names[0]: x, names[1]: y, "x_train": x[:1]})
    got = everything(open_data(f"npz:{tmp_path / 'd.npz'}"))
    assert torch.equal(got[0], torch.from_numpy(x).float())
    assert got[1] is not None
    assert torch.equal(got[1], torch.from_numpy(y))


def test_arrays_of_every_layout() -> None:
    bytes_ = np.random.default_rng(0).integers(0, 256, (4, 6, 7, 3), np.uint8)
    expected = torch.from_numpy(bytes_).permute(0, 3, 1, 2).float() / 255
    last = from_arrays("a", "test", bytes_, None)
    assert torch.equal(everything(last)[0], expected)
    assert "channels were last" in last.describe()
    assert torch.equal(everything(from_arrays("a", "test", bytes_[..., 0], None))[0], expected[:, :1])
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 4.0])
    moved = from_arrays("a", "test", bytes_, None, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    assert torch.equal(everything(moved)[0], (expected - mean[:, None, None]) / std[:, None, None])
    for kind in (np.int32, np.uint8):
        tokens = np.array([[5, 7], [9, 11]], kind)
        got = everything(from_arrays("a", "test", tokens, None))[0]
        assert got.dtype == torch.int64
        assert torch.equal(got, torch.from_numpy(tokens).long())
    floats = torch.randn(4, 16, 9, 1)
    assert torch.equal(everything(from_arrays("a", "test", floats, None))[0], floats)


@pytest.mark.parametrize("option", [{"mean": 0.5}, {"std": 2}])
def test_mean_and_std_of_tokens_are_refused(option: dict[str, float]) -> None:
    with pytest.raises(PcqError, match=r"mean and std are given, but the samples are int32\. Allowed: .*8-bit"):
        from_arrays("a", "test", np.array([[5, 7], [9, 11]], np.int32), None, **option)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"z": np.zeros(3)}, "it holds z"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(2)}, r"labels have shape \[2\]"),
        (
            {"x": np.zeros((3, 2)), "y": np.zeros((3, 4, 4))},
            r"shape \[3, 4, 4\]\. Allowed: \[3\], .*give the samples alone",
        ),
        ({"x": np.zeros((2, 2)), "y": np.array([0.5, 1])}, "not whole numbers"),
        ({"x": np.zeros((2, 2)), "y": np.array([-1, 1])}, "a label is -1"),
        ({"x": np.zeros((0, 2))}, "there are no samples"),
        ({"x": np.array([[0, 1], [2, np.nan], [np.inf, 0]])}, "2 of 3 samples hold NaN or infinity, such as sample 1"),
        ({"x": np.array(["a", "b"])}, "not made of numbers"),
        ({"x": np.array([{}, {}], dtype=object)}, r"holds Python objects\. Allowed: arrays of numbers"),
        ({"x_test": np.zeros((2, 2)), "y": np.zeros(2)}, r"x_test has no labels, and y no samples.*\"y_test\""),
        ({"x": np.zeros((2, 2)), "labels_train": np.zeros(2)}, "x has no labels, and labels_train no samples"),
        ({"x": np.ones((2, 2)) * 1j}, r"the numbers are complex\. Allowed: real ones"),
        ({"x": np.zeros((2, 2)), "y": np.ones(2) * 1j}, "the numbers are complex"),
        ({"images": np.zeros((2, 2)), "targets": np.zeros(2)}, "it holds images, targets. Allowed: x and y"),
    ],
)
def test_npz_that_is_wrong(tmp_path: Path, arrays: dict[str, np.ndarray], told: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(PcqError, match=told):
        open_data(f"npz:{tmp_path / 'd.npz'}")


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("mean=abc", "mean: 'abc' is not a number"),
        ("mean=", "mean: '' is not a number"),
        ("mean={}", "mean: {} is not a number"),
        ("mean=[1,[2]]", r"mean: \[2\] is not a number"),
        ("mean=1e999", "mean: inf is not a number"),
        ("mean=1,2", "mean and std have 2 values for 1 channels"),
        ("std=nan", "std: 'nan' is not a positive number"),
        ("std=None", "std: None is not a positive number"),
        ("std=0", "std: 0 is not a positive number"),
        ("std=-1", "std: -1 is not a positive number"),
        ("std=1e-60", "std: 1e-60 is not a positive number"),
    ],
)
def test_npz_options_that_are_wrong(tmp_path: Path, query: str, told: str) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros(3))
    with pytest.raises(PcqError, match=told):
        everything(open_data(f"npz:{tmp_path / 'd.npz'}?{query}"))


def test_npz_in_the_byte_order_of_other_machines(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([[0.5], [2]], ">f4"), y=np.array([1, 258], ">i8"))
    x, y = everything(open_data(f"npz:{tmp_path / 'd.npz'}"))
    assert y is not None
    assert (x.tolist(), y.tolist()) == ([[0.5], [2]], [1, 258])


def test_npz_of_several_splits_without_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x_train=np.zeros((3, 2)), y_train=np.zeros(3), x_test=np.zeros((2, 2)))
    test, train = (open_data(f"npz:{tmp_path / 'd.npz'}", split) for split in ("test", "train"))
    assert (test.n, test.labels, train.n, train.highest) == (2, None, 3, 0)


def test_npz_missing_truncated_or_no_archive(tmp_path: Path) -> None:
    (tmp_path / "t.npz").write_text("no arrays")
    with pytest.raises(PcqError, match=r"not a file of NumPy arrays. Write it with `np\.savez`"):
        open_data(f"npz:{tmp_path / 't.npz'}")
    with pytest.raises(PcqError, match="digits has no 'dir'"):
        open_data("digits:dir")
    with pytest.raises(PcqError, match="no such file"):
        open_data("npz:/nowhere.npz")
    np.savez(tmp_path / "d.npz", x=np.zeros((20, 20)))
    (tmp_path / "d.npz").write_bytes((tmp_path / "d.npz").read_bytes()[:-200])
    with pytest.raises(CheckFailed, match="cannot be read"):
        open_data(f"npz:{tmp_path / 'd.npz'}")
    np.save(tmp_path / "e.npy", np.zeros(3))
    with pytest.raises(PcqError, match="one array"):
        open_data(f"npz:{tmp_path / 'e.npy'}")


OWN = """
import torch
from beside import OFFSET

X = torch.arange(6.0).reshape(6, 1) + OFFSET
Y = torch.tensor([0, 1, 2, 0, 1, 2])

def arrays(split): return {"test": X, "val": X - 100, "train": X + 100}[split], Y
def unlabelled(): return X
def dataset(): return torch.utils.data.TensorDataset(X, Y)
def loader(): return torch.utils.data.DataLoader(dataset(), batch_size=4)
def batches():
    yield X[:4], Y[:4]
    yield X[4:], Y[4:]
def samples():
    for x, y in zip(X, Y): yield x, int(y)
def triples():
    for x, y in zip(X, Y): yield x, y, 1
def pairs(): return list(batches())
def alone(): return torch.utils.data.TensorDataset(X)
def dictionary(): return {"images": X, "labels": Y}
def threes(): return torch.utils.data.TensorDataset(X, Y, Y)
class Shifted(torch.utils.data.Dataset):
    targets = (Y + 1).tolist()
    def __len__(self): return len(X)
    def __getitem__(self, i): return X[i], self.targets[i] - 1
def shifted(): return Shifted()
def distributed():
    share = torch.utils.data.DistributedSampler(dataset(), num_replicas=2, rank=1)
    return torch.utils.data.DataLoader(dataset(), sampler=share)
def drawn(): return torch.utils.data.DataLoader(dataset(), sampler=torch.utils.data.SubsetRandomSampler([5, 3]))
def by_batch(): return torch.utils.data.DataLoader(dataset(), batch_sampler=[[5], [3]])
def twice(items): return torch.stack([2 * x for x, _ in items]), torch.stack([y for _, y in items])
def collated(): return torch.utils.data.DataLoader(dataset(), batch_size=4, shuffle=True, collate_fn=twice)
def mixed(): return torch.utils.data.DataLoader(dataset(), collate_fn=lambda items: {"x": torch.zeros(2)})
def words(): yield from ("ab", "cd")
def sparse(): return X.to_sparse(), Y
def sparse_samples():
    for x, y in zip(X, Y): yield x.to_sparse(), y
def halves(): return torch.utils.data.TensorDataset(X, Y + 0.7)
MAPS = torch.zeros(6, 4, 4).long()
def maps(): return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, MAPS))
def map_batches(): return [(X[:4], MAPS[:4]), (X[4:], MAPS[4:])]
def maps_in_turn(): yield from map_batches()
def endless(): return torch.utils.data.TensorDataset(X, Y / 0)
def waves(): return torch.utils.data.TensorDataset(X * 1j, Y)
def scaled(by=1): return X * by, Y
def raises(): return {}["missing"]
def leaves(): raise SystemExit(0)
def breaks():
    yield X, Y
    raise OSError("disk on fire")
def number(): return 3
def pil():
    from PIL import Image
    return [(Image.new("L", (2, 2)), 0)]
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "beside.py").write_text("OFFSET = 0.5\n")
    (tmp_path / "mine.py").write_text(OWN)
    return str(tmp_path / "mine.py")


OWN_FUNCTIONS = [
    "arrays", "dataset", "loader", "batches", "samples", "scaled", "pairs", "dictionary", "shifted", "distributed",
]  # fmt: skip


@pytest.mark.parametrize("function", OWN_FUNCTIONS)
def test_own_functions_of_every_kind(own: str, function: str) -> None:
    x, y = everything(open_data(f"{own}:{function}"))
    assert torch.equal(x, torch.arange(6.0).reshape(6, 1) + 0.5)
    assert y is not None
    assert torch.equal(y, torch.tensor([0, 1, 2, 0, 1, 2]))


def test_samples_of_a_data_loader_are_those_it_chooses_as_it_makes_them(own: str) -> None:
    for function in ("drawn", "by_batch"):
        x, y = everything(open_data(f"{own}:{function}"))
        assert (x.tolist(), [] if y is None else y.tolist()) == ([[3.5], [5.5]], [0, 2])
    x, y = everything(open_data(f"{own}:collated"))
    assert torch.equal(x, 2 * (torch.arange(6.0).reshape(6, 1) + 0.5))
    assert y is not None
    assert torch.equal(y, torch.tensor([0, 1, 2, 0, 1, 2]))
    with pytest.raises(PcqError, match=r"collate_fn makes something else .*Allowed: tensors x, or \(x, y\)"):
        open_data(f"{own}:mixed")


def test_targets_are_asked_for_only_where_they_are_the_labels(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TORCHVISION)
    plain, changed = open_data(f"{tmp_path / 'mine.py'}:plain"), open_data(f"{tmp_path / 'mine.py'}:changed")
    assert (plain.labels, changed.labels) != (None, None)
    assert plain.highest == 2
    assert changed.highest == 1


TORCHVISION = """
import torch

class Labelled(torch.utils.data.Dataset):
    target_transform = None
    read = 0
    targets = torch.tensor([0, 1, 2] * 100)
    def __len__(self): return 300
    def __getitem__(self, i):
        self.read += 1
        assert self.read < 10 or self.target_transform
        y = int(self.targets[i])
        return torch.zeros(2), self.target_transform(y) if self.target_transform else y

def plain(): return Labelled()
def changed():
    found = Labelled()
    found.target_transform = lambda y: min(y, 1)
    return found
"""


def test_own_functions_get_split_and_options(own: str) -> None:
    assert everything(open_data(f"{own}:arrays", "val"))[0][0] == -99.5
    assert everything(open_data(f"{own}:scaled?by=4"))[0][0] == 2.0
    for function in ("unlabelled", "alone"):
        assert open_data(f"{own}:{function}").labels is None
        assert torch.equal(everything(open_data(f"{own}:{function}"))[0], torch.arange(6.0).reshape(6, 1) + 0.5)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("leaves", r"leaves\(\) raised SystemExit: 0"),
        ("raises", r"raises\(\) raised KeyError.*See line \d+ of .*mine\.py"),
        ("breaks", "disk on fire"),
        ("number", "returned an int"),
        ("pil", "samples are not tensors but Image"),
        ("threes", r"it yields 3 values at a time\. Allowed: x alone, or \(x, y\)"),
        ("triples", r"it yields 3 values at a time\. Allowed: x alone, or \(x, y\)"),
        (
            "words",
            r"not made of numbers: it is of text\. Allowed: arrays or tensors .*Labels are class numbers",
        ),
        ("sparse", r"a tensor is sparse\. Allowed: dense tensors.*to_dense"),
        ("sparse_samples", "a tensor is sparse"),
        ("halves", "the labels are not whole numbers"),
        ("endless", "the labels are not whole numbers"),
        *(
            (maps, r"labels have shape \[6, 4, 4\]\. Allowed: \[6\], class numbers\. Maps, .*give the samples alone")
            for maps in ("maps", "map_batches", "maps_in_turn")
        ),
        ("waves", "the numbers are complex"),
        ("aray", "has no 'aray'.*Did you mean 'arrays'"),
    ],
)
def test_own_functions_that_are_wrong(own: str, function: str, told: str) -> None:
    with pytest.raises(PcqError, match=told):
        open_data(f"{own}:{function}")


def test_arrays_that_are_only_read_are_taken_without_a_word(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Torch warns of memory that may not be written, as a mapped file's; a read-only array is alike."""
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    x.flags.writeable = False
    assert torch.equal(tensor(x, "x"), torch.arange(12.0).reshape(4, 3))
    assert not recwarn.list


@pytest.mark.parametrize(
    ("layer", "given", "told"),
    [
        (torch.nn.Conv2d(1, 2, 1), torch.int64, r"samples of 1x8x8 in int64: .*Give numbers in float32, or images"),
        (torch.nn.Linear(8, 2), torch.bool, r"samples of 1x8x8 in bool: .*Give numbers in float32"),
        (torch.nn.Conv2d(3, 2, 1), torch.float32, r"samples of 1x8x8: the .*1 channels instead\.$"),
    ],
)
def test_numbers_of_a_type_that_layers_do_not_take(layer: torch.nn.Module, given: torch.dtype, told: str) -> None:
    x = torch.zeros(2, 1, 8, 8, dtype=given)
    with pytest.raises(PcqError, match=told), refusing([x]):
        layer(x)


@pytest.mark.parametrize(
    ("spec", "split", "told"),
    [
        ("digit", "test", "Did you mean 'digits'"),
        ("imagenet", "test", "Allowed: digits, fashion-mnist"),
        ("digits?size=3", "test", "no option 'size'"),
        ("cifar10", "test", "needs its folder"),
        ("digits", "tset", "Allowed: test, val, train"),
        ("", "test", "not a data set"),
        ("/nowhere/a.py:f", "test", "no such file"),
        ("pcq.nothing:f", "test", "no module 'pcq.nothing'"),
    ],
)
def test_specs_that_are_wrong(spec: str, split: str, told: str) -> None:
    with pytest.raises(PcqError, match=told):
        open_data(spec, split)
