"""Folders of images as people have them: each is read as a person reads it, or refused in one sentence."""
import os
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import protodiffusion as pd
from conftest import args, checkpoint, flags, metrics, refused, samples
from test_data import load, save_image

NOT_UTF8 = os.fsdecode(b"caf\xe9")
PETS = ["cat:3", "dog:3"]
SPLIT = (["cat", "dog"], [2, 2], [1, 1])
PARTS = ["train/cat:3", "train/dog:3", "test/cat:2", "test/dog:2"]
KEPT = (["cat", "dog"], [3, 3], [2, 2])
# A name; what is there: cat:3 is a folder of three images, emu/ an empty one, x -> y a link, and all else a file; then
# what is read (classes, and images of each to train on and held out), or a part of the sentence that refuses it.
FOLDERS = [
    ("images", [":23"], ([], [20], [3])),
    ("one image", ["0.png"], ([], [1], [0])),
    ("classes", PETS, SPLIT),
    ("classes of many, two and one", ["cat:12", "dog:2", "emu:1"], (["cat", "dog", "emu"], [10, 1, 1], [2, 1, 0])),
    ("one image a class", ["cat:1", "dog:1"], (["cat", "dog"], [1, 1], [0, 0])),
    ("train", ["train/cat:3", "train/dog:3"], SPLIT),
    ("train without classes", ["train:4"], ([], [3], [1])),
    ("train and test", PARTS, KEPT),
    ("train and val", [name.replace("test", "val") for name in PARTS], KEPT),
    ("train, test and val", [*PARTS, "val/cat:3", "val/dog:1"], (["cat", "dog"], [3, 3], [5, 3])),
    ("hidden things", [*PETS, ".DS_Store", ".x/cat:2", "cat/.thumbs:2", "cat/._0.png", ".venv/lib/x/y:1"], SPLIT),
    ("a Mac's archive", [*PARTS, "__MACOSX/train/cat/._0.png", "__MACOSX/train/cat:1"], KEPT),
    ("a Synology drive", [*PETS, "@eaDir/x.png", "cat/@eaDir/0.png/THUMB_M.jpg", "#recycle/cat:2"], SPLIT),
    ("other drives", [*PETS, "$RECYCLE.BIN/S-1-5-21:2", "lost+found:2", "Thumbs.db", "cat/desktop.ini"], SPLIT),
    ("other files", [*PETS, "labels.csv", "cat/notes.txt", "cat/film.mp4", "cat.zip", "LICENSE", "doc/x.pdf"], SPLIT),
    ("empty folders", [*PETS, "emu/", "train/", "test/cat/"], SPLIT),
    ("NFC and NFD", ["train/caf\u00e9:3", "test/cafe\u0301:2"], (["caf\u00e9"], [3], [2])),
    ("spaces and commas", ["a, b:3", " a:3", "a :3"], ([" a", "a ", "a, b"], [2] * 3, [1] * 3)),
    ("symbols", ["$x_$:3", "*:3", "[ab]:3", "_:3"], (["$x_$", "*", "[ab]", "_"], [2] * 4, [1] * 4)),
    ("digits, cases", ["1:3", "10:3", "2:3", "A:3", "a:3"], ([*"1 10 2 A a".split()], [2] * 5, [1] * 5)),
    ("scripts", ["🐈:3", "猫:3", "חתול:3", "q\u0303:3"], (["q\u0303", "חתול", "猫", "🐈"], [2] * 4, [1] * 4)),
    ("names with parts in them", ["test tube:3", "trains:3"], (["test tube", "trains"], [2, 2], [1, 1])),
    ("files of any name", ["cat/a, b.png", f"cat/{NOT_UTF8}.png", "cat/猫.x.png", "dog:3"], SPLIT),
    ("endings", ["cat/0.JPG", "cat/1.jfif", "cat/2.webp", "dog/0.Tiff", "dog/1.gif", "dog/2.bmp"], SPLIT),
    ("links to classes", ["../x/cat:3", "../x/dog:3", "cat -> ../x/cat", "dog -> ../x/dog"], SPLIT),
    ("a link to train", ["../x/cat:3", "../x/dog:3", "train -> ../x"], SPLIT),
    ("a link to an image", ["../x/cat:1", "cat/0.png -> ../../x/cat/0.png", "cat/1.png", "cat/2.png", "dog:3"], SPLIT),
    ("links to nothing that are no images", [*PETS, "cat/x.txt -> y", "x -> y"], SPLIT),
    ("nothing", [], "or no image in it: wanted are"),
    ("no image but hidden ones", ["cat/x.txt", ".x:2", "._0.png", "__MACOSX/cat:2"], "or no image in it: wanted are"),
    ("a class called train", ["bus:3", "train:3"], "/train/0.png"),
    ("a class called train in train", ["train/bus:3", "train/train:3"], "/train/train/0.png"),
    ("a class called val", ["train/bus:3", "train/val:3"], "/train/val/0.png"),
    ("a class called test set", [*PETS, "test set:3"], "/test set/0.png"),
    ("a class called Test in both parts", [*PARTS, "train/Test:3", "test/Test:1"], "/test/Test/0.png"),
    ("training and testing", ["training/cat:3", "testing/cat:3"], "/testing/cat/0.png"),
    ("TRAIN and Test", ["TRAIN/cat:3", "Test/cat:2"], "/TRAIN/cat/0.png"),
    ("train2017 and val2017", ["train2017:3", "val2017:2"], "/train2017/0.png"),
    ("val_images", ["val_images:3"], "/val_images/0.png"),
    ("train and valid", ["train/cat:3", "valid/cat:2"], "/valid/cat/0.png"),
    ("train and validation without classes", ["train:3", "validation:2"], "/validation/0.png"),
    ("trainA, trainB, testA and testB", ["trainA:3", "trainB:3", "testA:2", "testB:2"], "/testA"),
    ("seg_train and seg_test", ["seg_train:3", "seg_test:2"], "seg_test"),
    ("a folder around parts", ["data/set/train/cat:3", "data/set/test/cat:2"], "/data/set/test/cat/0.png"),
    ("a folder in a class", ["train/cat/images:3", "train/cat/boxes.txt"], "/train/cat/images/0.png"),
    ("COCO", ["images/train2017:3", "images/val2017:2", "labels/train2017/0.txt"], "/images/train2017/0.png"),
    ("runs beside classes", [*PETS, "runs/x/samples.png"], "/runs/x/samples.png"),
    ("an environment", [*PETS, "env/lib/python3.11/site-packages/x/home.png"], "/site-packages/x/home.png"),
    ("an image beside classes", [*PETS, "overview.png"], "/overview.png"),
    ("images deep down", [*PETS, "x/1/2/3/4/5/6/7:1"], "/x/1/2/3/4"),
    ("a folder beside images", [":4", "thumbs:3"], "/thumbs/0.png"),
    ("folders in one class", [*PETS, "cat/small:2", "cat/x.png/"], "/cat/small/0.png"),
    ("a folder beside parts", [*PARTS, "unlabeled:3"], "/unlabeled/0.png"),
    ("test without classes", ["train/cat:3", "train/dog:3", "test:4"], "/test/0.png"),
    ("a class that test lacks", [*PARTS, "train/emu:3"], "/test has no images of emu"),
    ("a class that train lacks", [*PARTS, "test/emu:3"], "/train has no images of emu"),
    ("a class that val lacks", [*PARTS, "val/cat:3", "val/dog/"], "/val has no images of dog"),
    ("test alone", ["test/cat:3"], "/train has no images of cat"),
    ("a name that is no text", ["dog:3", f"{NOT_UTF8}:2"], f"/{NOT_UTF8}/0.png"),
    ("a link that leads back up", [*PETS, "cat/up -> .."], "/cat/up"),
    ("two links that lead back up", [*PETS, "cat/up -> ..", "dog/up -> .."], "/cat/up"),
    ("a link to no image", [*PETS, "cat/x.png -> y"], "/cat/x.png"),
    ("a folder called as an image is", ["cat.png:3", "dog:3"], "/cat.png"),
    ("a class of a telephone's images", ["cat:3", "dog/0.heic", "dog/1.heic"], ".heic (cannot identify"),
    ("a QNAP drive", [*PETS, "@Recycle:2"], SPLIT),
]

