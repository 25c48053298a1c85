import io
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from limbeck.core.errors import UsageError
from limbeck.data import DatasetSource, Normalise, batches, image_transform, load_data
from limbeck.data.images import Images, pixels

Image = pytest.importorskip("PIL.Image")
v2 = pytest.importorskip("torchvision.transforms.v2")

CLASSES = ("cat", "dog", "owl")


def picture(seed, size=(40, 36)):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def write(folder, count=4, classes=CLASSES):
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for k in range(count):
            picture(100 * c + k).save(folder / name / f"{k}.png")


@pytest.fixture
def tree(tmp_path):
    """A folder of images with splits."""
    for split, count in [("train", 8), ("val", 3), ("test", 2)]:
        write(tmp_path / split, count)
    return tmp_path


def random_transform():
    """Augmentation that draws from torch, `random` and numpy."""

    def shift(x):
        return (x + random.random() * 0.1 + np.random.rand() * 0.1).clamp(0, 1)  # noqa: NPY002

    jitter = [v2.RandomResizedCrop(24), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4), v2.RandAugment()]
    return v2.Compose([*jitter, pixels, shift, v2.RandomErasing(0.5)])


def test_augmented_pixels_are_a_function_of_id_and_view(tree):
    images = load_data(tree, augment=False).train.dataset
    source = DatasetSource(images, random_transform(), views=0, seed=5)
    whole = source.batch(torch.arange(24), view=2).x
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    plan = [(rows, 2) for rows in order.split(5)]
    for workers in (0, 2):
        torch.manual_seed(workers), random.seed(workers)
        assert torch.equal(torch.cat([b.x for b in batches(source, plan, workers)]), whole[order])
    assert not torch.equal(source.batch(torch.arange(24), view=3).x, whole)
    assert len({t.sum().item() for t in whole}) == 24


def test_another_process_makes_the_same_pixels(tree):
    code = (
        "import sys, torch, random; torch.rand(7); random.random()\n"
        "from limbeck.data import load_data\n"
        "source = load_data(sys.argv[1], image_size=32, seed=3).train\n"
        "batch = source.batch(torch.tensor([5, 1]), view=9)\n"
        "print(batch.x.double().sum().item().hex(), batch.id.tolist(), source.fingerprint())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tree)], capture_output=True, text=True, check=True)
    source = load_data(tree, image_size=32, seed=3).train
    batch = source.batch(torch.tensor([5, 1]), view=9)
    assert done.stdout == f"{batch.x.double().sum().item().hex()} {batch.id.tolist()} {source.fingerprint()}\n"


def test_image_folder_with_splits(tree):
    data = load_data(tree)
    assert {name: len(s) for name, s in data.items()} == {"train": 24, "validation": 9, "test": 6}
    assert data.classes == CLASSES
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert (data.train.views, data.validation.views) == (0, 1)
    batch = data.validation.batch(torch.arange(3), 0)
    assert batch.x.shape == (3, 3, 36, 36)  # the shorter side of the images
    assert 0 <= float(batch.x.min()) < 0.1
    assert 0.9 < float(batch.x.max()) <= 1
    assert torch.equal(batch.x, data.validation.batch(torch.arange(3), 5).x)
    assert load_data(tree, image_size=48).train.batch(torch.arange(2), 0).x.shape == (2, 3, 48, 48)


def test_undisturbed_pixels_are_exact(tree):
    data = load_data(tree, image_size=36)
    expected = torch.from_numpy(np.array(picture(0))).permute(2, 0, 1)[:, :, 2:38].float() / 255
    assert torch.equal(data.test.batch(torch.tensor([0]), 0).x[0], expected)


def test_one_folder_is_divided_by_path(tmp_path):
    write(tmp_path / "set", 20)
    data = load_data(tmp_path / "set")
    assert list(data) == ["train", "validation", "test"]
    assert sum(len(s) for _, s in data.items()) == 60
    assert data.test.views == 1
    held_out = set(data.test.ids.tolist())
    (tmp_path / "moved").mkdir()
    (tmp_path / "set").rename(tmp_path / "moved" / "set")  # ids are of the relative path
    picture(7).save(tmp_path / "moved" / "set" / "cat" / "new.png")
    assert set(load_data(tmp_path / "moved" / "set").test.ids.tolist()) >= held_out


def test_missing_validation_is_taken_from_train(tmp_path):
    write(tmp_path / "train", 20), write(tmp_path / "test", 2)
    data = load_data(tmp_path, validation=0.2)
    assert len(data.train) + len(data.validation) == 60
    assert data.validation.views == 1
    assert list(load_data(tmp_path, validation=0)) == ["train", "test"]


def test_images_without_classes(tmp_path):
    write(tmp_path / "train", 5)
    (tmp_path / "unlabelled").mkdir()
    picture(1).save(tmp_path / "unlabelled" / "a.png")
    data = load_data(tmp_path, validation=0)
    assert "y" not in data.unlabelled.batch(torch.tensor([0]), 0)
    assert data.unlabelled.views == 0


def test_views_can_be_limited_and_augmentation_left_out(tree):
    assert load_data(tree, views=4).train.views == 4
    assert load_data(tree, augment=False).train.views == 1


def test_unreadable_image_is_named_when_its_header_is_broken(tree):
    (tree / "train" / "cat" / "broken.png").write_bytes(b"no image at all")
    with pytest.raises(UsageError, match=r"(?s)an image cannot be read.*train/cat/broken\.png"):
        load_data(tree)


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_image_is_named_when_it_is_read(tree, workers):
    path = tree / "train" / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:400])
    source = load_data(tree).train
    with pytest.raises(UsageError, match=r"(?s)an image cannot be read.*train/cat/0\.png"):
        list(batches(source, [(torch.arange(4), 0)], workers=workers))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: write(p / "val", 1, ("fox",)), r"(?s)not in the training images.*fox.*cat, dog, owl"),
        (lambda p: (p / "train" / "wolf").mkdir(), r"(?s)a class has no images.*wolf"),
        (lambda p: picture(0).save(p / "train" / "loose.png"), r"(?s)beside the class folders.*loose\.png"),
        (lambda p: (p / "empty").mkdir(), r"(?s)there are no images.*empty"),
    ],
)
def test_bad_image_folders(tmp_path, spoil, message):
    write(tmp_path / "train", 2)
    spoil(tmp_path)
    with pytest.raises(UsageError, match=message):
        load_data(tmp_path)


