"""The notebook: every code cell runs, on reduced settings and without Jupyter, and what is stored is a real run."""
import ast
import json
import re
import sys

import matplotlib
import pytest
from assignment import ROOT, taken_out

import patronus
import pdm
import protodiffusion

PATH = ROOT / "tutorial.ipynb"
CELLS = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
TEXT = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
SCRIPTS = {"protodiffusion": protodiffusion, "pdm": pdm, "patronus": patronus}


@pytest.mark.skipif(bool(taken_out(ROOT)), reason="its cells call what is an exercise here")
def test_every_cell_runs_on_reduced_settings(monkeypatch, capsys):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    shown = []
    monkeypatch.setattr(plt, "show", lambda: (shown.append(len(plt.get_fignums())), plt.close("all")))
    monkeypatch.chdir(ROOT)
    names = {"__name__": "__main__"}
    for number, cell in enumerate(CODE, 1):
        source = "".join(cell["source"])
        if number == 1:
            assert source.count("\nSCALE = 1 ") == 1, "the setting that makes a run short"
            source = source.replace("\nSCALE = 1 ", "\nSCALE = 0.004 ")
        exec(compile(source, f"{PATH.name}, code cell {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert len(shown) > 20 and set(shown) == {1}, "a picture at every step, one figure at a time"
    assert printed.count("not written yet") == 7, "exercises are left to the student"
    assert names["abar"].shape == (1000,)


@pytest.mark.parametrize("missing", ["pdm.py"])
def test_away_from_the_scripts_the_first_cell_says_what_to_do(tmp_path, monkeypatch, missing):
    monkeypatch.chdir(tmp_path)
    for name in SCRIPTS:
        if f"{name}.py" != missing:
            (tmp_path / f"{name}.py").touch()
    with pytest.raises(SystemExit, match="pdm.py: not beside this notebook"):
        exec("".join(CODE[0]["source"]).split("import copy")[0], {"sys": sys})


def test_the_notebook_defines_nothing_that_a_script_defines():
    mine = {node.name for cell in CODE for node in ast.walk(ast.parse("".join(cell["source"])))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    theirs = {name for script in SCRIPTS.values() for name in vars(script)}
    assert not mine & theirs


def test_what_is_stored_is_the_output_of_one_run_from_top_to_bottom():
    assert PATH.stat().st_size < 3e6
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1)), "run it from top to bottom"
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) > 20
    for cell in CODE:
        assert cell["outputs"] or "plt.show" not in "".join(cell["source"]), "a picture is missing"


def test_every_part_ends_with_questions_and_an_exercise():
    parts = re.split(r"^## Part \d\. ", TEXT, flags=re.MULTILINE)[1:]
    assert len(parts) == 8
    for part in parts:
        assert len(re.findall(r"<details><summary>\d\. .*?</summary>.*?</details>", part, re.DOTALL)) in (2, 3), part[:50]
        assert part.index("**Questions**") < part.index("**Exercise")


def test_the_commands_that_are_named_exist():
    commands = re.findall(r"python (\w+)\.py((?: [^`\s,]+)*)", TEXT)
    assert len(commands) > 10
    for script, flags in commands:
        flags = [flag for flag in flags.split() if "..." not in flag]
        if flags and not {"RUN", "--like"} & set(flags):
            SCRIPTS[script].parse_config(flags)
