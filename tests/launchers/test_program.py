"""A failed job fails the command, and the others go on."""

import subprocess
import sys

import pytest
from hydra.errors import CompactHydraException

from launchers.program import Program
from merging.errors import UserError


def raising(error):
    def job():
        raise error

    return job


def test_failures_are_counted_and_told_as_one_paragraph(caplog):
    program, answers = Program("duet"), []

    def command():
        answers.append(program.attempt(raising(UserError("No such file. Name one."))))
        answers.append(program.attempt(raising(ZeroDivisionError("nothing to merge by"))))
        answers.append(program.attempt(lambda: 3))

    assert program.run(command) == 1 and answers == [None, None, 3] and program.failed == 2
    readable, unreadable = caplog.records
    assert readable.getMessage() == "No such file. Name one." and not readable.exc_info and unreadable.exc_info


def test_a_reader_that_has_enough_is_no_failure():
    script = "import os; from launchers.program import Program; p = Program('duet')\n" \
             "raise SystemExit(p.run(lambda: [print('x' * 80) for _ in range(10_000)]))"  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (0, b"")


def test_a_job_in_another_process_raises_its_failure_again():
    program = Program("duet", process=-1)
    with pytest.raises(CompactHydraException, match="No such file"):
        program.attempt(raising(UserError("No such file.")))
    with pytest.raises(ZeroDivisionError):
        program.attempt(raising(ZeroDivisionError()))
    assert program.failed == 0


def test_an_interrupt_says_how_to_go_on(capsys):
    assert Program("duet", "Go on.").run(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "\nInterrupted. Go on.\n"


def test_a_refused_command_line_is_answered(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["duet", "sede=1"])
    with pytest.raises(SystemExit):
        Program("duet").run(raising(SystemExit(1)), lambda words: f"{words[0]}? Did you mean seed?")
    assert capsys.readouterr().err == "sede=1? Did you mean seed?\n"
