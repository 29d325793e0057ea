"""Handouts: bodies go, everything else stays, tests judge each exercise, and the originals put back satisfy them."""
import ast
import json
import os
import subprocess
import sys
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path

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
    """Another text for one function of a script in a handout, as a student would write it."""
    text = read(path)
    assert text.count(source(text, name)) == 1
    path.write_text(text.replace(source(text, name), body), encoding="utf-8", newline="\n")


def put_back(handout):
    for path in SCRIPTS:
        original, given = read(path), read(handout / path.name)
        text = given
        for name in marked(original):
            text = text.replace(source(given, name), source(original, name))
        (handout / path.name).write_text(text, encoding="utf-8", newline="\n")


def judge(handout, keyword):
    """pytest handout/tests -k keyword, run from elsewhere -> names of tests that passed, of those that failed, output.

    Of tests with parameters one name each: failed, if any is.
    """
    report = handout.parent / "report.xml"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1"}
    command = [sys.executable, "-m", "pytest", str(handout / "tests"), "-k", keyword, "-q", "--tb=native"]
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
    assert set(places()) == set(EXERCISES)
    assert test_same_text.SHARED == [name for name in EXERCISES if len(places()[name]) > 1]
    for path in SCRIPTS:
        found = marked(read(path))
        assert len(found) >= 6, f"{path.name} holds only {len(found)} exercises"
        assert set(found) == set(functions(read(path))) & set(EXERCISES), f"{path.name}: a mark is missing or too many"
        assert all(ast.get_docstring(node) for node in found.values())
    tests = Counter(name for path in (ROOT / "tests").glob("test_*.py") for name in functions(read(path)))
    for name, (look_at, *judges) in EXERCISES.items():
        assert look_at and judges and all(tests[test] == 1 for test in judges), name
        assert len(set(judges)) == len(judges)


def test_a_handout_differs_by_bodies_alone(handout):
    for path in SCRIPTS:
        original, given = read(path), read(handout / path.name)
        assert set(functions(given)) == set(functions(original)) and set(marked(given)) == set(marked(original))
        for name, node in marked(given).items():
            other = marked(original)[name]
            assert ast.dump(node.args) == ast.dump(other.args) and ast.get_docstring(node) == ast.get_docstring(other)
            assert len(node.body) == 2 and isinstance(node.body[1], ast.Raise), f"{name} in {path.name} has a body"
    assert json.loads(read(handout / "handout.json")) == {n: [s for s, *_ in held] for n, held in places().items()}
    put_back(handout)
    assert all(read(path) == read(handout / path.name) for path in SCRIPTS)


def test_no_solution_is_left_in_a_handout(handout):
    found = {path.relative_to(handout).as_posix() for path in handout.rglob("*") if path.is_file()}
    assert {"README.md", "LICENSE", "requirements.txt", "pytest.ini", "tests/conftest.py", "tests/test_pdm.py"} <= found
    assert not [name for name in found if any(part in name for part in (".git/", "__pycache__", "runs/", "data/"))]
    assert "tests/test_assignment.py" not in found, "it would make a handout of the handout"
    texts = {name: read(handout / name) for name in found if name.endswith((".py", ".md"))}
    texts |= {name: "\n".join("".join(cell["source"]) for cell in json.loads(read(handout / name))["cells"])
              for name in found if name.endswith(".ipynb")}
    for path in SCRIPTS:
        lines = read(path).split("\n")
        for exercise, node in marked(read(path)).items():
            body = "\n".join(lines[node.body[0].end_lineno:node.end_lineno]).strip()
            assert not [name for name, text in texts.items() if body in text], f"{exercise} is solved there"


def test_chosen_exercises_go_in_every_script_and_the_others_stay(tmp_path, capsys):
    assert assignment.main(["add_noise", "PDM.learn", "--out", str(tmp_path)]) == 0, "an empty folder is fine"
    assert "2 exercises" in capsys.readouterr().out
    assert json.loads(read(tmp_path / "handout.json")) == {
        "add_noise": ["protodiffusion.py", "pdm.py", "patronus.py"], "PDM.learn": ["pdm.py"]}
    for path in SCRIPTS:
        for name in marked(read(path)):
            same = source(read(path), name) == source(read(tmp_path / path.name), name)
            assert same == (name not in ("add_noise", "PDM.learn")), f"{name} in {path.name}"


@pytest.mark.parametrize("arguments, words", [
    (["--out", "new", "add_noise", "add_nose"], "no exercise 'add_nose'"),
    (["--out", "full"], "full is there already"),
    (["--out", "full/kept.txt"], "kept.txt is there already"),
    ([], "--out")])
def test_what_cannot_be_handed_out_is_one_sentence_and_changes_nothing(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/kept.txt").write_text("mine", encoding="utf-8")
    assert assignment.main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "kept.txt"] and read(Path("full/kept.txt")) == "mine"


def test_a_handout_is_not_handed_out_again(handout, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assignment, "ROOT", handout)
    assert assignment.main(["--out", str(tmp_path / "second")]) == 2
    assert "is a handout itself" in capsys.readouterr().err and not (tmp_path / "second").exists()


def test_the_list_names_scripts_and_what_is_asked(capsys):
    assert assignment.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in EXERCISES) and "protodiffusion.py, pdm.py, patronus.py" in said
    assert "Forward process xt = sqrt(abar_t) x0" in said


def test_one_text_is_asked_of_all_but_exercises_that_are_not_written_yet(handout):
    scripts = [handout / path.name for path in SCRIPTS]

    def compare():
        for i, a in enumerate(scripts):
            for b in scripts[i + 1:]:
                test_same_text.test_blocks_of_one_name_have_one_text(a, b)
        for name in test_same_text.SHARED:
            test_same_text.test_an_exercise_has_one_text_wherever_it_is_written(name, scripts)
    compare()
    write(scripts[0], "add_noise", source(read(SCRIPTS[0]), "add_noise"))
    compare()                                                 # solved in one script, open in the others
    write(scripts[1], "add_noise", source(read(SCRIPTS[0]), "add_noise") + "  # mine")
    with pytest.raises(AssertionError, match="add_noise in pdm.py"):
        compare()
    write(scripts[1], "add_noise", source(read(SCRIPTS[0]), "add_noise"))
    write(scripts[2], "alpha_bars", "def alpha_bars(T):\n    pass")
    with pytest.raises(AssertionError, match="^alpha_bars: give one text"):
        compare()


def test_a_handout_fails_exercise_by_exercise_and_passes_with_the_original_bodies(handout):
    wrong = "def add_noise(x0, t, eps, abar):\n    a = abar[t][:, None, None, None]\n    return a * x0 + (1 - a) * eps"
    write(handout / "protodiffusion.py", "add_noise", wrong)
    judges = {test for _, *tests in EXERCISES.values() for test in tests}
    one_text = "test_an_exercise_has_one_text_wherever_it_is_written"
    passed, failed, said = judge(handout, " or ".join(EXERCISES))
    assert failed == judges, f"not judged: {judges - failed}; and failed: {failed - judges}"
    assert passed == {one_text}
    for name, (look_at, *_) in EXERCISES.items():
        assert f"exercise {name}, " in said and f"look at: {look_at}" in said, f"{name}: no hint"
        assert name == "add_noise" or f"NotImplementedError: {name} is an exercise" in said
    assert "add_noise: mean sqrt(abar) x0" in said            # what is wrong of a wrong body
    put_back(handout)
    passed, failed, said = judge(handout, " or ".join(EXERCISES))
    assert (passed, failed) == (judges | {one_text}, set()), said
