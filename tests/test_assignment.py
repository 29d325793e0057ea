"""Handouts: bodies go, everything else stays, tests judge each exercise, and the originals put back satisfy them."""
import ast
import json
import os
import subprocess
import sys
import xml.etree.ElementTree
from collections import Counter

import pytest

import assignment
import test_same_text
from assignment import EXERCISES, ROOT, SCRIPTS, functions, marked, places

def read(path):
    return path.read_text(encoding="utf-8")

def source(text, name):
    """The text of a function or method, from def to its last line."""
    node = functions(text)[name]
    return "\n".join(text.split("\n")[node.lineno - 1:node.end_lineno])

def write(path, name, body):
    """Another text for a function of a script in a handout, as a student would write it."""
    path.write_text(read(path).replace(source(read(path), name), body), encoding="utf-8", newline="\n")

def put_back(handout):
    for path in SCRIPTS:
        for name in marked(read(path)):
            write(handout / path.name, name, source(read(path), name))

def judge(handout):
    """pytest handout/tests -k all exercises -> names of tests that passed, of those that failed, output."""
    report = handout.parent / "report.xml"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1"}
    command = [sys.executable, "-m", "pytest", handout / "tests", "-k", " or ".join(EXERCISES), "--tb=native"]
    done = subprocess.run([*command, f"--junitxml={report}"], capture_output=True, encoding="utf-8", env=environment,
                          cwd=handout.parent)
    cases = [(case.get("name").split("[")[0], len(case) > 0)
             for case in xml.etree.ElementTree.parse(report).iter("testcase")]
    failed = {name for name, bad in cases if bad}
    return {name for name, _ in cases} - failed, failed, done.stdout

@pytest.fixture
def handout(tmp_path):
    assert assignment.main(["--out", str(tmp_path / "handout")]) == 0
    return tmp_path / "handout"

def test_marks_and_table_are_of_the_same_exercises_and_every_judge_is_a_test():
    assert set(places()) == set(EXERCISES) and all(len(marked(read(path))) >= 6 for path in SCRIPTS)
    tests = Counter(name for path in (ROOT / "tests").glob("test_*.py") for name in functions(read(path)))
    for name, (look_at, *judges) in EXERCISES.items():
        assert look_at and judges and all(tests[test] == 1 for test in judges), name
        marks = [path.name for path in SCRIPTS if name in marked(read(path))]
        assert marks == [path.name for path in SCRIPTS if name in functions(read(path))], f"{name}: a mark is missing"

def test_a_handout_differs_by_bodies_alone_and_holds_no_solution(handout):
    found = {path.relative_to(handout).as_posix() for path in handout.rglob("*") if path.is_file()}
    assert {"README.md", "LICENSE", "requirements.txt", "pytest.ini", "tests/conftest.py", "tests/test_pdm.py"} <= found
    assert not [name for name in found if any(part in name for part in (".git/", "cache", "runs/", "data/", "_assign"))]
    texts = "\n".join(read(handout / name) for name in found if name.endswith((".py", ".md"))) + "\n".join(
        "".join(cell["source"]) + "\n" for cell in json.loads(read(handout / "tutorial.ipynb"))["cells"])
    for path in SCRIPTS:
        lines = read(path).split("\n")
        for name, node in marked(read(path)).items():
            stub = marked(read(handout / path.name))[name]
            assert ast.dump(stub.args) == ast.dump(node.args) and ast.get_docstring(stub) == ast.get_docstring(node)
            assert len(stub.body) == 2 and isinstance(stub.body[1], ast.Raise), f"{name} in {path.name} has a body"
            assert "\n".join(lines[node.body[0].end_lineno:node.end_lineno]).strip() not in texts, f"{name} is solved"
    assert json.loads(read(handout / "handout.json")) == {n: [s for s, *_ in held] for n, held in places().items()}
    put_back(handout)
    assert all(read(path) == read(handout / path.name) for path in SCRIPTS)

def test_chosen_exercises_go_in_every_script_and_the_others_stay(tmp_path, capsys):
    assert assignment.main(["add_noise", "PDM.learn", "--out", str(tmp_path)]) == 0, "an empty folder is fine"
    assert "2 exercises" in capsys.readouterr().out
    for path in SCRIPTS:
        for name in marked(read(path)):
            same = source(read(path), name) == source(read(tmp_path / path.name), name)
            assert same == (name not in ("add_noise", "PDM.learn")), f"{name} in {path.name}"

@pytest.mark.parametrize("arguments, words", [
    (["--out", "new", "add_noise", "add_nose"], "no exercise 'add_nose'"), ([], "--out"),
    (["--out", "full"], "full is there already"), (["--out", "full/kept.txt"], "kept.txt is there already")])
def test_what_cannot_be_handed_out_is_one_sentence_and_changes_nothing(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept.txt").write_text("mine", encoding="utf-8")
    assert assignment.main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "kept.txt"]

def test_the_list_names_scripts_and_what_is_asked_but_not_in_a_handout(handout, monkeypatch, capsys):
    assert assignment.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in EXERCISES) and "protodiffusion.py, pdm.py, patronus.py" in said
    monkeypatch.setattr(assignment, "ROOT", handout)
    assert assignment.main(["--list"]) == 2 and "is a handout itself" in capsys.readouterr().err

def test_a_handout_fails_exercise_by_exercise_and_passes_with_the_original_bodies(handout):
    wrong = "def add_noise(x0, t, eps, abar):\n    a = abar[t][:, None, None, None]\n    return a * x0 + (1 - a) * eps"
    write(handout / "protodiffusion.py", "add_noise", wrong)
    judges = {test for _, *tests in EXERCISES.values() for test in tests}
    passed, failed, said = judge(handout)
    assert failed == judges, f"not judged: {judges - failed}; and failed: {failed - judges}"
    for name, (look_at, *_) in EXERCISES.items():
        assert f"exercise {name}, " in said and f"look at: {look_at}" in said, f"{name}: no hint"
        assert name == "add_noise" or f"NotImplementedError: {name} is an exercise" in said
    put_back(handout)
    again, failed, said = judge(handout)
    assert not failed and again == judges | passed, said
    write(handout / "pdm.py", "add_noise", f"{source(read(SCRIPTS[1]), 'add_noise')}  # mine")
    with pytest.raises(AssertionError, match="add_noise in pdm.py"):
        test_same_text.test_an_exercise_has_one_text_wherever_it_is_written(
            "add_noise", [handout / path.name for path in SCRIPTS])
