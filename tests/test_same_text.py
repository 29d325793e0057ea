"""The scripts share no code but the same text, so that a diff of two of them shows the method."""
import ast
import functools
import re

import pytest

from assignment import SCRIPTS

METHOD_ONLY = {"Config", "main"}
PAIRS = [(a, b) for i, a in enumerate(SCRIPTS) for b in SCRIPTS[i + 1:]]

@functools.cache
def blocks(text):
    """Top-level functions, classes and capitalised constants: name -> source, decorators included."""
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        names = []
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n.id.isupper()]
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        found.update(dict.fromkeys(names, "\n".join(lines[first - 1:node.end_lineno])))
    return found

def banners(path):
    return re.findall(r"^# ---- (.+?) -+$", path.read_text(encoding="utf-8"), re.MULTILINE)

@pytest.mark.parametrize("a, b", PAIRS, ids=lambda path: path.stem)
def test_blocks_of_one_name_have_one_text(a, b):
    one, other = (blocks(path.read_text(encoding="utf-8")) for path in (a, b))
    shared = set(one) & set(other) - METHOD_ONLY
    assert len(shared) > 60, "scripts of one family"
    differ = sorted(name for name in shared if one[name] != other[name])
    assert not differ, f"{', '.join(differ)}: give one text in both scripts, or another name where the method differs"

@pytest.mark.parametrize("a, b", PAIRS, ids=lambda path: path.stem)
def test_shared_sections_come_in_one_order(a, b):
    one, other = banners(a), banners(b)
    assert [name for name in one if name in other] == [name for name in other if name in one]
    assert any("you can stop reading here" in name for name in one)

@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_no_script_imports_another(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in imported} & {p.stem for p in SCRIPTS}

def test_blocks_finds_what_it_should():
    found = blocks("A, B = 1, 2\nc = 3\n@d\ndef f():\n    pass\n\nclass G:\n    x = 1\n")
    assert found == {"A": "A, B = 1, 2", "B": "A, B = 1, 2", "f": "@d\ndef f():\n    pass", "G": "class G:\n    x = 1"}
