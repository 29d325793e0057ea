"""Handouts: bodies go, everything else stays, the judge accepts what is right and nothing else, and marks are just."""
import ast
import csv
import inspect
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import assignment
import bodies
import marking
from assignment import EXERCISES, ROOT, SCRIPTS, exercises_in, places, read, stub, taken_out, with_bodies, without_indent

def write(path, name, body):
    """Another body for an exercise, as a student would write it."""
    path.write_text(with_bodies(read(path), {name: body}), encoding="utf-8", newline="\n")

def put_back(handout):
    for path in SCRIPTS:
        shutil.copyfile(path, handout / path.name)

def run(handout, *words):
    """pytest in a handout -> its status, what it says."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, "-m", "pytest", handout / "tests", "-q", *words], capture_output=True,
                          encoding="utf-8", env=environment, cwd=handout.parent)
    return done.returncode, done.stdout + done.stderr

@pytest.fixture
def handout(tmp_path):
    assert assignment.main(["--out", str(tmp_path / "handout")]) == 0
    return tmp_path / "handout"

def stored(name):
    """The bodies of bodies.py for an exercise -> (what it does, body), with right or wrong in front."""
    held = getattr(bodies, name.replace(".", "_"))
    for label, function in inspect.getmembers(held, inspect.isfunction):
        yield label, without_indent(inspect.getsource(function).rstrip().split("\n")[1:])
    for label, edits in held.wrong.items():
        body = places(name)[0].body
        for old, new in zip(edits[::2], edits[1::2]):
            assert old in body, f"{name}, {label}: '{old}' is not in the body"
            body = body.replace(old, new)
        yield f"wrong {label}", body

def test_marks_and_table_are_of_the_same_exercises_in_every_script_that_has_them():
    assert {name for path in SCRIPTS for name in exercises_in(path)} == set(EXERCISES)
    for path in SCRIPTS:
        names = {node.name for node in ast.parse(read(path)).body if isinstance(node, ast.FunctionDef)}
        assert names & set(EXERCISES) == {name for name in exercises_in(path) if "." not in name}, f"{path.name}: a mark"
    for name, exercise in EXERCISES.items():
        assert 1 <= exercise.level <= 3 <= exercise.minutes and exercise.hint
        assert all(need in EXERCISES for need in exercise.needs.split(", ") if need)

def test_every_stored_body_and_every_stub_is_judged_as_it_should_be():
    jobs = [(name, label, body) for name in EXERCISES for label, body in (("wrong stub", stub(name)), *stored(name))]
    for name in EXERCISES:
        labels = [label for other, label, _ in jobs if other == name]
        assert sum(label.startswith("right") for label in labels) >= 2 and len(labels) >= 2 + 1 + 4, name
    said = marking.judged([(name, body) for name, _, body in jobs])
    astray = [(name, label, words) for (name, label, _), words in zip(jobs, said) if label.startswith("right") == bool(words)]
    assert not astray
    assert all("is an exercise" in words for (_, label, _), words in zip(jobs, said) if label == "wrong stub")

@pytest.mark.parametrize("body, words", [
    ("import os\nreturn os.getcwd()", "'os'"), ("from pathlib import Path", "import pathlib"), ("return open('x')", "open"),
    ("return torch.os.listdir()", "'os'"), ("torch.save(x0, '../x')", "save"), ("return eval('1')", "eval"),
    ("return ().__class__", "__class__"), ("return sys.exit()", "sys"), ("import torch.utils.cpp_extension", "utils"),
    ("from torch import hub", "hub"), ("global sys\nsys = 1", "global"), ("return __builtins__['open']", "__builtins__"),
    ("return getattr(torch, 'sa' + 've')", "getattr"), ("return getattr(torch, 'save')", "save"),
    ("return x0 +", "not Python"), ("return " + "-" * 5000 + "x0", "not Python")])
def test_what_a_body_may_not_use_is_refused_before_it_runs(body, words):
    assert words in marking.refused(body)
    assert marking.judged([("add_noise", body)]) == [marking.refused(body)]

def test_who_stops_early_is_not_right():
    answers = json.dumps([[["a", value] for value in marking.recorded()["invert"][:-1]], ""])
    assert marking.said_of("invert", answers) == "it stops before all is answered"

@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_body_gets_no_more_memory_than_there_is_for_one():
    [said] = marking.judged([("add_noise", "bytearray(5 << 30)\nreturn x0")])
    assert said.startswith("MemoryError")

def test_plain_bodies_are_not_refused():
    assert not marking.refused("import math\nimport torch.nn.functional as F\nfrom typing import Optional\ntime = trace = 1\n"
                               "code = math.pi * time\nreturn [code, getattr(x0, 'shape'), self._modules]")

def test_a_handout_differs_by_bodies_alone_and_holds_no_solution(handout):
    found = {path.relative_to(handout).as_posix() for path in handout.rglob("*") if path.is_file()}
    tests = {name for name in found if name.startswith("tests/")}
    assert tests == {f"tests/{name}" for name in ("assignment.py", "conftest.py", "test_exercises.py", "recorded.json")}
    assert {"README.md", "LICENSE", "requirements.txt", "pytest.ini", "tutorial.ipynb"} <= found
    assert not [name for name in found if any(part in name for part in (".git/", "cache", "runs/", "data/"))]
    texts = "\n".join(read(handout / name) for name in found if name.endswith((".py", ".md"))) + "\n".join(
        "".join(cell["source"]) + "\n" for cell in json.loads(read(handout / "tutorial.ipynb"))["cells"])
    plain = "\n".join(line.strip() for line in texts.split("\n"))
    for path in SCRIPTS:
        for name, place in exercises_in(path).items():
            empty = exercises_in(handout / path.name)[name]
            assert empty.docstring == place.docstring and not empty.body and empty.line, f"{name} in {path.name} has a body"
            assert "\n".join(line.strip() for line in place.body.split("\n")) not in plain, f"{name} is solved"
    assert json.loads(read(handout / "handout.json")) == {n: [place.script for place in places(n)] for n in EXERCISES}
    readme = read(handout / "README.md")
    assert "## For students" in readme and "## For teachers" not in readme and "MIT licence" in readme
    for path in SCRIPTS:
        text = with_bodies(read(handout / path.name), {name: place.body for name, place in exercises_in(path).items()})
        assert text == read(path)

def test_chosen_exercises_go_in_every_script_and_the_others_stay(tmp_path, capsys):
    assert assignment.main(["add_noise", "PDM.learn", "--out", str(tmp_path)]) == 0, "an empty folder is fine"
    assert "2 exercises" in capsys.readouterr().out
    for path in SCRIPTS:
        for name, place in exercises_in(path).items():
            same = exercises_in(tmp_path / path.name)[name].body == place.body
            assert same == (name not in ("add_noise", "PDM.learn")), f"{name} in {path.name}"

@pytest.mark.parametrize("arguments, words", [
    (["--out", "new", "add_noise", "add_nose"], "no exercise 'add_nose': choose of add_noise"), ([], "--out"),
    (["--out", "full"], "full is there already"), (["--out", "full/kept.txt"], "kept.txt is there already"),
    (["--out", "new", "--mark", "nowhere"], "nowhere is no folder"), (["--out", "new", "--mark", "full"], "holds no folder"),
    (["--out", "full", "--mark", "."], "full is there already"), (["--mark", "."], "--out"),
    (["--out", "new", "--mark", ".", "--points", "full/kept.txt"], "'mine' is not an exercise and its points")])
def test_what_cannot_be_done_is_one_sentence_and_changes_nothing(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept.txt").write_text("mine", encoding="utf-8")
    assert assignment.main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "kept.txt"]

def test_as_a_program_it_ends_with_status_2_and_one_sentence(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tests/assignment.py", "--mark", "nowhere", "--out", "marks"], cwd=tmp_path,
                          capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (2, "assignment: nowhere is no folder: it holds a folder a student\n")

@pytest.mark.parametrize("content, words", [
    (b"exercise,points\nadd_noise;2\n", "add_noise;2"), (b"add_noise,1\nadd_noise,2\n", "each once"), (b"", "no points"),
    ("add_noise,1".encode("utf-16"), "UTF-8"), (b"add_noise,-1", "-1"), (b"auroc,1", "no points")])
def test_points_that_cannot_be_read(tmp_path, content, words):
    (tmp_path / "points").write_bytes(content)
    with pytest.raises(assignment.Stop, match=words):
        marking.read_points(tmp_path / "points", ["add_noise"])

def test_points_are_of_the_names_asked_for_and_the_levels_without_a_file(tmp_path):
    (tmp_path / "points").write_bytes(b"\xef\xbb\xbfExercise,Points\r\nauroc, 2.5\r\n\r\nadd_noise,1\r\n")
    assert marking.read_points(tmp_path / "points", []) == dict(auroc=2.5, add_noise=1)
    assert marking.read_points(tmp_path / "points", ["auroc"]) == dict(auroc=2.5)
    assert marking.read_points(None, ["auroc", "invert"]) == dict(auroc=2, invert=3)

def test_what_counts_of_the_files_that_a_student_sent(tmp_path):
    names = ["auroc", "add_noise", "dce_loss", "activation", "compactness_loss", "invert"]
    (tmp_path / "a").mkdir()
    (tmp_path / "elsewhere.py").write_text("def dce_loss(d, y, gamma=2.0):\n    return d", encoding="utf-8")
    (tmp_path / "a/protodiffusion.py").symlink_to(tmp_path / "elsewhere.py")
    (tmp_path / "a/pdm.py").write_bytes("def add_noise(x0, t, eps, abar):\n    return 'M\xfcll'".encode("latin-1"))
    (tmp_path / "a/patronus.py").write_bytes(b"\xef\xbb\xbfdef auroc(\r\n        score,\r\n        positive):\r\n\t# mine\r\n\treturn 1\r\n# no\r\n"
                                             b"def activation(x):\r\n    return x\r\ndef invert(predict, x0, abar, steps):\r\n"
                                             b"    # later\r\n    raise NotImplementedError('invert is an exercise')\r\n")
    found = marking.sent(tmp_path / "a", names)
    assert found["auroc"] == ("return 1", "") and found["activation"][1] == "its arguments are (x) and must be (d)"
    assert found["dce_loss"] == ("", "protodiffusion.py is not there") and "is not there" in found["add_noise"][1]
    assert "pdm.py cannot be read as UTF-8" in found["compactness_loss"][1]
    assert found["invert"] == ("", "it is not written in patronus.py")

def test_a_handout_lists_its_state_and_copies_a_body_to_where_else_it_belongs(handout, monkeypatch, capsys):
    assert assignment.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in EXERCISES) and "builds on: add_noise" in said and "state:" not in said
    monkeypatch.setattr(assignment, "ROOT", handout)
    monkeypatch.setattr(assignment, "SCRIPTS", [handout / path.name for path in SCRIPTS])
    assert assignment.main(["--list"]) == 0 and capsys.readouterr().out.count("state: to do") == len(EXERCISES)
    assert assignment.main(["--copy", "add_noise"]) == 2 and "in no script yet" in capsys.readouterr().err
    write(handout / "pdm.py", "add_noise", "# mine\nreturn x0")
    write(handout / "patronus.py", "activation", "return (d +")
    assert assignment.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert "written in pdm.py; --copy add_noise puts it into protodiffusion.py, patronus.py" in said
    assert "cannot be read: patronus.py, line" in said
    assert assignment.main(["--copy", "add_noise"]) == 2 and "into patronus.py, line" in capsys.readouterr().err
    (handout / "patronus.py").write_text(read(handout / "patronus.py").replace("return (d +", "return d"), encoding="utf-8")
    assert assignment.main(["--copy", "add_noise"]) == 0
    assert all(place.body == "# mine\nreturn x0" for place in places("add_noise"))
    before = [read(handout / path.name) for path in SCRIPTS]
    write(handout / "pdm.py", "add_noise", "return eps")
    write(handout / "protodiffusion.py", "add_noise", stub("add_noise"))
    assert assignment.main(["--copy", "add_noise"]) == 2 and "pdm.py, patronus.py" in capsys.readouterr().err
    assert assignment.main(["--list", "add_noise"]) == 0 and "differs between pdm.py, patronus.py" in capsys.readouterr().out
    assert read(handout / "patronus.py") == before[2]
    assert assignment.main(["--out", str(handout / "new")]) == 2 and "is a handout itself" in capsys.readouterr().err

def test_the_judge_of_a_handout_says_what_to_do_next(handout):
    write(handout / "protodiffusion.py", "add_noise", "a = abar[t][:, None, None, None]\nreturn a * x0 + (1 - a) * eps")
    write(handout / "pdm.py", "alignment_loss", dict(stored("alignment_loss"))["right_by_hand"])
    write(handout / "pdm.py", "noise_loss", dict(stored("noise_loss"))["right_by_hand"])
    for name, body in (("frechet_distance", "return 1"), ("activation", "return (d +")):
        write(handout / "patronus.py", name, body)
    write(handout / "pdm.py", "frechet_distance", dict(stored("frechet_distance"))["right_root_of_the_other"])
    with ThreadPoolExecutor() as pool:
        (status, said), (_, unknown) = pool.map(lambda words: run(handout, *words), ([], ["-k", "noise_los_"]))
    assert status == 1
    failed = {line.split("[")[1].split("]")[0] for line in said.splitlines() if line.startswith("FAILED")}
    assert failed == set(EXERCISES) - {"alignment_loss", "noise_loss"}, "frechet_distance: for its two texts"
    said = said.split("short test summary")[0]                      # which repeats the messages where CI is set
    assert said.count("Look at: ") == 1 and EXERCISES["add_noise"].hint in said, "a hint after an attempt, no other"
    assert "activation cannot be read: patronus.py, line" in said and "auroc is an exercise, and not written yet" in said
    assert "noise_loss: written in pdm.py; --copy noise_loss puts it into protodiffusion.py, patronus.py" in said
    assert "frechet_distance is right in pdm.py, but differs between pdm.py and patronus.py" in said
    assert "exercises are add_noise, noise_loss" in unknown
    put_back(handout)
    status, said = run(handout)
    assert status == 0, said

def test_a_class_is_marked(handout, tmp_path, capsys):
    """Seven students, whose handouts lie in a folder of their own, one of them deeper down."""
    sent, points = tmp_path / "sent", {"add_noise": 2, "dce_loss": 3.5, "auroc": 1, "invert": 4}
    (tmp_path / "points.csv").write_text("exercise,points\n" + "".join(f"{n},{p}\n" for n, p in points.items()))
    for student in ("perfect", "empty", "wrong", "syntax", "endless", "tampered", "l\udcffser"):
        shutil.copytree(handout, sent / student / ("deeper" if student == "perfect" else "."))
        if student != "empty":
            put_back(sent / student / ("deeper" if student == "perfect" else "."))
    write(sent / "wrong/protodiffusion.py", "dce_loss", dict(stored("dce_loss"))["wrong gamma of the paper always"])
    for path in SCRIPTS:                                            # a mistake in one function, in every script
        write(sent / "syntax" / path.name, "add_noise", "return (x0")
        write(sent / "tampered" / path.name, "add_noise", "return x0")
    write(sent / "endless/patronus.py", "invert", "while True:\n    print('on and on')")
    write(sent / "endless/patronus.py", "auroc", "raise SystemExit(0)")
    write(sent / "tampered/patronus.py", "auroc", "open('tests/recorded.json', 'w').write('{}')")
    for path in SCRIPTS:
        write(sent / "l\udcffser" / path.name, "add_noise", "math.isclose = lambda *a, **k: True\nreturn helper(x0)")
    write(sent / "l\udcffser/patronus.py", "auroc", "raise ValueError('\\udc00\\n## auroc: 1 of 1')")
    (sent / "tampered/tests/test_exercises.py").write_text("def test_all():\n    pass\n")
    (sent / "tampered/tests/recorded.json").write_text("{}")
    (sent / "notes.txt").write_text("no student")
    assert assignment.main(["--mark", str(sent), "--points", str(tmp_path / "points.csv"), "--out", str(tmp_path / "marks"),
                            "--seconds", "6"]) == 0
    with open(tmp_path / "marks/marks.csv", newline="", encoding="utf-8-sig") as file:
        marks = {row.pop("student"): {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)}
    lost = dict(perfect=[], empty=[*points], wrong=["dce_loss"], syntax=["add_noise"], endless=["auroc", "invert"],
                tampered=["add_noise", "auroc"]) | {"l\\xffser": ["add_noise", "auroc"]}
    for student, missing in lost.items():
        own = {name: 0 if name in missing else value for name, value in points.items()}
        assert marks[student] == dict(total=sum(own.values()), **own), student
        page = read(tmp_path / f"marks/feedback/{student}.md")
        result = json.loads(read(tmp_path / f"marks/gradescope/{student}/results.json"))["tests"]
        assert f"{sum(own.values()):g} of 10.5 points" in page
        assert [(test["name"], test["score"], test["max_score"]) for test in result] == [(n, own[n], points[n]) for n in points]
        assert all(f"## {name}: 0 of" in page and EXERCISES[name].hint in page for name in missing)
    assert set(marks) == set(lost) and "perfect" in capsys.readouterr().out
    endless = read(tmp_path / "marks/feedback/endless.md")
    assert "more than 6 seconds" in endless and "SystemExit" in endless
    assert "protodiffusion.py, line" in read(tmp_path / "marks/feedback/syntax.md")
    assert "nothing counts but the body" in page and "\n## auroc: 1 of 1" not in page, "of the last"
    workflow = read(tmp_path / "marks/classroom.yml")
    assert all(f"test-name: {name}\n" in workflow and f"-k {name}\n" in workflow for name in points)
    assert "max-score: 3.5" in workflow and "runners: add-noise,dce-loss,auroc,invert" in workflow
    assert not taken_out(ROOT)
