"""The job `data`: what the model is about to read, and what it has read so far."""

import rich.console
import rich.markup
import rich.table

_SOURCES_A_TABLE = 5  # a column each: what 80 characters hold


def tables(title: str, rows: list[dict]) -> list[rich.table.Table]:
    """Tables of plain dicts with the same keys, a column for each dict, named by its 'source'."""
    shown = []
    for start in range(0, len(rows), _SOURCES_A_TABLE):
        some = rows[start : start + _SOURCES_A_TABLE]
        shown.append(rich.table.Table("", title=title, title_justify="left"))
        for row in some:
            shown[-1].add_column(_plain(row["source"]), justify="right", overflow="fold")
        for key in some[0]:
            if key != "source":
                shown[-1].add_row(key, *(_plain(row[key]) for row in some))
    return shown


def _plain(value) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}"
    return f"{value:,}" if isinstance(value, int) else rich.markup.escape(str(value))


def data(experiment, run, *, step: int = 0, rows: int = 4, verify: bool = False) -> None:
    """Show the data of an experiment: its sources, what they have given before a step, and that step's documents.

    step: the step whose batch is shown. rows: how many of its rows. verify: also read all layers against their
    checksums.
    """
    console = rich.console.Console()
    batches = experiment.data.train(
        sequence_length=experiment.sequence_length, batch_size=experiment.batch_size, seed=experiment.seed
    )
    console.print(
        *tables(f"Training sources; epochs of all {experiment.steps} steps", batches.describe(experiment.steps))
    )
    if experiment.data.validation is not None:
        validation = experiment.data.open_validation(
            sequence_length=experiment.sequence_length, batch_size=experiment.batch_size
        )
        console.print(*tables("Validation sources", validation.describe()))
    given = [{"source": name} | values for name, values in batches.accounting(step).items()]
    console.print(*tables(f"Given before step {step}; asked and realised share of rows", given))
    for piece, text in zip(batches.documents(step), batches.text(step)):
        if piece.row < rows:
            where = f"row {piece.row}: {piece.source} {piece.document}, tokens {piece.offset} to "
            console.rule(rich.markup.escape(f"{where}{piece.offset + piece.length}"), align="left")
            console.print(text, markup=False, highlight=False)
    if verify:
        print(f"{experiment.data.verify(sequence_length=experiment.sequence_length)} shards match their checksums")
