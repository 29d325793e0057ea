"""Puts the scripts where tests can import them, and knows which tests judge which exercise (assignment.py)."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assignment import EXERCISES, places  # noqa: E402


def asked_for(config):
    """The exercises in -k NAME or -k "NAME or NAME"; none if -k asks for anything else."""
    asked = set(config.option.keyword.split(" or "))
    return asked if asked <= set(EXERCISES) else set()


def pytest_ignore_collect(collection_path, config):
    """Files that judge none of the exercises asked for are not read: what is half written elsewhere does not matter."""
    asked, file = asked_for(config), collection_path.name
    if asked and file.startswith("test_") and file != "test_same_text.py":
        text = collection_path.read_text(encoding="utf-8")
        return None if any(f"def {test}(" in text for name in asked for test in EXERCISES[name][1:]) else True


def judged_by(item):
    """The exercises that a test judges: by the table, or because it runs once for each `exercise`."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    name = getattr(item, "originalname", item.name)
    return [exercise for exercise, (_, *tests) in EXERCISES.items()
            if name in tests or params.get("exercise") == exercise]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """-k with the names of exercises runs the tests that judge them, and not all whose names are alike."""
    for item in items:
        item.extra_keyword_matches.update(judged_by(item))
    if asked := asked_for(config):
        config.hook.pytest_deselected(items=[item for item in items if not asked & set(judged_by(item))])
        items[:] = [item for item in items if asked & set(judged_by(item))]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that judges an exercise and fails says where it is and what to look at."""
    report = yield
    for name in judged_by(item) if report.failed else ():
        where = ", ".join(f"{script}:{line}" for script, line, _ in places().get(name, ()))
        report.sections.append((f"exercise {name}, {where}", f"look at: {EXERCISES[name][0]}"))
    return report
