"""Judge bodies of exercises one by one, each in a process of its own, and mark what students sent.

    python tests/assignment.py --mark SUBMISSIONS --points FILE --out MARKS

SUBMISSIONS holds a folder a student, with the three scripts, or some, somewhere in it. Of these files nothing counts
but the bodies of exercises: each is put alone into the originals and judged by test_exercises.py, so one that is wrong
costs one exercise. Without a body in the first script, that of the next counts. FILE: lines `exercise,points`. MARKS:
marks.csv, feedback/STUDENT.md, gradescope/STUDENT/results.json (Gradescope and otter-grader read it as
/autograder/results/results.json), and classroom.yml, a workflow for GitHub Classroom.

A body gets no files and no network: what it may not use is refused before it runs, its time is limited, what it prints
is thrown away. That stops mishaps and jokes, but is no sandbox: mark what strangers send inside a container.
"""
import ast
import csv
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from assignment import EXERCISES, ROOT, SCRIPTS, Stop, blocks, exercises_in, places, read, with_body, without_indent

MODULES = {"torch", "numpy", "math", "itertools", "functools", "copy", "random", "operator", "collections"}
NAMES = {"open", "exec", "eval", "compile", "__import__", "input", "breakpoint", "exit", "quit", "globals", "locals", "vars",
         "getattr", "setattr", "delattr", "Path", "ThreadPoolExecutor", "dist"} | (sys.stdlib_module_names - MODULES)
ATTRIBUTES = set("os sys io builtins importlib inspect subprocess shutil ctypes multiprocessing utils hub serialization "
                 "package jit compile library load save savez savetxt tofile fromfile memmap".split())

def refused(body):
    """What a body may not use, as a sentence; empty if there is nothing."""
    try:
        tree = ast.parse("def body():\n" + "\n".join(f"    {line}" for line in body.split("\n")))
    except SyntaxError as fault:
        return f"this is not Python: {fault.msg}, line {(fault.lineno or 2) - 1} of the body"
    nodes = [*ast.walk(tree)]
    own = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    own |= {node.arg for node in nodes if isinstance(node, ast.arg)} | {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
    for node in nodes:
        used = ""
        if isinstance(node, ast.Name) and node.id in NAMES - own:
            used = node.id
        elif isinstance(node, ast.Attribute) and (node.attr in ATTRIBUTES or node.attr.startswith("_")):
            used = f".{node.attr}"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            paths = [node.module or "."] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            words = {*paths, *(name.name for name in node.names)} if isinstance(node, ast.ImportFrom) else {*paths}
            bad = [path for path in paths if path.split(".")[0] not in MODULES]
            bad += [word for path in words for word in path.split(".") if word in ATTRIBUTES]
            used = f"import {bad[0]}" if bad else ""
        if used:
            return f"an exercise needs no '{used}', so it was not run"
    return ""

def put_into(script, name, body):
    """Replace the body of an exercise in a module that is loaded."""
    text = with_body(read(ROOT / f"{script.__name__}.py"), name, body)
    line, _, end = blocks(text)[name]
    rows = text.split("\n")
    while rows[line - 2].strip().startswith("@"):
        line -= 1
    *owner, own = name.split(".")
    made = {}
    exec(without_indent(rows[line - 1:end]), vars(script), made)
    setattr(getattr(script, owner[0]) if owner else script, own, made[own])

def attempt(pipe, name, body):
    """In a process of its own: send what test_exercises.judge says of a body; nothing said means that it is right."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    import torch
    import test_exercises
    torch.set_num_threads(1)
    script = importlib.import_module(places(name)[0].script[:-3])
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            put_into(script, name, body)
            said = test_exercises.judge(name, script) or ""
        except BaseException as fault:                              # also sys.exit and Ctrl-C, if a body raises them
            said = f"{type(fault).__name__}: {fault}"
        os.chdir(ROOT)
    pipe.send(said[:1000])

def judged(jobs, seconds=60):
    """[(exercise, body)] -> for each what is wrong with it, in a sentence; empty if it is right."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "tests", ROOT, os.environ.get("PYTHONPATH", ""))))
    if method == "forkserver":                                      # then what all need is loaded once
        context.set_forkserver_preload(["test_exercises", *(path.stem for path in SCRIPTS)])

    def one(job):
        name, body = job
        if fault := refused(body):
            return fault
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=attempt, args=(theirs, name, body), daemon=True)
        process.start()
        theirs.close()
        try:
            said = ours.recv() if ours.poll(seconds) else f"it takes more than {seconds:g} seconds"
        except EOFError:
            said = "it ended its process"
        process.kill()
        process.join()
        return said
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, jobs))

