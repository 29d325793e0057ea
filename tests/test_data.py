"""The data: drawn shapes, published sets in their real file formats, pixels of all kinds, and the cache."""
import os
import pickle
import resource
import struct
import urllib.error
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import protodiffusion as pd
from conftest import CPU, config, same

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 30, 200)]

def save_image(path, colour, size=(10, 10), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path

def load(root, split="train", size=8):
    return pd.load_dataset("folder", split, size, root)

def test_shapes_follow_from_the_seed_alone_and_the_random_state_stays():
    torch.manual_seed(1)
    before, a = torch.get_rng_state(), pd.make_shapes(40, 12, seed=3)
    assert torch.get_rng_state().equal(before) and a.images.shape == (40, 3, 12, 12)
    torch.manual_seed(2)
    b, c = pd.make_shapes(40, 12, seed=3), pd.make_shapes(40, 12, seed=4)
    assert same(vars(a), vars(b)) and not a.images.equal(c.images)

def test_splits_of_shapes_share_no_image():
    sets = [{x.numpy().tobytes() for x in pd.load_dataset("shapes", split, 16).images} for split in pd.SHAPE_SPLITS]
    assert len(set.union(*sets)) == sum(n for n, _ in pd.SHAPE_SPLITS.values())

@pytest.mark.parametrize("bias", [0.95, 0.05, 0.5])
def test_attributes_of_shapes_are_halves_and_independent_but_for_the_bias(bias):
    data = pd.make_shapes(4000, 8, seed=7, bias=bias)
    a = data.attributes.double()
    assert abs((a[:, 4] == a[:, 0]).double().mean() - bias) < 0.02 and (a.mean(0) - 0.5).abs().max() < 0.05
    both = torch.cat([a[:, :4], torch.nn.functional.one_hot(data.labels, 10)], 1).T
    assert (torch.corrcoef(both)[:4] - torch.eye(4, 14)).abs().max() < 0.08

@pytest.mark.parametrize("name, n", [("shapes", 0), ("shapes-40", 2), ("shapes-160", 4)])
def test_fine_classes_are_figures_split_by_the_attributes_that_their_names_tell(name, n):
    fine, plain = pd.make_shapes(4000, 8, seed=3, fine=n), pd.make_shapes(4000, 8, seed=3)
    assert fine.images.equal(plain.images) and (fine.labels >> n).equal(plain.labels), "a figure's are side by side"
    assert len(set(fine.classes)) == 10 * 2 ** n and torch.bincount(fine.labels).min() > 5, "every class occurs"
    words = ("warm", "bright", "large", "left")
    for label, figure, has in zip(fine.labels, plain.labels, fine.attributes[:, :n].tolist()):
        named = fine.classes[label].split()
        assert named[-1] == pd.SHAPES[figure] and [word in named for word in words[:n]] == has and len(named) == n + 1
    assert pd.load_dataset(name, "test", 8).classes == fine.classes

def test_the_judge_recognises_fine_classes_of_images_that_it_never_saw_and_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setattr(pd, "SHAPE_SPLITS", dict(train=(200, 0), test=(2000, 1), judge=(20_000, 12)))
    cfg = config(pd, dataset="shapes-40", image_size=12, judge_width=8, judge_steps=180, data_dir=str(tmp_path))
    sets = pd.load_sets(cfg)
    assert pd.judge_images(cfg, Mock(device=CPU), sets, sets[1].images, sets[1].labels)["accuracy"] > 0.95
    monkeypatch.setattr(pd, "fit", None)
    net, real = pd.load_judge(cfg, sets[0], CPU)
    assert all(map(torch.allclose, real, pd.moments(pd.features_of(net[0], sets[0].images, CPU))))
    sets[0].images //= 2                                            # other images have another judge
    pytest.raises(TypeError, pd.load_judge, cfg, sets[0], CPU)

def test_cifar10_is_read_with_its_channels_rows_and_labels_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: os.path.isfile(path))
    folder, names = tmp_path / "cifar-10-batches-py", [f"class {i}" for i in range(10)]
    folder.mkdir()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    for b, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = np.full((2, 3, 32, 32), np.uint8([10 * b, 200, 0])[:, None, None])
        pixels[0, 2, 0, 31] = 255                                   # a blue mark, upper right
        (folder / name).write_bytes(pickle.dumps({"data": pixels.reshape(2, -1), "labels": [b, 9]}))
    train, test = (pd.load_dataset("cifar10", split, data_dir=tmp_path) for split in ("train", "test"))
    assert train.images.shape == (10, 3, 32, 32) and train.classes == names and train.attributes is None
    assert train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9] and test.labels.tolist() == [5, 9]
    assert train.images[:, 0, 5, 5].tolist() == [0, 0, 10, 10, 20, 20, 30, 30, 40, 40]
    assert (train.images[:, 1] == 200).all() and train.images[0, 2, 0, 31] == 255 and train.images[0, 2].sum() == 255

