"""Runs the commands that `cartouche serve` prints, as a newcomer would paste them.

Usage: printed_commands.py FILE, where FILE holds the server's standard output.
"""

import json
import pathlib
import re
import subprocess
import sys

DEMO = pathlib.Path(__file__).resolve().parents[2] / "assets/demo/documents/harbour-log"


def main() -> None:
    text = pathlib.Path(sys.argv[1]).read_text()
    commands = re.findall(r"^\d\. .*?\n((?:   .*\n)+)", text, re.MULTILINE)
    assert len(commands) == 3, f"{len(commands)} commands in:\n{text}"
    questions = json.loads((DEMO / "questions.json").read_text())
    right = next(q["answer"] for q in questions["questions"] if q["question"] in commands[0])
    wanted = [questions["refusal"], right, right]
    prompt_tokens = []
    for command, want in zip(commands, wanted):
        run = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
        reply = json.loads(run.stdout)
        answer = reply["choices"][0]["message"]["content"]
        assert answer == want, f"{command}\ngave {answer!r}, not {want!r}"
        prompt_tokens.append(reply["usage"]["prompt_tokens"])
    plain, long_context, cartridge = prompt_tokens
    assert plain == cartridge < 25 and long_context > 800, prompt_tokens
    print(f"printed commands: answers as promised, prompt tokens {prompt_tokens}")


if __name__ == "__main__":
    main()