def read_points(path):
    """exercise -> points; without a file the level of each."""
    if path is None:
        return {name: float(exercise.level) for name, exercise in EXERCISES.items()}
    points = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        for row in csv.reader(file):
            if not row or row == ["exercise", "points"]:
                continue
            if len(row) != 2 or row[0].strip() not in EXERCISES or not row[1].strip().replace(".", "", 1).isdecimal():
                raise Stop(f"{path}: '{','.join(row)}' is not an exercise and its points, like add_noise,2")
            points[row[0].strip()] = float(row[1])
    return points

def sent(folder, names):
    """What a student sent -> for each exercise (body, what there is to say if there is none)."""
    scripts = [min(found, key=lambda path: len(path.parts)) for path in SCRIPTS if (found := [*folder.rglob(path.name)])]
    held, faults = [], [] if scripts else ["there is none of the scripts"]
    for path in scripts:
        try:
            held.append(exercises_in(path))
        except (UnicodeDecodeError, ValueError) as fault:
            faults.append(f"{path.name} is no text: {fault}")
    result = {}
    for name in names:
        found = [script[name] for script in held if name in script]
        bodies = [place.body for place in found if place.body]
        errors = [place.error for place in found if place.error]
        result[name] = (bodies[0], "") if bodies else ("", (errors or faults or ["it is not written"])[0])
    return result

def result(name, said, points):
    """One test in Gradescope's results.json."""
    output = "right" if not said else f"{said}\nLook at: {EXERCISES[name].hint}"
    return dict(name=name, score=0 if said else points, max_score=points, status="failed" if said else "passed",
                output=output)

def workflow(points):
    """GitHub Classroom: a step for each exercise, and a report of their points."""
    steps, runners = [], []
    for name, value in points.items():
        key = name.replace(".", "-").replace("_", "-").lower()
        runners.append(key)
        steps.append(f"""      - id: {key}
        uses: classroom-resources/autograding-command-grader@v1
        with:
          test-name: {name}
          command: python -m pytest -q tests -k {name}
          timeout: 5
          max-score: {value:g}
""")
    given = "".join(f"          {key.upper().replace('-', '_')}_RESULTS: ${{{{ steps.{key}.outputs.result }}}}\n" for key in runners)
    return f"""# As .github/workflows/classroom.yml; protect tests/ in the settings of the assignment.
name: Autograding
on: [push, repository_dispatch]
permissions:
  checks: write
  actions: read
  contents: read
jobs:
  autograding:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: "3.11"
      - run: pip install -r requirements.txt
{"".join(steps)}      - uses: classroom-resources/autograding-grading-reporter@v1
        env:
{given}        with:
          runners: {",".join(runners)}
"""

def mark(submissions, points, out, seconds):
    """Mark the folder of each student; see the top. Stop if something is not as it must be."""
    points = read_points(points)
    if not submissions.is_dir():
        raise Stop(f"{submissions} is no folder: it holds a folder a student")
    students = sorted(path for path in submissions.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not students:
        raise Stop(f"{submissions} holds no folder: each student's files are in one of their own")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Stop(f"{out} is there already: choose a folder that is new or empty")
    originals = {path: path.read_bytes() for path in [*SCRIPTS, *(ROOT / "tests").glob("*.*")]}
    found = {student: sent(student, points) for student in students}
    jobs = [(name, body) for answers in found.values() for name, (body, _) in answers.items() if body]
    said = iter(judged(jobs, seconds))
    if any(not path.exists() or path.read_bytes() != content for path, content in originals.items()):
        raise Stop(f"files of {ROOT} changed during marking, so there are no marks: restore them, and look into the bodies")
    rows = []
    for student, answers in found.items():
        tests = [result(name, next(said) if body else missing, points[name]) for name, (body, missing) in answers.items()]
        rows.append([student.name, f"{sum(test['score'] for test in tests):g}", *(f"{test['score']:g}" for test in tests)])
        save(out / "gradescope" / student.name / "results.json", json.dumps(dict(tests=tests), indent=1) + "\n")
        page = [f"# {student.name}: {rows[-1][1]} of {sum(points.values()):g} points\n"]
        page += [f"## {test['name']}: {test['score']:g} of {test['max_score']:g}\n\n{test['output']}\n" for test in tests]
        save(out / "feedback" / f"{student.name}.md", "\n".join(page))
        print(f"{student.name:30} {rows[-1][1]:>6} of {sum(points.values()):g}")
    save(out / "classroom.yml", workflow(points))
    with open(out / "marks.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["student", "total", *points], *rows])
    print(f"{out}: marks.csv, a page of feedback and Gradescope's results a student, classroom.yml")

def save(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
