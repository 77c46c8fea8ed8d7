"""`python dataset.py CONFIG`: report on a dataset before training."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import track

from cli import Overrides, fail, plain_console
from config import load_config
from sources import find_images, report

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def report_on_images(
    context: typer.Context,  # its `obj` returns `dataset.load_images`
    config_file: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/cifar10.yml.")
    ],
    overrides: Overrides = None,
    contact_sheet: Annotated[
        Path | None, typer.Option(help="Where the PNG goes. Default: samples/CONFIG-data.png.")
    ] = None,
) -> None:
    """
    Look at a config's images before training: what they are and what becomes of them.

    Counts, sizes, kinds, unreadable files, copies, the split, the values and the classes; 64 of
    them as training sees them, as a PNG; and what had better change. Whatever is missing is
    downloaded and decoded, as training would.

    Examples:

    \b
      python dataset.py configs/cifar10.yml
      python dataset.py configs/folder.yml dataset.root=mine dataset.image_size=32
    """
    console = plain_console()
    hidden = not console.is_terminal
    bar = partial(track, description="Headers", console=console, transient=True, disable=hidden)
    sheet = contact_sheet or Path("samples", f"{config_file.stem}-data.png")

    def show(sections: dict[str, list[str]]) -> None:
        for label, lines in sections.items():
            for i, line in enumerate(lines):
                console.print(f"{label * (i == 0):<8}{line}")

    def read(images: Any) -> report.Values:
        starts = bar(range(0, len(images), 256), description="Reading images")
        rows = (list(range(len(images))[start : start + 256]) for start in starts)
        return report.read_values(images[r].images.numpy() for r in rows)

    try:
        if sheet.suffix.lower() != ".png":
            raise ValueError(f"--contact-sheet {sheet} must end in .png")
        if sheet.exists() and not report.is_contact_sheet(sheet):
            raise ValueError(f"{sheet} is another image; choose another --contact-sheet")
        config = load_config(config_file, overrides or ())
        data = config.dataset
        sources = find_images(data.name, Path(data.root), data.split)
        headers = report.read_headers(sources.values(), progress=bar)
        show(report.summarize_headers(config, headers))
        keys = data.model_dump(exclude={"random_flip"})
        parts = context.obj()(**keys, progress=partial(bar, description="Decoding images"))
        train, values, validation = parts["train"], *map(read, parts.values())
        names = [
            sources.get(k, sources["train"]).names[i] for k, p in parts.items() for i in p.rows
        ]
        show(report.summarize_values(config, values, validation.digests, names))
        classes = Counter(train.count_classes())
        show(report.summarize_classes(classes))
        some = np.linspace(0, len(train) - 1, min(64, len(train))).astype(int)
        report.write_contact_sheet(train[some].images.numpy(), sheet)
        show({"sheet": [str(sheet)]})
        advice = list(report.advise(config, headers, values, validation.digests, classes))
        title = "what may want changing:" if advice else "nothing to change"
        console.print("\n  * ".join([f"\n{title}", *advice]))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Exception as error:
        raise typer.Exit(fail(error)) from None