def colour(folder):
    """An image tells which folder it is in, and whether it is to be held out."""
    number = zlib.crc32(unicodedata.normalize("NFC", folder.name).encode(errors="surrogateescape"))
    return number & 255, number >> 8 & 255, 255 * bool({"test", "val"} & {*folder.parts[-2:]})

def make(root, tree):
    root.mkdir()
    for text in tree:
        name, _, target = text.partition(" -> ")
        folder, colon, n = name.rpartition(":")
        for path in [root / folder / f"{i}.png" for i in range(int(n))] if colon else [root / name]:
            path.parent.mkdir(parents=True, exist_ok=True)
            if target:
                path.symlink_to(target)
            elif name[-1] == "/":
                path.mkdir(exist_ok=True)
            elif path.suffix.lower() in pd.ENDINGS and path.suffix != ".heic":
                Image.new("RGB", (4, 4), colour(path.parent)).save(path)
            else:
                path.write_text("")
    return root

@pytest.mark.parametrize("tree, expected", [
    pytest.param(tree, expected, id=name) for name, tree, expected in FOLDERS])
def test_a_folder_is_read_as_a_person_reads_it_or_refused_in_a_sentence(tmp_path, monkeypatch, tree, expected):
    root, scans = make(tmp_path / "set", tree), []
    for name in ("scandir", "listdir"):
        def counted(*where, real=getattr(os, name)):
            scans.append(where)
            assert len(scans) < 1000, "links that lead in circles"
            if str(where).count("locked"):
                raise PermissionError(13, "Permission denied", str(where[0]))
            return real(*where)
        monkeypatch.setattr(os, name, counted)
    if isinstance(expected, str):
        with pytest.raises(pd.Stop) as stop:
            load(root, "train", 4), load(root, "test", 4)
        assert expected in str(stop.value) and str(root) in str(stop.value) and "\n" not in str(stop.value)
        return
    classes, *counts = expected
    for split, count in zip(("train", "test"), counts):
        data = load(root, split, 4)
        assert data.classes == classes and torch.bincount(data.labels, minlength=len(count)).tolist() == count
        assert split == "test" or (data.images[:, 2] < 9).all(), "what is in test/ or val/ is held out"
        seen = data.images[:, :2, 0, 0].tolist()
        assert np.allclose(seen, [colour(Path(classes[c]))[:2] for c in data.labels] if classes else seen, atol=9)