def test_tiny_imagenet_has_words_for_classes_and_a_tenth_held_out_also_after_kills(tmp_path, monkeypatch):
    words = "n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\nn02124075\tEgyptian cat\nn04285008\tsports car"
    def unpack(url, root, to, md5):
        for i, name in enumerate(("n02124075", "n01443537", "n04285008")):
            if i == killed:
                raise KeyboardInterrupt
            for j in range(10):
                save_image(to / f"tiny-imagenet-200/train/{name}/images/{name}_{j}.JPEG", COLOURS[i], (64, 64))
            (to / f"tiny-imagenet-200/train/{name}/{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t62\t62\n")
        (to / "tiny-imagenet-200/words.txt").write_text(words)
    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", unpack)
    for killed in range(3):                                         # before this class is unpacked
        pytest.raises(KeyboardInterrupt, pd.load_dataset, "tiny-imagenet", "train", 32, tmp_path)
    killed = None
    train, test = (pd.load_dataset("tiny-imagenet", split, 32, tmp_path) for split in ("train", "test"))
    assert not (tmp_path / "unpacking").exists()
    assert train.classes == test.classes == ["goldfish", "Egyptian cat", "sports car"], "in the order of their ids"
    assert torch.bincount(torch.cat([train.labels, test.labels])).tolist() == [10] * 3 and len(test.labels) == 3
    for data in (train, test):                                      # to the precision of JPEG
        assert (data.images - torch.tensor(COLOURS)[[1, 0, 2]][data.labels][:, :, None, None]).abs().max() <= 12

@pytest.mark.parametrize("name", [name for name in pd.Config.PRESETS if name not in (*pd.FINE, "folder")])
def test_no_network_is_one_sentence_about_the_set(tmp_path, monkeypatch, name):
    for function in ("_urlretrieve", "_get_redirect_url"):
        monkeypatch.setattr(torchvision.datasets.utils, function, Mock(side_effect=urllib.error.URLError("no name")))
    pytest.raises(pd.Stop, pd.load_dataset, name, "train", 32, tmp_path).match(f"^{name} in {tmp_path}.*network$")

def test_sets_and_splits_that_do_not_exist_are_refused(tmp_path):
    for name, split in (("shapes", "valid"), ("cifar10", "valid"), ("cifar11", "train")):
        pytest.raises(pd.Stop, pd.load_dataset, name, split, 16, tmp_path).match(f"no {split} of {name}")

def test_runs_see_one_channel_if_all_images_are_grey(tmp_path):
    for j, part in enumerate(("train", "train", "train", "test")):
        save_image(tmp_path / part / "x" / f"{j}.png", 40 * j, mode="L")
    cfg = config(pd, dataset="folder", data_dir=tmp_path)
    train, test = pd.load_sets(cfg)
    assert train.images.shape[1:] == (1, 16, 16) and train.images.is_contiguous() and len(test.images) == 1
    assert train.images[:, 0, 0, 0].tolist() == [0, 40, 80]
    save_image(tmp_path / "test/x/colour.png", (0, 0, 9))
    assert [data.images.shape[1] for data in pd.load_sets(cfg)] == [3, 3]

