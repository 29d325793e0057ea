"""The data: drawn shapes, published sets in their real file formats, folders of images, and the cache."""
import os
import pickle
import struct
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import protodiffusion as pd

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200), (200, 30, 200)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_image(path, colour, size=(10, 10), mode="RGB", **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **how)
    return path


def make_folder(root, parts, each=3):
    """parts: folders like train/cat -> `each` PNG files of a colour of their own in every one."""
    for i, part in enumerate(parts):
        for j in range(each):
            save_image(root / part / f"{j}.png", tuple(min(255, v + 3 * j) for v in COLOURS[i % len(COLOURS)]))
    return root


def near(images, colour, within=12):
    """images [C, H, W] or [N, C, H, W]: every pixel has the colour, but for compression."""
    target = torch.tensor(colour).view(-1, 1, 1)
    return (images.int() - target).abs().max().item() <= within


@pytest.fixture
def any_checksum(monkeypatch):
    """Files made here pass torchvision's checks of the originals' MD5 sums; those of existence stay."""
    def exists(path, md5=None):
        return os.path.isfile(path)
    for module in (torchvision.datasets.cifar, torchvision.datasets.stl10, torchvision.datasets.celeba,
                   torchvision.datasets.mnist):
        monkeypatch.setattr(module, "check_integrity", exists)


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("Temporary failure in name resolution")
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", fail)
    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", fail)


@pytest.fixture
def no_decoding(monkeypatch):
    def fail(*args):
        raise AssertionError("decoded again")
    return lambda: monkeypatch.setattr(pd, "decode", fail)


# Shapes

@pytest.fixture(scope="module")
def shapes():
    return pd.make_shapes(3000, 16, seed=5)


def test_shapes_have_the_promised_types_classes_and_names(shapes):
    assert shapes.images.shape == (3000, 3, 16, 16) and shapes.images.dtype == torch.uint8
    assert shapes.labels.dtype == torch.int64 and shapes.attributes.dtype == torch.bool
    assert shapes.classes == list(pd.SHAPES) and tuple(shapes.attribute_names) == pd.SHAPE_ATTRIBUTES
    assert shapes.attributes.shape == (3000, 5)
    share = torch.bincount(shapes.labels, minlength=10) / 3000
    assert len(share) == 10 and share.min() > 0.07 and share.max() < 0.13


def test_shapes_follow_from_the_seed_alone():
    torch.manual_seed(1)
    a = pd.make_shapes(40, 12, seed=3)
    torch.manual_seed(2)
    b, c = pd.make_shapes(40, 12, seed=3), pd.make_shapes(40, 12, seed=4)
    assert a.images.equal(b.images) and a.labels.equal(b.labels) and a.attributes.equal(b.attributes)
    assert not a.images.equal(c.images) and a.images.shape == (40, 3, 12, 12)


def test_drawing_shapes_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    pd.make_shapes(5, 8, seed=3)
    assert torch.get_rng_state().equal(before)


def test_splits_of_shapes_share_no_image(monkeypatch):
    assert len({seed for _, seed in pd.SHAPE_SPLITS.values()}) == len(pd.SHAPE_SPLITS) == 3
    small = {name: (400, seed) for name, (_, seed) in pd.SHAPE_SPLITS.items()}
    monkeypatch.setattr(pd, "SHAPE_SPLITS", small)
    sets = [{x.numpy().tobytes() for x in pd.load_dataset("shapes", s, 16).images}
            for s in ("train", "test", "judge")]
    assert all(len(s) == 400 for s in sets)
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]


def test_attributes_of_shapes_are_halves_and_independent(shapes):
    a = shapes.attributes.double()
    assert (a.mean(0) - 0.5).abs().max() < 0.05
    both = torch.cat([a, torch.nn.functional.one_hot(shapes.labels, 10).double()], 1).T
    correlation = torch.corrcoef(both)[:5] - torch.eye(5, 15)
    assert correlation.abs().max() < 0.08


