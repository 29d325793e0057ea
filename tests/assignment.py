"""Hand the project out as exercises: a copy in which chosen functions have a docstring and no body.

    python tests/assignment.py --list                               # the exercises; in a handout: how far each is
    python tests/assignment.py --out handout                        # a handout with all of them
    python tests/assignment.py --out handout add_noise dce_loss     # or with these
    python -m pytest handout/tests -k add_noise                     # judges one, in a handout or in the project
    python tests/assignment.py --copy add_noise                     # in a handout: to the other scripts that hold it
    python tests/assignment.py --mark SUBMISSIONS --points FILE --out MARKS     # see marking.py

An exercise is a function or method of a script with the line `# exercise` above it. A function that several scripts
share is taken out of all of them; it is judged where it is written first. The originals stay where they are, which
makes them the solution; handout.json says what was taken out.
"""
import argparse
import ast
import functools
import json
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [ROOT / f"{name}.py" for name in ("protodiffusion", "pdm", "patronus") if (ROOT / f"{name}.py").exists()]
COPIED = ("protodiffusion.py", "pdm.py", "patronus.py", "tutorial.ipynb", "LICENSE", "requirements.txt", "pytest.ini",
          ".gitignore", "assets/*.*", "tests/assignment.py", "tests/conftest.py", "tests/test_exercises.py", "tests/recorded.json")

class Exercise(NamedTuple):
    level: int                      # 1 to 3
    minutes: int                    # with the paper at hand
    source: str                     # the equation
    needs: str                      # exercises that it calls
    hint: str                       # what to look at when the judge says no

EXERCISES = {
    "add_noise": Exercise(1, 10, "DDPM eq. 4", "",
        "sqrt(abar) weighs the image, sqrt(1 - abar) the noise; each image has its own t: abar[t] is [B]"),
    "noise_loss": Exercise(1, 10, "DDPM eq. 14", "add_noise",
        "model(xt, t, condition); a mean over images, channels and pixels, in float32"),
    "guided_noise": Exercise(2, 20, "Ho & Salimans eq. 6", "",
        "w = 0 is the conditional model: weights 1 + w and -w; one call with 2 B images, B if w = 0"),
    "ddim_step": Exercise(2, 25, "DDIM eq. 12, 16", "",
        "the variance that sigma takes from the predicted noise comes back as noise; a, a_next are abar"),
    "dpmpp_step": Exercise(3, 40, "DPM-Solver++ alg. 2", "",
        "lambda grows towards the image: mind the signs; the first and the last step are of first order"),
    "frechet_distance": Exercise(2, 25, "Heusel eq. 6", "",
        "S1 and S2 do not commute; without full rank, rounding makes eigenvalues negative"),
    "dce_loss": Exercise(2, 20, "Yang eq. 6-8", "",
        "one softmax over all C K prototypes, then sums within classes; in logarithms, or 900 overflows"),
    "prototype_loss": Exercise(1, 15, "Yang eq. 9", "",
        "of the own class alone, and of its K prototypes only the nearest; d is squared already"),
    "contrastive_loss": Exercise(1, 10, "PDM", "", "near is likely, so distances enter with a minus; tau sharpens"),
    "alignment_loss": Exercise(1, 10, "PDM", "",
        "mean over B and D, not sum; nothing is detached, so features and prototypes both move"),
    "compactness_loss": Exercise(1, 15, "PDM", "",
        "cosines: no lengths; squared: opposite is as bad as equal; each pair twice, no diagonal"),
    "balanced_assignment": Exercise(2, 20, "Cuturi; SwAV", "",
        "in a round columns come first and rows last; three rounds, or as many as are asked for"),
    "swapped_loss": Exercise(3, 35, "SwAV eq. 1-2", "balanced_assignment",
        "q of each other view; in_all_processes: own rows begin at RANK * B"),
    "PrototypeAttention.forward": Exercise(2, 35, "PDM, attention", "",
        "softmax over the n tokens, not the pixels; heads are slices of C / heads channels"),
    "PDM.learn": Exercise(3, 60, "PDM, algorithm",
        "contrastive_loss, alignment_loss, compactness_loss, swapped_loss",
        "nearest to the clean image, or label; s-PDM: no compactness; count once, then p"),
    "receptive_field": Exercise(2, 25, "Araujo", "",
        "kernel and padding count in steps of the layers before; strides multiply later steps"),
    "patch_distances": Exercise(2, 25, "ProtoPNet", "",
        "squared, for each patch and prototype: [B, m, h, w]; at least 0; float32 under autocast"),
    "activation": Exercise(1, 5, "ProtoPNet", "", "large where the distance is small: 9.2 at d = 0; d is squared already"),
    "invert": Exercise(3, 35, "DDIM eq. 12, section 4.3", "",
        "from the clean image, abar = 1, to the noisiest level; the network is told the t of the current x"),
    "spherical": Exercise(1, 15, "Shoemake", "",
        "the angle between two vectors as long as the image has numbers; do not divide by almost 0"),
    "auroc": Exercise(2, 25, "Mann & Whitney", "", "ties count half; only the order of the scores matters; NaN if one kind is missing"),
    "choose_movers": Exercise(2, 20, "Patronus", "auroc",
        "0.1 tells a trait as well as 0.9; the n best for b go first, then the n best for a of the rest"),
}

