"""The job `data`: what the model is about to read, and what it has read so far."""

import rich.console
import rich.markup
import rich.table


def table(title: str, rows: list[dict]) -> rich.table.Table:
    """A table of plain dicts with the same keys."""
    shown = rich.table.Table(title=title, title_justify="left")
    for key in rows[0]:
        shown.add_column(key, justify="right" if key != "source" else "left")
    for row in rows:
        shown.add_row(*(f"{value:,.4f}" if isinstance(value, float) else _plain(value) for value in row.values()))
    return shown


def _plain(value) -> str:
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
        table(f"Training sources; epochs of all {experiment.steps} steps", batches.describe(experiment.steps))
    )
    if experiment.data.validation is not None:
        validation = experiment.data.open_validation(
            sequence_length=experiment.sequence_length, batch_size=experiment.batch_size
        )
        console.print(table("Validation sources", validation.describe()))
    given = [{"source": name} | values for name, values in batches.accounting(step).items()]
    console.print(table(f"Given before step {step}; asked and realised share of rows", given))
    for piece, text in zip(batches.documents(step), batches.text(step)):
        if piece.row < rows:
            where = f"row {piece.row}: {piece.source} {piece.document}, tokens {piece.offset} to "
            console.rule(rich.markup.escape(f"{where}{piece.offset + piece.length}"), align="left")
            console.print(text, markup=False, highlight=False)
    if verify:
        print(f"{experiment.data.verify(sequence_length=experiment.sequence_length)} shards match their checksums")
