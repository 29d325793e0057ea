"""The data: drawn shapes, published sets in their real file formats, folders of images, and the cache."""
import os
import pickle
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import protodiffusion as pd
from conftest import CPU, args, checkpoint, config

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200), (200, 30, 200)]

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

def load(root, split="train", size=8):
    return pd.load_dataset("folder", split, size, root)

def near(images, colour, within=12):
    """images [C, H, W] or [N, C, H, W]: every pixel has the colour, but for compression."""
    return (images.int() - torch.tensor(colour).view(-1, 1, 1)).abs().max().item() <= within

@pytest.fixture
def any_checksum(monkeypatch):
    """Files made here pass torchvision's checks of the originals' MD5 sums; those of existence stay."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: os.path.isfile(path))

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

def test_shapes_follow_from_the_seed_alone():
    torch.manual_seed(1)
    before, a = torch.get_rng_state(), pd.make_shapes(40, 12, seed=3)
    assert torch.get_rng_state().equal(before), "the global random state stays"
    torch.manual_seed(2)
    b, c = pd.make_shapes(40, 12, seed=3), pd.make_shapes(40, 12, seed=4)
    assert a.images.equal(b.images) and a.labels.equal(b.labels) and a.attributes.equal(b.attributes)
    assert not a.images.equal(c.images) and a.images.shape == (40, 3, 12, 12)

def test_splits_of_shapes_share_no_image():
    sets = [{x.numpy().tobytes() for x in pd.load_dataset("shapes", split, 16).images} for split in pd.SHAPE_SPLITS]
    assert len(set.union(*sets)) == sum(n for n, _ in pd.SHAPE_SPLITS.values())

@pytest.mark.parametrize("bias", [0.95, 0.05, 0.5])
def test_attributes_of_shapes_are_halves_and_independent_but_for_the_bias(bias):
    data = pd.make_shapes(4000, 8, seed=7, bias=bias)
    a = data.attributes.double()
    assert (a[:, 4] == a[:, 0]).double().mean().item() == pytest.approx(bias, abs=0.02)
    assert (a.mean(0) - 0.5).abs().max() < 0.05
    both = torch.cat([a[:, :4], torch.nn.functional.one_hot(data.labels, 10).double()], 1).T
    assert (torch.corrcoef(both)[:4] - torch.eye(4, 14)).abs().max() < 0.08

@pytest.mark.parametrize("name, n", [("shapes", 0), ("shapes-40", 2), ("shapes-160", 4)])
def test_fine_classes_are_figures_split_by_the_attributes_that_their_names_tell(name, n):
    assert pd.FINE[name] == n
    fine, plain = pd.make_shapes(4000, 8, seed=3, fine=n), pd.make_shapes(4000, 8, seed=3)
    assert fine.images.equal(plain.images) and (fine.labels >> n).equal(plain.labels), "a figure's are side by side"
    assert len(set(fine.classes)) == 10 * 2 ** n and torch.bincount(fine.labels).min() > 5, "every class occurs"
    words = ("warm", "bright", "large", "left")
    for label, figure, has in zip(fine.labels, plain.labels, fine.attributes[:, :n].tolist()):
        named = fine.classes[label].split()
        assert named[-1] == pd.SHAPES[figure] and [word in named for word in words[:n]] == has and len(named) == n + 1
    assert pd.load_dataset(name, "test", 8).classes == fine.classes

def test_the_judge_recognises_the_fine_classes_of_images_that_it_never_saw(tmp_path, monkeypatch):
    monkeypatch.setattr(pd, "SHAPE_SPLITS", dict(train=(200, 0), test=(2000, 1), judge=(20_000, 2)))
    cfg = config(pd, dataset="shapes-40", image_size=12, judge_width=8, judge_steps=250, amp="auto", data_dir=str(tmp_path))
    train_set, test_set, _ = pd.load_classes(cfg)
    found = pd.judge_images(pd.load_judge(cfg, train_set, CPU), test_set.images, test_set.labels, CPU)
    assert found["accuracy"] > 0.98, "else it would measure itself"

def test_few_images_of_each_class_are_trained_on_and_all_are_held_out_and_for_the_judge():
    few, test, whole = pd.load_classes(config(pd, dataset="shapes-40", images_per_class=3))
    all_, held_out = pd.load_sets(config(pd, dataset="shapes-40"))
    assert whole.images.equal(all_.images) and test.images.equal(held_out.images)
    assert torch.bincount(few.labels, minlength=40).equal(torch.bincount(whole.labels, minlength=40).clamp(max=3))
    first = (whole.labels == whole.labels[0]).nonzero()[:3, 0]
    assert few.images[few.labels == whole.labels[0]].equal(whole.images[first]) and few.classes == whole.classes
    assert pd.load_classes(config(pd))[0].images.equal(whole.images)

def test_samples_of_a_run_with_few_images_are_judged_by_all(tmp_path, monkeypatch):
    given, judged, load, judge_images = [], [], pd.load_judge, pd.judge_images
    monkeypatch.setattr(pd, "judge_images", lambda judge, x, *more: judged.append(len(x)) or judge_images(judge, x, *more))
    monkeypatch.setattr(pd, "load_judge", lambda cfg, data, device: given.append(len(data.images)) or load(cfg, data, device))
    out = tmp_path / "run"
    assert pd.main(args(pd, data_dir=tmp_path, out=out, images_per_class=2, eval_every=3, prototypes="random")) == 0
    assert judged[-2:] == [20, 20], "real images: as many as samples"
    assert given == [200] * 3 and len(checkpoint(out)["known"]["targets"]) == 20

# Published sets

def test_cifar10_is_read_with_its_channels_rows_and_labels_in_place(tmp_path, any_checksum):
    folder, names = tmp_path / "cifar-10-batches-py", [f"class {i}" for i in range(10)]
    folder.mkdir()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    for b, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = np.empty((2, 3, 32, 32), np.uint8)
        pixels[:] = np.array([10 * b, 200, 0])[:, None, None]
        pixels[0, 2, 0, 31] = 255                                   # a blue mark, upper right
        (folder / name).write_bytes(pickle.dumps({"data": pixels.reshape(2, -1), "labels": [b, 9]}))
    train, test = (pd.load_dataset("cifar10", split, data_dir=tmp_path) for split in ("train", "test"))
    assert train.images.shape == (10, 3, 32, 32) and test.images.shape == (2, 3, 32, 32)
    assert train.classes == names and train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert test.labels.tolist() == [5, 9] and (train.attributes, test.attributes) == (None, None)
    assert train.images[:, 0, 5, 5].tolist() == [0, 0, 10, 10, 20, 20, 30, 30, 40, 40]
    assert (train.images[:, 1] == 200).all() and train.images[0, 2, 0, 31] == 255 and train.images[0, 2].sum() == 255

def test_tiny_imagenet_has_words_for_classes_and_a_tenth_held_out(tmp_path):
    folder, ids = tmp_path / "tiny-imagenet-200", ["n02124075", "n01443537", "n04285008"]
    for i, wnid in enumerate(ids):
        for j in range(10):
            save_image(folder / "train" / wnid / "images" / f"{wnid}_{j}.JPEG", COLOURS[i], (64, 64))
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t62\t62\n")
    (folder / "words.txt").write_text("n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\n"
                                      "n02124075\tEgyptian cat\nn04285008\tsports car, sport car\n")
    train, test = (pd.load_dataset("tiny-imagenet", split, 32, tmp_path) for split in ("train", "test"))
    assert train.classes == test.classes == ["goldfish", "Egyptian cat", "sports car"], "in the order of their ids"
    assert torch.bincount(torch.cat([train.labels, test.labels])).tolist() == [10] * 3 and len(test.labels) == 3
    for data in (train, test):
        assert all(near(x, COLOURS[[1, 0, 2][c]]) for x, c in zip(data.images, data.labels))

@pytest.mark.parametrize("name", [name for name in pd.Config.PRESETS if name not in (*pd.FINE, "folder")])
def test_no_network_is_one_sentence_about_the_set(tmp_path, no_network, name):
    with pytest.raises(pd.Stop, match=f"{name}.*{tmp_path}.*network"):
        pd.load_dataset(name, "train", 32, tmp_path)
    assert not list(tmp_path.rglob("*.pt"))

# Folders

def test_a_folder_of_train_and_test_keeps_its_split_and_classes(tmp_path):
    make_folder(tmp_path, ["train/cat", "train/dog", "test/dog"])
    train, test = load(tmp_path), load(tmp_path, "test")
    assert train.classes == test.classes == ["cat", "dog"] and train.images.shape == (6, 3, 8, 8)
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and test.labels.tolist() == [1, 1, 1]
    assert near(train.images[0], COLOURS[0], 0) and near(train.images[3], COLOURS[1], 0)
    assert near(test.images[0], COLOURS[2], 0)

@pytest.mark.parametrize("parts", [["a", "b"], ["train/a", "train/b"], [""]])
def test_a_folder_without_test_holds_out_a_tenth_always_the_same(tmp_path, parts):
    for i, part in enumerate(parts):
        for j in range(40 // len(parts)):
            save_image(tmp_path / part / f"{j}.png", (6 * j, 200 * i, 9))
    train, test = load(tmp_path), load(tmp_path, "test")
    assert len(train.images) == 36 and len(test.images) == 4
    keys = [{tuple(x[:, 0, 0].tolist()) for x in data.images} for data in (train, test)]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 40
    for data in (train, test):
        if parts == [""]:
            assert data.labels is None and data.classes == []
        else:
            assert data.classes == ["a", "b"] and (data.images[:, 1, 0, 0] == 200 * data.labels).all()
    for cached in tmp_path.glob("*.pt"):
        cached.unlink()
    assert load(tmp_path, "test").images.equal(test.images)

def test_folders_are_read_to_their_depth_but_for_hidden_and_other_files(tmp_path):
    root = make_folder(tmp_path / ".hidden", ["train/cat", "train/dog/deeper", "train/.thumbnails"], each=2)
    (root / "train" / "cat" / "._0.png").write_bytes(b"\x00\x05\x16\x07")
    (root / "train" / "cat" / "notes.txt").write_text("not an image")
    (root / "train" / ".DS_Store").write_bytes(b"\x00")
    train, test = load(root), load(root, "test")
    assert len(train.images) + len(test.images) == 4 and train.classes == ["cat", "dog"]
    assert sorted([*train.labels, *test.labels]) == [0, 0, 1, 1]

@pytest.mark.parametrize("parts, split", [
    (["train/cat", "train/dog", "train"], "train"), (["train/cat", "test/fish"], "test"),
    (["train/cat", "train/dog", "test"], "test")])
def test_images_of_no_class_are_a_stop(tmp_path, parts, split):
    make_folder(tmp_path, parts)
    with pytest.raises(pd.Stop, match="images are in .*: give train"):
        load(tmp_path, split)

@pytest.mark.parametrize("make", [False, True])
def test_a_missing_and_an_empty_folder_are_named(tmp_path, make):
    if make:
        (tmp_path / "nowhere").mkdir()
    with pytest.raises(pd.Stop, match="nowhere.*--data-dir"):
        load(tmp_path / "nowhere")

def test_sets_and_splits_that_do_not_exist_are_refused(tmp_path):
    for name in ("shapes", "cifar10"):
        with pytest.raises(pd.Stop, match="split valid"):
            pd.load_dataset(name, "valid", 16, tmp_path)
    with pytest.raises(pd.Stop, match=f"cifar11.*{', '.join(pd.Config.PRESETS)}"):
        pd.load_dataset("cifar11", "train", 32, tmp_path)

def test_runs_see_one_channel_if_all_images_are_grey(tmp_path):
    for part, n in (("train", 3), ("test", 1)):
        for j in range(n):
            save_image(tmp_path / part / "x" / f"{j}.png", 40 * j, mode="L")
    cfg = config(pd, dataset="folder", data_dir=tmp_path)
    train, test = pd.load_sets(cfg)
    assert train.images.shape[1:] == (1, 16, 16) and train.images.is_contiguous() and len(test.images) == 1
    assert train.images[:, 0, 0, 0].tolist() == [0, 40, 80]
    save_image(tmp_path / "test" / "x" / "colour.png", (0, 0, 9))
    assert [data.images.shape[1] for data in pd.load_sets(cfg)] == [3, 3]

@pytest.mark.parametrize("size, box", [((30, 10), (10, 0, 20, 10)), ((10, 30), (0, 10, 10, 20))])
def test_images_that_are_not_square_keep_their_centre(tmp_path, size, box):
    image = Image.new("RGB", size, (255, 0, 0))
    image.paste((0, 255, 0), box)
    image.save(tmp_path / "x.png")
    pixels = pd.decode(tmp_path / "x.png", 8)
    assert pixels.shape == (3, 8, 8) and pixels.dtype == torch.uint8
    assert pixels[1, 1:-1, 1:-1].min() > 240 and pixels[0, 1:-1, 1:-1].max() < 15

def test_the_orientation_a_camera_noted_is_applied(tmp_path):
    image = Image.new("RGB", (16, 16), (0, 0, 200))
    image.paste((200, 0, 0), (0, 0, 8, 16))                         # stored: red at the left
    exif = Image.Exif()
    exif[0x0112] = 6                                                # shown after a quarter turn clockwise
    image.save(tmp_path / "x.jpg", exif=exif, quality=95)
    red = pd.decode(tmp_path / "x.jpg", 16)[0]
    assert red[:6].min() > 120 and red[10:].max() < 80

@pytest.mark.parametrize("mode, colour", [("RGBA", (200, 30, 30, 255)), ("LA", (90, 255)), ("P", 3), ("1", 1),
                                          ("CMYK", (0, 0, 0, 0)), ("I;16", 40_000)])
def test_other_kinds_of_pixels_become_rgb(tmp_path, mode, colour):
    pixels = pd.decode(save_image(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"), colour, mode=mode), 8)
    assert pixels.shape == (3, 8, 8) and pixels.dtype == torch.uint8
    assert mode != "RGBA" or pixels[:, 4, 4].tolist() == [200, 30, 30]

def test_an_image_that_does_not_decode_is_named(tmp_path):
    make_folder(tmp_path, ["train/cat", "train/dog", "test/cat"])
    whole = (tmp_path / "train" / "cat" / "1.png").read_bytes()
    for damage in (b"no image", whole[:len(whole) // 2], b""):
        (tmp_path / "train" / "cat" / "1.png").write_bytes(damage)
        with pytest.raises(pd.Stop, match="1.png"):
            load(tmp_path)

# The cache

@pytest.fixture
def pets(tmp_path):
    return make_folder(tmp_path, ["train/cat", "train/dog", "test/cat"])

def test_the_cache_is_used_instead_of_decoding(pets, no_decoding):
    first = load(pets)
    assert sorted(p.name for p in pets.glob("*.*")) == ["prototype-folder-range.pt", "prototype-folder-train-8.pt"]
    no_decoding()
    second = load(pets)
    assert second.images.equal(first.images) and second.labels.equal(first.labels) and second.classes == first.classes
    for split, size in (("train", 12), ("test", 8)):                # of another size or split is another cache
        with pytest.raises(AssertionError, match="decoded again"):
            load(pets, split, size)

@pytest.mark.parametrize("change, left", [("added", 7), ("removed", 5), ("rewritten", 6)])
def test_a_changed_folder_is_read_again(pets, change, left):
    load(pets)
    file = pets / "train" / "dog" / ("3.png" if change == "added" else "2.png")
    if change == "removed":
        file.unlink()
    else:
        save_image(file, (1, 2, 3))
        os.utime(file, (2e9, 2e9))
    data = load(pets)
    assert len(data.images) == left == len(data.labels)
    assert change == "removed" or near(data.images[-1], (1, 2, 3), 0)

def test_a_new_class_renumbers_the_cached_test_split(tmp_path):
    make_folder(tmp_path, ["train/cat", "train/dog", "test/cat", "test/dog"], each=2)
    assert load(tmp_path, "test").labels.tolist() == [0, 0, 1, 1]
    make_folder(tmp_path, ["train/ant"])
    test = load(tmp_path, "test")
    assert test.classes == ["ant", "cat", "dog"] and test.labels.tolist() == [1, 1, 2, 2]

@pytest.mark.parametrize("content", ["half", {"key": []}, [1, 2, 3], {"images": torch.zeros(1)}])
def test_a_damaged_or_foreign_cache_is_built_again(pets, no_decoding, content):
    first, cache = load(pets), pets / "prototype-folder-train-8.pt"
    if content == "half":
        whole = cache.read_bytes()
        cache.write_bytes(whole[:len(whole) // 2])
    else:
        torch.save(content, cache)
    assert load(pets).images.equal(first.images)
    no_decoding()
    assert load(pets).images.equal(first.images)

def test_a_cache_that_cannot_be_written_is_a_note_not_an_error(pets, monkeypatch, capsys):
    def refuse(content, path):
        raise pd.Stop(f"{path} cannot be written (no space)")
    monkeypatch.setattr(pd, "save_safely", refuse)
    assert len(load(pets).images) == 6 and "no space" in capsys.readouterr().out

def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    pd.save_safely({"a": 1}, path)

    def half(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(pd.Stop, match="x.pt"):
        pd.save_safely({"a": 2}, path)
    assert torch.load(path, weights_only=True) == {"a": 1} and os.listdir(tmp_path) == ["x.pt"]

def test_the_judge_is_trained_once_for_the_same_images(tmp_path, monkeypatch):
    sizes, fit = [], pd.fit
    monkeypatch.setattr(pd, "fit", lambda net, images, *rest: sizes.append(len(images)) or fit(net, images, *rest))
    cfg = config(pd, data_dir=tmp_path)
    data = pd.load_dataset("shapes", "train", 16)
    first, second = pd.load_judge(cfg, data, CPU), pd.load_judge(cfg, data, CPU)
    assert sizes == [200] and first.last.weight.equal(second.last.weight)
    own = pd.moments(pd.features_of(second.features, data.images, CPU))
    assert all(torch.allclose(a, b) for a, b in zip(second.moments, own))
    darker = pd.Dataset(data.images // 2, data.labels, data.classes)
    assert not torch.equal(pd.load_judge(cfg, darker, CPU).moments[0], own[0]) and sizes == [200, 200]

# From uint8 to batches

def test_images_are_scaled_to_one_and_back():
    images = torch.tensor([[[[0, 255]]], [[[255, 0]]], [[[51, 204]]]], dtype=torch.uint8)
    x = pd.scaled(images, torch.tensor([2, 0]), CPU)
    assert x.dtype == torch.float32 and torch.allclose(x, torch.tensor([[[[-0.6, 0.6]]], [[[-1.0, 1.0]]]]), atol=1e-6)
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert pd.to_uint8(pd.scaled(images, torch.tensor([0]), CPU)).equal(images)
    assert pd.to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]