class Stop(Exception):
    """What only the person at the keyboard can put right: one sentence, and exit status 2."""

class Place(NamedTuple):
    """Where a script's text holds an exercise. Lines count from 1, as in an editor."""
    script: str                     # name of the file
    line: int                       # of its def
    begin: int                      # the last line before its body
    end: int                        # the last line of its body
    arguments: list                 # their names
    docstring: str
    body: str                       # without indentation; empty while it is not written
    error: str                      # why it cannot be read

def stub(name):
    return f'raise NotImplementedError("{name} is an exercise: pytest tests -k {name}")'

def read(path):
    return path.read_text(encoding="utf-8-sig")                     # some editors put a mark in front

def without_indent(lines):
    least = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join(line[least:].rstrip() for line in lines)

def with_indent(body, line):
    """The lines of a body as they stand below the line of its def."""
    indent = " " * (line.index("def") + 4)
    return [indent + row if row else row for row in body.split("\n")]

def parsed(text):
    """A text as Python -> ast.Module. Raises SyntaxError, also for what is too much for the parser."""
    try:
        return ast.parse(text)
    except (ValueError, RecursionError, MemoryError) as fault:
        raise SyntaxError(f"{type(fault).__name__}: {fault}") from None

@functools.lru_cache(50)
def functions(text):
    """Functions, and methods as Class.method, of a text that is Python -> name: ast node."""
    found = {}
    for node in parsed(text).body:
        for own in [node] if isinstance(node, ast.FunctionDef) else node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(own, ast.FunctionDef):
                found[own.name if own is node else f"{node.name}.{own.name}"] = own
    return found

def blocks(text):
    """Exercises in a text that is not Python as a whole, by indentation -> name: (line of def, text from there on)."""
    lines, owner, found = text.split("\n"), "", {}
    for i, row in enumerate(lines):
        if match := re.match(r"(\s*)(class|def) (\w+)", row):
            if match[2] == "class":
                owner = f"{match[3]}."
            name = (owner if match[1] else "") + match[3]
            end = i + 1
            while end < len(lines) and (not lines[end].strip() or lines[end].startswith(match[1] + " ")):
                end += 1
            if match[2] == "def" and name in EXERCISES:
                found[name] = i + 1, without_indent(lines[i:end])
    return found

def located(script, node, lines, line):
    """A Place of an ast node, whose text begins at this line of a script."""
    statements = node.body[1:] if ast.get_docstring(node) is not None else node.body
    begin = node.body[0].end_lineno if ast.get_docstring(node) is not None else node.body[0].lineno - 1
    body = without_indent(lines[begin:node.end_lineno]).strip("\n")
    if not statements or all(isinstance(part, ast.Pass) or isinstance(part, ast.Raise) and "an exercise" in ast.unparse(part)
                             for part in statements):
        body = ""
    arguments = [arg.arg for arg in node.args.args]
    return Place(script, line, begin + line - node.lineno, node.end_lineno + line - node.lineno, arguments,
                 ast.get_docstring(node) or "", body, "")

def exercises_in(path):
    """The exercises that a script holds, even if some of it is not Python -> name: Place."""
    text = read(path)
    try:
        return {name: located(path.name, node, text.split("\n"), node.lineno)
                for name, node in functions(text).items() if name in EXERCISES}
    except SyntaxError:
        found = {}
    for name, (line, own) in blocks(text).items():
        try:
            node = parsed(own).body[0]
            found[name] = located(path.name, node, own.split("\n"), line)
        except SyntaxError as fault:
            error = f"{path.name}, line {line - 1 + (fault.lineno or 1)}: {fault.msg}"
            found[name] = Place(path.name, line, line, line, [], "", "", error)
    return found

def places(name):
    """Where an exercise is, in the scripts' order -> list of Place."""
    return [held[name] for held in map(exercises_in, SCRIPTS) if name in held]

def not_python(path):
    """Why a script cannot be read; empty if it can."""
    try:
        functions(read(path))
    except SyntaxError as fault:
        return f"{path.name}, line {fault.lineno}: {fault.msg}"
    return ""

def judged_in(name):
    """The script that an exercise is judged in, the first with a body, or None; and why not."""
    held = places(name)
    for place in held:
        if place.body:
            fault = not_python(ROOT / place.script)
            return (None, f"{name} cannot be judged: {fault}") if fault else (Path(place.script).stem, "")
    faults = [place.error for place in held if place.error]
    if faults:
        return None, f"{name} cannot be read: {faults[0]}"
    where = ", ".join(f"{place.script}:{place.line}" for place in held)
    return None, f"NotImplementedError: {name} is an exercise, and not written yet: {where}"

def with_bodies(text, bodies):
    """A script's text, which is Python, in which exercises have other bodies, name: body."""
    lines, found = text.split("\n"), functions(text)
    for name in sorted(bodies, key=lambda name: -found[name].lineno):                  # from the end: lines stay put
        own = located("", found[name], lines, found[name].lineno)
        lines[own.begin:own.end] = with_indent(bodies[name], lines[own.line - 1])
    return "\n".join(lines)

