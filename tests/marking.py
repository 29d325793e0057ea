"""Judge bodies of exercises one by one, each in a process of its own, and mark what students sent.

    python tests/assignment.py --mark SUBMISSIONS --points FILE --out MARKS

SUBMISSIONS holds a folder a student, with the three scripts, or some, somewhere in it. Of these files nothing counts
but the bodies of exercises: each is put alone into the originals and judged by test_exercises.py, so one that is wrong
costs one exercise. Without a body in the first script, that of the next counts. FILE: lines `exercise,points`. MARKS:
marks.csv, feedback/STUDENT.md, gradescope/STUDENT/results.json (Gradescope and otter-grader read it as
/autograder/results/results.json), and classroom.yml, a workflow for GitHub Classroom.

A body gets no files and no network: what it may not use is refused before it runs, its time (and on Linux its memory)
is limited, what it prints is thrown away. That stops mishaps and jokes, but is no sandbox: mark what strangers send inside a container.
"""
import csv
import importlib
import json
import multiprocessing
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

try:
    import resource
except ImportError:                                                 # Windows
    resource = None

from assignment import EXERCISES, ROOT, SCRIPTS, Stop, exercises_in, functions, places, read, with_indent, without_indent
from test_exercises import answers, difference, recorded, refused

def source_of(name, body):
    """The original's decorators, def and docstring, and another body -> text without indentation."""
    text = read(ROOT / places(name)[0].script)
    node, lines = functions(text)[name], text.split("\n")
    first = min([node.lineno, *(part.lineno for part in node.decorator_list)])
    return without_indent([*lines[first - 1:places(name)[0].begin], *with_indent(body, lines[node.lineno - 1])])

def attempt(pipe, name, stem, source, folder, seconds):
    """In a process of its own, in an empty folder: put another text of an exercise into the script; send its answers,
    and what stopped it, as json. Its processor time ends even if the marking was killed."""
    if resource:
        resource.setrlimit(resource.RLIMIT_CPU, (2 * seconds, 2 * seconds))
        resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.chdir(folder)
    torch.set_num_threads(1)
    found, stopped = [], ""
    try:
        script, made = importlib.import_module(stem), {}
        exec(source, vars(script), made)
        *owner, own = name.split(".")
        setattr(getattr(script, owner[0]) if owner else script, own, made[own])
        for answer in answers(name, script):
            found.append(answer)
    except BaseException as fault:                                  # also sys.exit and Ctrl-C, if a body raises them
        stopped = f"{type(fault).__name__}: {fault}"
        if isinstance(fault, NameError):
            stopped += ", and nothing counts but the body: what it needs must stand in it"
    pipe.send_bytes(json.dumps([found, stopped], default=str).encode("utf-8", "backslashreplace"))

def said_of(name, sent):
    """What is wrong with the answers that an attempt sent, in a sentence; empty if nothing is."""
    found, stopped = json.loads(sent)
    for (label, value), right in zip(found, recorded()[name]):
        if said := difference(value, right):
            return f"{label}: {said}"
    if not stopped and len(found) < len(recorded()[name]):
        stopped = "it stops before all is answered"
    return " ".join(stopped.split())[:500]                          # one line, which cannot look like another mark

