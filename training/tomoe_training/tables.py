"""Tables on standard error. (Standard output is for JSON.)"""

from rich.console import Console
from rich.table import Table

_TITLES = {"checkpoint": "ToMoE checkpoint", "adapter": "ToMoE adapter"}


def _text(value) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
        return f"{min(value)} to {max(value)}, mean {sum(value) / len(value):.1f}"
    if isinstance(value, dict):
        return "\n".join(f"{k.replace('_', ' ')}: {_text(v)}" for k, v in value.items())
    return str(value)


def print_facts(facts: dict) -> None:
    """Print the facts of ``tomoe inspect`` as a table of two columns."""
    table = Table(title=_TITLES.get(facts["kind"], facts["kind"]), show_header=False)
    for name, value in facts.items():
        if name != "kind":
            table.add_row(name.replace("_", " "), _text(value))
    Console(stderr=True).print(table)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print rows of text as a table."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console(stderr=True).print(table)