@pytest.mark.parametrize("bias, share", [(0.95, 0.95), (0.05, 0.05), (1.0, 1.0)])
def test_bias_ties_the_dot_to_the_hue_and_keeps_both_at_one_half(bias, share):
    warm, dot = pd.make_shapes(4000, 8, seed=7, bias=bias).attributes[:, [0, 4]].T
    assert (dot == warm).double().mean().item() == pytest.approx(share, abs=0.015)
    assert abs(warm.double().mean() - 0.5) < 0.04 and abs(dot.double().mean() - 0.5) < 0.04


def corner(shapes, size=2):
    return shapes.images[:, :, -size:, -size:].double().mean((1, 2, 3)) / 255


def test_bright_background_is_seen_in_the_corner_opposite_the_dot(shapes):
    assert ((corner(shapes, 1) > 0.45) == shapes.attributes[:, 1]).double().mean() > 0.98


def test_the_dot_is_seen_in_the_upper_left_corner(shapes):
    x = shapes.images.double() / 255
    spot = x[:, :, 1:3, 1:3].mean((1, 2, 3))
    seen = (spot - corner(shapes, 1)).abs() > 0.1
    assert (seen == shapes.attributes[:, 4]).double().mean() > 0.95
    dotted = shapes.attributes[:, 4]
    dark = spot < corner(shapes, 1)                                 # black on bright grey, white on dark grey
    assert (dark == shapes.attributes[:, 1])[dotted].double().mean() > 0.98


def ink(shapes):
    """Saturation as a mask of the figure [N, H, W]: background and dot are grey, the figure is coloured."""
    x = shapes.images.double() / 255
    return x.amax(1) - x.amin(1)


def test_warm_hue_is_seen_as_red_over_blue_and_green(shapes):
    mask, x = ink(shapes)[:, None], shapes.images.double() / 255
    red, green, blue = ((x * mask).sum((2, 3)) / mask.sum((2, 3))).T
    assert ((red > torch.maximum(green, blue)) == shapes.attributes[:, 0]).double().mean() > 0.97


def test_large_figures_cover_more_and_left_ones_lie_left(shapes):
    mask, large, left = ink(shapes), shapes.attributes[:, 2], shapes.attributes[:, 3]
    area = mask.sum((1, 2))
    for label in range(10):
        here = shapes.labels == label
        assert area[here & large].mean() > 1.35 * area[here & ~large].mean()
    axis = (torch.arange(16).double() + 0.5) / 16 * 2 - 1
    centre = (mask.sum(1) * axis).sum(1) / area
    one = shapes.labels != pd.SHAPES.index("crescent")              # its mass is not in its middle
    assert ((centre < 0) == left)[one].double().mean() > 0.95


def test_the_ten_figures_differ(shapes):
    means = torch.stack([ink(shapes)[shapes.labels == c].mean(0) for c in range(10)]).flatten(1)
    assert torch.pdist(means).min() > 0.3


@pytest.mark.parametrize("figure, x, y, expected", [
    ("circle", 0, 0, "inside"), ("square", 0.6, 0.6, "inside"), ("circle", 0.75, 0.75, "outside"),
    ("ring", 0, 0, "outside"), ("ring", 0.75, 0, "inside"), ("plus", 0, 0.9, "inside"), ("plus", 0.6, 0.6, "outside"),
    ("cross", 0, 0.9, "outside"), ("cross", 0.6, 0.6, "inside"), ("bar", 0.9, 0, "inside"),
    ("bar", 0, 0.5, "outside"),
    ("star", 0, 0.9, "inside"), ("star", 0, -0.9, "outside"), ("diamond", 0, 0.8, "inside"),
    ("diamond", 0.7, 0.7, "outside"), ("triangle", 0, 0.8, "inside"), ("triangle", 0.7, 0.7, "outside"),
    ("triangle", 0.6, -0.4, "inside")])
def test_known_points_lie_inside_or_outside_the_figures(figure, x, y, expected):
    d = pd.signed_distance(figure, torch.tensor([float(x)]), torch.tensor([float(y)])).item()
    assert (d < 0) == (expected == "inside")


