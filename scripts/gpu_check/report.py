"""What was found: steps with tables, written as Markdown and CSV. Names of hosts and paths are taken out."""

import csv
import dataclasses
import os
import pathlib
import re
import socket

from .process import ROOT

PASSED, FAILED, NOT_RUN = "passed", "FAILED", "NOT RUN"
EXCERPT_LINES = 40
EXCERPT_LINE = 400  # characters


@dataclasses.dataclass
class Table:
    """Rows under a heading. With `file`, also `FILE.csv`, where tables of the same columns share a file."""

    title: str
    columns: list[str]
    rows: list[list] = dataclasses.field(default_factory=list)
    file: str | None = None


@dataclasses.dataclass
class Step:
    """One step. `correctness`: whether the exit status depends on it."""

    name: str
    title: str
    correctness: bool
    status: str = NOT_RUN
    summary: str = "not reached"
    seconds: float = 0.0
    tables: list[Table] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    excerpts: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def passed(self, summary: str) -> None:
        self.status, self.summary = PASSED, summary

    def failed(self, summary: str) -> None:
        self.status, self.summary = FAILED, summary

    def not_run(self, why: str) -> None:
        self.status, self.summary = NOT_RUN, why

    def table(self, title: str, columns: list[str], file: str | None = None) -> Table:
        self.tables.append(Table(title, columns, file=file))
        return self.tables[-1]

    def excerpt(self, title: str, text: str) -> None:
        """The end of an output, for whoever has to find out why."""
        lines = [line[:EXCERPT_LINE] for line in text.strip().splitlines()[-EXCERPT_LINES:]]
        self.excerpts.append((title, "\n".join(lines)))


@dataclasses.dataclass
class Report:
    """All steps, and what stands above them."""

    folder: pathlib.Path
    heading: str = ""
    head: list[str] = dataclasses.field(default_factory=list)
    steps: list[Step] = dataclasses.field(default_factory=list)
    extra: list[Table] = dataclasses.field(default_factory=list)  # as CSV only

    def write(self) -> None:
        """Everything known so far; called after each step, so that a killed run leaves it too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace(self.folder / "report.md", anonymous(self.markdown()))
        for name in {table.file for table in self.tables() if table.file}:
            self.write_csv(name)

    def tables(self) -> list[Table]:
        return [table for step in self.steps for table in step.tables] + self.extra

    def log(self, title: str, text: str) -> None:
        """The whole output of a command, beside the report."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
            file.write(anonymous(f"==== {title}\n{text.rstrip()}\n\n"))

    def write_csv(self, name: str) -> None:
        tables = [table for table in self.tables() if table.file == name]
        columns = list(dict.fromkeys(column for table in tables for column in table.columns))
        temporary = self.folder / f".{name}.csv"
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for table in tables:
                for row in table.rows:
                    cells = dict(zip(table.columns, row))
                    writer.writerow({key: anonymous(number(value, 6)) for key, value in cells.items()})
        os.replace(temporary, self.folder / f"{name}.csv")

    def markdown(self) -> str:
        out = [f"# {self.heading}", "", *self.head, "", "| step | result | | s |", "|---|---|---|---|"]
        for i, step in enumerate(self.steps):
            out.append(f"| {i}. {cell(step.title)} | {step.status} | {cell(step.summary)} | {step.seconds:.0f} |")
        for i, step in enumerate(self.steps):
            out += ["", f"## {i}. {step.title}: {step.status}", "", step.summary]
            out += [line for note in step.notes for line in ("", note)]
            for table in step.tables:
                out += ["", f"**{table.title}**" if table.title else "", ""]
                out.append(f"| {' | '.join(table.columns)} |")
                out.append(f"|{'---|' * len(table.columns)}")
                out += [f"| {' | '.join(cell(number(value, 4)) for value in row)} |" for row in table.rows]
            for title, text in step.excerpts:
                out += ["", f"{title}:", "", "```text", text.replace("```", "'''"), "```"]
        return "\n".join(out) + "\n"


def replace(path: pathlib.Path, text: str) -> None:
    """Never half a file."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def number(value, digits: int) -> str:
    """`None` is an empty cell."""
    if value is None:
        return ""
    if isinstance(value, float):
        text = f"{value:.{digits}g}"
        return f"{value:.0f}" if "e+" in text and abs(value) < 1e9 else text
    return str(value)


def cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


PATH = re.compile(r"(?<![\w./:~-])(?:/[\w.+@~-]+){2,}/?")
ROUTES = ("/v1/", "/health/", "/demo/")


def anonymous(text: str) -> str:
    """Without absolute paths (their last part stays) and without the machine's names."""

    def last_part(found: re.Match) -> str:
        path = found[0]
        return path if path.startswith(ROUTES) else f"…/{path.rstrip('/').rsplit('/', 1)[1]}"

    text = PATH.sub(last_part, text.replace(f"{ROOT}/", ""))
    for name in {socket.gethostname(), socket.gethostname().split(".")[0], os.uname().nodename}:
        if len(name) > 3 and name != "localhost":
            text = re.sub(rf"\b{re.escape(name)}\b", "HOST", text)
    return text