def taken_out(root):
    """The exercises that were taken out of the project in the folder `root`, in their order; none if it is no handout."""
    path = Path(root) / "handout.json"
    gone = json.loads(read(path)) if path.exists() else []
    return [name for name in EXERCISES if name in gone]

def for_students(readme):
    """The README without what it says for teachers."""
    return re.sub(r"^### For teachers\n.*?(?=^## )", "", readme, flags=re.MULTILINE | re.DOTALL)

def hand_out(out, names):
    """Copy the project into the folder `out`, without the bodies of the exercises `names`. Stop if it is not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Stop(f"{out} is there already: choose a folder that is new or empty")
    for path in sorted(path for pattern in COPIED for path in ROOT.glob(pattern)):
        copy = out / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        if path in SCRIPTS:
            text = with_bodies(read(path), {name: stub(name) for name in exercises_in(path) if name in names})
            copy.write_text(text, encoding="utf-8", newline="\n")
    (out / "README.md").write_text(for_students(read(ROOT / "README.md")), encoding="utf-8", newline="\n")
    content = {name: [place.script for place in places(name)] for name in names}
    (out / "handout.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

def state(name):
    """In a handout: how far an exercise is, in words."""
    held = places(name)
    written = [place.script for place in held if place.body]
    if faults := [place.error for place in held if place.error]:
        return f"cannot be read: {faults[0]}"
    if not written:
        return "to do"
    if len({place.body for place in held if place.body}) > 1:
        return f"differs between {', '.join(written)}"
    rest = [place.script for place in held if not place.body]
    return f"written in {written[0]}; --copy {name} puts it into {', '.join(rest)}" if rest else "written"

def print_list(names):
    missing = taken_out(ROOT)
    for name in names or missing or EXERCISES:
        e, held = EXERCISES[name], places(name)
        line = (held[0].docstring or "").split("\n")[0]
        print(f"{name:27}{'*' * e.level:4}{e.minutes:3} min  {', '.join(place.script for place in held)}\n"
              f"    {line}\n" + "".join(f"    {word}: {text}\n" for word, text in
              (("equation", e.source), ("builds on", e.needs), ("state", state(name) if missing else "")) if text), end="")

def copy_body(name):
    """Put the body that is written in one script into the others that hold the exercise."""
    held = places(name)
    bodies = {place.body: place.script for place in held if place.body}
    if len(bodies) != 1:
        raise Stop(f"{name} is written in no script yet" if not bodies else f"{name} differs between "
                   f"{', '.join(bodies.values())}: make one of them a stub again ({stub(name)}), or edit them")
    [(body, source)] = bodies.items()
    for place in held:
        path = ROOT / place.script
        if not place.body and (fault := not_python(path)):
            raise Stop(f"{name} cannot be put into {fault}")
        if not place.body:
            path.write_text(with_bodies(read(path), {name: body}), encoding="utf-8", newline="\n")
            print(f"{name}: from {source} to {place.script}")

def main(argv=None):
    """The command line. Returns the exit status: 0; 2 for what one sentence explains."""
    parser = argparse.ArgumentParser(prog="python tests/assignment.py", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="exercises; none: all")
    parser.add_argument("--out", type=Path, help="the folder of the handout, or of the marks, new or empty")
    parser.add_argument("--list", action="store_true", help="print the exercises, in a handout with their state")
    parser.add_argument("--copy", action="store_true", help="in a handout: copy NAME to the other scripts that hold it")
    parser.add_argument("--mark", type=Path, metavar="SUBMISSIONS", help="a folder that holds a folder a student")
    parser.add_argument("--points", type=Path, help="--mark: a csv file of exercise,points; without: the levels 1 to 3")
    parser.add_argument("--seconds", type=int, default=60, help="--mark: the time that an exercise may take [60]")
    given = parser.parse_args(argv)
    try:
        for name in given.names:
            if name not in EXERCISES:
                raise Stop(f"there is no exercise '{name}': choose of {', '.join(EXERCISES)}")
        if given.list:
            print_list(given.names)
        elif given.copy:
            if not given.names:
                raise Stop("say which: --copy NAME")
            for name in given.names:
                copy_body(name)
        elif taken_out(ROOT):
            raise Stop(f"{ROOT} is a handout itself: use the project that it was made from")
        elif not given.out:
            raise Stop("say with --out where the result shall lie, or ask for --list")
        elif given.mark:
            from marking import mark
            mark(given.mark, given.points, given.names, given.out, max(1, min(3600, given.seconds)))
        else:
            names = given.names or list(EXERCISES)
            hand_out(given.out, names)
            print(f"{given.out}: {len(names)} exercises, listed in handout.json; one is judged by: "
                  f"python -m pytest {given.out / 'tests'} -k {names[0]}")
        return 0
    except (Stop, OSError) as error:
        print(f"assignment: {error}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    from assignment import main                                     # the module whose Stop marking.py raises
    sys.exit(main())