def test_a_folder_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "nowhere", save_image(tmp_path / "x.png", 0)):
        pytest.raises(pd.Stop, load, path).match(str(path))

def test_of_each_class_the_2nd_12th_22nd_in_a_fixed_random_order_is_held_out():
    items = [*enumerate([0] * 40 + [1] * 2 + [2] + [3] * 15)]
    order = [items[i] for i in torch.randperm(58, generator=torch.Generator().manual_seed(0))]
    wanted = [item for c in range(4) for item in [item for item in order if item[1] == c][1::10]]
    assert sorted(pd.split_off(items, False)) == sorted(wanted)
    assert sorted(pd.split_off(items, True) + wanted) == items

def test_many_classes_of_odd_names(script, tmp_path, monkeypatch, capsys):
    """A whole run. The first class has one image alone: none is held out."""
    names = ["!", "$x_$", "1", "12", "_low", "a, b", "caf\u00e9", *sorted(f"猫{i}" for i in range(30))]
    root, out = make(tmp_path / "set", ["!:1", *(f"{name}:2" for name in names[1:])]), tmp_path / "run"
    drawn, save = set(), Figure.savefig
    def note(figure, path, **how):
        save(figure, path, dpi=20)
        drawn.update(part.get_text().strip() for part in figure.findobj(lambda part: hasattr(part, "get_text")))
    monkeypatch.setattr(Figure, "savefig", note)
    def explain(cfg, run, sets, folder):                            # the one picture with names
        script.explain_when(cfg, run, sets, sets[1].images[:8], folder)
    monkeypatch.setattr(script, "explain", explain, raising=False)
    more = dict(pdm=dict(supervised=True), patronus=dict(attribute="12", watch="1")).get(script.SCRIPT, {})
    assert script.main(args(script, dataset="folder", data_dir=root, out=out, **more)) == 0
    assert "pictures have numbers for names that the font cannot draw" in capsys.readouterr().out
    assert {*names[1:7], "7", "8", "9"} <= drawn and "猫" not in "".join(drawn)
    assert metrics(out)["classes"] == checkpoint(out)["known"]["classes"] == names
    if script.SCRIPT != "patronus":
        assert np.load(out / "samples.npz")["classes"].tolist() == names
        flag = "labels" if script.SCRIPT == "protodiffusion" else "prototype"
        assert script.main([*flags(sample=out, num_samples=10, out=out / "asked"), f"--{flag}=$x_$,_low,猫3"]) == 0
        assert {names[i] for i in samples(out / "asked")[1]} == {"$x_$", "_low", "猫3"}
        refused(script, capsys, [*flags(sample=out), f"--{flag}=猫"], "!, $x_$, 1, 12, _low, a, b, caf\u00e9, 猫0, ")

def test_one_class_of_two_grey_images_and_one_image(script, tmp_path, monkeypatch, capsys):
    for i in range(12):
        save_image(tmp_path / f"set/{'train' if i < 2 else 'test'}/_only/{i}.png", 20 * i, (9, 9), "L")
    monkeypatch.setattr(script, "explain", lambda *a: None, raising=False)
    monkeypatch.setattr(Figure, "savefig", lambda *a, **how: None)
    given = args(script, dataset="folder", data_dir=tmp_path / "set", out=tmp_path / "run")
    assert script.main(given) == 0 and samples(tmp_path / "run")[0].shape == (20, 16, 16, 1)
    (tmp_path / "set/train/_only/0.png").unlink()
    refused(script, capsys, [*given[:-1], tmp_path / "too few"], "too few images")
    assert not (tmp_path / "too few").exists()

def test_a_title_may_have_dollars(tmp_path):
    pd.draw_grid(tmp_path / "x.png", torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["$x_$"], "$x_$ and $x_$")
