"""Failpoints: what a rule may say, what is done at a failpoint, and that each name stands at one place in the code."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import lmpipe
from lmpipe import failpoints
from lmpipe import messages as m
from lmpipe.failpoints import POINTS, VARIABLE, Control, Fired, Rule, actions, parse

WORKER_POINT = "persist.save.held"


def run(rules: str, code: str) -> subprocess.CompletedProcess[str]:
    """Python with failpoints from its start."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", f"from lmpipe import failpoints as f, messages as m\n{code}"],
        env={VARIABLE: rules},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_this_process_was_started_without_and_so_nothing_can_happen() -> None:
    assert not failpoints.on
    failpoints.hit("no such name: nobody looks")
    assert failpoints.carry("gather.up", m.Ping(m.SessionId(1), 1), lambda: True)


def test_each_failpoint_stands_at_one_place() -> None:
    found: Counter[str] = Counter()
    for path in Path(lmpipe.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "failpoints.hit":
                found.update(c.value for c in ast.walk(node.args[0]) if isinstance(c, ast.Constant))
    assert found == Counter(name for name in POINTS if name not in failpoints.MESSAGES)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("persist.save.helt=kill", 'no failpoint "persist.save.helt"; did you mean "persist.save.held"?'),
        ("persist.save.held=kil", 'no action "kil"; did you mean "kill"?'),
        ("persist.save.held=drop", "possible are kill, stop, sleep, error"),
        ("persist.save.held=error:EIOO", '"EIOO" is no error number; did you mean "EIO"?'),
        ("producer.lookup.held=error:EIO", "possible are kill, stop, sleep"),
        ("gather.up.Saved=error:EIO", "possible are kill, stop, sleep, drop, twice, late"),
        ("persist.save.held", "is not NAME=ACTION"),
        ("persist.save.held=sleep", "could not convert"),
    ],
)
def test_a_wrong_rule_is_refused_with_what_is_right(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        parse(text)
    assert said in str(error.value)
    with pytest.raises(ValueError):
        Control(tmp_path / "rules").arm(text)


def test_a_process_does_not_start_with_a_wrong_rule() -> None:
    done = run("persist.save.helt=kill", "print('started')")
    assert (done.returncode, done.stdout) == (1, "")
    assert 'did you mean "persist.save.held"?' in done.stderr


def test_rules_count_and_draw() -> None:
    rule = Rule.parse(f"{WORKER_POINT}=sleep:0.5@3")
    assert [rule.is_due() for _ in range(5)] == [False, False, True, True, True]
    drawn = [Rule.parse(f"{WORKER_POINT}=kill%0.5/7") for _ in range(2)]
    first, second = ([rule.is_due() for _ in range(100)] for rule in drawn)
    assert first == second, "the seed decides"
    assert 20 < sum(first) < 80
    two = parse(f"# a comment\n{WORKER_POINT}=kill; ssd.read.begun=error:EIO*2\n")
    assert [(rule.action, rule.argument, rule.most) for rule in two.values()] == [("kill", "", 0), ("error", "EIO", 2)]


def test_every_failpoint_has_actions_and_a_text() -> None:
    assert all(POINTS.values())
    assert all({"kill", "stop"} <= set(actions(name)) for name in POINTS)


def test_a_process_dies_where_it_is_told_to() -> None:
    done = run(f"{WORKER_POINT}=kill@2", f"f.hit({WORKER_POINT!r}); print('once', flush=True); f.hit({WORKER_POINT!r})")
    assert (done.returncode, done.stdout) == (-9, "once\n")


def test_an_error_is_thrown_as_often_as_is_said() -> None:
    code = f"""
for _ in range(3):
    try:
        f.hit({WORKER_POINT!r})
    except OSError as error:
        print(error.errno)
"""
    assert run(f"{WORKER_POINT}=error:ENOSPC*2", code).stdout == "28\n28\n"


def test_messages_are_lost_doubled_and_late() -> None:
    code = """
import time
sent = []
def say(number):
    return f.carry('gather.up', m.Invalidated(m.SessionId(1), number, 0), lambda: sent.append(number) or True)
assert all(say(number) for number in range(4))
f.deliver()
print(sent)
while len(sent) < 5 and SENT_LATE:
    time.sleep(0.01)
    f.deliver()
print(sent)
"""
    name = "gather.up.Invalidated"
    assert run(f"{name}=drop@2*2", code.replace("SENT_LATE", "False")).stdout == "[0, 3]\n" * 2
    assert run(f"{name}=twice@4", code.replace("SENT_LATE", "False")).stdout == "[0, 1, 2, 3, 3]\n" * 2
    assert run(f"{name}=late:0.3*1", code.replace("< 5", "< 4").replace("SENT_LATE", "True")).stdout == (
        "[1, 2, 3]\n[1, 2, 3, 0]\n"
    )


def test_a_file_of_rules_is_obeyed_when_it_changes_and_says_what_was_done(tmp_path: Path) -> None:
    control = Control(tmp_path / "rules")
    code = f"""
import sys
for _ in sys.stdin:
    try:
        f.hit({WORKER_POINT!r})
        print("nothing", flush=True)
    except OSError:
        print("failed", flush=True)
"""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", f"from lmpipe import failpoints as f\n{code}"],
            env={VARIABLE: str(control.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]

    def hit(process: subprocess.Popen[str]) -> str:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    assert hit(started[0]) == "nothing", "there is no file yet"
    control.arm(f"{WORKER_POINT}=error:EIO*1")
    assert [hit(process) for process in (*started, *started)] == ["failed", "nothing", "nothing", "nothing"]
    assert control.fired() == [Fired(WORKER_POINT, "error", started[0].pid)]
    control.clear()
    assert control.fired() == []
    control.arm(f"{WORKER_POINT}=error:EIO")
    assert [hit(process) for process in started] == ["failed"] * 2
    control.clear()
    assert hit(started[1]) == "nothing"
    for process in started:
        process.communicate(timeout=60)