@pytest.mark.parametrize("figure", pd.SHAPES)
def test_every_figure_is_within_reach_and_bounded_by_its_distance(figure):
    axis = torch.linspace(-1.6, 1.6, 161)
    x, y = axis.expand(161, 161), axis[:, None].expand(161, 161)
    d = pd.signed_distance(figure, x, y)
    assert (d[torch.hypot(x, y) > 1.2] > 0).all() and (d < 0).double().mean() > 0.02
    slope = torch.stack([d[:, 1:] - d[:, :-1], d.T[:, 1:] - d.T[:, :-1]]).abs() / 0.02
    assert slope.max() < 1.02                                       # never further than the true distance


def test_the_distance_of_a_circle_is_exact():
    x, y = torch.tensor([0.0, 0.3, 2.0]), torch.tensor([0.0, 0.4, 0.0])
    d = pd.signed_distance("circle", x, y)
    assert torch.allclose(d[2] - d[0], torch.tensor(2.0)) and torch.allclose(d[1] - d[0], torch.tensor(0.5))


# Published sets

def write_cifar10(root):
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [f"class {i}" for i in range(10)]
    with open(folder / "batches.meta", "wb") as file:
        pickle.dump({"label_names": names}, file)
    for b, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = np.zeros((2, 3, 32, 32), np.uint8)
        pixels[:, 0], pixels[:, 1], pixels[0, 2, 0, 31] = 10 * b, 200, 255         # a blue mark, upper right
        with open(folder / name, "wb") as file:
            pickle.dump({"data": pixels.reshape(2, -1), "labels": [b, 9]}, file)
    return names


def test_cifar10_is_read_with_its_channels_rows_and_labels_in_place(tmp_path, any_checksum):
    names = write_cifar10(tmp_path)
    train, test = (pd.load_dataset("cifar10", split, 32, tmp_path) for split in ("train", "test"))
    assert train.images.shape == (10, 3, 32, 32) and test.images.shape == (2, 3, 32, 32)
    assert train.classes == names and train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert test.labels.tolist() == [5, 9] and (train.attributes, test.attributes) == (None, None)
    assert train.images[:, 0, 5, 5].tolist() == [0, 0, 10, 10, 20, 20, 30, 30, 40, 40]
    assert (train.images[:, 1] == 200).all() and train.images[0, 2, 0, 31] == 255 and train.images[0, 2].sum() == 255


def test_stl10_is_read_upright_and_scaled(tmp_path, any_checksum):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    (folder / "class_names.txt").write_text("\n".join(f"c{i}" for i in range(10)) + "\n")
    (folder / "unlabeled_X.bin").write_bytes(b"")
    for split, n in (("train", 3), ("test", 2)):
        upright = np.zeros((n, 3, 96, 96), np.uint8)
        upright[:, 0, :48] = 200                                    # the upper half is red
        upright[:, 2] = 77
        upright.transpose(0, 1, 3, 2).tofile(folder / f"{split}_X.bin")             # the files hold columns
        np.arange(1, n + 1, dtype=np.uint8).tofile(folder / f"{split}_y.bin")       # and labels from 1
    data = pd.load_dataset("stl10", "train", 32, tmp_path)
    assert data.images.shape == (3, 3, 32, 32) and data.labels.tolist() == [0, 1, 2]
    assert data.classes == [f"c{i}" for i in range(10)]
    assert (data.images[:, 0, :12] > 190).all() and (data.images[:, 0, 20:] < 10).all()
    assert (data.images[:, 2] == 77).all()
    assert pd.load_dataset("stl10", "test", 32, tmp_path).labels.tolist() == [0, 1]


