"""Completion: a shell runs the script that `ysnake completion` prints."""

import shutil
import subprocess

import pytest
from small import entry

from ysnake import __main__ as front
from ysnake import completion

TYPED = {
    "ysnake tr": {"train"},
    "ysnake train --pre": {"--precision", "--preset"},
    "ysnake train --init ": {"hippo", "uniform"},
    "ysnake run --checkpoint ": {"best", "last"},
    "ysnake generate-data --co": {"--count"},
    "ysnake ": {*front.COMMANDS, "-h", "--help"},
}
# what bash does when TAB is pressed at the end of a line
IN_BASH = """
source "$1"; shift
for line in "$@"; do
    read -ra COMP_WORDS <<< "$line"
    [[ $line == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )) COMPREPLY=()
    _tyro_ysnake
    echo "${COMPREPLY[*]}"
done
complete -p ysnake
"""


def script(folder, shell):
    code, out, errors = entry(completion.main, shell)
    assert code == 0, errors
    path = folder / f"ysnake.{shell}"
    path.write_text(out)
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_commands_options_and_values(tmp_path):
    command = ["bash", "-c", IN_BASH, "bash", script(tmp_path, "bash"), *TYPED]
    done = subprocess.run(command, capture_output=True, text=True)
    *completed, registered = done.stdout.splitlines()
    assert [set(line.split()) for line in completed] == list(TYPED.values()), done.stderr
    assert "-o default" in registered  # names of files where nothing else fits


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes_commands_and_options(tmp_path):
    path = script(tmp_path, "fish")
    for typed, expected in list(TYPED.items())[:2]:
        command = ["fish", "-c", f"source {path}; complete -C '{typed}'"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert {line.split("\t")[0] for line in done.stdout.splitlines()} == expected


def test_the_script_for_zsh(tmp_path):
    path = script(tmp_path, "zsh")
    assert path.read_text().startswith("#compdef ysnake\n")
    if shutil.which("zsh"):
        assert subprocess.run(["zsh", "-n", path]).returncode == 0
