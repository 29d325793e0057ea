"""Folders of images as people have them: layouts, kinds of pixels, names of classes, and odd sets that are trained."""
import os
from collections import Counter

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.text import Text
from PIL import Image

import protodiffusion as pd
from conftest import args, checkpoint, config, flags, metrics, refused, samples
from test_data import COLOURS, load, make_folder, near, save_image

NOT_UTF8 = os.fsdecode(b"caf\xe9")

def counts(root, split):
    """The number of images of each class."""
    data = load(root, split)
    return torch.bincount(data.labels, minlength=len(data.classes)).tolist()

def save_values(path, value, dtype):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), value, dtype)).save(path)

def pixels(root, split="train"):
    """One value of each image."""
    return load(root, split).images[:, 0, 4, 4].tolist()

# Say what was found

def test_what_was_found_is_said_in_one_line_and_in_the_result(tmp_path, capsys):
    names = [f"c{i:02}" for i in range(12)]
    make_folder(tmp_path, [*(f"train/{name}" for name in names), "test/c03", "val/c05", "runs/x", "env/icons"], each=2)
    for name in ("notes.txt", "train/more.txt", ".hidden", "train/c01/._0.png", "LICENSE", "env/pyvenv.cfg"):
        (tmp_path / name).write_text("")
    pd.load_sets(config(pd, dataset="folder", data_dir=tmp_path))
    line, *more = capsys.readouterr().out.splitlines()
    assert not more and str(load(tmp_path)) in line
    for words in ("24 images of 12 classes", f"({', '.join(names[:10])}, ...)", "in colour", "2 held-out images",
                  "2 .txt", "2 hidden", "1 runs/", "1 env/", "1 without ending", "2 val"):
        assert words in line, words
    flat = [save_image(tmp_path / f"flat/{i}.png", 9, mode="L") for i in range(2)]
    assert str(load(flat[0].parent)) == "1 images of no classes (), in grey; left out: nothing"