def test_fashion_mnist_is_one_channel_padded_to_32(tmp_path, any_checksum):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, n in (("train", 4), ("t10k", 2)):
        pixels = np.full((n, 28, 28), 90, np.uint8)
        pixels[:, 0, 27] = 250
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + pixels.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + bytes([9, 0, 3, 4][:n]))
    data = pd.load_dataset("fashion-mnist", "train", 32, tmp_path)
    assert data.images.shape == (4, 1, 32, 32) and data.labels.tolist() == [9, 0, 3, 4] and len(data.classes) == 10
    assert data.images[0, 0, 2, 29] == 250 and data.images[0, 0, 10, 10] == 90
    assert data.images[:, 0, :2].sum() == data.images[:, 0, -2:].sum() == data.images[..., :2].sum() == 0
    assert pd.load_dataset("fashion-mnist", "test", 32, tmp_path).images.shape == (2, 1, 32, 32)


def test_eurosat_is_split_once_and_for_all(tmp_path):
    kinds = ["Forest", "River", "Industrial"]
    for k, kind in enumerate(kinds):
        for i in range(10):
            path = tmp_path / "eurosat" / "2750" / kind / f"{kind}_{i + 1}.jpg"
            save_image(path, (20 + 8 * i, 60 + 60 * k, 128), (64, 64))
    train, test = (pd.load_dataset("eurosat", split, 32, tmp_path) for split in ("train", "test"))
    assert len(train.images) == 24 and len(test.images) == 6 and train.classes == test.classes == sorted(kinds)
    key = [{(round((x[0].float().mean().item() - 20) / 8), c) for x, c in zip(d.images, d.labels.tolist())}
           for d in (train, test)]
    assert not key[0] & key[1] and len(key[0] | key[1]) == 30
    for x, c in zip(train.images, train.labels):                    # labels belong to their images
        assert abs(x[1].float().mean() - (60 + 60 * kinds.index(train.classes[c]))) < 8
    for cached in tmp_path.glob("*.pt"):
        cached.unlink()
    assert pd.load_dataset("eurosat", "test", 32, tmp_path).images.equal(test.images)


ATTRIBUTES = ("5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair "
              "Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair "
              "Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face "
              "Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks "
              "Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings "
              "Wearing_Hat Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young").split()


def test_celeba_has_forty_attributes_and_the_male_one_as_classes(tmp_path, any_checksum):
    folder, n = tmp_path / "celeba", 6
    names, lines = [f"{i + 1:06}.jpg" for i in range(n)], []
    for i, name in enumerate(names):
        save_image(folder / "img_align_celeba" / name, COLOURS[i], (178, 218))
        signs = ["-1"] * 40
        signs[i] = " 1"
        signs[20] = " 1" if i % 2 else "-1"
        lines.append(f"{name} {' '.join(signs)}")
    (folder / "list_attr_celeba.txt").write_text(f"{n}\n{' '.join(ATTRIBUTES)} \n" + "\n".join(lines) + "\n")
    (folder / "list_eval_partition.txt").write_text("".join(f"{f} {p}\n" for f, p in zip(names, (0, 0, 0, 1, 2, 2))))
    (folder / "identity_CelebA.txt").write_text("".join(f"{f} {i + 7}\n" for i, f in enumerate(names)))
    (folder / "list_bbox_celeba.txt").write_text(
        f"{n}\nimage_id x_1 y_1 width height\n" + "".join(f"{f}    95  71 226 313\n" for f in names))
    (folder / "list_landmarks_align_celeba.txt").write_text(
        f"{n}\nlefteye_x lefteye_y\n" + "".join(f"{f} 69 109\n" for f in names))
    train, test = (pd.load_dataset("celeba", split, 32, tmp_path) for split in ("train", "test"))
    assert len(train.images) == 3 and len(test.images) == 2         # partition 1 is validation
    assert tuple(train.attribute_names) == tuple(ATTRIBUTES) and train.attributes.shape == (3, 40)
    assert train.attributes.dtype == torch.bool and train.attributes[:, :3].equal(torch.eye(3, dtype=torch.bool))
    assert train.classes == ["not male", "male"]
    assert train.labels.tolist() == [0, 1, 0] and test.labels.tolist() == [0, 1]
    assert near(train.images[1], COLOURS[1]) and near(test.images[0], COLOURS[4])


