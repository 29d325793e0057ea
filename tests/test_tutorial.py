"""The notebook: every code cell runs, on reduced settings and without Jupyter, and what is stored is a real run."""
import ast
import importlib
import json
import os
import re
import subprocess
import sys

import matplotlib
import pytest
import torch
from assignment import EXERCISES, ROOT, hand_out

PATH = ROOT / "tutorial.ipynb"
CELLS = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
TEXT = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
SCRIPTS = {name: importlib.import_module(name) for name in ("protodiffusion", "pdm", "patronus")}

@pytest.fixture(autouse=True)
def beside_the_scripts(monkeypatch):
    monkeypatch.chdir(ROOT)

def test_every_cell_runs_on_reduced_settings(monkeypatch, capsys, pytestconfig):
    if apart := getattr(pytestconfig, "longest", None):                 # already on its way: see conftest.py
        said = apart.communicate()[0]
        assert apart.returncode == 0, said
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    shown = []
    monkeypatch.setattr(plt, "show", lambda: (shown.append(len(plt.get_fignums())), plt.close("all")))
    for script in SCRIPTS.values():                                     # more images than `small` leaves, its cells take 1000
        monkeypatch.setattr(script, "SHAPE_SPLITS", {"train": (2000, 0), "test": (1000, 1), "judge": (400, 12)})
    names = {"__name__": "__main__"}
    for number, cell in enumerate(CODE, 1):
        source = "".join(cell["source"])
        if number == 1:
            assert source.count("\nSCALE = 1 ") == 1, "the setting that makes a run short"
            source = source.replace("\nSCALE = 1 ", "\nSCALE = 0.004 ")
        exec(compile(source, f"{PATH.name}, code cell {number}", "exec"), names)
    assert len(shown) > 20 and set(shown) == {1}, "a picture at every step, one figure at a time"
    assert capsys.readouterr().out.count("not written yet") == 7, "exercises are left to the student"

IN_A_HANDOUT = """
import ast, json, sys
from types import SimpleNamespace
import matplotlib
matplotlib.use("Agg")
import patronus, pdm, protodiffusion
for script in (patronus, pdm, protodiffusion):
    script.SHAPE_SPLITS = {"train": (200, 0), "test": (200, 1), "judge": (200, 12)}
shell = SimpleNamespace(ast_transformers=[])
names = {"__name__": "__main__", "get_ipython": lambda: shell}
for number, cell in enumerate(json.load(open("tutorial.ipynb", encoding="utf-8"))["cells"]):
    if cell["cell_type"] == "code":
        tree = ast.parse("".join(cell["source"]).replace("\\nSCALE = 1 ", "\\nSCALE = 0.004 "))
        for transformer in shell.ast_transformers:
            tree = transformer.visit(tree)
        exec(compile(tree, f"cell {number}", "exec"), names)
"""

def test_in_a_handout_cells_wait_for_what_is_not_written_and_the_last_is_reached(tmp_path):
    hand_out(tmp_path / "handout", list(EXERCISES))
    done = subprocess.run([sys.executable, "-c", IN_A_HANDOUT], cwd=tmp_path / "handout", capture_output=True, encoding="utf-8",
                          env={**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "this cell waits, for a function: add_noise is an exercise" in done.stdout
    assert done.stdout.count("this cell waits") > 15 and "this notebook took" in done.stdout

def test_attempts_are_told_what_is_wrong_and_errors_of_ones_own_are_seen(capsys):
    names = {"__name__": "__main__"}
    exec("".join(CODE[0]["source"]), names)
    def said(mine):
        assert names["check"](mine, [1.0, 2.0], 0, hint="Think.", then=lambda: print("unlocked")) is None
        return "".join(capsys.readouterr())
    assert "unlocked" in said(lambda x: torch.tensor([1.0, 2.0]))
    assert "off by up to 1. Think." in said(lambda x: torch.tensor([1.0, 3.0])) and "ZeroDivisionError" in said(lambda x: 1 / x)
    assert all("tensor of shape [2]" in said(lambda x, answer=answer: answer) for answer in (None, 3.0, "abc"))
    def cell(text):
        *body, last = names["Waits"]().visit(ast.parse(text)).body
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        return eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    assert cell("a = 1\na + 1") == 2 and cell("b = 3") is None and cell("") is None
    for text, fault in (("unknown", NameError), ("1 / 0", ZeroDivisionError)):
        with pytest.raises(fault):
            cell(text)
    cell("raise NotImplementedError('add_noise')")
    assert cell("unknown") is None and "waits, for a cell above: name 'unknown'" in capsys.readouterr().out
    with pytest.raises(ZeroDivisionError):
        cell("1 / 0")

def test_the_first_cell_loads_the_scripts_anew_when_it_runs_again(monkeypatch):
    loaded, names = [], {"__name__": "__main__"}
    monkeypatch.setattr(importlib, "reload", lambda module: loaded.append(module.__name__))
    exec("".join(CODE[0]["source"]), names)
    assert not loaded
    exec("".join(CODE[0]["source"]), names)
    assert loaded == ["patronus", "pdm", "protodiffusion"]

def test_away_from_the_scripts_the_first_cell_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("protodiffusion", "patronus"):
        (tmp_path / f"{name}.py").touch()
    with pytest.raises(SystemExit, match="pdm.py: not beside this notebook"):
        exec("".join(CODE[0]["source"]).split("import copy")[0], {"sys": sys})

def test_what_is_stored_is_the_output_of_one_run_from_top_to_bottom():
    assert PATH.stat().st_size < 3e6
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1)), "run it from top to bottom"
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    for cell in CODE:
        assert cell["outputs"] or "plt.show" not in "".join(cell["source"]), "a picture is missing"

def test_every_part_ends_with_questions_and_an_exercise():
    for part in re.split(r"^## Part \d\. ", TEXT, flags=re.MULTILINE)[1:]:
        questions = re.findall(r"<details><summary>\d\. .*?</summary>.*?</details>", part, re.DOTALL)
        assert len(questions) in (2, 3) and part.index("**Questions**") < part.index("**Exercise"), part[:50]

def test_the_commands_that_are_named_exist(capsys):
    commands = re.findall(r"python (\w+)\.py((?: [^`\s,]+)*)", TEXT)
    assert len(commands) > 10
    for script, words in commands:
        with pytest.raises(SystemExit):
            SCRIPTS[script].main(["--help"])
        known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        assert set(re.findall(r"--[a-z-]+", words)) <= known, f"{script}.py{words}"