def test_long_decoding_shows_progress(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(pd, "progress", lambda text, *end: said.append(text))
    load(make_folder(tmp_path, ["train/a", "train/b", "test/b"]))
    assert said == [f"decoding: {i}/6" for i in range(1, 7)]

# Layouts

@pytest.mark.parametrize("parts", [
    ["train/a", "train/b", "val/b"], ["Train/a", "TRAIN/b", "VALID/b"], ["training/a", "training/b", "testing/b"],
    ["train/a", "train/b", "val/a", "test/b"], ["data/set/train/a", "data/set/train/b", "data/set/Validation/b"],
    ["train/a/deeper/x", "train/b", "test/b/deeper"], ["train/a", "train/b", "test/b", "runs/x/y", ".cache/x"]])
def test_parts_are_known_by_their_usual_names_also_a_folder_too_deep(tmp_path, parts):
    make_folder(tmp_path, parts)
    assert load(tmp_path).classes == ["a", "b"]
    assert (counts(tmp_path, "train"), counts(tmp_path, "test")) == ([3, 3], [0, 3])

@pytest.mark.parametrize("parts, classes", [
    (["train", "bus"], ["bus", "train"]), (["one/a/Test", "one/a/bus"], ["Test", "bus"]),
    (["x/y/a", "x/y/b"], ["a", "b"]), (["train/val", "train/test"], ["test", "val"]), (["a", "b", "runs"], ["a", "b"])])
def test_a_class_may_be_called_train_and_what_has_no_parts_is_split(tmp_path, parts, classes):
    make_folder(tmp_path, parts)
    assert load(tmp_path).classes == classes
    assert (counts(tmp_path, "train"), counts(tmp_path, "test")) == ([2, 2], [1, 1])

def test_parts_may_hold_images_without_classes(tmp_path):
    make_folder(tmp_path, ["data/training", "data/val"], each=4)
    for split, colour in zip(("train", "test"), COLOURS):
        data = load(tmp_path, split)
        assert data.labels is None and len(data.images) == 4 and near(data.images[0], colour, 0)

@pytest.mark.parametrize("parts", [["test/a"], ["train/a", "x/a"], ["train", "train/a"], ["train/a", "test/b"], []])
def test_a_layout_that_is_not_understood_is_described(tmp_path, parts):
    with pytest.raises(pd.Stop, match=f"images are in {', '.join(sorted(parts)) or 'no folder'}: give train/<class>"):
        load(make_folder(tmp_path, parts))

def test_folders_may_be_links_but_not_lead_back_up(tmp_path):
    make_folder(tmp_path / "real", ["a", "b"])
    (tmp_path / "set").mkdir()
    (tmp_path / "whole").mkdir()
    for link, target in (("set/a", "real/a"), ("set/b", "real/b"), ("real/a/up", "real"), ("whole/train", "real")):
        (tmp_path / link).symlink_to(tmp_path / target)
    for root in (tmp_path / "set", tmp_path / "whole"):
        assert load(root).classes == ["a", "b"] and counts(root, "train") == [2, 2] and load(root).left_out == "1 up/"

# Splitting

def test_every_class_is_split_and_keeps_an_image_to_train_on():
    items = [(i, c) for i, c in enumerate([0] * 40 + [1] * 2 + [2] + [3] * 15)]
    train, test = (pd.seeded_split(items, part) for part in (True, False))
    assert sorted(train + test) == items
    kept, held_out = (Counter(label for _, label in part) for part in (train, test))
    assert kept == {0: 36, 1: 1, 2: 1, 3: 13} and held_out == {0: 4, 1: 1, 3: 2}
    with pytest.raises(pd.Stop, match="no class has two images"):
        pd.seeded_split([(0, 0), (1, 1)], True)

# Pixels

@pytest.mark.parametrize("dtype, ending, values", [
    (np.uint16, "png", [0, 1024, 4095]), (np.uint16, "tif", [100, 150, 300]), (">u2", "tif", [0, 1024, 4095]),
    (np.int32, "tif", [-100_000, 0, 300_000]), (np.float32, "tiff", [-1, -0.5, 1])])
def test_deep_pixels_keep_their_order_in_one_range_for_the_whole_set(tmp_path, dtype, ending, values):
    low, middle, high = values
    for file, value in (("train/x/0", low), ("train/x/1", middle), ("test/x/0", high)):
        save_values(tmp_path / f"{file}.{ending}", value, dtype)
    save_image(tmp_path / "train/x/2.png", 77, mode="L")            # of 8 bits: as it is
    share = round((middle - low) / (high - low) * 255)
    assert (pixels(tmp_path), pixels(tmp_path, "test")) == ([0, share, 77], [255])
    assert load(tmp_path).span == (low, high)
    save_values(tmp_path / f"test/x/1.{ending}", 2 * high - low, dtype)         # twice the range: all are read again
    assert pixels(tmp_path, "test") == [128, 255] and abs(pixels(tmp_path)[1] - share / 2) <= 1

@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers_do_not_widen_the_range(tmp_path, odd):
    for i, value in enumerate((1000, 2000, 3000)):
        save_values(tmp_path / f"train/x/{i}.tif", value, np.float32)
    save_values(tmp_path / "test/x/0.tif", [odd, *7 * [3000]], np.float32)      # a column at the left
    assert (pixels(tmp_path), pixels(tmp_path, "test")) == ([0, 128, 255], [255])

@pytest.mark.parametrize("file, mode, colour, seen", [
    ("x.png", "RGBA", (0, 0, 0, 0), 255), ("x.png", "RGBA", (0, 0, 0, 128), 127), ("x.webp", "RGBA", (0, 0, 0, 0), 255),
    ("x.tif", "RGBA", (200, 30, 30, 0), 255), ("x.png", "LA", (0, 0), 255), ("x.png", "LA", (90, 255), 90),
    ("key.png", "P", 3, 255), ("key.gif", "P", 3, 255), ("key.png", "L", 3, 255), ("x.png", "P", 3, 0),
    ("x.tif", "CMYK", (255, 0, 0, 0), 0), ("x.tif", "CMYK", (0, 0, 0, 0), 255), ("x.tif", "LAB", (255, 128, 128), 254),
    ("x.png", "1", 1, 255)])
def test_transparency_is_white_and_other_pixels_are_what_they_were(tmp_path, file, mode, colour, seen):
    image = Image.new(mode, (8, 8), colour)
    if mode == "P":
        image.putpalette([0] * 768)
    image.save(tmp_path / file, **(dict(transparency=3) if "key" in file else {}))
    assert pd.decode(tmp_path / file, 8)[0, 4, 4] == seen

def test_a_damaged_note_of_the_camera_turns_nothing(tmp_path):
    image = Image.new("RGB", (8, 8), "red")
    image.paste("blue", (0, 0, 4, 8))
    for exif in (b"junk", b"Exif\0\0MM"):
        image.save(tmp_path / "x.png", exif=exif)
        assert pd.decode(tmp_path / "x.png", 8)[2].tolist() == 8 * [4 * [255] + 4 * [0]]

def test_the_usual_endings_are_images_and_of_several_frames_the_first(tmp_path):
    red, black = Image.new("RGB", (8, 8), (200, 30, 30)), Image.new("RGB", (8, 8))
    for i, ending in enumerate("png JPG jpeg jfif jpe gif bmp tif TIFF webp ppm jp2 avif".split()):
        if f".{ending.lower()}" in Image.registered_extensions():   # AVIF where Pillow reads it
            several = dict(save_all=True, append_images=[black]) if ending in ("gif", "tif", "png") else {}
            red.save(tmp_path / f"{i}.{ending}", Image.registered_extensions()[f".{ending.lower()}"], **several)
    made = len([*tmp_path.iterdir()])
    (tmp_path / "film.mp4").write_text("")
    data = [load(tmp_path, split) for split in ("train", "test")]
    assert made >= 12 and sum(len(part.images) for part in data) == made and data[0].left_out == "1 .mp4"
    assert all(near(part.images, (200, 30, 30), 8) for part in data)

def test_all_images_that_do_not_decode_are_named_and_the_others_read_once(tmp_path, monkeypatch):
    make_folder(tmp_path, ["train/a", "train/b", "test/a"])
    bad, read, decode = [tmp_path / f"train/{name}.png" for name in ("a/0", "b/2", "b/link")], [], pd.decode
    monkeypatch.setattr(pd, "decode", lambda file, *how: read.append(file) or decode(file, *how))
    for path in bad[:2]:
        path.write_bytes(b"no image")
    bad[2].symlink_to("gone")
    for _ in range(2):
        with pytest.raises(pd.Stop) as stop:
            load(tmp_path)
        assert all(str(path) in str(stop.value) for path in bad)
    assert len(set(read)) == 7 and len([path for path in read if path not in bad]) == 4
    read.clear()
    for path in bad:
        save_image(path, (1, 2, 3))
        os.utime(path, (2e9, 2e9))
    images = load(tmp_path).images
    assert sorted(read) == bad and near(images[[0, 5, 6]], (1, 2, 3), 0) and near(images[1], COLOURS[0], 3)

def test_images_that_are_too_large_are_named_with_the_limit_and_tried_again(tmp_path, monkeypatch):
    """The same files may become readable: by another limit, another Pillow or a chmod."""
    make_folder(tmp_path, ["train/a", "test/a"])
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
        with pytest.raises(pd.Stop, match=r"/\d.png does not decode .*\(100 pixels\) exceeds limit of 80 pixels"):
            load(tmp_path)
    assert near(load(tmp_path).images[0], COLOURS[0], 0)

# Names

@pytest.mark.parametrize("text, classes, labels", [
    ("", ["a", "b"], [0, 1]), ("1, b", ["a", "b"], [1, 1]), ("1,12", ["1", "12", "2"], [0, 1]),
    ('"a, b",c', ["a, b", "c"], [0, 1]), ('"""a"""," b"', [" b", '"a"'], [1, 0]),
    (f"$x,_,猫,{NOT_UTF8}", [pd.readable(NOT_UTF8), "猫", "_", "$x"], [3, 2, 1, 0])])
def test_any_name_can_be_asked_for_and_a_number_has_one_meaning(text, classes, labels):
    assert pd.asked_labels(text, classes) == labels

@pytest.mark.parametrize("text, classes", [
    ("0", ["1", "2", "10"]), ("0", ["a", "7"]), ("2", ["a", "b"]), ("a", ["a, b"]), ("a\nb", ["a"])])
def test_a_class_that_is_not_there_is_refused_with_the_names(text, classes):
    with pytest.raises(pd.Stop, match=f"'{text}': give .*{', '.join(classes)}"):
        pd.asked_labels(text, classes)

# Odd sets, in whole runs of all scripts

@pytest.fixture
def drawn(monkeypatch):
    """For each picture that was drawn, its texts, and the largest side of a table in it."""
    found, save = {}, Figure.savefig

    def note(figure, path, **how):
        save(figure, path, **how)
        tables = [image.get_array() for image in figure.findobj(AxesImage)]
        found[path.name] = ({text.get_text().strip() for text in figure.findobj(Text)},
                            max([max(table.shape) for table in tables if table.ndim == 2], default=0))
    monkeypatch.setattr(Figure, "savefig", note)
    return found

@pytest.mark.filterwarnings("ignore:Glyph")
def test_many_classes_of_odd_names_and_two_images_that_are_alike(script, tmp_path, drawn, capsys):
    """And the first class has one image alone: among held-out images this trait never occurs."""
    root, out = tmp_path / "set", tmp_path / "run"
    folders = ["!", "$x_$", "1", "12", "2", "_low", "a, b", NOT_UTF8, *sorted(f"猫{i}" for i in range(200))]
    names = [script.readable(name) for name in folders]
    for name in folders:
        for j in range(1 + (name != "!")):
            save_image(root / name / f"{j}.png", (9, 9, 9))
    more = dict(supervised=True) if script.SCRIPT == "pdm" else {}
    assert script.main(args(script, dataset="folder", data_dir=root, out=out, **more)) == 0
    assert metrics(out)["classes"] == names and checkpoint(out)["step"] == 6
    assert all(len(texts & {*names}) <= 40 and side <= 100 for texts, side in drawn.values()), "however many classes"
    if script.SCRIPT == "patronus":
        assert {*names[:8]} <= drawn["when.png"][0] and len(metrics(out)) < 200
        return
    assert {*names[:8]} <= drawn["denoising.png"][0]
    assert np.load(out / "samples.npz")["classes"].tolist() == names
    asked = [*flags(sample=out, num_samples=10), '--labels=$x_$,12,_low,"a, b",猫3,' + NOT_UTF8]
    assert script.main(asked) == 0
    assert {names[i] for i in samples(out / "samples")[1]} == {*names[1:8], "猫3"} - {"1", "2"}
    refused(script, capsys, [*flags(sample=out), "--labels=0"], "'0'", "!, $x_$, 1, 12, 2, _low")

def test_one_class_of_two_deep_images_and_what_is_like_them(script, tmp_path, capsys, monkeypatch):
    """Fewer than in a batch; then images for --like and --edit: of 16 bits, and transparent."""
    root, out = tmp_path / "set", tmp_path / "run"
    for i, value in enumerate((0, 1024, *range(2048, 4096, 256), 4095)):
        save_values(root / ("train" if i < 2 else "test") / "_only" / f"{i}.png", value, np.uint16)
    assert script.main(args(script, dataset="folder", data_dir=root, out=out)) == 0
    assert capsys.readouterr().out.startswith("folder: 2 images of 1 classes (_only), in grey")
    assert samples(out)[0].shape == (20, 16, 16, 1) and checkpoint(out)["known"]["span"] == (0, 4095)
    seen, decode = [], script.decode
    monkeypatch.setattr(script, "decode", lambda *how: seen.append(decode(*how)) or seen[-1])
    save_image(tmp_path / "clear.png", (0, 0, 0, 0), mode="RGBA")
    if script.SCRIPT != "protodiffusion":
        for file in (root / "train/_only/1.png", tmp_path / "clear.png"):
            asked = dict(sample=out, like=file) if script.SCRIPT == "pdm" else dict(model=out, edit=file, set="0=1")
            assert script.main(flags(**asked)) == 0
        assert [image.unique().tolist() for image in seen] == [[64], [255]]
    if script.SCRIPT == "patronus":                                 # and if there is another class, held out nowhere
        loaded, sets = script.load_run(out), script.load_traits(script.load_run(out).config)
        sets[0].classes = sets[1].classes = ["_only", "never"]
        figures = script.measure_traits(loaded.config, loaded, sets)[0]
        assert "kept__only" in figures and "leak" not in figures