def test_missing_celeba_says_what_to_fetch_and_where_to_put_it(tmp_path):
    with pytest.raises(pd.Stop) as stop:
        pd.load_dataset("celeba", "train", 32, tmp_path)
    text = str(stop.value)
    assert "celeba" in text and str(tmp_path) in text and "img_align_celeba" in text and ".txt" in text


def write_tiny_imagenet(root):
    folder, ids = root / "tiny-imagenet-200", ["n02124075", "n01443537", "n04285008"]
    for i, wnid in enumerate(ids):
        for j in range(2):
            save_image(folder / "train" / wnid / "images" / f"{wnid}_{j}.JPEG", COLOURS[i], (64, 64))
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t62\t62\n")
    (folder / "wnids.txt").write_text("\n".join(ids) + "\n")
    (folder / "words.txt").write_text("n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\n"
                                      "n02124075\tEgyptian cat\nn04285008\tsports car, sport car\n")
    owners = [ids[2], ids[0], ids[1]]
    for j, wnid in enumerate(owners):
        save_image(folder / "val" / "images" / f"val_{j}.JPEG", COLOURS[ids.index(wnid)], (64, 64))
    (folder / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{j}.JPEG\t{wnid}\t0\t32\t44\t62\n" for j, wnid in enumerate(owners)))


def test_tiny_imagenet_has_words_for_classes_and_its_validation_images_for_test(tmp_path):
    write_tiny_imagenet(tmp_path)
    train, test = (pd.load_dataset("tiny-imagenet", split, 32, tmp_path) for split in ("train", "test"))
    assert train.classes == test.classes == ["Egyptian cat", "goldfish", "sports car"]
    assert sorted(train.labels.tolist()) == [0, 0, 1, 1, 2, 2] and test.labels.tolist() == [2, 0, 1]
    for data in (train, test):
        assert all(near(x, COLOURS[c]) for x, c in zip(data.images, data.labels))


def test_a_published_set_that_lacks_an_image_names_it(tmp_path):
    write_tiny_imagenet(tmp_path)
    (tmp_path / "tiny-imagenet-200" / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(pd.Stop, match="val_1.JPEG"):
        pd.load_dataset("tiny-imagenet", "test", 32, tmp_path)


# Folders

def test_a_folder_of_train_and_test_keeps_its_split_and_classes(tmp_path):
    make_folder(tmp_path, ["train/cat", "train/dog", "test/dog"])
    train, test = (pd.load_dataset("folder", split, 8, tmp_path) for split in ("train", "test"))
    assert train.classes == test.classes == ["cat", "dog"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and test.labels.tolist() == [1, 1, 1]
    assert near(train.images[0], COLOURS[0], 0) and near(train.images[3], COLOURS[1], 0)
    assert near(test.images[0], COLOURS[2], 0)
    assert train.images.shape == (6, 3, 8, 8)


@pytest.mark.parametrize("parts, labelled", [(["a", "b"], True), (["train/a", "train/b"], True), ([""], False)])
def test_a_folder_without_test_holds_out_a_tenth_always_the_same(tmp_path, parts, labelled):
    for i, part in enumerate(parts):
        for j in range(40 // len(parts)):
            save_image(tmp_path / part / f"{j}.png", (6 * j, 200 * i, 9))
    train, test = (pd.load_dataset("folder", split, 8, tmp_path) for split in ("train", "test"))
    assert len(train.images) == 36 and len(test.images) == 4
    keys = [{tuple(x[:, 0, 0].tolist()) for x in data.images} for data in (train, test)]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 40
    for data in (train, test):
        if labelled:
            assert data.classes == ["a", "b"] and (data.images[:, 1, 0, 0] == 200 * data.labels).all()
        else:
            assert data.labels is None and data.classes == []
    for cached in tmp_path.glob("*.pt"):
        cached.unlink()
    assert pd.load_dataset("folder", "test", 8, tmp_path).images.equal(test.images)


def test_images_in_subfolders_belong_to_the_class_at_the_top(tmp_path):
    make_folder(tmp_path, ["train/cat/indoors/old", "train/cat", "train/dog", "test/dog/new"], each=2)
    train = pd.load_dataset("folder", "train", 8, tmp_path)
    assert train.classes == ["cat", "dog"] and sorted(train.labels.tolist()) == [0, 0, 0, 0, 1, 1]
    assert pd.load_dataset("folder", "test", 8, tmp_path).labels.tolist() == [1, 1]


def test_hidden_files_and_other_files_are_no_images(tmp_path):
    make_folder(tmp_path, ["train/cat", "train/dog", "train/.thumbnails"], each=2)
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".DS_Store").write_bytes(b"\x00")
    train, test = (pd.load_dataset("folder", split, 8, tmp_path) for split in ("train", "test"))
    assert len(train.images) + len(test.images) == 4 and train.classes == ["cat", "dog"]


def test_a_stray_image_beside_classes_is_named(tmp_path):
    make_folder(tmp_path, ["train/cat", "train/dog"], each=2)
    save_image(tmp_path / "train" / "stray.png", COLOURS[0])
    with pytest.raises(pd.Stop, match="stray.png"):
        pd.load_dataset("folder", "train", 8, tmp_path)


@pytest.mark.parametrize("name", ["shapes", "cifar10"])
def test_a_split_that_does_not_exist_is_refused(tmp_path, name):
    with pytest.raises(pd.Stop, match="split 'valid'"):
        pd.load_dataset(name, "valid", 16, tmp_path)


def test_a_folder_below_a_hidden_one_is_read(tmp_path):
    root = make_folder(tmp_path / ".hidden" / "images", ["a", "b"])
    assert len(pd.load_dataset("folder", "train", 8, root).images) == 5


def test_grey_images_have_one_channel(tmp_path):
    for j in range(3):
        save_image(tmp_path / "train" / "x" / f"{j}.png", 40 * j, mode="L")
    save_image(tmp_path / "test" / "x" / "0.png", 7, mode="L")
    data = pd.load_dataset("folder", "train", 8, tmp_path)
    assert data.images.shape[1:] == (1, 8, 8) and data.images.is_contiguous()
    assert data.images[:, 0, 0, 0].tolist() == [0, 40, 80]
    save_image(tmp_path / "train" / "x" / "colour.png", (0, 0, 9))
    assert pd.load_dataset("folder", "train", 8, tmp_path).images.shape[1] == 3


@pytest.mark.parametrize("size", [(30, 10), (10, 30)])
def test_images_that_are_not_square_keep_their_centre(tmp_path, size):
    image = Image.new("RGB", size, (255, 0, 0))
    image.paste((0, 255, 0), (10, 0, 20, 10) if size[0] > size[1] else (0, 10, 10, 20))
    image.save(tmp_path / "x.png")
    array = pd.decode(tmp_path / "x.png", 8)
    assert array.shape == (8, 8, 3) and array.dtype == np.uint8
    assert array[1:-1, 1:-1, 1].min() > 240 and array[1:-1, 1:-1, 0].max() < 15


def test_the_orientation_a_camera_noted_is_applied(tmp_path):
    image = Image.new("RGB", (16, 16), (0, 0, 200))
    image.paste((200, 0, 0), (0, 0, 8, 16))                         # stored: red at the left
    exif = Image.Exif()
    exif[0x0112] = 6                                                # shown after a quarter turn clockwise
    image.save(tmp_path / "x.jpg", exif=exif, quality=95)
    array = pd.decode(tmp_path / "x.jpg", 16).astype(int)
    assert array[:6, :, 0].min() > 120 and array[10:, :, 0].max() < 80


@pytest.mark.parametrize("mode, colour", [("RGBA", (200, 30, 30, 255)), ("LA", (90, 255)), ("P", 3), ("1", 1),
                                          ("CMYK", (0, 0, 0, 0)), ("I;16", 40_000)])
def test_other_kinds_of_pixels_become_rgb(tmp_path, mode, colour):
    path = save_image(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"), colour, mode=mode)
    array = pd.decode(path, 8)
    assert array.shape == (8, 8, 3) and array.dtype == np.uint8
    if mode == "RGBA":
        assert array[4, 4].tolist() == [200, 30, 30]


# The cache

def test_the_cache_is_written_and_used_instead_of_decoding(tmp_path, no_decoding):
    make_folder(tmp_path, ["train/cat", "train/dog"])
    first = pd.load_dataset("folder", "train", 8, tmp_path)
    assert [p.name for p in tmp_path.glob("*.pt")] == ["prototype-folder-train-8.pt"]
    assert not list(tmp_path.glob("*.tmp"))
    no_decoding()
    second = pd.load_dataset("folder", "train", 8, tmp_path)
    assert second.images.equal(first.images) and second.labels.equal(first.labels) and second.classes == first.classes
    with pytest.raises(AssertionError, match="decoded again"):
        pd.load_dataset("folder", "train", 12, tmp_path)            # another size is another cache


def test_the_cache_of_a_published_set_needs_no_files(tmp_path, any_checksum, no_network, no_decoding):
    write_cifar10(tmp_path)
    first = pd.load_dataset("cifar10", "train", 32, tmp_path)
    for file in (tmp_path / "cifar-10-batches-py").iterdir():
        file.unlink()
    no_decoding()
    assert pd.load_dataset("cifar10", "train", 32, tmp_path).images.equal(first.images)


@pytest.mark.parametrize("change", ["added", "removed", "rewritten"])
def test_a_changed_folder_is_read_again(tmp_path, change):
    make_folder(tmp_path, ["train/cat", "train/dog", "test/cat"])
    pd.load_dataset("folder", "train", 8, tmp_path)
    file = tmp_path / "train" / "dog" / "2.png"
    if change == "removed":
        file.unlink()
    elif change == "added":
        save_image(tmp_path / "train" / "dog" / "3.png", (1, 2, 3))
    else:
        stamp = file.stat().st_mtime_ns + 5_000_000_000
        save_image(file, (1, 2, 3))
        os.utime(file, ns=(stamp, stamp))
    data = pd.load_dataset("folder", "train", 8, tmp_path)
    assert len(data.images) == {"added": 7, "removed": 5, "rewritten": 6}[change] == len(data.labels)
    if change != "removed":
        assert near(data.images[-1], (1, 2, 3), 0)


def test_a_new_class_renumbers_the_cached_test_split(tmp_path):
    make_folder(tmp_path, ["train/cat", "train/dog", "test/cat", "test/dog"], each=1)
    assert pd.load_dataset("folder", "test", 8, tmp_path).labels.tolist() == [0, 1]
    make_folder(tmp_path, ["train/ant"], each=1)
    test = pd.load_dataset("folder", "test", 8, tmp_path)
    assert test.classes == ["ant", "cat", "dog"] and test.labels.tolist() == [1, 2]


def test_a_truncated_cache_is_built_again(tmp_path, no_decoding):
    make_folder(tmp_path, ["train/cat", "train/dog", "test/cat"])
    first = pd.load_dataset("folder", "train", 8, tmp_path)
    cache = tmp_path / "prototype-folder-train-8.pt"
    whole = cache.read_bytes()
    cache.write_bytes(whole[:len(whole) // 2])
    assert pd.load_dataset("folder", "train", 8, tmp_path).images.equal(first.images)
    no_decoding()
    assert pd.load_dataset("folder", "train", 8, tmp_path).images.equal(first.images)


@pytest.mark.parametrize("foreign", [{"key": []}, [1, 2, 3], {"images": torch.zeros(1)}])
def test_a_foreign_file_in_place_of_the_cache_is_replaced(tmp_path, foreign):
    make_folder(tmp_path, ["train/cat", "train/dog", "test/cat"])
    torch.save(foreign, tmp_path / "prototype-folder-train-8.pt")
    assert len(pd.load_dataset("folder", "train", 8, tmp_path).images) == 6


def test_a_cache_that_cannot_be_written_is_a_note_not_an_error(tmp_path, monkeypatch, capsys):
    make_folder(tmp_path, ["train/cat", "train/dog"])

    def refuse(content, path):
        raise pd.Stop(f"{path} cannot be written (no space)")
    monkeypatch.setattr(pd, "save_safely", refuse)
    assert len(pd.load_dataset("folder", "train", 8, tmp_path).images) == 5
    assert "no space" in capsys.readouterr().out


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    pd.save_safely({"a": 1}, path)

    def half(content, file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(pd.Stop, match="x.pt"):
        pd.save_safely({"a": 2}, path)
    assert torch.load(path, weights_only=True) == {"a": 1} and os.listdir(tmp_path) == ["x.pt"]


# What can go wrong

def test_an_unknown_set_is_named_with_the_known_ones(tmp_path):
    with pytest.raises(pd.Stop) as stop:
        pd.load_dataset("cifar11", "train", 32, tmp_path)
    assert "cifar11" in str(stop.value) and all(name in str(stop.value) for name in pd.Config.PRESETS)


@pytest.mark.parametrize("make", [False, True])
def test_a_missing_and_an_empty_folder_are_named(tmp_path, make):
    root = tmp_path / "nowhere"
    if make:
        root.mkdir()
    with pytest.raises(pd.Stop, match="nowhere.*--data-dir"):
        pd.load_dataset("folder", "train", 8, root)


def test_an_image_that_does_not_decode_is_named(tmp_path):
    make_folder(tmp_path, ["train/cat", "train/dog", "test/cat"])
    whole = (tmp_path / "train" / "cat" / "1.png").read_bytes()
    for damage in (b"no image", whole[:len(whole) // 2], b""):
        (tmp_path / "train" / "cat" / "1.png").write_bytes(damage)
        with pytest.raises(pd.Stop, match="1.png"):
            pd.load_dataset("folder", "train", 8, tmp_path)


def test_a_test_class_that_train_lacks_is_a_stop(tmp_path):
    make_folder(tmp_path, ["train/cat", "train/dog", "test/fish"])
    assert len(pd.load_dataset("folder", "train", 8, tmp_path).images) == 6
    with pytest.raises(pd.Stop, match="test"):
        pd.load_dataset("folder", "test", 8, tmp_path)


def test_images_beside_the_class_folders_of_test_are_a_stop(tmp_path):
    make_folder(tmp_path, ["train/cat", "train/dog", "test"])
    with pytest.raises(pd.Stop, match="test"):
        pd.load_dataset("folder", "test", 8, tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "stl10", "fashion-mnist", "eurosat", "tiny-imagenet"])
def test_no_network_is_one_sentence_about_the_set(tmp_path, no_network, name):
    with pytest.raises(pd.Stop) as stop:
        pd.load_dataset(name, "train", 32, tmp_path)
    text = str(stop.value)
    assert name in text and str(tmp_path) in text and "network" in text
    assert not list(tmp_path.rglob("*.pt"))


# From uint8 to batches

def test_images_are_scaled_to_one_and_mirrored_where_asked():
    images = torch.tensor([[[[0, 255]]], [[[255, 0]]], [[[51, 204]]]], dtype=torch.uint8)
    x = pd.scaled(images, torch.tensor([2, 0]), torch.device("cpu"), torch.tensor([True, False]))
    assert x.dtype == torch.float32 and torch.allclose(x, torch.tensor([[[[0.6, -0.6]]], [[[-1.0, 1.0]]]]), atol=1e-6)


def test_to_uint8_undoes_scaling():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert pd.to_uint8(pd.scaled(images, torch.tensor([0]), torch.device("cpu"))).equal(images)
    assert pd.to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]