def test_one_class_only(tmp_path):
    write(tmp_path / "train", 2, ("cat",))
    with pytest.raises(UsageError, match="one class only"):
        load_data(tmp_path)


def test_fingerprint_follows_files_and_augmentation(tree):
    first = load_data(tree).train.fingerprint()
    assert load_data(tree).train.fingerprint() == first
    assert load_data(tree, seed=1).train.fingerprint() != first
    assert load_data(tree, image_size=20).train.fingerprint() != first
    picture(999, size=(41, 40)).save(tree / "train" / "cat" / "0.png")
    assert load_data(tree).train.fingerprint() != first


def test_torchvision_folders_are_data_sets_too(tree):
    folder = pytest.importorskip("torchvision.datasets").ImageFolder(
        str(tree / "train"), transform=image_transform(16, True)
    )
    source = DatasetSource(folder, views=0)
    assert source.classes == CLASSES
    assert source.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    a, b = source.batch(torch.arange(3), 0), source.batch(torch.arange(3), 1)
    assert torch.equal(a.x, source.batch(torch.arange(3), 0).x)
    assert not torch.equal(a.x, b.x)


def test_pil_images_without_a_transform_become_pixels():
    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, row):
            return {"image": picture(row), "label": row}

    batch = DatasetSource(Pictures()).batch(torch.tensor([1, 2]), 0)
    assert batch.x.shape == (2, 3, 36, 40)
    assert batch.y.tolist() == [1, 2]


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("1", 3), ("RGB", 3), ("RGBA", 4), ("P", 3), ("I;16", 3)])
def test_pixels_of_every_mode(mode, channels):
    x = pixels(Image.new(mode, (5, 4)))
    assert (x.shape, x.dtype) == ((channels, 4, 5), torch.float32)


def test_bytes_are_images_too():
    buffer = io.BytesIO()
    picture(3).save(buffer, "PNG")
    images = Images([buffer.getvalue(), b"junk"], torch.arange(2), where="set.parquet")
    assert np.array_equal(np.array(images[0]), np.array(picture(3)))
    with pytest.raises(UsageError, match=r"set\.parquet, row 1"):
        images.check()


def test_normalise():
    x = torch.rand(2, 3, 4, 4)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    expected = v2.functional.normalize(x, mean, std)
    module = Normalise(mean, std)
    assert torch.allclose(module(x), expected)
    assert module(x.to(torch.bfloat16)).dtype == torch.bfloat16
    assert not module.state_dict()
    with pytest.raises(UsageError, match="other channels"):
        module(torch.rand(2, 1, 4, 4))
    with pytest.raises(UsageError, match="std > 0"):
        Normalise((0.5,), (0.0,))