def judged(jobs, seconds=60):
    """[(exercise, body)] -> for each what is wrong with it, in a sentence; empty if it is right."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "tests", ROOT, os.environ.get("PYTHONPATH", ""))))
    if method == "forkserver":                                      # then what all need is loaded once
        context.set_forkserver_preload(["marking", *(path.stem for path in SCRIPTS)])

    def one(job):
        name, body = job
        if fault := refused(body):
            return fault
        ours, theirs = context.Pipe(duplex=False)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            script = Path(places(name)[0].script).stem
            given = theirs, name, script, source_of(name, body), folder, seconds
            process = context.Process(target=attempt, args=given, daemon=True)
            process.start()
            theirs.close()
            try:
                said = said_of(name, ours.recv_bytes()) if ours.poll(seconds) else f"it takes more than {seconds} seconds"
            except (EOFError, OSError, ValueError):
                said = "it ended its process"
            process.kill()
            process.join()
        return said
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, jobs))

def read_points(path, names):
    """exercise -> points, of `names` if there are any; without a file the level of each."""
    points = {name: float(exercise.level) for name, exercise in EXERCISES.items()}
    if path is not None:
        points = {}
        try:
            rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
        except (ValueError, csv.Error) as fault:
            raise Stop(f"{path} is no csv file in UTF-8: {fault}") from None
        for row in rows:
            if not row or [word.strip().lower() for word in row] == ["exercise", "points"]:
                continue
            name, value = (word.strip() for word in row) if len(row) == 2 else ("", "")
            if name not in EXERCISES or name in points or not re.fullmatch(r"\d+(\.\d+)?", value):
                raise Stop(f"{path}: '{','.join(row)}' is not an exercise and its points, like add_noise,2, each once")
            points[name] = float(value)
    points = {name: value for name, value in points.items() if not names or name in names}
    if not points:
        raise Stop(f"{path} gives no points for what shall be marked")
    return points

def sent(folder, names):
    """What a student sent -> for each exercise (body, what there is to say if there is none). Links do not count."""
    held, faults = {}, {}
    for path in SCRIPTS:
        found = [other for other in folder.rglob(path.name) if other.is_file() and not other.is_symlink()]
        faults[path.name] = f"{path.name} is not there"
        if found:
            try:
                held[path.name] = exercises_in(min(found, key=lambda other: (len(other.parts), str(other))))
                faults[path.name] = ""
            except (OSError, ValueError) as fault:
                faults[path.name] = f"{path.name} cannot be read as UTF-8: {fault}"
    result = {}
    for name in names:
        own = places(name)
        found = [held[place.script][name] for place in own if name in held.get(place.script, ())]
        said = [place.error for place in found if place.error] + [faults[place.script] for place in own if faults[place.script]]
        result[name] = "", (said or [f"it is not written in {', '.join(place.script for place in own)}"])[0]
        for theirs in found:
            if theirs.body and theirs.arguments == own[0].arguments:
                result[name] = theirs.body, ""
                break
            if theirs.body:
                result[name] = "", (f"its arguments are ({', '.join(theirs.arguments)}) and must be "
                                    f"({', '.join(own[0].arguments)})")
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

def mark(submissions, points, names, out, seconds):
    """Mark the folder of each student; see the top. Stop if something is not as it must be."""
    points = read_points(points, names)
    if not submissions.is_dir():
        raise Stop(f"{submissions} is no folder: it holds a folder a student")
    students = sorted(path for path in submissions.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not students:
        raise Stop(f"{submissions} holds no folder: each student's files are in one of their own")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Stop(f"{out} is there already: choose a folder that is new or empty")
    for name, said in zip(points, judged([(name, places(name)[0].body) for name in points], 600)):
        if said:
            raise Stop(f"the original of {name} is judged wrong, so there are no marks: {said}")
    originals = {path: path.read_bytes() for path in [*SCRIPTS, *(ROOT / "tests").glob("*.*")]}
    found = {student: sent(student, points) for student in students}
    jobs = [(name, body) for answers in found.values() for name, (body, _) in answers.items() if body]
    said = iter(judged(jobs, seconds))
    if any(not path.exists() or path.read_bytes() != content for path, content in originals.items()):
        raise Stop(f"files of {ROOT} changed during marking, so there are no marks: restore them, and look into the bodies")
    rows = []
    for student, answers in found.items():
        name = os.fsencode(student.name).decode("utf-8", "backslashreplace")
        tests = [result(exercise, next(said) if body else missing, points[exercise])
                 for exercise, (body, missing) in answers.items()]
        rows.append([name, f"{sum(test['score'] for test in tests):g}", *(f"{test['score']:g}" for test in tests)])
        save(out / "gradescope" / name / "results.json", json.dumps(dict(tests=tests), indent=1) + "\n")
        page = [f"# {name}: {rows[-1][1]} of {sum(points.values()):g} points\n"]
        page += [f"## {test['name']}: {test['score']:g} of {test['max_score']:g}\n\n{test['output']}\n" for test in tests]
        save(out / "feedback" / f"{name}.md", "\n".join(page))
        print(f"{ascii(name)[1:-1]:30} {rows[-1][1]:>6} of {sum(points.values()):g}")
    save(out / "classroom.yml", workflow(points))
    with open(out / "marks.csv", "w", encoding="utf-8-sig", newline="") as file:       # Excel looks for the mark
        csv.writer(file).writerows([["student", "total", *points], *rows])
    print(f"{out}: marks.csv, a page of feedback and Gradescope's results a student, classroom.yml")

def save(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