def test_images_that_are_not_square_keep_their_centre(tmp_path):
    for size, box in (((30, 10), (10, 0, 20, 10)), ((10, 30), (0, 10, 10, 20))):
        image = Image.new("RGB", size, (255, 0, 0))
        image.paste((0, 255, 0), box)
        image.save(tmp_path / "x.png")
        pixels = pd.decode(tmp_path / "x.png", 8)
        assert pixels[1, 1:-1, 1:-1].min() > 240 and pixels[0, 1:-1, 1:-1].max() < 15

def test_the_orientation_a_camera_noted_is_applied_unless_the_note_is_damaged(tmp_path):
    left, exif = np.tile(np.uint8([200] * 8 + [0] * 8), (16, 1)), Image.Exif()
    exif[0x0112] = 6                                                # shown after a quarter turn clockwise
    for note, seen in ((exif, left.T), (b"junk", left), (b"Exif\0\0MM", left)):
        Image.fromarray(left).save(tmp_path / "x.png", exif=note)
        assert (pd.decode(tmp_path / "x.png", 16).numpy() == seen).all()

@pytest.mark.parametrize("file, mode, colour, seen", [
    ("x.png", "RGBA", (0, 0, 0, 0), 255), ("x.png", "RGBA", (0, 0, 0, 128), 127), ("x.webp", "RGBA", (0, 0, 0, 0), 255),
    ("x.tif", "RGBA", (200, 30, 30, 0), 255), ("x.png", "LA", (0, 0), 255), ("x.png", "LA", (90, 255), 90),
    ("key.png", "P", 3, 255), ("key.gif", "P", 3, 255), ("key.png", "L", 3, 255), ("x.png", "P", 3, 0),
    ("x.tif", "CMYK", (255, 0, 0, 0), 0), ("x.tif", "CMYK", (0, 0, 0, 0), 255), ("x.tif", "LAB", (255, 128, 128), 254),
    ("x.png", "1", 1, 255), ("frames.gif", "L", 77, 77)])
def test_transparency_is_white_of_frames_the_first_and_other_pixels_what_they_were(tmp_path, file, mode, colour, seen):
    image = Image.new(mode, (8, 8), colour)
    if mode == "P":
        image.putpalette([0] * 768)
    how = dict(key=dict(transparency=3), frames=dict(save_all=True, append_images=[Image.new(mode, (8, 8))]))
    image.save(tmp_path / file, **how.get(file[:-4], {}))
    pixels = pd.decode(tmp_path / file, 8)
    assert pixels.shape == (3, 8, 8) and pixels.dtype == torch.uint8 and pixels[0, 4, 4] == seen

def test_mode_L_is_the_luminance_of_colours_and_exactly_the_value_of_greys(tmp_path):
    for colour in COLOURS:
        grey = pd.decode(save_image(tmp_path / "x.png", colour), 8, mode="L")
        assert grey.shape == (1, 8, 8) and abs(grey[0, 4, 4] - np.dot(colour, (0.299, 0.587, 0.114))) < 0.51
    for mode in ("L", "RGB", "RGBA"):
        Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert(mode).save(tmp_path / "x.png")
        assert pd.decode(tmp_path / "x.png", 16, mode="L").flatten().tolist() == [*range(256)], mode

def deep_png(kind, channels):
    """A PNG file of 8 x 8 pixels of 16 bits, which Pillow reads but does not write."""
    rows = zlib.compress(8 * (b"\0" + 8 * channels * struct.pack(">H", 1000)))
    chunks = b"IHDR" + struct.pack(">IIBBBBB", 8, 8, 16, kind, 0, 0, 0), b"IDAT" + rows, b"IEND"
    packed = [struct.pack(">I", len(x) - 4) + x + struct.pack(">I", zlib.crc32(x)) for x in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)

def test_more_than_8_bits_and_all_that_cannot_be_read_is_named_in_one_message(tmp_path, monkeypatch):
    good = [save_image(tmp_path / part / "x/good.png", 9) for part in ("train", "test")]
    huge, whole = save_image(good[0].with_name("huge.png"), 0, (20, 20)), good[0].read_bytes()
    deep = dict(grey=deep_png(0, 1), rgb=deep_png(2, 3), rgba=deep_png(6, 4), la=deep_png(4, 2))
    for name, content in {**deep, "half": whole[:len(whole) // 2], "text": b"no image", "empty": b""}.items():
        good[0].with_name(f"{name}.png").write_bytes(content)
    for dtype in ("<u2", ">u2", "<i4", "<f4"):
        Image.fromarray(np.full((8, 8), 100, dtype)).save(good[0].with_name(f"{dtype}.tif"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)             # an error from 300 on
    faults = str(pytest.raises(pd.Stop, load, tmp_path).value).removeprefix("these images cannot be read: ").split("; ")
    said = dict(fault.split(" (", 1) for fault in faults)
    assert [*said] == sorted(map(str, {*huge.parent.iterdir()} - {*good})), "all bad ones and no other"
    assert sum("more than 8 bits" in fault for fault in said.values()) == 8 and "300 pixels" in said[str(huge)]

@pytest.fixture
def pets(tmp_path):
    for i, name in enumerate(("train/cat/0", "train/cat/1", "train/dog/0", "train/dog/1", "test/cat/0", "test/dog/0")):
        os.utime(save_image(tmp_path / f"{name}.png", (9 * i + 9, 0, 0)), (1e9, 1e9))
    return tmp_path

def test_the_cache_is_used_instead_of_decoding_if_its_name_and_content_fit(pets, monkeypatch):
    first = load(pets)
    monkeypatch.setattr(pd, "decode", None)
    assert same(vars(load(pets)), vars(first))
    for split, size in (("train", 12), ("test", 8)):                # of another size or split is another cache
        pytest.raises(pd.Stop, load, pets, split, size).match("cannot be read")
    (pets / "prototype-folder-train-8.pt").write_bytes(b"half")
    pytest.raises(pd.Stop, load, pets).match("prototype-folder-train-8.pt is missing or damaged")

@pytest.mark.parametrize("name, width, later", [
    ("9.png", 0, 0), ("0.txt", 0, 0), ("0a.png", 10, 0), ("0.png", 30, 0), ("0.png", 10, 1)])
def test_a_folder_with_another_name_or_number_or_size_or_time_of_images_is_read_again(pets, name, width, later):
    _, file = load(pets), pets / "train/cat/0.png"
    time, size = file.stat().st_mtime_ns, file.stat().st_size
    if width:
        save_image(file.with_name(name), 99, (width, 10))
        os.utime(file.with_name(name), ns=(time, time + later))
        assert (file.stat().st_size == size) == (width == 10)
    else:
        file.rename(file.with_name(name))
    data, files = load(pets), sorted(pets.glob("train/*/*.png"))
    assert data.images.equal(torch.stack([pd.decode(file, 8) for file in files]))
    assert [data.classes[c] for c in data.labels] == [file.parent.name for file in files]

@pytest.mark.parametrize("room", [0, 20_000])                       # bytes; with some, the disk is full half-way
def test_a_data_folder_that_cannot_be_written_goes_without_cache(pets, room):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))    # a longer file cannot be written
    try:
        assert len(load(pets, size=64).images) == 4 and not [*pets.glob("*.pt")]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

def test_images_are_scaled_to_one_and_back():
    images = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    x = pd.scaled(images, torch.tensor([3, 0]), CPU)
    assert x.dtype == torch.float32 and torch.allclose(x, images[[3, 0]].double().div(127.5).sub(1).float(), atol=1e-6)
    assert pd.to_uint8(x).equal(images[[3, 0]]) and pd.to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]
